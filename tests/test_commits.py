"""The commit thread shares commits fairly, and the write lock tells who holds it and ends a stuck worker."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from mcp_flow import commits
from mcp_flow.commits import CommitThread, WriteLock
from mcp_flow.errors import FlowError, StoreError


class Table:
    """A database of one table, counting its commits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = 0
        self.fail_at_commit: Exception | None = None

    def open(self) -> None:
        self.conn = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self.conn.execute("CREATE TABLE IF NOT EXISTS seen (word TEXT UNIQUE)")

    def close(self) -> None:
        self.conn.close()

    def begin(self) -> None:
        self.conn.execute("BEGIN IMMEDIATE")

    def begin_body(self) -> None:
        self.changes = self.conn.total_changes

    def undo_body(self) -> bool:
        return self.conn.total_changes == self.changes

    def commit(self) -> None:
        if self.fail_at_commit:
            raise self.fail_at_commit
        self.conn.execute("COMMIT")
        self.commits += 1

    def rollback(self) -> None:
        if self.conn.in_transaction:
            self.conn.execute("ROLLBACK")

    def add(self, word: str, error: Exception | None = None) -> Callable[[], str]:
        def body() -> str:
            self.conn.execute("INSERT INTO seen VALUES (?)", (word,))
            if error:
                raise error
            return word

        return body

    def words(self) -> list[str]:
        return [word for (word,) in self.conn.execute("SELECT word FROM seen ORDER BY rowid")]


def explain(error: sqlite3.Error) -> StoreError:
    return StoreError(f"explained: {error}")


class Opened:
    """A commit thread on a fresh table; `hold` keeps it busy, so that what follows falls into one batch."""

    def __init__(self, folder: Path) -> None:
        self.table = Table(folder / "t.db")
        self.thread = CommitThread(self.table, WriteLock(folder / "write.lock", "test"), explain)

    async def __aenter__(self) -> Opened:
        await self.thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.thread.stop()

    async def in_one_batch(self, *bodies: Callable[[], object]) -> list[object]:
        """The results or errors of writes that were all queued before the first could be taken."""
        busy, go = threading.Event(), threading.Event()

        def hold() -> None:
            busy.set()
            go.wait(5)

        holding = asyncio.ensure_future(self.thread.read(hold))
        await asyncio.to_thread(busy.wait, 5)
        writes = [asyncio.ensure_future(self.thread.write(body)) for body in bodies]
        await asyncio.sleep(0)
        go.set()
        await holding
        return list(await asyncio.gather(*writes, return_exceptions=True))


async def test_writes_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    async with Opened(tmp_path) as opened:
        before = opened.table.commits
        words = [f"w{i}" for i in range(100)]
        assert await opened.in_one_batch(*(opened.table.add(word) for word in words)) == words
        assert opened.table.commits - before == 1
        assert await opened.thread.read(opened.table.words) == words


async def test_a_write_that_fails_is_undone_alone(tmp_path: Path) -> None:
    class Refused(FlowError):
        pass

    async with Opened(tmp_path) as opened:
        add = opened.table.add
        one, bad, same, two = await opened.in_one_batch(add("one"), add("bad", Refused("no")), add("one"), add("two"))
        assert (one, two) == ("one", "two")
        assert isinstance(bad, Refused)
        assert isinstance(same, StoreError)
        assert "explained: UNIQUE" in str(same)
        assert await opened.thread.read(opened.table.words) == ["one", "two"]


async def test_a_commit_that_fails_undoes_the_batch_and_tells_everyone_in_it(tmp_path: Path) -> None:
    async with Opened(tmp_path) as opened:
        opened.table.fail_at_commit = sqlite3.OperationalError("database or disk is full")
        results = await opened.in_one_batch(opened.table.add("one"), opened.table.add("two"))
        assert [str(result) for result in results] == ["explained: database or disk is full"] * 2
        opened.table.fail_at_commit = None
        assert await opened.thread.write(opened.table.add("three")) == "three"
        assert await opened.thread.read(opened.table.words) == ["three"]


async def test_jobs_happen_in_the_order_that_they_were_asked_for(tmp_path: Path) -> None:
    async with Opened(tmp_path) as opened:
        first = asyncio.ensure_future(opened.thread.write(opened.table.add("a")))
        seen = asyncio.ensure_future(opened.thread.read(opened.table.words))
        second = asyncio.ensure_future(opened.thread.write(opened.table.add("b")))
        await asyncio.gather(first, seen, second)
        assert seen.result() == ["a"]


async def test_a_write_that_nobody_waits_for_any_more_happens_all_the_same(tmp_path: Path) -> None:
    async with Opened(tmp_path) as opened:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await opened.thread.write(opened.table.add("left"))
        assert await opened.thread.read(opened.table.words) == ["left"]


async def test_a_write_from_another_thread_is_queued_without_waiting(tmp_path: Path) -> None:
    async with Opened(tmp_path) as opened:
        thread = threading.Thread(target=opened.thread.write_soon, args=(opened.table.add("soon"),))
        thread.start()
        await asyncio.to_thread(thread.join, 5)
        assert await opened.thread.read(opened.table.words) == ["soon"]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mcp-flow store"]


async def test_stopping_ends_the_thread_even_when_the_stopping_is_cancelled(tmp_path: Path) -> None:
    with anyio.CancelScope() as scope:
        async with Opened(tmp_path) as opened:
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert threads() == []
    with pytest.raises(sqlite3.ProgrammingError):
        opened.table.words()


async def test_a_database_that_does_not_open_leaves_no_thread_behind(tmp_path: Path) -> None:
    (tmp_path / "t.db").mkdir()
    with pytest.raises(StoreError, match="unable to open"):
        await Opened(tmp_path).thread.start()
    for thread in threads():
        await asyncio.to_thread(thread.join, 5)
    assert threads() == []


HOLDER = """
import os, sys, signal
from pathlib import Path
from mcp_flow.commits import WriteLock
with WriteLock(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path, role: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), role],
        env=os.environ | {"PYTHONPATH": str(Path(commits.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "held\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()


def test_a_worker_that_holds_the_lock_too_long_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.1)
    holder = start_holder(tmp_path / "write.lock", "worker")
    try:
        lock = WriteLock(tmp_path / "write.lock", "test")
        with lock:
            assert (tmp_path / "write.lock").read_text().split() == [str(os.getpid()), "test"]
        lock.close()
        assert holder.wait(5) == -9
    finally:
        end(holder)


@pytest.mark.parametrize("role", ["server", "command"])
def test_anyone_else_who_holds_the_lock_too_long_is_named_and_lives(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.1)
    holder = start_holder(tmp_path / "write.lock", role)
    try:
        lock = WriteLock(tmp_path / "write.lock", "test")
        with pytest.raises(StoreError, match=rf"Process {holder.pid} \({role}\).*kill -CONT {holder.pid}"):
            lock.__enter__()
        assert holder.poll() is None
        end(holder)
        with lock:
            pass
        lock.close()
    finally:
        end(holder)


def test_a_worker_does_not_kill_its_own_process_over_a_lock_that_another_part_of_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.05)
    one, other = WriteLock(tmp_path / "write.lock", "worker"), WriteLock(tmp_path / "write.lock", "worker")
    with one, pytest.raises(StoreError, match=f"Process {os.getpid()}"):
        other.__enter__()
    one.close()
    other.close()


def test_the_lock_s_file_is_for_its_owner_only(tmp_path: Path) -> None:
    lock = WriteLock(tmp_path / "write.lock", "test")
    assert (tmp_path / "write.lock").stat().st_mode & 0o777 == 0o600
    lock.close()
