"""The one thread of a process that uses the database: jobs in order, adjacent writes sharing a commit.

Every write transaction, open and close holds an exclusive file lock as well. Measured against SQLite's own busy
handler it is fairer between processes and never stalls for a second; and the lock's file names its holder.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mcp_flow import locks
from mcp_flow.errors import StoreError

T = TypeVar("T")
HELD_TOO_LONG = 5.0
_BATCH = 256
"""How many writes may share a commit; more would make the first of them wait for the last."""


class WriteLock:
    """The exclusive lock of a home folder's writers; its file names the holder."""

    def __init__(self, path: Path, holder: str) -> None:
        self._file = locks.open_lock(path)
        self._fd = self._file.fileno()
        self._name = f"{os.getpid()} {holder}".ljust(64).encode()

    def __enter__(self) -> None:
        pause, deadline = 0.0002, 0.0
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                deadline = deadline or now + HELD_TOO_LONG
                if now > deadline:
                    self._end_holder()
                    deadline = now + HELD_TOO_LONG
                time.sleep(pause)
                pause = min(pause * 1.5, 0.003)
        os.pwrite(self._fd, self._name, 0)

    def acquire_now(self) -> bool:
        """Take the lock if nobody has it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.pwrite(self._fd, self._name, 0)
        return True

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give the file back."""
        self._file.close()

    def _end_holder(self) -> None:
        """Kill a worker that has held the lock too long; raise `StoreError` naming any other holder."""
        pid, _, role = os.pread(self._fd, 64, 0).decode(errors="replace").strip().partition(" ")
        if role == "worker" and pid.isdigit() and int(pid) != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
            return
        raise StoreError(
            f"Process {pid or '?'} ({role or 'unknown'}) has held the journal's write lock for {HELD_TOO_LONG:g} s. "
            f"If it is stopped, let it go on (kill -CONT {pid}) or end it, then try again."
        )


class Connection(Protocol):
    """What the thread needs of a database: to open and close it, and the frame of a write transaction."""

    def open(self) -> None: ...
    def close(self) -> None: ...
    def begin(self) -> None: ...
    def begin_body(self) -> None: ...
    def undo_body(self) -> bool: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...


class _Job:
    __slots__ = ("body", "error", "future", "on_result", "queued", "result", "write")

    def __init__(
        self,
        body: Callable[[], Any],
        write: bool,
        future: asyncio.Future[Any] | None,
        on_result: Callable[[Any], None] | None = None,
    ) -> None:
        self.body = body
        self.write = write
        self.future = future
        self.on_result = on_result
        self.queued = False
        self.result: Any = None
        self.error: BaseException | None = None


_NOTHING_MORE = _Job(lambda: None, False, None)


class _HalfDone(Exception):
    """A job failed after it had written something."""


class CommitThread:
    """Runs jobs against a `Connection` in a thread of its own, which closes the lock when it ends.

    With `at_once` a write that is alone in its turn of the loop, while nobody else writes, is committed by the loop
    itself: two hand-overs between threads cost about as much as the commit does. Whatever would have to wait (a second
    write, a held lock, a thread at work) goes to the thread.
    """

    def __init__(
        self,
        connection: Connection,
        lock: WriteLock,
        explain: Callable[[sqlite3.Error], StoreError],
        *,
        at_once: bool = False,
    ) -> None:
        self._connection = connection
        self._lock = lock
        self._explain = explain
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._at_once = at_once
        self._pending: list[_Job] = []
        self._queued = 0
        self._using = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="mcp-flow store", daemon=True)

    async def start(self) -> None:
        """Start the thread and open the database; raises `StoreError`."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        try:
            await self.submit(self._open, write=False)
        except BaseException:
            self._jobs.put(None)
            raise

    async def stop(self) -> None:
        """Close the database after the jobs at hand, and end the thread."""
        try:
            self._flush()
            await self.submit(self._close, write=False)
        finally:
            self._jobs.put(None)
            self._thread.join(timeout=5)

    async def read(self, body: Callable[[], T]) -> T:
        """Run `body` outside a transaction."""
        return await self.submit(body, write=False)

    async def write(self, body: Callable[[], T]) -> T:
        """Run `body` in a write transaction and return once it is durable; an error undoes `body` alone."""
        return await self.submit(body, write=True)

    def write_soon(self, body: Callable[[], Any]) -> None:
        """Queue a write from any thread without waiting for it; its errors are dropped."""
        self._jobs.put(_Job(body, True, None))

    def submit(
        self, body: Callable[[], T], *, write: bool, on_result: Callable[[T], None] | None = None
    ) -> asyncio.Future[T]:
        """Queue a job now, before anything that is queued later; the future is the loop's.

        A job that was queued will happen: who cancels the future only stops waiting. `on_result` is called in the loop
        with the result, before whoever waits goes on, and also when nobody does any more.
        """
        assert self._loop
        future: asyncio.Future[T] = self._loop.create_future()
        job = _Job(body, write, future, on_result)
        if not write or not self._at_once:
            self._jobs.put(job)
            return future
        self._pending.append(job)
        if len(self._pending) == 1:
            self._loop.call_soon(self._flush)
        return future

    def _flush(self) -> None:
        """Commit what this turn of the loop has written, here or in the thread."""
        batch, self._pending = self._pending, []
        if len(batch) == 1 and not self._queued and self._using.acquire(blocking=False):
            try:
                if self._lock.acquire_now():
                    try:
                        self._commit_locked(batch)
                    finally:
                        self._lock.__exit__()
                    self._settle(batch)
                    return
            finally:
                self._using.release()
        for job in batch:
            job.queued = True
            self._queued += 1
            self._jobs.put(job)

    def _open(self) -> None:
        with self._lock, self._explained():
            self._connection.open()

    def _close(self) -> None:
        with self._lock, self._explained():
            self._connection.close()

    def _work(self) -> None:
        try:
            job = self._jobs.get()
            while job is not None:
                if job.write:
                    batch, job = self._gather(job)
                    with self._using:
                        self._commit(batch)
                    self._deliver(batch)
                    if job is _NOTHING_MORE:
                        job = self._jobs.get()
                else:
                    with self._using:
                        self._run(job)
                    self._deliver([job])
                    job = self._jobs.get()
        finally:
            # Here and nowhere else: a number closed under a thread that still waits for the lock may be another
            # file by the time that the thread writes its name into it.
            self._lock.close()

    def _gather(self, first: _Job) -> tuple[list[_Job], _Job | None]:
        """The writes that are queued behind `first` without a gap, and what comes after them."""
        batch = [first]
        while len(batch) < _BATCH:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None or not job.write:
                return batch, job
            batch.append(job)
        return batch, _NOTHING_MORE

    def _run(self, job: _Job) -> None:
        try:
            with self._explained():
                job.result = job.body()
        except BaseException as error:  # the boundary to the thread: whoever waits gets it
            job.error = error

    def _commit(self, batch: list[_Job]) -> None:
        try:
            with self._lock:
                self._commit_locked(batch)
        except BaseException as error:  # the boundary to the thread: whoever waits gets it
            for job in batch:
                job.error = job.error or error

    def _commit_locked(self, batch: list[_Job]) -> None:
        again = False
        try:
            with self._explained():
                try:
                    self._connection.begin()
                    for job in batch:
                        self._run_body(job)
                    self._connection.commit()
                except _HalfDone:
                    self._connection.rollback()
                    again = len(batch) > 1
                except BaseException:
                    self._connection.rollback()
                    raise
        except BaseException as error:  # the boundary to the thread: whoever waits gets it
            for job in batch:
                job.error = job.error or error
        if again:
            for job in batch:
                job.error = None
                self._commit_locked([job])

    def _run_body(self, job: _Job) -> None:
        """Run a job within the transaction. One that is refused has written nothing, as a rule, and needs no savepoint.

        Raises `_HalfDone` where it has: then the transaction is undone, and every job of it gets one of its own.
        """
        self._connection.begin_body()
        try:
            job.result = job.body()
            return
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.IntegrityError):
                raise
            job.error = self._explain(error)
        except Exception as error:  # the job's own condition: it is undone, the batch goes on
            job.error = error
        if not self._connection.undo_body():
            raise _HalfDone

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _deliver(self, batch: list[_Job]) -> None:
        assert self._loop
        waited = [job for job in batch if job.future is not None]
        if waited:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._settle, waited)

    def _settle(self, batch: list[_Job]) -> None:
        """Tell the loop's side of each job how it ended."""
        for job in batch:
            self._queued -= job.queued
            if job.error is None and job.on_result is not None:
                job.on_result(job.result)
            future = job.future
            if future is None or future.done():
                continue
            if job.error is None:
                future.set_result(job.result)
            else:
                future.set_exception(job.error)
                future.exception()  # seen, so that one whose waiter is gone is not complained about
