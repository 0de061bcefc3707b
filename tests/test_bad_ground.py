"""Ground that can't be written on: a clear error at once, what was there untouched, and work goes on afterwards.

Full and read-only disks are real ones, mounted for a child in a namespace of its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import open_house

from mcp_flow import commits
from mcp_flow import events as ev
from mcp_flow import store as store_module
from mcp_flow.config import Settings
from mcp_flow.errors import StoreError
from mcp_flow.store import Store

LOOKED = ev.PageEvaluated(code="1", mode="read", outcome="ok")
CREATED = ev.RunCreated(workflow="buy", function="buy", root="/w", entry="buy.py", revision="r1")


@cache
def may_mount() -> bool:
    """Whether this machine lets us mount in a namespace of our own."""
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


needs_mount = pytest.mark.skipif(not may_mount(), reason="this machine lets nobody mount")

CHILD = """
import asyncio, json, os, subprocess, sys, time
from pathlib import Path
from mcp_flow import config, events as ev
from mcp_flow.errors import FlowError
from mcp_flow.store import Store

home = Path(sys.argv[1])
settings = config.load(home=home, workflows=home)
CREATED = ev.RunCreated(workflow="buy", function="buy", root="/w", entry="buy.py", revision="r1")
LOOKED = ev.PageEvaluated(code="x" * 3000, mode="read", outcome="ok")

def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True)

async def refused(work):
    began = time.monotonic()
    try:
        await work
    except FlowError as error:
        return {"error": str(error), "type": type(error).__name__, "seconds": time.monotonic() - began}
    return None

async def open_store():
    async with Store(settings, "test"):
        pass
"""


async def in_namespace(body: str, home: Path) -> Any:
    """Run `main()` of this source where it may mount what it likes; what it returns."""
    source = f"{CHILD}\n{body}\nprint(json.dumps(asyncio.run(main())))"
    ended = await asyncio.to_thread(
        subprocess.run,
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", source, str(home)],
        env=os.environ | {"PYTHONPATH": str(Path(store_module.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def digests(folder: Path) -> dict[str, str]:
    """The content of the database's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("flow.db*"))}


async def a_home(settings: Settings, events: int = 3) -> None:
    async with Store(settings, "test") as store:
        await store.create("r1", CREATED)
        for _ in range(events - 1):
            await store.append("r1", LOOKED)


# --- a full disk ---


@needs_mount
async def test_a_disk_that_fills_up_is_named_and_work_goes_on_once_there_is_room(settings: Settings) -> None:
    settings.home.mkdir()
    told = await in_namespace(
        """
        async def main():
            mount("-t", "tmpfs", "-o", "size=700k", "tmpfs", home)
            async with Store(settings, "worker", at_once=True) as store:
                await store.create("r1", CREATED)
                written = 0
                while written < 1000 and not (refusal := await refused(store.append("r1", LOOKED))):
                    written += 1
                kept = await store.verify("r1")
                listed = [row.run_id for row in await store.list_runs([], None, None, 9, None)]
                await refused(store.append("r1", LOOKED))
                mount("-o", "remount,size=4m", home)
                again = await refused(store.append("r1", LOOKED))
                async with Store(settings, "test") as other:
                    length = await other.verify("r1")
            return [written, refusal, kept, listed, again, length]
        """.replace("\n        ", "\n"),
        settings.home,
    )
    written, refusal, kept, listed, again, length = told
    assert 10 < written < 1000
    assert re.search(r"The disk that holds .*flow\.db is full\. .*make room and call again", refusal["error"])
    assert refusal["type"] == "StoreError"
    assert refusal["seconds"] < 1
    assert (kept, listed, again) == (written + 1, ["r1"], None)
    assert length == written + 2


@needs_mount
async def test_a_disk_too_full_for_a_journal_is_named_at_opening(settings: Settings) -> None:
    settings.home.mkdir()
    told = await in_namespace(
        """
        async def main():
            mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", home)
            (home / "filler").write_bytes(b"x" * 45_000)
            refusal = await refused(open_store())
            (home / "filler").unlink()
            mount("-o", "remount,size=4m", home)
            return [refusal, await refused(open_store())]
        """.replace("\n        ", "\n"),
        settings.home,
    )
    refusal, again = told
    assert re.search(r"full|No space left", refusal["error"])
    assert (refusal["type"], again) == ("StoreError", None)
    assert refusal["seconds"] < 1


# --- a read-only disk ---


@needs_mount
async def test_a_disk_that_becomes_read_only_is_named_and_reading_goes_on(settings: Settings) -> None:
    await a_home(settings)
    told = await in_namespace(
        """
        async def main():
            mount("--bind", home, home)
            async with Store(settings, "worker", at_once=True) as store:
                await store.append("r1", LOOKED)
                # What a disk does that has found errors on itself: what is open for writing stays open.
                opened = await refused(store.append("r1", LOOKED))
            mount("-o", "remount,ro,bind", home)
            return [opened, await refused(open_store())]
        """.replace("\n        ", "\n"),
        settings.home,
    )
    opened, refusal = told
    assert opened is None
    assert refusal["type"] == "StoreError"
    assert re.search(r"Read-only file system", refusal["error"])
    assert str(settings.home) in refusal["error"]
    assert refusal["seconds"] < 1
    async with Store(settings, "test") as store:
        assert await store.verify("r1") == 5


@needs_mount
async def test_a_database_that_may_not_be_written_to_is_named_with_what_to_do(settings: Settings) -> None:
    await a_home(settings)
    before = digests(settings.home)
    told = await in_namespace(
        """
        async def main():
            mount("--bind", home / "flow.db", home / "flow.db")
            mount("-o", "remount,ro,bind", home / "flow.db")
            return await refused(open_store())
        """.replace("\n        ", "\n"),
        settings.home,
    )
    assert told["type"] == "StoreError"
    assert re.search(r"flow\.db can't be written to \(.*Check its owner and mode, or choose another", told["error"])
    assert digests(settings.home) == before


# --- a locked database ---


async def test_a_database_that_a_foreign_program_has_locked_is_named_at_opening_and_left_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    await a_home(settings)
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **k | {"timeout": 0.05}))
    with closing(connect(settings.database, isolation_level=None)) as foreign:
        foreign.execute("PRAGMA locking_mode = EXCLUSIVE")
        foreign.execute("BEGIN EXCLUSIVE")
        before = time.monotonic()
        with pytest.raises(StoreError, match=r"flow\.db is locked by a program that is not mcp-flow\. End it"):
            async with Store(settings, "test"):
                pass
        assert time.monotonic() - before < 1
        foreign.execute("ROLLBACK")
    async with Store(settings, "test") as store:
        assert await store.verify("r1") == 3
        await store.append("r1", LOOKED)


async def test_a_write_lock_that_its_dead_holder_left_is_free(settings: Settings) -> None:
    await a_home(settings)
    holder = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR), 2); os._exit(1)",
         str(settings.home / "write.lock")],
        check=False,
    )  # fmt: skip
    assert holder.returncode == 1
    async with Store(settings, "test") as store:
        await store.append("r1", LOOKED)
        assert await store.verify("r1") == 4
    fd = os.open(settings.home / "write.lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


@contextmanager
def write_lock_held(settings: Settings) -> Iterator[None]:
    """The journal can't be written: a process that is no worker has its lock."""
    fd = os.open(settings.home / "write.lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, f"{os.getpid()} server".ljust(64).encode(), 0)
        yield
    finally:
        os.close(fd)


async def test_runs_under_which_the_journal_is_locked_go_on_afterwards_and_nothing_of_them_has_failed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.1)
    async with open_house(settings) as house:
        await house.working()
        run_id = await house.start(
            """
            async def work(gate):
                did(gate)
                await until_open(gate)

            @workflow
            async def main(flow: Flow, once: bool) -> list:
                await flow.step("before", did, "before")
                try:
                    await flow.step("work", work, "go", once=once)
                except Exception as error:
                    did(f"{type(error).__name__} passed for the step's own")
                return [await flow.step("after", did, "after"), flow.attempt]
            """,
            {"once": False},
        )
        runs = [run_id, await house.again({"once": True})]
        for run_id in runs:
            await house.event(run_id, ev.StepStarted, lambda event: event.key == "work#1")
        with write_lock_held(settings), anyio.fail_after(20):
            house.open("go")
            while caplog.text.count("was dropped: Process") < 2:
                await house.bell.next_ring(0.01)
        assert await house.finished(runs[0]) == ["after", 2]
        request = await house.waiting(runs[1], "in-doubt")
        assert "and its end was never recorded" in request.opened.prompt
        await house.resume(runs[1], step="done")
        assert await house.finished(runs[1]) == ["after", 2]
        assert sorted(house.did()) == ["after", "after", "before", "before", "go", "go", "go"]
        for run_id in runs:
            assert await house.events(run_id, ev.StepFailed) == await house.events(run_id, ev.RunFailed) == []
            await house.store.verify(run_id)


# --- a damaged database ---


@pytest.mark.parametrize("share", [0.3, 0.7])
async def test_a_truncated_database_is_named_and_left_as_it_is(share: float, settings: Settings) -> None:
    await a_home(settings, 40)
    with closing(sqlite3.connect(settings.database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with settings.database.open("r+b") as file:
        file.truncate(int(settings.database.stat().st_size * share) // 4096 * 4096)
    before = settings.database.read_bytes()

    async def use() -> None:
        async with Store(settings, "test") as store:
            await store.verify("r1")
            await store.append("r1", LOOKED)

    with pytest.raises(StoreError, match=r"flow\.db is damaged .*move it away"):
        await use()
    assert settings.database.read_bytes() == before


async def test_a_database_cut_to_nothing_is_a_new_one(settings: Settings) -> None:
    settings.home.mkdir()
    settings.database.touch()
    async with Store(settings, "test") as store:
        assert await store.count() == {}
        await store.create("r1", CREATED)
        assert await store.verify("r1") == 1


@pytest.mark.parametrize("name", ["a database of another program", "a text"])
async def test_a_file_that_is_another_s_is_left_as_it_is(name: str, settings: Settings) -> None:
    settings.home.mkdir()
    if name == "a text":
        settings.database.write_bytes(b"dear diary\n" * 500)
    else:
        with closing(sqlite3.connect(settings.database)) as connection:
            connection.execute("CREATE TABLE events (holiday TEXT)")
            connection.execute("PRAGMA user_version = 7")
            connection.commit()
    before = settings.database.read_bytes()
    with pytest.raises(StoreError, match=r"flow\.db is damaged|schema 7"):
        async with Store(settings, "test"):
            pass
    assert settings.database.read_bytes() == before
