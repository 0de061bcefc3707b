"""A journal outlives the version that wrote it: it is migrated whole or not at all, and an older process stops."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mcp_flow import events as ev
from mcp_flow import store as store_module
from mcp_flow.config import Settings
from mcp_flow.errors import StoreError
from mcp_flow.store import Store

SCHEMA_1 = Path(__file__).parent / "journals" / "schema-1.sql"
"""What the first version left of a home folder: runs that wait, failed, were cancelled and queued."""


@pytest.fixture
def old_home(settings: Settings) -> Settings:
    """A home folder whose database has schema 1."""
    settings.home.mkdir(mode=0o700)
    with closing(sqlite3.connect(settings.database)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA_1.read_text())
    return settings


def dump(database: Path) -> list[str]:
    """All that is in a database."""
    with closing(sqlite3.connect(database)) as connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        return [*connection.iterdump(), f"PRAGMA user_version = {version}"]


async def test_a_home_folder_of_schema_1_has_all_that_it_had(old_home: Settings) -> None:
    with closing(sqlite3.connect(old_home.database)) as connection:
        before = connection.execute("SELECT * FROM events ORDER BY run, seq").fetchall()
    async with Store(old_home, "test") as store:
        rows = await store.list_runs([], None, None, 10, None)
        assert [(row.run_id, row.workflow, row.status, row.owner, row.why) for row in rows] == [
            ("queued", "sell", "queued", None, None),
            ("cancelled", "sell", "cancelled", None, "enough"),
            ("failed", "buy", "failed", None, "ValueError: no such button"),
            ("asking", "buy", "waiting-approval", "w-1", "Pay?"),
        ]
        assert [await store.verify(row.run_id) for row in rows] == [1, 2, 5, 11]
        run = await store.run("asking")
        assert {key: step.value for key, step in run.steps.items()} == {"open shop#1": "ünï", "now#1": "2026-05-01"}
        assert (run.pages, run.requests["q-1"].value, run.held_since) == (
            {"main": "T1"},
            3,
            "2026-05-01T12:00:08.000000Z",
        )
        [pending] = await store.open_requests()
        assert (pending.run_id, pending.request.request_id, pending.request.data) == ("asking", "q-2", {"total": 5})
        assert await store.find_request("q-1") == "asking"
        assert (await store.run("failed")).steps["pay#1"].in_doubt
        assert await store.load_revision("abc") == ("buy.py", {"buy.py": b"print('tea')\n"})
        assert (await store.beats())["w-1"].silent == 0
    with closing(sqlite3.connect(old_home.database)) as connection:
        assert connection.execute("SELECT * FROM events ORDER BY run, seq").fetchall() == before
        assert connection.execute("PRAGMA user_version").fetchone() == (store_module.SCHEMA_VERSION,)
        assert connection.execute("SELECT count(*) FROM steps").fetchone() == (2,)


async def test_a_checkpoint_of_schema_1_says_where_the_pages_were_and_what_they_stored(old_home: Settings) -> None:
    async with Store(old_home, "test") as store:
        asking, failed = await store.load_checkpoint("asking"), await store.load_checkpoint("failed")
    assert asking
    assert failed
    places, data = map(json.loads, asking)
    assert places == {"main": "http://shop/cart", "mail": "http://mail/"}
    assert data == {
        "storage": {"cookies": [{"name": "session", "value": "1"}], "origins": []},
        "titles": {"main": ["http://shop/cart", "Cart"]},
    }
    assert json.loads(failed[0]) == {}
    assert json.loads(failed[1])["storage"] == {"cookies": [], "origins": []}


async def test_a_run_of_schema_1_goes_on(old_home: Settings) -> None:
    async with Store(old_home, "worker", at_once=True) as store:
        await store.append("asking", ev.RequestAnswered(request_id="q-2", value={"approved": True}))
        assert await store.claim("w-9", ["w-1"], 9) == [("asking", 2), ("queued", 1)]
        await store.append("asking", ev.AttemptStarted(attempt=2, revision="abc"), epoch=2)
        await store.append(
            "asking",
            ev.StepStarted(key="pay#1", fingerprint="f", url="/pay", code="c"),
            epoch=2,
            places='{"main": "/pay"}',
        )
        assert await store.verify("asking") == 15
        checkpoint = await store.load_checkpoint("asking")
        assert checkpoint
        assert checkpoint[0] == '{"main": "/pay"}'
        assert json.loads(checkpoint[1])["storage"]["cookies"]


async def test_a_home_folder_that_was_migrated_is_that_of_a_new_one(old_home: Settings) -> None:
    async with Store(old_home, "test"):
        pass
    with closing(sqlite3.connect(old_home.database)) as connection:
        migrated = columns(connection)
    old_home.database.unlink()
    async with Store(old_home, "test"):
        pass
    with closing(sqlite3.connect(old_home.database)) as connection:
        assert columns(connection) == migrated


def columns(connection: sqlite3.Connection) -> dict[str, Any]:
    """What tables, views and indexes there are, and the columns of each."""
    names = connection.execute("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%' ORDER BY name").fetchall()
    return {name: connection.execute(f"SELECT * FROM pragma_table_xinfo('{name}')").fetchall() for (name,) in names}


KILLED_AT = """
import asyncio, os, shutil, signal, sqlite3, sys
from pathlib import Path
from mcp_flow import config, store

connect, home, folder = sqlite3.connect, Path(sys.argv[1]), Path(sys.argv[2])

def killing(number):
    def connect_and_count(*args, **kwargs):
        connection, left = connect(*args, **kwargs), [number]

        def count(statement):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        connection.set_trace_callback(count)
        return connection

    return connect_and_count

async def open_store(settings):
    async with store.Store(settings, "test"):
        pass

number, status = -1, 1
while status:
    number += 1
    shutil.copytree(home, folder / str(number))
    if (pid := os.fork()) == 0:
        store.sqlite3.connect = killing(number)
        asyncio.run(open_store(config.load(home=folder / str(number))))
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
print(number)
"""


async def test_a_migration_that_is_killed_at_any_statement_has_not_been(old_home: Settings, tmp_path: Path) -> None:
    before = dump(old_home.database)
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", KILLED_AT, str(old_home.home), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(store_module.__file__).parents[1])},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    statements = int(ended.stdout)
    assert statements > 30
    done = f"PRAGMA user_version = {store_module.SCHEMA_VERSION}"
    found = [dump(tmp_path / str(number) / "flow.db") for number in range(statements + 1)]
    migrated = [state[-1] == done for state in found]
    # At most the few statements that come after the commit find it migrated; before, nothing of it is there.
    assert migrated == sorted(migrated)
    assert 1 <= sum(migrated) <= 3
    for number, state in enumerate(found[: migrated.index(True)]):
        assert state == before, f"killed at statement {number}"
    last = migrated.index(True) - 1
    shutil.copy(tmp_path / str(last) / "flow.db", old_home.database)
    async with Store(old_home, "test") as store:
        assert await store.verify("asking") == 11
        assert await store.load_checkpoint("asking")


async def test_a_process_of_an_older_version_stops_once_the_journal_is_migrated(
    old_home: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Store(old_home, "test"):
        pass
    now = store_module.SCHEMA_VERSION
    with closing(sqlite3.connect(old_home.database)) as connection:
        connection.execute(f"PRAGMA user_version = {now - 1}")
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", now - 1)
    async with Store(old_home, "worker", at_once=True) as older:
        monkeypatch.undo()
        async with Store(old_home, "test") as newer:
            await newer.append("failed", ev.PageEvaluated(code="1", mode="read", outcome="ok"))
        migrated = dump(old_home.database)
        monkeypatch.setattr(store_module, "SCHEMA_VERSION", now - 1)
        refusal = rf"journal has schema {now} and this mcp-flow writes schema {now - 1}.*Install the newer mcp-flow"
        for move in (
            older.append("queued", ev.RunCancelled(reason="enough")),
            older.claim("w-9", ["w-1"], 9),
            older.decide("failed", lambda _: [ev.RunResumed(revision="abc")]),
        ):
            with pytest.raises(StoreError, match=refusal):
                await move
        with pytest.raises(StoreError, match=refusal):
            async with Store(old_home, "test"):
                pass
    assert dump(old_home.database) == migrated
