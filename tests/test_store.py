"""The store keeps every journal whole: against late writers, other processes, kills, damage and lost projections."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Coroutine, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import hypothesis
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from mcp_flow import commits, config, run
from mcp_flow import events as ev
from mcp_flow import store as store_module
from mcp_flow.config import Settings
from mcp_flow.errors import (
    BrokenChain,
    Conflict,
    FlowError,
    IllegalEvent,
    InvalidId,
    LeaseLost,
    StoreError,
    UnknownRun,
)
from mcp_flow.store import Beat, Store

if TYPE_CHECKING:
    from tests.conftest import Clock

T = TypeVar("T")
MOUNTS = Path("/proc/mounts").read_text() if Path("/proc/mounts").exists() else ""
ERROR = ev.Failure(type="ValueError", message="no such button")
LOOKED = ev.PageEvaluated(code="1", mode="read", outcome="ok")
HOLD = 1800.0
BEFORE = datetime(2031, 1, 1, tzinfo=UTC)
"""Before all that a clock of these tests has seen."""


def created(workflow: str = "buy") -> ev.RunCreated:
    return ev.RunCreated(workflow=workflow, function=workflow, root="/w", entry=f"{workflow}.py", revision="r1")


def attempt(number: int = 1) -> ev.AttemptStarted:
    return ev.AttemptStarted(attempt=number, revision="r1")


def step(key: str) -> tuple[ev.Event, ev.Event]:
    return ev.StepStarted(key=key, fingerprint="f"), ev.StepFinished(key=key, value=key)


def asked(request_id: str, **fields: Any) -> ev.RequestOpened:
    fields = {"kind": "approval", "prompt": "Pay?"} | fields
    return ev.RequestOpened(request_id=request_id, key=f"{request_id}#1", fingerprint="f", **fields)


async def start(store: Store, run_id: str, worker: str = "w1", workflow: str = "buy") -> int:
    """Create a run and bring it into its first attempt; returns the epoch."""
    await store.create(run_id, created(workflow))
    ((claimed, epoch),) = await store.claim(worker, [], 1)
    assert claimed == run_id
    await store.append(run_id, attempt(), epoch=epoch)
    return epoch


async def types(store: Store, run_id: str) -> list[str]:
    return [recorded.event.type for recorded in await store.events(run_id)]


@contextmanager
def raw(settings: Settings) -> Iterator[sqlite3.Connection]:
    """The database as anybody with SQL has it."""
    with closing(sqlite3.connect(settings.database, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        yield connection


# --- journals ---


async def test_what_was_appended_is_there_when_the_store_is_opened_again(settings: Settings, clock: Clock) -> None:
    async with Store(settings, "test", now=clock) as store:
        epoch = await start(store, "r1")
        await store.append("r1", *step("a#1"), epoch=epoch)
        before = await store.run("r1")
    async with Store(settings, "test", now=clock) as store:
        assert await store.run("r1") == before
        assert await types(store, "r1") == [
            "run.created",
            "run.claimed",
            "attempt.started",
            "step.started",
            "step.finished",
        ]
        assert await store.verify("r1") == 5


async def test_an_id_in_use_is_a_conflict_and_leaves_its_run_alone(store: Store) -> None:
    await store.create("r1", created("buy"))
    with pytest.raises(Conflict, match="r1"):
        await store.create("r1", created("sell"))
    assert [row.workflow for row in await store.list_runs([], None, None, 10, None)] == ["buy"]


@pytest.mark.parametrize("bad", ["", "../x", "a/b", ".hidden", "a" * 65, "é", "a\n"])
async def test_an_id_is_never_a_path(bad: str, store: Store) -> None:
    with pytest.raises(InvalidId):
        await store.create(bad, created())
    assert await store.count() == {}


async def test_an_unknown_run_is_named_and_not_made(store: Store) -> None:
    for call in (store.run("no"), store.events("no"), store.verify("no"), store.append("no", LOOKED)):
        with pytest.raises(UnknownRun, match="'no'"):
            await call
    assert await store.count() == {}


async def test_events_are_appended_all_or_none(store: Store) -> None:
    epoch = await start(store, "r1")
    started, finished = step("a#1")
    with pytest.raises(IllegalEvent):
        await store.append("r1", started, finished, finished, epoch=epoch)
    assert await types(store, "r1") == ["run.created", "run.claimed", "attempt.started"]
    await store.append("r1", started, finished, epoch=epoch)
    assert await store.verify("r1") == 5


async def test_events_are_read_from_where_one_left_off(store: Store) -> None:
    epoch = await start(store, "r1")
    await store.append("r1", *step("a#1"), epoch=epoch)
    assert [r.seq for r in await store.events("r1", since=2)] == [3, 4, 5]
    assert [r.seq for r in await store.events("r1", since=1, limit=2)] == [2, 3]
    assert await store.events("r1", since=5) == []


async def test_events_carry_the_time_of_the_clock(store: Store, clock: Clock) -> None:
    await store.create("r1", created())
    clock.tick(1.5)
    await store.append("r1", LOOKED)
    assert [r.at for r in await store.events("r1")] == ["2031-05-01T12:00:00.000000Z", "2031-05-01T12:00:01.500000Z"]


async def test_a_late_writer_is_refused_in_the_transaction_of_its_append(settings: Settings, store: Store) -> None:
    epoch = await start(store, "r1", "w1")
    await store.append("r1", ev.StepStarted(key="a#1", fingerprint="f"), epoch=epoch)
    async with Store(settings, "test") as other:
        assert await other.claim("w2", ["w1"], 5) == [("r1", epoch + 1)]
    with pytest.raises(LeaseLost):
        await store.append("r1", ev.StepFinished(key="a#1"), epoch=epoch)
    assert await types(store, "r1") == ["run.created", "run.claimed", "attempt.started", "step.started", "run.claimed"]


async def test_a_view_follows_what_others_wrote(settings: Settings, store: Store) -> None:
    await store.create("r1", created())
    view = await store.run("r1")
    async with Store(settings, "test") as other:
        await other.append("r1", LOOKED, LOOKED)
    await store.append("r1", LOOKED)
    assert view.seq == 4
    assert await store.run("r1") is view


async def test_a_view_that_is_forgotten_while_it_is_read_is_whole_all_the_same(store: Store) -> None:
    await store.create("r1", created())
    await store.run("r1")
    await store.append("r1", LOOKED)
    reading = asyncio.ensure_future(store.run("r1"))
    await asyncio.sleep(0)
    store.forget("r1")
    view = await reading
    assert (view.seq, view.created) == (2, created())


async def test_a_decision_is_made_on_the_run_as_it_is_in_the_transaction(settings: Settings, store: Store) -> None:
    epoch = await start(store, "r1")
    await store.append("r1", asked("q1"), epoch=epoch)
    await store.run("r1")
    async with Store(settings, "test") as other:
        await other.append("r1", ev.RequestAnswered(request_id="q1", value={"approved": False}))
    seen = []

    def plan(now: run.Run) -> list[ev.Event]:
        seen.append(now.requests["q1"].status)
        return [LOOKED]

    recorded = await store.decide("r1", plan)
    assert seen == ["answered"]
    assert [(r.seq, r.event) for r in recorded] == [(6, LOOKED)]


async def test_a_decision_that_raises_appends_nothing(store: Store) -> None:
    await store.create("r1", created())

    def plan(_: run.Run) -> list[ev.Event]:
        raise Conflict("changed my mind")

    with pytest.raises(Conflict, match="changed my mind"):
        await store.decide("r1", plan)
    assert await store.decide("r1", lambda _: []) == []
    assert await store.verify("r1") == 1


FINISH_OR_CANCEL: list[tuple[str, ev.Event, int | None]] = [
    ("finished", ev.RunFinished(output=1), 1),
    ("cancelled", ev.RunCancelled(reason="enough"), None),
]


@pytest.mark.parametrize("first", [0, 1])
async def test_of_two_ends_the_earlier_wins(first: int, settings: Settings, store: Store) -> None:
    await start(store, "r1")
    status, event, epoch = FINISH_OR_CANCEL[first]
    _, late, late_epoch = FINISH_OR_CANCEL[1 - first]
    await store.append("r1", event, epoch=epoch)
    async with Store(settings, "test") as other:
        with pytest.raises(IllegalEvent, match=f"the run is {status}"):
            await other.append("r1", late, epoch=late_epoch)
        assert (await other.run("r1")).status == status


@pytest.mark.parametrize("first", [0, 1])
async def test_of_two_ends_in_one_batch_the_earlier_wins_and_is_projected(first: int, store: Store) -> None:
    await start(store, "r1")
    ends = [FINISH_OR_CANCEL[first], FINISH_OR_CANCEL[1 - first]]
    results = await asyncio.gather(
        *(store.append("r1", event, epoch=epoch) for _, event, epoch in ends), return_exceptions=True
    )
    assert results[0] is None
    assert isinstance(results[1], IllegalEvent)
    status = ends[0][0]
    assert [row.status for row in await store.list_runs([], None, None, 10, None)] == [status]
    assert (await store.run("r1")).status == status


async def test_one_failing_append_leaves_the_others_of_its_batch(store: Store) -> None:
    for i in range(20):
        await store.create(f"r{i}", created())
    appends = [store.append(f"r{i}", LOOKED, epoch=7 if i == 7 else None) for i in range(20)]
    results = await asyncio.gather(*appends, store.append("nobody", LOOKED), return_exceptions=True)
    assert [type(result) for result in results if result] == [LeaseLost, UnknownRun]
    assert [await store.verify(f"r{i}") for i in range(20)] == [1 if i == 7 else 2 for i in range(20)]


async def test_more_runs_than_are_kept_in_memory_share_a_transaction(store: Store, clock: Clock) -> None:
    names = [f"r{i}" for i in range(600)]
    await asyncio.gather(*(store.create(name, created()) for name in names))
    assert await store.claim("w1", [], 1000) == [(name, 1) for name in names]
    due = clock() + timedelta(seconds=5)
    await asyncio.gather(
        *(store.append(name, attempt(), asked(f"q-{name}", expires=due), ev.AttemptIdled(), epoch=1) for name in names)
    )
    assert await store.count() == {"waiting-approval": 600}
    clock.tick(5)
    assert sorted(await store.expire_due()) == sorted(names)
    assert await store.count() == {"running": 600}


# --- files and bad ground ---


async def test_the_files_are_for_their_owner_only(settings: Settings, store: Store) -> None:
    await store.create("r1", created())
    assert settings.home.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in settings.home.iterdir()}
    assert modes == dict.fromkeys(["flow.db", "flow.db-wal", "flow.db-shm", "write.lock"], 0o600)


async def test_every_commit_is_durable(store: Store) -> None:
    pragmas = await store.pragmas()
    assert (pragmas["journal_mode"], pragmas["synchronous"]) == ("wal", 2)


async def test_a_schema_from_the_future_is_refused_at_opening_and_at_the_next_write(
    settings: Settings, store: Store
) -> None:
    await store.create("r1", created())
    with raw(settings) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"schema 99.*newer mcp-flow"):
        await store.append("r1", LOOKED)
    with pytest.raises(StoreError, match="schema 99"):
        async with Store(settings, "test"):
            pass
    with raw(settings) as connection:
        connection.execute(f"PRAGMA user_version = {store_module.SCHEMA_VERSION}")
    assert await store.verify("r1") == 1


async def test_a_file_that_is_no_database_is_left_as_it_is(settings: Settings) -> None:
    settings.home.mkdir()
    content = b"these are my holiday notes, please keep them\n" * 100
    settings.database.write_bytes(content)
    with pytest.raises(StoreError, match=r"flow\.db is damaged .*move it away"):
        async with Store(settings, "test"):
            pass
    assert settings.database.read_bytes() == content


async def test_a_folder_in_the_place_of_the_database_is_named(settings: Settings) -> None:
    settings.database.mkdir(parents=True)
    with pytest.raises(StoreError, match=r"can't be opened: Is a directory"):
        async with Store(settings, "test"):
            pass


async def test_a_file_in_the_place_of_the_home_folder_is_named(settings: Settings) -> None:
    settings.home.write_text("")
    with pytest.raises(FlowError, match=f"{settings.home} can't be made.*--home"):
        async with Store(settings, "test"):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
async def test_a_read_only_folder_is_named(settings: Settings) -> None:
    settings.home.mkdir(mode=0o500)
    with pytest.raises(StoreError, match="can't be opened: Permission denied"):
        async with Store(settings, "test"):
            pass


@pytest.mark.skipif(not MOUNTS, reason="only Linux tells")
async def test_a_home_on_a_network_file_system_is_refused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {line.split()[2] for line in MOUNTS.splitlines()}
    monkeypatch.setattr(store_module, "_NETWORK_FILE_SYSTEMS", kinds)
    with pytest.raises(StoreError, match="network file system"):
        async with Store(settings, "test"):
            pass


async def sql(store: Store, statement: str) -> Any:
    """Something set or asked on the store's own connection."""
    return await store._thread.read(lambda: store._tx.execute(statement).fetchone())


async def test_a_full_disk_is_named_and_costs_nothing_that_was_there(store: Store) -> None:
    epoch = await start(store, "r1")
    (pages,) = await sql(store, "PRAGMA page_count")
    await sql(store, f"PRAGMA max_page_count = {pages + 3}")
    big = ev.PageEvaluated(code="x" * 3000, mode="read", outcome="ok")
    written = 0
    for _ in range(20):
        try:
            await store.append("r1", big)
        except StoreError as error:
            refusal = str(error)
            break
        written += 1
    assert 0 < written < 20
    assert re.search(r"The disk that holds .*flow\.db is full\. .*make room", refusal)
    assert await store.verify("r1") == 3 + written
    await sql(store, "PRAGMA max_page_count = 100000")
    await store.append("r1", *step("a#1"), epoch=epoch)
    assert await store.verify("r1") == 5 + written
    assert (await store.run("r1")).seq == 5 + written


async def test_a_program_that_locks_the_database_is_told_from_mcp_flow(settings: Settings, store: Store) -> None:
    await store.create("r1", created())
    await sql(store, "PRAGMA busy_timeout = 20")
    with raw(settings) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="locked by a program that is not mcp-flow"):
            await store.append("r1", LOOKED)
        connection.execute("ROLLBACK")
    await store.append("r1", LOOKED)
    assert await store.verify("r1") == 2


async def test_a_store_that_did_not_open_leaves_nothing_behind(settings: Settings) -> None:
    settings.database.mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd")) if MOUNTS else 0
    for _ in range(3):
        with pytest.raises(StoreError):
            async with Store(settings, "test"):
                pass
    for thread in threading.enumerate():
        if thread.name == "mcp-flow store":
            await asyncio.to_thread(thread.join, 5)
            assert not thread.is_alive()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before


# --- the chain ---


async def whole_journal(store: Store) -> int:
    epoch = await start(store, "r1")
    await store.append("r1", *step("open shop#1"), asked("q1"), ev.AttemptIdled(), epoch=epoch)
    await store.append("r1", ev.RequestAnswered(request_id="q1", value={"approved": True}, note="ünïcode"))
    return await store.verify("r1")


TEXTS = ("at", "type", "data")


@pytest.mark.parametrize("column", [*TEXTS, "hash"])
async def test_verify_names_the_first_event_of_which_a_byte_was_altered(
    column: str, settings: Settings, store: Store
) -> None:
    length = await whole_journal(store)
    kind = "BLOB" if column == "hash" else "TEXT"
    update = f"UPDATE events SET {column} = CAST(? AS {kind}) WHERE seq = ?"
    with raw(settings) as connection:
        connection.execute("DROP INDEX one_result")  # it would refuse what is no JSON
        connection.execute("DROP INDEX one_request")
        for seq in range(1, length + 1):
            (stored,) = connection.execute(
                f"SELECT CAST({column} AS BLOB) FROM events WHERE seq = ?", (seq,)
            ).fetchone()
            for place in range(0, len(stored), 5):
                flip = 0x80 if place % 2 else 0x01  # often no UTF-8, often another letter
                altered = bytearray(stored)
                altered[place] ^= flip
                connection.execute(update, (bytes(altered), seq))
                with pytest.raises(BrokenChain, match=rf"event {seq} \("):
                    await store.verify("r1")
            connection.execute(update, (stored, seq))
            assert await store.verify("r1") == length


async def test_verify_names_the_first_event_of_which_a_number_was_altered(settings: Settings, store: Store) -> None:
    length = await whole_journal(store)
    with raw(settings) as connection:
        for seq in range(1, length + 1):
            (epoch,) = connection.execute("SELECT epoch FROM events WHERE seq = ?", (seq,)).fetchone()
            for other in (None, "", 0, 1, 2):
                if other != epoch:
                    connection.execute("UPDATE events SET epoch = ? WHERE seq = ?", (other, seq))
                    with pytest.raises(BrokenChain, match=rf"event {seq} \("):
                        await store.verify("r1")
            connection.execute("UPDATE events SET epoch = ? WHERE seq = ?", (epoch, seq))
        connection.execute("UPDATE events SET seq = seq + 100 WHERE seq >= 4")
        with pytest.raises(BrokenChain, match="event 4 is missing; the next one there is 104"):
            await store.verify("r1")


async def test_verify_names_the_event_that_was_deleted_or_exchanged(settings: Settings, store: Store) -> None:
    length = await whole_journal(store)
    columns = "run, seq, at, epoch, type, data, hash"
    with raw(settings) as connection:
        for seq in range(1, length):
            row = connection.execute(f"SELECT {columns} FROM events WHERE seq = ?", (seq,)).fetchone()
            connection.execute("DELETE FROM events WHERE seq = ?", (seq,))
            with pytest.raises(BrokenChain, match=f"event {seq} is missing"):
                await store.verify("r1")
            connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        assert await store.verify("r1") == length
        connection.execute("UPDATE events SET seq = -seq WHERE seq IN (4, 5)")
        connection.execute("UPDATE events SET seq = 9 + seq WHERE seq < 0")
        with pytest.raises(BrokenChain, match=r"event 4 \("):
            await store.verify("r1")
        connection.execute("DELETE FROM events")
        with pytest.raises(BrokenChain, match="event 1 is missing"):
            await store.verify("r1")


async def test_a_journal_does_not_pass_for_that_of_another_run(settings: Settings, store: Store) -> None:
    await whole_journal(store)
    with raw(settings) as connection:
        connection.execute("UPDATE journals SET run_id = 'r2'")
    with pytest.raises(BrokenChain, match="event 1"):
        await store.verify("r2")


async def test_the_whole_chain_made_anew_over_an_impossible_story_does_not_fold(
    settings: Settings, store: Store
) -> None:
    length = await whole_journal(store)
    tip = ev.genesis("r1")
    with raw(settings) as connection:
        connection.execute("DROP INDEX one_result")
        connection.execute("UPDATE events SET data = replace(data, 'open shop#1', 'other#1') WHERE seq = 5")
        for seq, *rest in connection.execute("SELECT seq, at, epoch, type, data FROM events ORDER BY seq").fetchall():
            tip = ev.chain(tip, seq, *rest)
            connection.execute("UPDATE events SET hash = ? WHERE seq = ?", (tip, seq))
    assert length > 5
    with pytest.raises(BrokenChain, match=r"event 5 \(step.finished\) can't be: .*other#1 was not started"):
        await store.verify("r1")


async def test_the_database_itself_refuses_a_second_result_for_a_step(settings: Settings, store: Store) -> None:
    epoch = await start(store, "r1")
    await store.append("r1", *step("a#1"), epoch=epoch)
    with raw(settings) as connection, pytest.raises(sqlite3.IntegrityError):
        connection.execute("INSERT INTO events SELECT run, 6, at, epoch, type, data, hash FROM events WHERE seq = 5")


# --- projections ---


async def what_clients_see(store: Store) -> list[Any]:
    return [
        await store.list_runs([], None, None, 100, None),
        await store.open_requests(),
        await store.count(),
        await store.targets(),
        await store.next_due(HOLD, BEFORE),
        await store.owners(),
        await store.find_request("q1"),
        await store.find_request("q-answered"),
        await store.wanting(["w1"]),
    ]


async def a_busy_home(store: Store, clock: Clock) -> None:
    """Runs in the middle of all kinds of things; r-asking waits under epoch 1."""
    await start(store, "r-asking")
    await store.append("r-asking", ev.PageOpened(name="main", target_id="t"), *step("a#1"), epoch=1)
    await store.append("r-asking", asked("q-answered"), epoch=1)
    await store.append("r-asking", ev.RequestAnswered(request_id="q-answered"))
    await store.append("r-asking", asked("q1", expires=clock() + timedelta(hours=1)), ev.AttemptIdled(), epoch=1)
    await start(store, "r-failed")
    await store.append("r-failed", ev.StepStarted(key="b#1", fingerprint="f"), ev.RunFailed(error=ERROR), epoch=1)
    await start(store, "r-cancelled")
    await store.append("r-cancelled", asked("q2"), ev.AttemptIdled(), epoch=1)
    await store.append("r-cancelled", ev.RunCancelled(reason="enough"))
    await start(store, "r-running")
    await store.create("r-queued", created("sell"))


LOSSES = {
    "emptied": ("DELETE FROM run_rows", "DELETE FROM request_rows"),
    "dropped": ("DROP TABLE run_rows", "DROP TABLE request_rows"),
    "dropped with their views": (
        "DROP VIEW runs",
        "DROP VIEW steps",
        "DROP VIEW requests",
        "DROP TABLE run_rows",
        "DROP TABLE request_rows",
    ),
    "falsified": (
        "UPDATE run_rows SET status = 'finished', wants_worker = 0",
        "UPDATE request_rows SET status = 'open', expires = NULL",
        "INSERT INTO run_rows VALUES (99, 'x', 'running', 1, NULL, 0, 0, '', NULL, 1, 1, NULL, NULL)",
    ),
}


async def test_a_journal_that_can_not_be_read_does_not_keep_the_others_from_being_claimed(
    settings: Settings, store: Store
) -> None:
    await store.create("bad", created())
    await store.create("good", created())
    with raw(settings) as connection:
        connection.execute("UPDATE events SET type = 'run.teleported' WHERE run = 1")
    async with Store(settings, "worker", at_once=True) as other:
        assert await other.claim("w-1", [], 10) == [("good", 1)]


@pytest.mark.parametrize("loss", LOSSES)
async def test_projections_lost_in_the_middle_of_a_run_are_made_anew_and_nobody_notices(
    loss: str, settings: Settings, store: Store, clock: Clock
) -> None:
    await a_busy_home(store, clock)
    before = await what_clients_see(store)
    assert before[2] == {"waiting-approval": 1, "failed": 1, "cancelled": 1, "running": 1, "queued": 1}
    with raw(settings) as connection:
        for statement in LOSSES[loss]:
            connection.execute(statement)
    async with Store(settings, "test", now=clock) as other:
        assert await other.rebuild() == []
    assert await what_clients_see(store) == before
    await store.append("r-asking", ev.RequestAnswered(request_id="q1", value={"approved": True}))
    assert (await store.count())["running"] == 2
    claimed = [("r-asking", 2), ("r-cancelled", 2), ("r-running", 2), ("r-queued", 1)]
    assert await store.claim("w2", ["w1"], 9) == claimed


async def test_who_made_the_projections_anew_projects_what_comes_after_the_writes_of_others(
    settings: Settings, store: Store, clock: Clock
) -> None:
    epoch = await start(store, "r1")
    async with Store(settings, "test", now=clock) as other:
        assert await other.rebuild() == []
        await store.append("r1", asked("q1"), ev.AttemptIdled(), epoch=epoch)
        assert await store.count() == {"waiting-approval": 1}
        await other.append("r1", ev.RequestAnswered(request_id="q1", value={"approved": True}))
    assert await store.count() == {"running": 1}


@pytest.mark.parametrize("loss", ["dropped", "dropped with their views"])
async def test_an_append_after_the_projections_were_dropped_makes_them_anew_by_itself(
    loss: str, settings: Settings, store: Store, clock: Clock
) -> None:
    await a_busy_home(store, clock)
    before = await what_clients_see(store)
    with raw(settings) as connection:
        for statement in LOSSES[loss]:
            connection.execute(statement)
    await store.append("r-running", *step("late#1"), epoch=1)
    rows, *rest = await what_clients_see(store)
    assert rest == before[1:]
    assert [(row.run_id, row.status, row.why) for row in rows] == [
        (row.run_id, row.status, row.why) for row in before[0]
    ]
    assert next(row.step for row in rows if row.run_id == "r-running") == "late#1"


async def test_projections_written_along_the_way_are_those_that_a_rebuild_makes(
    settings: Settings, store: Store, clock: Clock
) -> None:
    await a_busy_home(store, clock)
    tables = ("run_rows", "request_rows")
    with raw(settings) as connection:
        before = [connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables]
        await store.rebuild()
        assert [connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in tables] == before


async def test_of_all_the_runs_that_were_looked_at_only_those_somebody_follows_stay_in_memory(store: Store) -> None:
    for number in range(100):
        await store.create(f"r{number}", created())
    followed, looked_at = await store.run("r0"), weakref.ref(await store.run("r1"))
    for number in range(2, 100):
        await store.run(f"r{number}")
    gc.collect()
    assert looked_at() is None
    assert await store.run("r0") is followed
    await store.append("r0", ev.RunCancelled(reason="enough"))
    assert followed.status == "cancelled"


async def test_people_with_sql_find_runs_steps_and_requests(settings: Settings, store: Store, clock: Clock) -> None:
    await a_busy_home(store, clock)
    with raw(settings) as connection:
        runs = connection.execute("SELECT run_id, workflow, status, why FROM runs ORDER BY run_id").fetchall()
        steps = connection.execute("SELECT run_id, key, status, value FROM steps ORDER BY key").fetchall()
        requests = connection.execute("SELECT request_id, run_id, kind, status, prompt FROM requests").fetchall()
    assert runs == [
        ("r-asking", "buy", "waiting-approval", "Pay?"),
        ("r-cancelled", "buy", "cancelled", "enough"),
        ("r-failed", "buy", "failed", "ValueError: no such button"),
        ("r-queued", "sell", "queued", None),
        ("r-running", "buy", "running", None),
    ]
    assert steps == [("r-asking", "a#1", "finished", "a#1"), ("r-failed", "b#1", "started", None)]
    assert sorted(requests) == [
        ("q-answered", "r-asking", "approval", "answered", "Pay?"),
        ("q1", "r-asking", "approval", "open", "Pay?"),
        ("q2", "r-cancelled", "approval", "withdrawn", "Pay?"),
    ]


# --- work ---


async def test_runs_are_claimed_oldest_first_once_and_from_the_dead(settings: Settings, store: Store) -> None:
    for i in range(4):
        await store.create(f"r{i}", created())
    assert await store.claim("w1", [], 2) == [("r0", 1), ("r1", 1)]
    async with Store(settings, "test") as other:
        assert await other.claim("w2", [], 9) == [("r2", 1), ("r3", 1)]
        assert await other.claim("w2", [], 9) == []
        assert not await other.wanting([])
        assert await other.wanting(["w1"])
        assert await other.claim("w2", ["w1"], 1) == [("r0", 2)]
        assert await other.claim("w2", ["w1"], 9) == [("r1", 2)]
        assert not await other.wanting(["w1"])


async def test_a_run_that_waits_is_nobody_s_work_until_it_is_answered(store: Store) -> None:
    await start(store, "r1")
    await store.append("r1", asked("q1"), ev.AttemptIdled(), ev.RunReleased(reason="idle"), epoch=1)
    assert await store.claim("w2", ["w1"], 9) == []
    await store.append("r1", ev.RequestAnswered(request_id="q1"))
    assert await store.claim("w2", [], 9) == [("r1", 2)]


async def test_requests_expire_when_they_are_due_and_not_before(store: Store, clock: Clock) -> None:
    for i, seconds in enumerate([10, 20, None]):
        await start(store, f"r{i}")
        expires = None if seconds is None else clock() + timedelta(seconds=seconds)
        await store.append(f"r{i}", asked(f"q{i}", expires=expires), ev.AttemptIdled(), epoch=1)
    assert await store.next_due(HOLD, BEFORE) == clock() + timedelta(seconds=10)
    clock.tick(9.999)
    assert await store.expire_due() == []
    clock.tick(0.001)
    assert await store.expire_due() == ["r0"]
    assert await store.expire_due() == []
    clock.tick(100)
    assert await store.expire_due() == ["r1"]
    assert await store.next_due(HOLD, BEFORE) is None
    assert [row.request.request_id for row in await store.open_requests()] == ["q2"]
    assert (await store.run("r0")).requests["q0"].status == "expired"


HOLDS = (ev.PageOpened(name="main", target_id="t"), asked("q1"), ev.AttemptIdled())


async def test_a_run_that_has_held_its_page_for_too_long_is_due_and_is_taken_to_be_parked(
    store: Store, clock: Clock
) -> None:
    await start(store, "r1")
    await store.append("r1", *HOLDS, ev.RunReleased(reason="idle"), epoch=1)
    await start(store, "r2")
    await store.append("r2", asked("q2"), ev.AttemptIdled(), ev.RunReleased(reason="idle"), epoch=1)
    since = clock()
    assert await store.next_due(60, BEFORE) == since + timedelta(seconds=60)
    clock.tick(10)
    for held_before, wanted in ((since - timedelta(seconds=0.001), False), (since, True)):
        assert await store.wanting([], held_before=held_before) is wanted
        assert await store.wanting([], held_before=held_before, only="r2") is False
    assert await store.claim("w2", [], 9) == []
    assert await store.claim("w2", [], 9, held_before=since) == [("r1", 2)]
    assert await store.claim("w3", [], 9, held_before=since) == []
    await store.append("r1", ev.RunParked(), epoch=2)
    assert await store.next_due(60, BEFORE) is None
    assert not await store.wanting([], held_before=clock())
    assert (await store.targets(), (await store.run("r1")).status) == (set(), "waiting-approval")


async def test_a_held_page_is_left_to_an_owner_who_lives_and_is_taken_from_one_who_does_not(
    store: Store, clock: Clock
) -> None:
    await start(store, "r1")
    await store.append("r1", *HOLDS, epoch=1)
    assert await store.owners() == {"w1": False}
    assert await store.claim("w2", [], 9, held_before=clock()) == []
    assert await store.claim("w2", ["w1"], 9, held_before=clock()) == [("r1", 2)]


async def test_the_owners_say_whom_somebody_waits_for(store: Store) -> None:
    for number, run_id in enumerate(("working", "hijacked", "cancelled", "asking"), 1):
        await start(store, run_id, f"w{number}")
    await store.append("hijacked", ev.HijackRequested(reason="look"))
    await store.append("cancelled", ev.RunCancelled(reason="enough"))
    await store.append("asking", asked("q1"), ev.AttemptIdled(), epoch=1)
    assert await store.owners() == {"w1": False, "w2": True, "w3": True}
    assert await store.claim("w9", ["w3"], 9) == [("cancelled", 2)]
    await store.append("cancelled", ev.RunReleased(reason="cancelled"), epoch=2)
    assert await store.owners() == {"w1": False, "w2": True}


async def test_a_cancelled_run_is_work_until_its_owner_or_another_lets_go_of_it(store: Store) -> None:
    await start(store, "r1")
    await store.append("r1", ev.RunCancelled(reason="enough"))
    assert not await store.wanting([])
    assert await store.wanting(["w1"])
    await store.append("r1", ev.RunReleased(reason="it is cancelled"), epoch=1)
    assert not await store.wanting(["w1"])


async def test_only_runs_that_wait_are_let_go_of_when_their_owner_is_dead(store: Store) -> None:
    for run_id in ("working", "asking", "other"):
        await start(store, run_id, "w2" if run_id == "other" else "w1")
    await store.append("asking", asked("q1"), ev.AttemptIdled(), epoch=1)
    await store.append("other", asked("q2"), ev.AttemptIdled(), epoch=1)
    await start(store, "ended")
    await store.append("ended", ev.RunFinished(), epoch=1)
    await store.orphan_idle([])
    await store.orphan_idle(["w1", "w9"])
    await store.orphan_idle(["w1"])
    owners = {run_id: (await store.run(run_id)).owner for run_id in ("working", "asking", "other", "ended")}
    assert owners == {"working": "w1", "asking": None, "other": "w2", "ended": "w1"}
    assert (await types(store, "asking"))[-1] == "run.orphaned"
    await store.append("asking", ev.RequestAnswered(request_id="q1"))
    assert await store.claim("w3", [], 9) == [("asking", 2)]


async def test_a_worker_may_take_one_run_only(store: Store) -> None:
    for run_id in ("r1", "r2"):
        await store.create(run_id, created())
    assert await store.wanting([], only="r2")
    assert not await store.wanting([], only="r3")
    assert await store.claim("w1", [], 9, only="r2") == [("r2", 1)]
    assert not await store.wanting([], only="r2")
    assert await store.wanting([])


async def test_what_was_due_when_somebody_last_looked_is_not_due_again(store: Store, clock: Clock) -> None:
    for number, seconds in enumerate((10, 30)):
        await start(store, f"r{number}")
        due = clock() + timedelta(seconds=seconds)
        await store.append(f"r{number}", asked(f"d{number}", expires=due), ev.AttemptIdled(), epoch=1)
    await start(store, "r2")
    await store.append("r2", *HOLDS, epoch=1)
    first, held, last = (clock() + timedelta(seconds=seconds) for seconds in (10, 20, 30))
    assert await store.next_due(20, clock()) == first
    assert await store.next_due(20, first - timedelta(seconds=0.001)) == first
    assert await store.next_due(20, first) == held
    assert await store.next_due(20, held) == last
    assert await store.next_due(20, last) is None


async def test_a_deadline_of_a_cancelled_run_is_never_due(store: Store, clock: Clock) -> None:
    await start(store, "r1")
    await store.append("r1", asked("q1", expires=clock()), ev.AttemptIdled(), epoch=1)
    await store.append("r1", ev.RunCancelled(reason="enough"))
    assert await store.next_due(HOLD, BEFORE) is None
    assert await store.open_requests() == []
    assert await store.expire_due() == []


async def test_a_worker_s_counter_rises_with_each_beat(store: Store) -> None:
    store.beat("w1")
    store.beat("w1", 4.5)
    store.beat("w2")
    assert await store.beats() == {"w1": Beat(os.getpid(), 2, 4.5), "w2": Beat(os.getpid(), 1, 0.0)}
    store.beat("w1")
    assert (await store.beats())["w1"] == Beat(os.getpid(), 3, 0.0)
    await store.forget_worker("w1")
    assert await store.beats() == {"w2": Beat(os.getpid(), 1, 0.0)}


async def test_the_data_version_changes_when_somebody_else_has_written_and_only_then(
    settings: Settings, store: Store
) -> None:
    await store.create("r1", created())
    idle = await store.data_version()
    await store.append("r1", LOOKED)
    assert await store.data_version() == idle
    async with Store(settings, "test") as other:
        await other.append("r1", LOOKED)
        changed = await store.data_version()
        assert changed != idle
        assert await store.data_version() == changed


# --- the registry ---


async def test_runs_are_listed_newest_first_in_pages_that_neither_repeat_nor_miss(store: Store) -> None:
    for i in range(7):
        await store.create(f"r{i}", created())
    seen, before = [], None
    while page := await store.list_runs([], None, None, 3, before):
        assert len(page) <= 3
        seen += [row.run_id for row in page]
        before = page[-1].no
        if len(seen) == 3:
            await store.create("newer", created())
    assert seen == [f"r{i}" for i in reversed(range(7))]


async def test_runs_are_found_by_status_workflow_and_words(store: Store, clock: Clock) -> None:
    await a_busy_home(store, clock)

    async def found(status: list[str], workflow: str | None, query: str | None) -> list[str]:
        return [row.run_id for row in await store.list_runs(status, workflow, query, 9, None)]

    assert await found(["failed", "queued"], None, None) == ["r-queued", "r-failed"]
    assert await found([], "sell", None) == ["r-queued"]
    assert await found([], None, "NO SUCH") == ["r-failed"]
    assert await found([], None, "asking") == ["r-asking"]
    assert await found([], None, "%") == []
    assert await found(["failed"], "sell", None) == []


async def test_open_requests_are_listed_oldest_first_in_pages_that_neither_repeat_nor_miss(
    store: Store, clock: Clock
) -> None:
    for i in range(7):
        await start(store, f"r{i}", workflow=f"flow{i}")
        await store.append(f"r{i}", asked(f"q{9 - i}"), epoch=1)
        clock.tick(i % 2)  # some at the same time
    seen, after = [], None
    while page := await store.open_requests(limit=2, after=after):
        seen += [(row.run_id, row.workflow, row.request.request_id) for row in page]
        after = page[-1].opened_at, page[-1].request.request_id
    assert sorted(seen) == [(f"r{i}", f"flow{i}", f"q{9 - i}") for i in range(7)]
    opened_at = [row.opened_at for row in await store.open_requests()]
    assert opened_at == sorted(opened_at)


async def test_open_requests_are_found_by_run_and_kind_as_they_were_asked(store: Store) -> None:
    await start(store, "r1")
    question = asked("q2", kind="input", prompt="Your name?", answer_schema={"type": "string"}, by="human")
    await store.append("r1", asked("q1"), question, epoch=1)
    await start(store, "r2")
    await store.append("r2", asked("q3"), epoch=1)
    assert [row.request for row in await store.open_requests(kinds=["input", "timer"])] == [question]
    assert {row.request.request_id for row in await store.open_requests("r1")} == {"q1", "q2"}
    assert await store.open_requests("r2", ["input"]) == []
    assert await store.find_request("q3") == "r2"
    assert await store.find_request("q4") is None


async def test_revisions_and_checkpoints_come_back_as_they_were_kept(store: Store) -> None:
    files = {"buy.py": b"print('\xff\x00')\r\n", "lib/ünit.py": "# ü".encode()}
    await store.save_revision("abc", "buy.py", files)
    await store.save_revision("abc", "other.py", {})
    assert await store.load_revision("abc") == ("buy.py", files)
    with pytest.raises(StoreError, match="revision nope"):
        await store.load_revision("nope")
    await store.create("r1", created())
    assert await store.load_checkpoint("r1") is None
    await store.save_checkpoint("r1", "{1}", "[1]")
    assert await store.load_checkpoint("r1") == ("{1}", "[1]")
    await store.save_checkpoint("r1", "{2}", None)
    assert await store.load_checkpoint("r1") == ("{2}", "[1]")
    await store.save_checkpoint("r1", None, "[3]")
    assert await store.load_checkpoint("r1") == ("{2}", "[3]")
    await store.append("r1", ev.RunCancelled(reason="enough"))
    assert await store.load_checkpoint("r1") is None


async def test_a_checkpoint_has_places_before_it_has_data_and_data_before_it_has_places(store: Store) -> None:
    await store.create("r1", created())
    await store.save_checkpoint("r1", '{"main": "/a"}', None)
    assert await store.load_checkpoint("r1") == ('{"main": "/a"}', "{}")
    await store.create("r2", created())
    await store.save_checkpoint("r2", None, '{"storage": {}}')
    assert await store.load_checkpoint("r2") == ("{}", '{"storage": {}}')


async def test_places_are_kept_with_the_events_that_led_there_and_not_without_them(store: Store) -> None:
    epoch = await start(store, "r1")
    await store.append("r1", *step("a#1"), epoch=epoch, places='{"main": "/a"}')
    assert await store.load_checkpoint("r1") == ('{"main": "/a"}', "{}")
    with pytest.raises(IllegalEvent):
        await store.append("r1", *step("a#1"), epoch=epoch, places='{"main": "/b"}')
    with pytest.raises(LeaseLost):
        await store.append("r1", *step("b#1"), epoch=epoch + 1, places='{"main": "/c"}')
    assert await store.load_checkpoint("r1") == ('{"main": "/a"}', "{}")


async def test_a_checkpoint_of_an_epoch_that_is_over_or_of_a_run_that_has_ended_is_not_kept(store: Store) -> None:
    epoch = await start(store, "r1")
    await store.save_checkpoint("r1", "{1}", "[1]", epoch)
    assert await store.claim("w2", ["w1"], 9) == [("r1", epoch + 1)]
    await store.save_checkpoint("r1", "{2}", "[2]", epoch)
    assert await store.load_checkpoint("r1") == ("{1}", "[1]")
    await store.save_checkpoint("r1", "{3}", "[3]", epoch + 1)
    assert await store.load_checkpoint("r1") == ("{3}", "[3]")
    await store.append("r1", ev.RunCancelled(reason="enough"))
    await store.save_checkpoint("r1", "{4}", "[4]", epoch + 1)
    assert await store.load_checkpoint("r1") is None


async def test_a_journal_begins_with_all_of_its_first_events_and_its_checkpoint_or_not_at_all(store: Store) -> None:
    fork = created().model_copy(update={"forked_from": "r0"})
    shared = ev.StepShared(key="a#1", value=1)
    await store.create("r1", fork, shared, checkpoint=("{}", "[]"))
    assert await types(store, "r1") == ["run.created", "step.shared"]
    assert await store.load_checkpoint("r1") == ("{}", "[]")
    with pytest.raises(IllegalEvent, match="only a fork"):
        await store.create("r2", created(), shared, checkpoint=("{}", "[]"))
    with pytest.raises(UnknownRun):
        await store.run("r2")
    await store.create("r2", created())
    assert await store.load_checkpoint("r2") is None


# --- several processes ---


CHILD = """
import asyncio, os, signal, sys
from mcp_flow import config, events as ev
from mcp_flow.store import Store

LOOKED = ev.PageEvaluated(code="1", mode="read", outcome="ok")

async def append(run_id, times):
    async with Store(config.load(home=HOME), "worker", at_once=True) as store:
        for i in range(times):
            await store.append(run_id, LOOKED)
            await store.append("shared", ev.PageEvaluated(code=run_id, mode="read", outcome=str(i)))

async def append_for_ever():
    async with Store(config.load(home=HOME), "worker", at_once=True) as store:
        for i in range(1_000_000):
            await asyncio.gather(*(store.append("r1", LOOKED) for _ in range(5)))
            print((await store.run("r1")).seq, flush=True)

async def stop_inside(role):
    def plan(run):
        print("inside", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        return [LOOKED]

    async with Store(config.load(home=HOME), role) as store:
        await store.decide("r1", plan)
    print("done", flush=True)
"""


def child(settings: Settings, call: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"HOME = {str(settings.home)!r}\n{CHILD}\nasyncio.run({call})"],
        env=os.environ | {"PYTHONPATH": str(Path(store_module.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout
    process.stdout.close()


async def test_processes_that_append_at_the_same_time_lose_nothing(settings: Settings, store: Store) -> None:
    for run_id in ("r1", "r2", "shared"):
        await store.create(run_id, created())
    children = [child(settings, f"append('{run_id}', 40)") for run_id in ("r1", "r2")]
    try:
        for process in children:
            assert await asyncio.to_thread(process.wait, 20) == 0
    finally:
        for process in children:
            end(process)
    assert [await store.verify(run_id) for run_id in ("r1", "r2", "shared")] == [41, 41, 81]
    shared = [recorded.event for recorded in await store.events("shared", since=1)]
    for run_id in ("r1", "r2"):
        outcomes = [e.outcome for e in shared if isinstance(e, ev.PageEvaluated) and e.code == run_id]
        assert outcomes == [str(i) for i in range(40)]


async def test_a_process_killed_in_the_midst_of_appends_leaves_all_that_it_was_told_is_there(
    settings: Settings, store: Store
) -> None:
    await store.create("r1", created())
    process = child(settings, "append_for_ever()")
    assert process.stdout
    try:
        told = 0
        while told < 60:
            told = int(await asyncio.to_thread(process.stdout.readline))
        process.kill()
        rest = (await asyncio.to_thread(process.communicate))[0].splitlines()
        told = max([told, *(int(line) for line in rest if line)])
    finally:
        end(process)
    assert await store.verify("r1") >= told
    await store.append("r1", LOOKED)
    view = await store.run("r1")
    assert await store.verify("r1") == view.seq > told
    with raw(settings) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_a_worker_that_stands_still_inside_a_transaction_is_killed_and_its_write_is_undone(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("r1", created())
    monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.1)
    process = child(settings, "stop_inside('worker')")
    assert process.stdout
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "inside\n"
        await store.append("r1", ev.RunCancelled(reason="enough"))
        assert await asyncio.to_thread(process.wait, 5) == -signal.SIGKILL
    finally:
        end(process)
    assert await types(store, "r1") == ["run.created", "run.cancelled"]
    assert await store.verify("r1") == 2


async def test_a_server_that_stands_still_inside_a_transaction_is_named_and_may_go_on(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.create("r1", created())
    monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.1)
    process = child(settings, "stop_inside('server')")
    assert process.stdout
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "inside\n"
        with pytest.raises(StoreError, match=rf"Process {process.pid} \(server\)"):
            await store.append("r1", LOOKED)
        assert await store.verify("r1") == 1  # reading goes on
        process.send_signal(signal.SIGCONT)
        assert await asyncio.to_thread(process.stdout.readline) == "done\n"
    finally:
        end(process)
    await store.append("r1", LOOKED)
    assert await store.verify("r1") == 3


# --- anything at all ---


HIJACKS: list[list[ev.Event]] = [
    [ev.HijackRequested(reason="x")],
    [ev.HijackRequested(reason="x"), ev.RunHijacked()],
    [ev.RunHijacked()],
    [ev.HijackReleased()],
]


class Home(RuleBasedStateMachine):
    """Workers that claim, write, park, crash and come back too late, in two processes' worth of stores."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.settings = config.load(home=self.folder / "home", workflows=self.folder)
        self.loop = asyncio.new_event_loop()
        self.now = datetime(2031, 5, 1, 12, 0, tzinfo=UTC)
        self.stores: list[Store] = []
        self.journals: dict[str, list[tuple[str, int | None]]] = {}
        self.owners: dict[tuple[str, int], str] = {}
        self.holds: dict[str, tuple[int, str] | None] = {}
        self.living = ["w1", "w2"]
        self.dead: set[str] = set()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    def open_store(self, role: str) -> Store:
        return self.do(Store(self.settings, role, now=lambda: self.now, at_once=role == "worker").__aenter__())

    @initialize(target=leases)
    def open(self) -> Any:
        self.stores += [self.open_store("server"), self.open_store("worker")]
        for _ in range(3):
            self.create(0)
        return multiple(*self.claim(1, 0, 2, False))

    def teardown(self) -> None:
        try:
            if self.stores:
                self.make_the_projections_anew(0)
        finally:
            for store in self.stores:
                self.do(store.__aexit__())
            self.loop.close()
            shutil.rmtree(self.folder)

    def epoch(self, run_id: str) -> int:
        return sum(1 for type_, _ in self.journals[run_id] if type_ == "run.claimed")

    def try_append(self, which: int, run_id: str, epoch: int | None, *events: ev.Event) -> bool:
        try:
            self.do(self.stores[which].append(run_id, *events, epoch=epoch))
        except (IllegalEvent, LeaseLost):
            return False
        self.journals[run_id] += [(event.type, epoch) for event in events]
        return True

    def folds(self) -> list[run.Run]:
        """The runs, oldest first."""
        return [self.do(self.stores[0].run(run_id)) for run_id in self.journals]

    stores_ = st.integers(0, 1)
    runs_ = st.integers(0, 3)
    numbers = st.integers(0, 9)
    keys = st.sampled_from(["a#1", "b#1"])

    def run_id(self, number: int) -> str:
        return f"r{number % len(self.journals)}"

    @precondition(lambda self: len(self.journals) < 5)
    @rule(which=stores_)
    def create(self, which: int) -> None:
        run_id = f"r{len(self.journals)}"
        self.do(self.stores[which].create(run_id, created()))
        self.journals[run_id] = [("run.created", None)]
        self.holds[run_id] = None

    @rule(which=stores_, seconds=st.sampled_from([0.5, 5.0, 30.0]))
    def let_time_pass(self, which: int, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        due = sorted(
            run.run_id
            for run in self.folds()
            for request in run.open_requests()
            if request.opened.expires and request.opened.expires <= self.now
        )
        assert sorted(self.do(self.stores[which].expire_due())) == due
        for run_id in due:
            self.journals[run_id].append(("request.expired", None))

    @rule(
        target=leases, which=stores_, worker=st.integers(0, 1), limit=st.integers(1, 3), hold=st.booleans(), ask=numbers
    )
    def take(self, which: int, worker: int, limit: int, hold: bool, ask: int) -> Any:
        claimed = self.claim(which, worker, limit, hold)
        for lease in claimed if ask % 2 else []:
            self.ask(which, lease, ask, ask)
        return multiple(*claimed)

    def claim(self, which: int, worker: int, limit: int, hold: bool) -> list[tuple[str, int]]:
        name, before = self.living[worker], self.now - timedelta(seconds=10) if hold else None
        stamp = before and before.isoformat(timespec="microseconds").replace("+00:00", "Z")
        free = [run for run in self.folds() if run.owner is None or run.owner in self.dead]
        wanting = [
            run.run_id for run in free if run.wants_worker or (stamp and run.held_since and run.held_since <= stamp)
        ]
        assert self.do(self.stores[which].wanting(self.dead, held_before=before)) is bool(wanting)
        claimed = self.do(self.stores[which].claim(name, self.dead, limit, held_before=before))
        assert [run_id for run_id, _ in claimed] == wanting[:limit]
        for run_id, epoch in claimed:
            held = self.holds[run_id]
            assert held is None or held[1] in self.dead
            assert epoch == self.epoch(run_id) + 1
            assert (run_id, epoch) not in self.owners
            self.owners[run_id, epoch] = name
            self.holds[run_id] = epoch, name
            self.journals[run_id].append(("run.claimed", epoch))
            if self.do(self.stores[which].run(run_id)).held_since:
                self.park(which, (run_id, epoch))
            else:
                began = self.try_append(which, run_id, epoch, attempt(self.attempts(run_id) + 1))
                assert began or self.ended(run_id)
        return claimed

    def attempts(self, run_id: str) -> int:
        return sum(1 for type_, _ in self.journals[run_id] if type_ == "attempt.started")

    def ended(self, run_id: str) -> bool:
        return any(type_ in ("run.finished", "run.cancelled") for type_, _ in self.journals[run_id])

    def write(self, which: int, lease: tuple[str, int], *events: ev.Event) -> bool:
        """Write under a lease, that may be long over: then it must be refused."""
        run_id, epoch = lease
        accepted = self.try_append(which, run_id, epoch, *events)
        held = self.holds[run_id]
        assert not accepted or (held is not None and held[0] == epoch), "a late writer got in"
        return accepted

    @rule(which=stores_, lease=leases, key=keys)
    def step(self, which: int, lease: tuple[str, int], key: str) -> None:
        before = list(self.journals[lease[0]])
        if self.write(which, lease, *step(key)):
            done = self.do(self.stores[which].run(lease[0])).steps[key]
            assert (done.status, done.value) == ("finished", key)
        else:
            assert self.journals[lease[0]] == before

    @rule(which=stores_, lease=leases, number=numbers, seconds=st.none() | numbers)
    def ask(self, which: int, lease: tuple[str, int], number: int, seconds: int | None) -> None:
        expires = None if seconds is None else self.now + timedelta(seconds=seconds)
        page = [ev.PageOpened(name="main", target_id=f"t{number}")] if number % 2 else []
        request = asked(f"{lease[0]}-q{number}", expires=expires)
        if self.write(which, lease, *page, request, ev.AttemptIdled()) and number % 4 == 1:
            self.release(which, lease)

    @rule(which=stores_, lease=leases)
    def open_page(self, which: int, lease: tuple[str, int]) -> None:
        self.write(which, lease, ev.PageOpened(name="main", target_id=f"t-{lease}"))

    @rule(which=stores_, lease=leases)
    def lose_page(self, which: int, lease: tuple[str, int]) -> None:
        if self.write(which, lease, ev.PageLost(what="the browser ended")):
            assert not self.do(self.stores[which].run(lease[0])).pages
            assert self.try_append(which, *lease, attempt(self.attempts(lease[0]) + 1))

    @rule(which=stores_, lease=leases)
    def park(self, which: int, lease: tuple[str, int]) -> None:
        if self.write(which, lease, ev.RunParked()):
            self.holds[lease[0]] = None

    @rule(which=stores_, run=runs_, number=st.integers(0, 5))
    def answer(self, which: int, run: int, number: int) -> None:
        run_id = self.run_id(run)
        asking = [request.opened.request_id for request in self.do(self.stores[0].run(run_id)).open_requests()]
        request_id = asking[number % len(asking)] if asking else f"{run_id}-q{number}"
        assert self.try_append(which, run_id, None, ev.RequestAnswered(request_id=request_id)) is bool(asking)

    @rule(which=stores_, lease=consumes(leases))
    def release(self, which: int, lease: tuple[str, int]) -> None:
        if self.write(which, lease, ev.RunReleased(reason="stopping")):
            self.holds[lease[0]] = None

    @rule(which=stores_, lease=leases)
    def fail(self, which: int, lease: tuple[str, int]) -> None:
        if self.write(which, lease, ev.RunFailed(error=ERROR)):
            self.holds[lease[0]] = None

    @rule(which=stores_, run=runs_)
    def resume(self, which: int, run: int) -> None:
        self.try_append(which, self.run_id(run), None, ev.RunResumed(revision="r1"))

    @rule(which=stores_, lease=leases, how=st.sampled_from(["finish", "cancel"]))
    def end(self, which: int, lease: tuple[str, int], how: str) -> None:
        if how == "finish":
            self.write(which, lease, ev.RunFinished())
        else:
            assert self.try_append(which, lease[0], None, ev.RunCancelled(reason="x")) or self.ended(lease[0])

    @rule(which=stores_, run=runs_, moves=st.sampled_from(HIJACKS))
    def take_or_hand_back(self, which: int, run: int, moves: list[ev.Event]) -> None:
        self.try_append(which, self.run_id(run), None, *moves)

    @rule(worker=st.integers(0, 1))
    def crash_and_start_another(self, worker: int) -> None:
        """The dead one's leases stay in the bundle: it may have been stopped only, and go on too late."""
        self.dead.add(self.living[worker])
        self.living[worker] = f"w{len(self.dead) + 2}"

    @rule(which=stores_, lease=leases, key=keys, what=st.sampled_from(["append", "create", "claim"]))
    def fail_to_commit(self, which: int, lease: tuple[str, int], key: str, what: str) -> None:
        """Nothing is there of what can't be committed, which is for the invariants to see."""
        store = self.stores[which]
        match what:
            case "append":
                work: Coroutine[Any, Any, Any] = store.append(lease[0], *step(key), epoch=lease[1])
            case "create":
                work = store.create(f"r{len(self.journals)}", created())
            case _:
                work = store.claim("w0", self.dead, 3)
        self.let_commit(store, False)
        try:
            assert (what, self.do(work)) == ("claim", []), "it was committed"
        except (StoreError, IllegalEvent, LeaseLost):
            pass
        finally:
            self.let_commit(store, True)

    def let_commit(self, store: Store, allowed: bool) -> None:
        commit = (sqlite3.SQLITE_TRANSACTION, "COMMIT")

        def judge(action: int, what: str | None, *_: object) -> int:
            return sqlite3.SQLITE_DENY if (action, what) == commit else sqlite3.SQLITE_OK

        async def put() -> None:
            connection = store._connection._conn
            await store._thread.read(lambda: connection.set_authorizer(None if allowed else judge))

        self.do(put())

    @rule(which=stores_)
    def let_go_of_what_waits(self, which: int) -> None:
        orphans = [
            (run.run_id, run.awaits_owner and not run.ended)
            for run in self.folds()
            if run.owner in self.dead and (run.awaits_owner or not (run.wants_worker or run.ended))
        ]
        self.do(self.stores[which].orphan_idle(self.dead))
        for run_id, hijacked in orphans:
            self.journals[run_id].append(("run.orphaned", None))
            self.journals[run_id] += [("run.hijacked", None)] if hijacked else []
            self.holds[run_id] = None

    @rule(which=stores_)
    def open_again(self, which: int) -> None:
        self.do(self.stores[which].__aexit__())
        self.stores[which] = self.open_store("worker")

    @rule(which=stores_)
    def lose_the_projections(self, which: int) -> None:
        with raw(self.settings) as connection:
            connection.execute("DROP TABLE run_rows")
            connection.execute("DELETE FROM request_rows")
        assert self.do(self.stores[which].rebuild()) == []

    @rule(which=stores_)
    def make_the_projections_anew(self, which: int) -> None:
        before = self.projections()
        assert self.do(self.stores[which].rebuild()) == []
        assert self.projections() == before

    def projections(self) -> list[Any]:
        with raw(self.settings) as connection:
            return [
                connection.execute(f"SELECT * FROM {t} ORDER BY 1").fetchall() for t in ("run_rows", "request_rows")
            ]

    @invariant()
    def every_journal_is_whole_and_every_status_is_its_own(self) -> None:
        listed = []
        for store in self.stores:
            rows = self.do(store.list_runs([], None, None, 100, None))
            listed.append({row.run_id: row.status for row in rows})
        for run_id, expected in self.journals.items():
            recorded = self.do(self.stores[0].events(run_id))
            assert [(r.event.type, r.epoch) for r in recorded] == expected
            assert self.do(self.stores[1].verify(run_id)) == len(expected)
            folded = run.fold(run_id, recorded)
            assert folded == self.do(self.stores[1].run(run_id))
            assert folded.status in get_args(run.Status)
            assert [statuses[run_id] for statuses in listed] == [folded.status] * 2

    @invariant()
    def every_epoch_has_one_owner_and_it_is_the_last_that_the_journal_names(self) -> None:
        for run_id in self.journals:
            recorded = self.do(self.stores[0].events(run_id))
            claims = [(r.epoch, r.event.worker) for r in recorded if isinstance(r.event, ev.RunClaimed)]
            assert claims == [(n, self.owners[run_id, n]) for n in range(1, len(claims) + 1)]
            held = self.holds[run_id]
            assert self.do(self.stores[0].run(run_id)).owner == (held and held[1])


def test_no_run_has_two_owners_and_no_event_is_lost_whatever_happens() -> None:
    hypothesis.stateful.run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Home, settings=hypothesis.settings(max_examples=25, stateful_step_count=30, deadline=None)
    )
