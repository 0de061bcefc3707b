"""The only SQL: append to journals, load them, claim runs, list requests, keep revisions and checkpoints.

The journal (`journals`, `events`) is the truth. `run_rows` and `request_rows` are projections of it, written in the
transaction of the event and made anew by `rebuild`. People with SQL read the views `runs`, `steps` and `requests`.
Nothing outside this module knows that it is SQLite.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

from mcp_flow import events as ev
from mcp_flow.commits import CommitThread, WriteLock
from mcp_flow.config import Settings, check_id, private_folder
from mcp_flow.errors import BrokenChain, Conflict, FlowError, StoreError, UnknownRun
from mcp_flow.run import Run
from mcp_flow.secrets import secret_places

T = TypeVar("T")
SCHEMA_VERSION = 3
_CACHED_RUNS = 512
_KEPT_VIEWS = 64
_KEPT_EVENTS = 512
BUSY = 5000
"""Milliseconds for which a program that is not mcp-flow may lock the database."""
EMPTY_WITHIN = 200
"""Milliseconds for which readers may hold up the emptying of the log."""
EMPTY_EVERY = 1.0
"""Seconds between two attempts at that."""
_NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "9p", "fuse.sshfs", "ceph"}

_PROJECTIONS = """
CREATE TABLE IF NOT EXISTS run_rows (
  run INTEGER PRIMARY KEY, workflow TEXT NOT NULL, status TEXT NOT NULL, wants_worker INTEGER NOT NULL, owner TEXT,
  epoch INTEGER NOT NULL, attempt INTEGER NOT NULL, created_at TEXT NOT NULL, why TEXT, has_page INTEGER NOT NULL,
  awaits_owner INTEGER NOT NULL, held_since TEXT, hijacked_until TEXT
);
CREATE INDEX IF NOT EXISTS run_rows_wanting ON run_rows (run) WHERE wants_worker;
CREATE INDEX IF NOT EXISTS run_rows_held ON run_rows (held_since) WHERE held_since IS NOT NULL;
CREATE INDEX IF NOT EXISTS run_rows_hijacked ON run_rows (hijacked_until) WHERE hijacked_until IS NOT NULL;
CREATE INDEX IF NOT EXISTS run_rows_status ON run_rows (status, run);
CREATE TABLE IF NOT EXISTS request_rows (
  request_id TEXT PRIMARY KEY, run INTEGER NOT NULL, seq INTEGER NOT NULL, kind TEXT NOT NULL, status TEXT NOT NULL,
  opened_at TEXT NOT NULL, expires TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS request_rows_open ON request_rows (opened_at, request_id) WHERE status = 'open';
CREATE INDEX IF NOT EXISTS request_rows_due ON request_rows (expires) WHERE status = 'open' AND expires IS NOT NULL;
CREATE VIEW IF NOT EXISTS runs AS
  SELECT j.run_id, r.workflow, r.status, r.attempt, r.epoch, r.owner, r.created_at, e.at AS updated_at, r.why
  FROM run_rows r JOIN journals j ON j.no = r.run
  JOIN events e ON e.run = r.run AND e.seq = (SELECT max(seq) FROM events WHERE run = r.run);
CREATE VIEW IF NOT EXISTS steps AS
  SELECT j.run_id, e.data ->> 'key' AS key, ifnull(e.data ->> 'generation', 0) AS generation,
    replace(e.type, 'step.', '') AS status, e.at, e.data ->> 'value' AS value, e.data ->> 'ms' AS ms,
    e.data ->> '$.error.message' AS error
  FROM events e JOIN journals j ON j.no = e.run WHERE e.type IN ('step.started', 'step.finished', 'step.failed')
  AND e.seq = (SELECT max(l.seq) FROM events l WHERE l.run = e.run AND l.type LIKE 'step.%'
    AND l.data ->> 'key' = e.data ->> 'key');
CREATE VIEW IF NOT EXISTS requests AS
  SELECT q.request_id, j.run_id, q.kind, q.status, q.opened_at, q.expires, e.data ->> 'prompt' AS prompt,
    e.data ->> 'by' AS "by"
  FROM request_rows q JOIN journals j ON j.no = q.run JOIN events e ON e.run = q.run AND e.seq = q.seq
"""


@dataclass(frozen=True, slots=True)
class RunRow:
    """A line of the registry; `at` is the time of the run's last event."""

    no: int
    run_id: str
    workflow: str
    status: str
    owner: str | None
    created_at: str
    updated_at: str
    step: str | None
    why: str | None


class Beat(NamedTuple):
    """A worker's process id, the counter of its heart, and the seconds for which its loop had stood still by then."""

    pid: int
    number: int
    silent: float


@dataclass(frozen=True, slots=True)
class RequestRow:
    """An open request and the run that it belongs to."""

    run_id: str
    workflow: str
    opened_at: str
    request: ev.RequestOpened


class _Transaction:
    """Appends within one write transaction; lives in the store's thread."""

    def __init__(self, connection: _Connection, now: Callable[[], datetime]) -> None:
        self._connection = connection
        self._now = now
        self._cache: OrderedDict[str, tuple[int, bytes, Run]] = OrderedDict()
        self._projected: dict[str, tuple[Any, ...]] = {}
        self._current: set[str] = set()
        self._touched: dict[str, int] = {}
        self._requests: dict[str, set[str]] = {}
        self._in_body: set[str] = set()
        self._first_touched: set[str] = set()
        self._tails: dict[str, list[ev.Recorded]] = {}
        self._ends: dict[str, list[ev.Recorded]] = {}

    def begin(self) -> None:
        self._current.clear()
        self._touched.clear()
        self._requests.clear()
        self._ends, self._tails = {run_id: tail[-_KEPT_EVENTS:] for run_id, tail in self._tails.items()}, {}

    def begin_body(self) -> None:
        self._in_body.clear()
        self._first_touched.clear()

    def forget_body(self) -> None:
        """Drop what the undone body may have folded."""
        for run_id in self._in_body:
            self._drop(run_id)
        for run_id in self._first_touched:
            self._touched.pop(run_id, None)

    def forget_all(self) -> None:
        self._cache.clear()
        self._projected.clear()
        self._tails.clear()
        self._ends.clear()

    def end(self) -> None:
        """After the commit nothing is certain any more: another process may write."""
        self._current.clear()

    def _drop(self, run_id: str) -> None:
        self._cache.pop(run_id, None)
        self._tails.pop(run_id, None)
        self._ends.pop(run_id, None)
        self._projected.pop(run_id, None)
        self._current.discard(run_id)

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(sql, values)

    def number(self, run_id: str) -> int:
        """The number of a run's journal; raises `UnknownRun`."""
        row = self.execute("SELECT no FROM journals WHERE run_id = ?", (run_id,)).fetchone()
        if row is None:
            raise UnknownRun(f"There is no run {run_id!r}. list_runs() shows the runs that there are.")
        return int(row[0])

    def fold(self, run_id: str) -> tuple[int, bytes, Run]:
        """The run as its journal is now: `seq` and hash are read in this very transaction."""
        cached = self._cache.get(run_id)
        if cached is not None and run_id in self._current:
            return cached
        if cached is None:
            number, tip, run = self.number(run_id), ev.genesis(run_id), Run(run_id)
        else:
            number, tip, run = cached
            row = self.execute(
                "SELECT seq, hash FROM events WHERE run = ? ORDER BY seq DESC LIMIT 1", (number,)
            ).fetchone()
            if row is not None and row[0] == run.seq and row[1] == tip:
                self._current.add(run_id)
                return cached
            self._projected.pop(run_id, None)
            if row is None or row[0] <= run.seq:
                number, tip, run = self.number(run_id), ev.genesis(run_id), Run(run_id)
        for recorded, digest in _load(self.execute, number, run.seq):
            run.take(recorded)
            tip = digest
        self._cache[run_id] = (number, tip, run)
        self._cache.move_to_end(run_id)
        self._current.add(run_id)
        while len(self._cache) > _CACHED_RUNS:
            self._drop(next(iter(self._cache)))
        return number, tip, run

    def fold_now(self, run_id: str) -> Run:
        """`fold` outside a transaction, for reading."""
        try:
            return self.fold(run_id)[2]
        finally:
            self._current.clear()

    def append(
        self, run_id: str, prepared: Iterable[tuple[ev.Event, str]], epoch: int | None, since: int | None = None
    ) -> list[ev.Recorded]:
        """Append events if each may follow; returns them, and with `since` all others after it too."""
        self._in_body.add(run_id)
        number, tip, run = self.fold(run_id)
        before = run.seq
        at = _stamp(self._now())
        appended, rows = [], []
        for event, data in prepared:
            recorded = ev.Recorded(run.seq + 1, at, epoch, event)
            run.advance(recorded)
            if request_id := getattr(event, "request_id", None):
                self._requests.setdefault(run_id, set()).add(request_id)
            tip = ev.chain(tip, recorded.seq, at, epoch, event.type, data)
            rows.append((number, recorded.seq, at, epoch, event.type, data, tip))
            appended.append(recorded)
        self._connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        self._cache[run_id] = (number, tip, run)
        if run_id not in self._touched:
            self._touched[run_id] = before
            self._first_touched.add(run_id)
        tail = self._tails.get(run_id)
        if tail is None:
            end = self._ends.get(run_id, [])
            tail = self._tails[run_id] = end if end and end[-1].seq == before else []
        tail += appended
        if since is None or since >= before:
            return appended
        # Many branches append at a time, each from what was known before: reading all that for each is quadratic.
        if tail and tail[0].seq <= since + 1:
            return tail[since + 1 - tail[0].seq :]
        return [recorded for recorded, _ in _load(self.execute, number, since)]

    def project(self) -> None:
        """Write what the touched runs look like now."""
        for run_id, before in self._touched.items():
            number, _, run = self.fold(run_id)
            self.project_run(number, run, before)

    def project_run(self, number: int, run: Run, before: int) -> None:
        """Write a run's row, and those of its requests that were opened or settled after `before`."""
        assert run.created
        waiting = run.open_requests()
        why = _told(run.error) if run.error else waiting[0].opened.prompt if waiting else run.reason
        until = run.hijacked_until
        row = (
            run.status, run.wants_worker, run.owner, run.epoch, run.attempt, why and why[:500], bool(run.pages),
            run.awaits_owner, run.held_since, until and _stamp(until),
        )  # fmt: skip
        if self._projected.get(run.run_id) != row:
            self.execute(
                "INSERT OR REPLACE INTO run_rows (run, workflow, created_at, status, wants_worker, owner, epoch,"
                " attempt, why, has_page, awaits_owner, held_since, hijacked_until)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (number, run.created.workflow, run.created_at, *row),
            )
            self._projected[run.run_id] = row
            if run.ended:
                self._erase_secrets(number)
                self._drop_checkpoint(number, run)
        # Looking at all of them each time would make a run of many questions quadratic.
        whole = not before or run.ended
        for request_id in run.requests if whole else self._requests.get(run.run_id, ()):
            request = run.requests.get(request_id)
            if request is None:  # an undone body named it
                continue
            if request.seq > before:
                expires = request.opened.expires
                self.execute(
                    "INSERT OR REPLACE INTO request_rows VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (request_id, number, request.seq, request.opened.kind, request.status, request.at,
                     expires and _stamp(expires)),
                )  # fmt: skip
            elif request.settled_seq > before:
                self.execute("UPDATE request_rows SET status = ? WHERE request_id = ?", (request.status, request_id))

    def _erase_secrets(self, number: int) -> None:
        """Erase the secret answers of a run that has ended; an empty row says that the log may hold them still."""
        secret = "DELETE FROM secret_answers WHERE run = ? AND ref != ''"
        if self.execute(secret, (number,)).rowcount > 0:
            self.note_erased(number)

    def _drop_checkpoint(self, number: int, run: Run) -> None:
        """Forget what an ended run's pages held: cookies and places outlive no run."""
        dropped = self.execute("DELETE FROM checkpoints WHERE run = ?", (number,)).rowcount
        asked = (request.opened for request in run.requests.values() if request.status == "answered")
        if dropped > 0 and any(secret_places(opened.answer_schema) for opened in asked):
            self.note_erased(number)  # a page may have shown, or kept, what it was given

    def note_erased(self, number: int) -> None:
        """Note, in the very transaction, that the log holds what a run has erased."""
        self.execute("INSERT OR IGNORE INTO secret_answers VALUES (?, '', '')", (number,))
        self._connection.log_holds_secrets = True


class _Connection:
    """The SQLite side of the commit thread."""

    def __init__(self, path: Path, now: Callable[[], datetime]) -> None:
        self._path = path
        self._conn: sqlite3.Connection | None = None
        self._changes = 0
        self.log_holds_secrets = False
        """Whether secrets that were erased may still stand in the write-ahead log."""
        self._held_up_at = -EMPTY_EVERY
        self.transaction = _Transaction(self, now)

    def open(self) -> None:
        # Only a new file is opened here: closing a file of which this process has a connection already would drop the
        # locks of that one, and whoever leaves the database then takes its log away from under it.
        if self._path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with suppress(FileExistsError):
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        if not os.access(self._path, os.W_OK):
            # SQLite opens it all the same, and says so at the first write only.
            raise sqlite3.OperationalError("attempt to write a readonly database")
        # Who has locked it now is no process of ours, which would hold the lock that we have: that is said at once.
        conn = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=0.2)
        try:
            version = conn.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise StoreError(_too_new(version))
            conn.execute("PRAGMA journal_mode = WAL")
            conn.execute("PRAGMA synchronous = FULL")
            conn.execute("PRAGMA foreign_keys = ON")
            conn.execute("PRAGMA secure_delete = ON")  # or an erased secret would stand on in a free page
            self._conn = conn
            if version < SCHEMA_VERSION:
                # All or nothing: a crash in between must leave a database of the older schema.
                conn.execute("BEGIN IMMEDIATE")
                # A quarter of the time that a process needs to start, for what is to be done once.
                from mcp_flow import schema

                schema.migrate(conn)
                self.rebuild()
                conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                conn.execute("COMMIT")
            left = conn.execute("SELECT 1 FROM secret_answers WHERE ref = '' LIMIT 1").fetchone()
            self.log_holds_secrets = left is not None
            conn.execute(f"PRAGMA busy_timeout = {BUSY}")
            self._empty_log()
        except BaseException:
            conn.close()
            self._conn = None
            raise

    def close(self) -> None:
        if self._conn is not None:
            self._empty_log()
            self._conn.close()
            self._conn = None

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        if self._conn is None:
            raise StoreError("The journal is closed.")
        return self._conn.execute(sql, values)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        assert self._conn
        self._conn.executemany(sql, rows)

    def begin(self) -> None:
        self.execute("BEGIN IMMEDIATE")
        version = self.execute("PRAGMA user_version").fetchone()[0]
        if version != SCHEMA_VERSION:
            raise StoreError(_too_new(version))
        self.transaction.begin()

    def begin_body(self) -> None:
        assert self._conn
        self.transaction.begin_body()
        self._changes = self._conn.total_changes

    def undo_body(self) -> bool:
        """Forget what the failed body has folded, and say whether that undoes it because it has written nothing."""
        assert self._conn
        self.transaction.forget_body()
        return self._conn.total_changes == self._changes

    def commit(self) -> None:
        try:
            self.transaction.project()
        except sqlite3.OperationalError as error:
            if "no such table" not in str(error):
                raise
            self.rebuild()
        self.execute("COMMIT")
        self.transaction.end()
        self._empty_log()

    def _empty_log(self) -> None:
        """Empty the write-ahead log, where erased secrets may stand in it; while somebody reads, a second later."""
        if not self.log_holds_secrets or time.monotonic() - self._held_up_at < EMPTY_EVERY:
            return
        with suppress(sqlite3.OperationalError):  # what was committed is, whatever becomes of the log
            self.execute(f"PRAGMA busy_timeout = {EMPTY_WITHIN}")
            try:
                busy = self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                self.execute(f"PRAGMA busy_timeout = {BUSY}")
            if busy:
                self._held_up_at = time.monotonic()
                return
            self.execute("DELETE FROM secret_answers WHERE ref = ''")
            self.log_holds_secrets = False

    def rollback(self) -> None:
        self.transaction.forget_all()
        if self._conn is not None and self._conn.in_transaction:
            self._conn.execute("ROLLBACK")

    def rebuild(self) -> list[str]:
        """Make every projection anew from the events; returns the runs whose journals can't be read."""
        self.transaction.forget_all()
        for view in ("runs", "steps", "requests"):
            self.execute(f"DROP VIEW IF EXISTS {view}")
        for table in ("run_rows", "request_rows"):
            self.execute(f"DROP TABLE IF EXISTS {table}")
        for statement in _PROJECTIONS.split(";\n"):
            self.execute(statement)
        journals = self.execute("SELECT no, run_id FROM journals").fetchall()
        unreadable = []
        for number, run_id in journals:
            run = Run(run_id)
            try:
                for recorded, _ in _load(self.execute, number, 0):
                    run.advance(recorded)
            except (FlowError, ValueError, sqlite3.OperationalError):
                unreadable.append(run_id)
                continue
            self.transaction.project_run(number, run, 0)
        # A row counts as written only as long as its run is cached, or what others write would go unnoticed.
        self.transaction.forget_all()
        return unreadable


class Store:
    """The journal of a home folder. Use as an async context manager; every method may raise `StoreError`.

    The `role` is what others call this process; a `worker` that stands still in a commit is killed by whoever waits.
    With `at_once` the loop commits by itself where that saves time.
    """

    def __init__(
        self, settings: Settings, role: str, now: Callable[[], datetime] | None = None, *, at_once: bool = False
    ) -> None:
        self.now = now or (lambda: datetime.now(UTC))
        self._settings = settings
        self._role = role
        # A process that writes step after step waits for each; a server must answer while a disk is slow.
        self._at_once = at_once
        # Whoever follows a run holds it; of the others a few are kept, so that a server does not grow with its runs.
        self._views: WeakValueDictionary[str, Run] = WeakValueDictionary()
        self._recent: OrderedDict[str, Run] = OrderedDict()
        self.on_recorded: Callable[[str, ev.Recorded], None] | None = None
        """Called with each event of a run that is followed here, once it is durable."""
        self._connection = _Connection(settings.database, self.now)
        self._tx = self._connection.transaction

    async def __aenter__(self) -> Store:
        home = private_folder(self._settings.home)
        _refuse_network(home)
        try:
            lock = WriteLock(home / "write.lock", self._role)
            self._thread = CommitThread(self._connection, lock, self._explain, at_once=self._at_once)
            await self._thread.start()
        except OSError as error:
            raise StoreError(f"The journal in {home} can't be opened: {error.strerror}.") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._thread.stop()

    # --- journals ---

    async def create(
        self,
        run_id: str,
        *events: ev.Event,
        checkpoint: tuple[str, str] | None = None,
        owner: str | None = None,
    ) -> None:
        """Begin a journal; raises `Conflict` for an id in use.

        A `checkpoint` is places and data of its pages to be; with an `owner` nobody else can claim the run before.
        """
        check_id(run_id, "run")
        prepared = [(event, event.encoded()) for event in events]
        claimed = ev.RunClaimed(worker=owner) if owner else None

        def body() -> None:
            if self._tx.execute("SELECT 1 FROM journals WHERE run_id = ?", (run_id,)).fetchone():
                raise Conflict(f"The run id {run_id!r} is in use. get_run(run_id={run_id!r}) shows that run.")
            self._tx.execute("INSERT INTO journals (run_id) VALUES (?)", (run_id,))
            self._tx.append(run_id, prepared, None)
            if checkpoint:
                self._save_places(run_id, checkpoint[0])
                self._save_data(run_id, checkpoint[1])
            if claimed:
                self._tx.append(run_id, [(claimed, claimed.encoded())], 1)

        await self._thread.write(body)

    async def append(self, run_id: str, *events: ev.Event, epoch: int | None = None, places: str | None = None) -> None:
        """Append events, all or none, and return once they are durable; raises `IllegalEvent` or `LeaseLost`.

        With them are kept the `places` at which the run's pages are by then.
        """
        await self.append_soon(run_id, *events, epoch=epoch, places=places)

    def append_soon(
        self, run_id: str, *events: ev.Event, epoch: int | None = None, places: str | None = None
    ) -> asyncio.Future[Any]:
        """`append`, queued at once, before whatever is appended later; the future ends when it is durable."""
        prepared = [(event, event.encoded()) for event in events]
        view = self._views.get(run_id)

        def body() -> list[ev.Recorded]:
            appended = self._tx.append(run_id, prepared, epoch, view.seq if view else None)
            if places is not None:
                self._save_places(run_id, places)
            return appended

        return self._thread.submit(
            body,
            write=True,
            on_result=lambda recorded: self._advance(run_id, recorded),
        )

    def append_from_thread(self, run_id: str, event: ev.Event) -> None:
        """Append an event that needs no epoch, from any thread, without waiting for it."""
        prepared = [(event, event.encoded())]
        self._thread.write_soon(lambda: self._tx.append(run_id, prepared, None))

    async def decide(
        self, run_id: str, plan: Callable[[Run], Sequence[ev.Event]], epoch: int | None = None
    ) -> list[ev.Recorded]:
        """Append what `plan` says to the run as it is in the transaction; `plan` may raise to append nothing."""
        view = self._views.get(run_id)

        def body() -> tuple[list[ev.Recorded], int]:
            run = self._tx.fold(run_id)[2]
            before, since = run.seq, view.seq if view else None
            prepared = [(event, event.encoded()) for event in plan(run)]
            return (self._tx.append(run_id, prepared, epoch, since) if prepared else []), before

        recorded, before = await self._thread.submit(
            body, write=True, on_result=lambda result: self._advance(run_id, result[0])
        )
        return [r for r in recorded if r.seq > before]

    async def run(self, run_id: str) -> Run:
        """The run as it is now, to be read only; raises `UnknownRun`. The same object while anyone holds it."""
        if view := self._views.get(run_id):
            self._keep(view)
            since = view.seq
            body = lambda: [r for r, _ in _load(self._tx.execute, self._tx.number(run_id), since)]  # noqa: E731
            self._advance(run_id, await self._read(body))
            return view
        # A copy of the fold that the transactions keep: a long journal is read and folded once a process.
        fresh = await self._read(lambda: self._tx.fold_now(run_id).copy())
        view = self._views.setdefault(run_id, fresh)
        self._keep(view)
        return view

    def forget(self, run_id: str) -> None:
        """Drop the kept fold of a run that nobody here follows any more."""
        self._views.pop(run_id, None)
        self._recent.pop(run_id, None)

    def _keep(self, view: Run) -> None:
        self._recent[view.run_id] = view
        self._recent.move_to_end(view.run_id)
        while len(self._recent) > _KEPT_VIEWS:
            self._recent.popitem(last=False)

    async def targets(self) -> set[str]:
        """The target ids of all pages that runs which have not ended have recorded."""

        def body() -> set[str]:
            sql = "SELECT j.run_id FROM run_rows r JOIN journals j ON j.no = r.run WHERE r.has_page"
            runs = [self._tx.fold(run_id)[2] for (run_id,) in self._tx.execute(sql).fetchall()]
            return {target for run in runs if not run.ended for target in run.pages.values()}

        return await self._thread.write(body)

    async def events(self, run_id: str, since: int = 0, limit: int = 1000) -> list[ev.Recorded]:
        """The events after `since`, at most `limit`; raises `UnknownRun`."""

        def body() -> list[ev.Recorded]:
            return [r for r, _ in _load(self._tx.execute, self._tx.number(run_id), since, limit)]

        return await self._read(body)

    async def verify(self, run_id: str) -> int:
        """Check that a journal's chain holds and folds; returns its length. Raises `BrokenChain` at the first fault."""

        def body() -> int:
            number, tip, run = self._tx.number(run_id), ev.genesis(run_id), Run(run_id)
            rows = self._tx.execute(
                "SELECT seq, CAST(at AS BLOB), CAST(type AS BLOB), CAST(data AS BLOB), epoch, hash FROM events"
                " WHERE run = ? ORDER BY seq",
                (number,),
            )
            # Closed at the first fault, or what is raised would keep this connection at an old state of the database.
            with closing(rows):
                for seq, *texts, epoch, digest in rows:
                    # Read as bytes, because damage that is no UTF-8 must be named like any other.
                    at, type_, data = (text.decode("utf-8", "surrogateescape") for text in texts)
                    tip = ev.chain(tip, seq, at, epoch, type_, data)
                    if seq != run.seq + 1:
                        raise BrokenChain(f"Run {run_id}: event {run.seq + 1} is missing; the next one there is {seq}.")
                    if tip != digest:
                        raise BrokenChain(f"Run {run_id}: event {seq} ({type_}) was changed; the chain breaks there.")
                    try:
                        run.advance(ev.Recorded(seq, at, epoch, ev.decode(type_, data)))
                    except (FlowError, ValueError) as error:
                        raise BrokenChain(f"Run {run_id}: event {seq} ({type_}) can't be: {error}") from error
            if not run.seq:
                raise BrokenChain(f"Run {run_id}: event 1 is missing; nothing is left of the journal.")
            return run.seq

        return await self._read(body)

    async def rebuild(self) -> list[str]:
        """Make every projection anew from the events; returns the runs whose journals can't be read."""
        return await self._thread.write(self._connection.rebuild)

    # --- work ---

    async def claim(
        self,
        worker: str,
        dead: Iterable[str],
        limit: int,
        *,
        held_before: datetime | None = None,
        only: str | None = None,
        such: Callable[[Run], bool] = lambda _: True,
    ) -> list[tuple[str, int]]:
        """Take up to `limit` runs that have no living owner, oldest first; returns ids and epochs.

        Those that want a worker, and those that hold a page without use since before `held_before`; or `only` one; and
        of them `such` as the caller chooses.
        """
        where, values = _wanting(dead, held_before, only)

        def wanting(among: str, those: Sequence[Any]) -> list[str]:
            sql = (
                f"SELECT j.run_id FROM run_rows r JOIN journals j ON j.no = r.run WHERE {where} {among} ORDER BY r.run"
            )
            return [run_id for (run_id,) in self._tx.execute(sql, (*values, *those)).fetchall()]

        # A long journal is folded before the lock is taken; the transaction then reads only what is newer.
        # One that can't be read must not keep the others from being executed; `verify` says what is wrong with it.
        chosen: list[str] = []
        for run_id in await self._read(lambda: wanting("", ())):
            with suppress(FlowError, ValueError):
                if such(await self._read(partial(self._tx.fold_now, run_id))):
                    chosen.append(run_id)
            if len(chosen) == limit:
                break

        def body() -> list[tuple[str, int]]:
            claimed = []
            event = ev.RunClaimed(worker=worker)
            for run_id in wanting("AND j.run_id IN (SELECT value FROM json_each(?))", (json.dumps(chosen),)):
                epoch = self._tx.fold(run_id)[2].epoch + 1
                self._tx.append(run_id, [(event, event.encoded())], epoch)
                claimed.append((run_id, epoch))
            return claimed

        return await self._thread.write(body) if chosen else []

    async def orphan_idle(self, dead: Iterable[str]) -> None:
        """Let go of the runs whose owner is among `dead` and is to execute nothing of them.

        Those that wait: an answer is to wake them like any other. Those that were cancelled: whoever comes closes their
        pages. And those that somebody wants to hijack: nothing is in the way any more.
        """
        sql = (
            "SELECT j.run_id, r.owner FROM run_rows r JOIN journals j ON j.no = r.run WHERE (r.awaits_owner"
            " OR NOT r.wants_worker AND r.status NOT IN ('finished', 'cancelled', 'continued'))"
            " AND r.owner IN (SELECT value FROM json_each(?))"
        )
        gone = json.dumps(list(dead))

        def body() -> None:
            for run_id, owner in self._tx.execute(sql, (gone,)).fetchall():
                run = self._tx.fold(run_id)[2]
                events: list[ev.Event] = [ev.RunOrphaned(owner=owner)]
                if run.awaits_owner and not run.ended:
                    events.append(ev.RunHijacked())
                self._tx.append(run_id, [(event, event.encoded()) for event in events], None)

        if await self._read(lambda: self._tx.execute(sql, (gone,)).fetchone()):
            await self._thread.write(body)

    async def executed_by(self, worker: str) -> list[str]:
        """The runs of a worker that have its code at work, as far as their journals tell."""
        sql = (
            "SELECT j.run_id FROM run_rows r JOIN journals j ON j.no = r.run"
            " WHERE r.wants_worker AND r.owner = ? ORDER BY r.run"
        )
        rows = await self._read(lambda: self._tx.execute(sql, (worker,)).fetchall())
        return [run_id for (run_id,) in rows]

    async def owners(self, *, waiting: bool = False) -> dict[str, bool]:
        """The workers that own runs which have work for a worker, and whether somebody waits for them to react.

        With `waiting` those that own runs which wait, too.
        """
        which = "status NOT IN ('finished', 'cancelled', 'continued') OR wants_worker" if waiting else "wants_worker"
        sql = (
            f"SELECT owner, max(awaits_owner) FROM (SELECT owner, awaits_owner FROM run_rows WHERE {which}"
            " UNION ALL SELECT owner, 0 FROM run_rows WHERE held_since IS NOT NULL)"
            " WHERE owner IS NOT NULL GROUP BY owner"
        )
        rows = await self._read(lambda: self._tx.execute(sql).fetchall())
        return {owner: bool(awaited) for owner, awaited in rows}

    async def wanting(
        self, dead: Iterable[str], *, held_before: datetime | None = None, only: str | None = None
    ) -> bool:
        """Whether there is any run that `claim` would take."""
        where, values = _wanting(dead, held_before, only)
        sql = f"SELECT 1 FROM run_rows r JOIN journals j ON j.no = r.run WHERE {where} LIMIT 1"
        return await self._read(lambda: self._tx.execute(sql, values).fetchone() is not None)

    async def expire_due(self) -> list[str]:
        """Expire the open requests and the holds on pages whose time is over; returns their runs."""

        def due() -> list[tuple[str, str | None]]:
            now = _stamp(self.now())
            return self._tx.execute(
                "SELECT j.run_id, q.request_id FROM request_rows q JOIN journals j ON j.no = q.run"
                " WHERE q.status = 'open' AND q.expires IS NOT NULL AND q.expires <= ? UNION ALL"
                " SELECT j.run_id, NULL FROM run_rows r JOIN journals j ON j.no = r.run WHERE r.hijacked_until <= ?"
                " LIMIT 1000",
                (now, now),
            ).fetchall()

        def body() -> list[str]:
            expired = []
            for run_id, request_id in due():
                try:
                    event = ev.RequestExpired(request_id=request_id) if request_id else ev.HijackExpired()
                    self._tx.append(run_id, [(event, event.encoded())], None)
                except (FlowError, ValueError):  # settled meanwhile; or unreadable, which must not hold up the others
                    continue
                expired.append(run_id)
            return expired

        return await self._thread.write(body) if await self._read(due) else []

    async def next_due(self, hold: float, after: datetime) -> datetime | None:
        """When, later than `after`, a request or a hold on a page expires, or a page has been unused for `hold`."""
        queries = (
            "SELECT min(expires) FROM request_rows WHERE status = 'open' AND expires > ?",
            "SELECT min(hijacked_until) FROM run_rows WHERE hijacked_until > ?",
            "SELECT min(held_since) FROM run_rows WHERE held_since > ?",
        )
        unused_for = timedelta(seconds=hold)
        values = (_stamp(after), _stamp(after), _stamp(after - unused_for))

        def body() -> list[str | None]:
            return [self._tx.execute(sql, (value,)).fetchone()[0] for sql, value in zip(queries, values, strict=True)]

        *expires, held = await self._read(body)
        moments = [datetime.fromisoformat(moment) for moment in expires if moment]
        moments += [datetime.fromisoformat(held) + unused_for] if held else []
        return min(moments, default=None)

    def beat(self, worker: str, silent: float = 0.0) -> None:
        """Raise the worker's counter, and say for how long its loop has stood still; from any thread, not waiting."""
        self._thread.write_soon(lambda: self._beat(worker, silent))

    async def first_beat(self, worker: str) -> None:
        """Begin the worker's counter, and return once that is durable."""
        await self._thread.write(lambda: self._beat(worker, 0.0))

    def _beat(self, worker: str, silent: float) -> None:
        sql = (
            "INSERT INTO beats VALUES (?, ?, 1, ?) ON CONFLICT DO UPDATE SET beat = beat + 1, silent = excluded.silent"
        )
        self._tx.execute(sql, (worker, os.getpid(), silent))

    async def beats(self) -> dict[str, Beat]:
        """The sign of life of each worker that is known."""
        rows = await self._read(lambda: self._tx.execute("SELECT worker, pid, beat, silent FROM beats").fetchall())
        return {worker: Beat(*values) for worker, *values in rows}

    async def forget_worker(self, worker: str) -> None:
        """Drop the counter of a worker that is gone."""
        await self._thread.write(lambda: self._tx.execute("DELETE FROM beats WHERE worker = ?", (worker,)))

    async def data_version(self) -> int:
        """A number that changes when another process has written."""
        return int(await self._read(lambda: self._tx.execute("PRAGMA data_version").fetchone()[0]))

    # --- the registry ---

    async def list_runs(
        self,
        status: Sequence[str],
        workflow: str | None,
        query: str | None,
        limit: int,
        before: int | None,
        living: Iterable[str] | None = None,
    ) -> list[RunRow]:
        """Runs, newest first; `before` is the `no` of the last page's last row.

        `query` is sought in ids, workflows' names and whys, which of a failure hold its type and step.

        With the workers that are `living`, a running run of another's is `interrupted`.
        """
        where, values = ["1"], list[Any]()
        word = "r.status"
        if living is not None:
            word = "CASE WHEN r.status = 'running' AND r.owner NOT IN (SELECT value FROM json_each(?))"
            word += " THEN 'interrupted' ELSE r.status END"
            values.append(json.dumps(sorted(living)))
        if status:
            where.append("r.status IN (SELECT value FROM json_each(?))")
            where.append("word IN (SELECT value FROM json_each(?))")
            stored = {"running" if one == "interrupted" else one for one in status}
            values += [json.dumps(sorted(stored)), json.dumps(list(status))]
        if workflow:
            where.append("r.workflow = ?")
            values.append(workflow)
        if query:
            where.append("instr(lower(j.run_id || char(10) || r.workflow || char(10) || ifnull(r.why, '')), lower(?))")
            values.append(query)
        if before is not None:
            where.append("r.run < ?")
            values.append(before)
        sql = (
            f"SELECT r.run, j.run_id, r.workflow, {word} AS word, r.owner, r.created_at, (SELECT at FROM events e"
            " WHERE e.run = r.run ORDER BY seq DESC LIMIT 1), (SELECT data ->> 'key' FROM events e WHERE e.run = r.run"
            " AND type = 'step.started' ORDER BY seq DESC LIMIT 1), r.why FROM run_rows r"
            f" JOIN journals j ON j.no = r.run WHERE {' AND '.join(where)} ORDER BY r.run DESC LIMIT ?"
        )
        rows = await self._read(lambda: self._tx.execute(sql, [*values, limit]).fetchall())
        return [RunRow(*row) for row in rows]

    async def open_requests(
        self,
        run_id: str | None = None,
        kinds: Sequence[str] = (),
        limit: int = 50,
        after: tuple[str, str] | None = None,
    ) -> list[RequestRow]:
        """Open requests, oldest first; `after` is the time and id of the last row of the page before."""
        where, values = ["q.status = 'open'"], list[Any]()
        if run_id:
            where.append("j.run_id = ?")
            values.append(run_id)
        if kinds:
            where.append("q.kind IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(list(kinds)))
        if after:
            where.append("(q.opened_at, q.request_id) > (?, ?)")
            values += after
        sql = (
            "SELECT j.run_id, r.workflow, q.opened_at, e.data FROM request_rows q JOIN journals j ON j.no = q.run"
            " JOIN run_rows r ON r.run = q.run JOIN events e ON e.run = q.run AND e.seq = q.seq"
            f" WHERE {' AND '.join(where)} ORDER BY q.opened_at, q.request_id LIMIT ?"
        )
        rows = await self._read(lambda: self._tx.execute(sql, [*values, limit]).fetchall())
        return [RequestRow(run, workflow, at, _request(data)) for run, workflow, at, data in rows]

    async def find_request(self, request_id: str) -> str | None:
        """The run that a request belongs to, whatever became of it."""
        sql = "SELECT j.run_id FROM request_rows q JOIN journals j ON j.no = q.run WHERE q.request_id = ?"
        row = await self._read(lambda: self._tx.execute(sql, (request_id,)).fetchone())
        return row[0] if row else None

    async def count(self) -> dict[str, int]:
        """How many runs have each status."""
        sql = "SELECT status, count(*) FROM run_rows GROUP BY status"
        return dict(await self._read(lambda: self._tx.execute(sql).fetchall()))

    # --- beside the journal ---

    async def save_revision(self, digest: str, entry: str, files: Mapping[str, bytes]) -> None:
        """Keep a revision's sources under its hash."""
        text = json.dumps({name: content.decode("utf-8", "surrogateescape") for name, content in files.items()})
        packed = zlib.compress(text.encode("utf-8", "surrogatepass"))
        known = "SELECT 1 FROM revisions WHERE hash = ?"
        if not await self._read(lambda: self._tx.execute(known, (digest,)).fetchone()):
            sql = "INSERT OR IGNORE INTO revisions VALUES (?, ?, ?)"
            await self._thread.write(lambda: self._tx.execute(sql, (digest, entry, packed)))

    async def load_revision(self, digest: str) -> tuple[str, dict[str, bytes]]:
        """Entry and sources of a kept revision; raises `StoreError` when it is not there."""
        sql = "SELECT entry, files FROM revisions WHERE hash = ?"
        row = await self._read(lambda: self._tx.execute(sql, (digest,)).fetchone())
        if row is None:
            raise StoreError(f"The revision {digest[:12]} is not in the store.")
        files = json.loads(zlib.decompress(row[1]).decode("utf-8", "surrogatepass"))
        return row[0], {name: text.encode("utf-8", "surrogateescape") for name, text in files.items()}

    async def save_checkpoint(
        self, run_id: str, places: str | None, data: str | None, epoch: int | None = None
    ) -> None:
        """Keep what a run's pages need to be rebuilt, where they are and what they store; None keeps what was.

        With an `epoch` that is over, nothing is kept.
        """

        def body() -> None:
            run = self._tx.fold(run_id)[2]
            if epoch is not None and (run.epoch != epoch or run.ended):
                return
            if places is not None:
                self._save_places(run_id, places)
            if data is not None:
                self._save_data(run_id, data)

        await self._thread.write(body)

    async def load_checkpoint(self, run_id: str) -> tuple[str, str] | None:
        """Places and data of the last checkpoint."""
        sql = "SELECT places, data FROM checkpoints WHERE run = ?"
        row = await self._read(lambda: self._tx.execute(sql, (self._tx.number(run_id),)).fetchone())
        return (row[0], row[1]) if row else None

    async def answer_with_secrets(
        self, run_id: str, plan: Callable[[Run], Sequence[ev.Event]], secrets: Mapping[str, str]
    ) -> list[ev.Recorded]:
        """`decide`, keeping the secrets that its events refer to outside of the journal, in the same transaction."""

        def body() -> list[ev.Recorded]:
            number, _, run = self._tx.fold(run_id)
            since = run.seq
            prepared = [(event, event.encoded()) for event in plan(run)]
            if not prepared:
                return []
            for ref, value in secrets.items():
                self._tx.execute("INSERT INTO secret_answers VALUES (?, ?, ?)", (number, ref, value))
            return self._tx.append(run_id, prepared, None, since)

        return await self._thread.submit(body, write=True, on_result=lambda recorded: self._advance(run_id, recorded))

    async def secret_answers(self, run_id: str) -> dict[str, str]:
        """The secrets that were given as answers to a run that has not ended, by reference."""
        sql = "SELECT ref, value FROM secret_answers WHERE run = ?"
        return dict(await self._read(lambda: self._tx.execute(sql, (self._tx.number(run_id),)).fetchall()))

    async def waiting_for_event(self, name: str) -> list[str]:
        """The runs that wait for an event of this name, longest first."""
        sql = (
            "SELECT DISTINCT j.run_id FROM request_rows q JOIN journals j ON j.no = q.run"
            " JOIN events e ON e.run = q.run AND e.seq = q.seq"
            " WHERE q.status = 'open' AND q.kind = 'event' AND e.data ->> '$.data.event' = ? ORDER BY q.opened_at"
        )
        return [row[0] for row in await self._read(lambda: self._tx.execute(sql, (name,)).fetchall())]

    async def sent_under(self, key: str) -> str | None:
        """The name of the event that was sent to all who waited under this key, if one was."""
        known = "SELECT sent FROM sent_events WHERE key = ?"
        row = await self._read(lambda: self._tx.execute(known, (key,)).fetchone())
        return row[0] if row else None

    async def note_sending(self, key: str, name: str) -> None:
        """Note that an event was sent under this key to all who waited."""
        sql = "INSERT OR IGNORE INTO sent_events VALUES (?, ?, ?)"
        await self._thread.write(lambda: self._tx.execute(sql, (key, _stamp(self.now()), name)))

    async def pragmas(self) -> dict[str, Any]:
        """The pragmas in force, for benchmarks to print."""
        names = ("journal_mode", "synchronous", "page_size", "wal_autocheckpoint", "user_version")
        return await self._read(lambda: {n: self._tx.execute(f"PRAGMA {n}").fetchone()[0] for n in names})

    # --- inside ---

    def _save_places(self, run_id: str, places: str) -> None:
        self._tx.execute(
            "INSERT INTO checkpoints (run, at, data, places) VALUES (?, ?, '{}', ?)"
            " ON CONFLICT DO UPDATE SET at = excluded.at, places = excluded.places",
            (self._tx.number(run_id), _stamp(self.now()), places),
        )

    def _save_data(self, run_id: str, data: str) -> None:
        self._tx.execute(
            "INSERT INTO checkpoints (run, at, data) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET at = excluded.at, data = excluded.data",
            (self._tx.number(run_id), _stamp(self.now()), data),
        )

    async def _read(self, body: Callable[[], T]) -> T:
        """Run `body` outside a transaction; projections that somebody has dropped are made anew first."""
        try:
            return await self._thread.read(body)
        except StoreError as error:
            if "no such table" not in str(error):
                raise
        await self.rebuild()
        return await self._thread.read(body)

    def _advance(self, run_id: str, recorded: Iterable[ev.Recorded]) -> None:
        if view := self._views.get(run_id):
            for entry in recorded:
                # A view that came into being while an append was on its way may lack what is between: it is
                # read with the next append or `run`.
                if entry.seq == view.seq + 1:
                    view.take(entry)
                    if self.on_recorded:
                        self.on_recorded(run_id, entry)

    def _explain(self, error: sqlite3.Error) -> StoreError:
        path, text = self._settings.database, str(error)
        if isinstance(error, sqlite3.IntegrityError):
            return StoreError(f"The journal refused an entry that it has already: {text}.")
        if "full" in text:
            return StoreError(f"The disk that holds {path} is full. Nothing was lost; make room and call again.")
        if "readonly" in text or "unable to open" in text:
            return StoreError(
                f"{path} can't be written to ({text}). Check its owner and mode, or choose another --home."
            )
        if "not a database" in text or "malformed" in text:
            return StoreError(
                f"{path} is damaged ({text}). Put a copy of it in its place, or move it away to begin anew."
            )
        if "locked" in text:
            return StoreError(f"{path} is locked by a program that is not mcp-flow. End it and call again.")
        return StoreError(f"{path}: {text}.")


def _wanting(dead: Iterable[str], held_before: datetime | None, only: str | None) -> tuple[str, list[Any]]:
    """The condition on a run's row under which a worker takes the run, and its values."""
    # One query a reason, because only then each uses the index made for it.
    work, values = "SELECT run FROM run_rows WHERE wants_worker", list[Any]()
    if held_before is not None:
        work += " UNION ALL SELECT run FROM run_rows WHERE held_since <= ?"
        values.append(_stamp(held_before))
    where = f"r.run IN ({work}) AND (r.owner IS NULL OR r.owner IN (SELECT value FROM json_each(?)))"
    values.append(json.dumps(list(dead)))
    if only is not None:
        where += " AND j.run_id = ?"
        values.append(only)
    return where, values


def _load(
    execute: Callable[[str, Sequence[Any]], sqlite3.Cursor], number: int, since: int, limit: int = -1
) -> Iterable[tuple[ev.Recorded, bytes]]:
    rows = execute(
        "SELECT seq, at, epoch, type, data, hash FROM events WHERE run = ? AND seq > ? ORDER BY seq LIMIT ?",
        (number, since, limit),
    )
    for seq, at, epoch, type_, data, digest in rows.fetchall():
        yield ev.Recorded(seq, at, epoch, ev.decode(type_, data)), digest


def _told(error: ev.Failure) -> str:
    """An error in one text, by which it can be found."""
    return f"{error.type}{f' at step {error.step}' if error.step else ''}: {error.message}"


def _request(data: str) -> ev.RequestOpened:
    return ev.RequestOpened.model_validate_json(data)


def _stamp(moment: datetime) -> str:
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def _too_new(version: int) -> str:
    return (
        f"The journal has schema {version} and this mcp-flow writes schema {SCHEMA_VERSION}. "
        "Install the newer mcp-flow, and restart the client that started this one."
    )


def _refuse_network(home: Path) -> None:
    """Raise `StoreError` for a home on a network file system, whose locks don't hold."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return
    inside = [(where, kind) for where, kind in mounts if home.is_relative_to(where.replace("\\040", " "))]
    _where, kind = max(inside, key=lambda mount: len(mount[0]), default=("", ""))
    if kind in _NETWORK_FILE_SYSTEMS:
        raise StoreError(f"{home} is on a network file system ({kind}), where locks don't hold. Choose a local --home.")
