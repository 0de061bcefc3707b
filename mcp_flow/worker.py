"""The process that executes runs: claim, replay, execute, append; and give back what it can't keep.

A worker gets its work only by claiming it from the store. Everything it holds (coroutines, leases, connections) can be
lost at any instant: another worker claims the runs, replays them and attaches to the pages that still live.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.attempt import Attempt, Outcome
from mcp_flow.browser import host as hosts
from mcp_flow.browser.session import Checkpoint, Driver, OnEvent, PageRecord, Session, attach, sweep
from mcp_flow.config import Settings, private_folder
from mcp_flow.definition import Workflow, workflows_in
from mcp_flow.errors import BrokenWorkflow, FlowError, IllegalEvent, LeaseLost, WorkerCrashed
from mcp_flow.leases import Leases
from mcp_flow.revisions import Revision, load, source_line
from mcp_flow.run import Run
from mcp_flow.store import Store

logger = logging.getLogger(__name__)

BEAT = 2.0
"""Seconds between two heartbeats."""
POLL = 1.0
"""Seconds between two looks for what no doorbell told of."""
BLOCKED_AFTER = 3.0
"""Seconds for which a loop stands still before that is journaled."""
CLAIM_AT_ONCE = 50
MAX_RUNNING = 200

MAX_CRASHES = 3
"""How many workers in a row may die at the same place of a run before it counts as failed."""

Resolved = tuple[Workflow[..., object], Callable[[str, int], str | None]]


class Worker:
    """Executes runs until it has had nothing to do for `settings.worker_idle` seconds, or is told to stop."""

    def __init__(self, settings: Settings, store: Store, worker_id: str | None = None) -> None:
        self.id = worker_id or f"w-{secrets.token_hex(4)}"
        self._settings = settings
        self._store = store
        self._driver = Driver()
        self._attempts: dict[str, Attempt] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._leases = Leases(settings, store)

    async def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Claim and execute until idle or stopped; `ready` is called once the worker can be found by others."""
        presence.sweep(self._settings)
        lock = presence.LifeLock(self._settings, self.id)
        bell = presence.Doorbell(self._settings)
        heart = _Heart(self.id, self._store, self._settings, asyncio.get_running_loop(), self._runs_of_frames)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self.stop)
        heart.start()
        ready()
        try:
            await self._work(bell)
        finally:
            await self._release_all()
            await self._driver.stop()
            heart.stop()
            with contextlib.suppress(FlowError):
                await self._store.forget_worker(self.id)
            bell.close()
            lock.release()
            # Whoever waits for a released run should look for another worker now.
            presence.ring(self._settings, "")

    def stop(self) -> None:
        """Claim nothing more; `serve` gives the runs back and returns."""
        self._stopping.set()

    async def _work(self, bell: presence.Doorbell) -> None:
        idle_since = time.monotonic()
        version = -1
        rung: set[str] = set()
        while not self._stopping.is_set():
            now_version = await self._store.data_version()
            rung |= set(self._attempts) if "" in rung or (now_version != version and not rung) else set()
            version = now_version
            await self._look_at(rung)
            await self._claim()
            if self._executing():
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= self._settings.worker_idle and await self._may_leave():
                return
            rung = await self._next_ring(bell)

    async def _next_ring(self, bell: presence.Doorbell) -> set[str]:
        ring = asyncio.ensure_future(bell.wait(POLL))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({ring, stop}, return_when=asyncio.FIRST_COMPLETED)
            return ring.result() if ring.done() else set()
        finally:
            ring.cancel()
            stop.cancel()

    async def _may_leave(self) -> bool:
        """Leave only if no work came in between; whoever starts a worker meanwhile waits for that to be certain."""
        guard = presence.changing_of_the_guard(self._settings)
        await asyncio.to_thread(guard.__enter__)
        try:
            if await self._store.wanting(await self._dead()):
                return False
            await self._release_all()
            await self._sweep_contexts()
            return True
        finally:
            guard.__exit__(None, None, None)

    async def _sweep_contexts(self) -> None:
        """Close contexts that no run has recorded: what workers killed between making and recording them left."""
        if presence.living(self._settings) - {self.id}:
            return
        keep = await self._store.targets()
        for host in hosts.living(self._settings):
            with contextlib.suppress(FlowError):
                await sweep(self._driver, host, keep)

    def _executing(self) -> bool:
        return any(not attempt.waiting for attempt in self._attempts.values()) or len(self._tasks) > len(self._attempts)

    async def _claim(self) -> None:
        room = MAX_RUNNING - sum(not attempt.waiting for attempt in self._attempts.values())
        if room <= 0:
            return
        # Nobody rings for what this very process has written.
        await self._look_at(set(await self._store.expire_due()))
        dead = await self._dead()
        if not await self._store.wanting(dead):
            return
        for run_id, epoch in await self._store.claim(self.id, dead, min(room, CLAIM_AT_ONCE)):
            task = asyncio.create_task(self._carry(run_id, epoch), name=f"run {run_id}")
            self._tasks[run_id] = task
            task.add_done_callback(partial(self._forget, run_id))

    async def _dead(self) -> list[str]:
        return await self._leases.over(but=self.id)

    def _forget(self, run_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]
            self._store.forget(run_id)
        if not task.cancelled() and (error := task.exception()):
            logger.error("Run %s was dropped: %s", run_id, error, exc_info=error)

    # --- one run ---

    async def _carry(self, run_id: str, epoch: int) -> None:
        """Execute a claimed run until it ends, fails, or is given back."""
        run = await self._store.run(run_id)
        while True:
            if run.ended:
                await self._close_pages_of(run, epoch)
                return
            try:
                if run.crashes >= MAX_CRASHES:
                    raise WorkerCrashed(_crashed(run))
                workflow, line_of = await self._resolve(run)
            except FlowError as error:
                await self._refuse(run, epoch, error)
                return
            attempt = Attempt(
                self._settings, self._store, run, epoch, workflow, line_of, self._open_session, self._announce
            )
            self._attempts[run_id] = attempt
            try:
                outcome = await attempt.execute()
            finally:
                if self._attempts.get(run_id) is attempt:
                    del self._attempts[run_id]
            if await self._settle(attempt, run, epoch, outcome):
                return

    async def _settle(self, attempt: Attempt, run: Run, epoch: int, outcome: Outcome) -> bool:
        """Tidy up after an attempt; returns False when the next one is to follow at once."""
        if outcome in ("finished", "cancelled"):
            had_session = attempt.pages.session is not None
            await attempt.pages.close()
            if run.pages:
                if not had_session:
                    await self._close_pages_of(run, epoch)
                else:
                    await self._append_quietly(run, ev.PageClosed())
            self._announce(run.run_id)
            return True
        await attempt.detach()
        again = outcome == "suspended" and run.owner == self.id and not run.active and not self._stopping.is_set()
        return not again

    async def _refuse(self, run: Run, epoch: int, error: FlowError) -> None:
        """Fail a run whose code can't be had, before any browser starts."""
        failure = ev.Failure(type=type(error).__name__, message=str(error))
        with contextlib.suppress(LeaseLost, IllegalEvent):
            await self._store.append(
                run.run_id,
                ev.AttemptStarted(attempt=run.attempt + 1, revision=run.revision),
                ev.RunFailed(error=failure),
                epoch=epoch,
            )
        self._announce(run.run_id)

    async def _resolve(self, run: Run) -> Resolved:
        """The workflow's function at the run's revision, compiled from the kept bytes."""
        assert run.created
        entry, files = await self._store.load_revision(run.revision)
        revision = Revision(run.created.root, entry, files, run.revision)
        module = load(revision)
        workflow = workflows_in(module).get(run.created.function)
        if workflow is None:
            raise BrokenWorkflow(f"{revision.path} no longer has a workflow {run.created.function!r}.")
        return workflow, lambda file, line: source_line(revision, file, line)

    async def _open_session(self, run: Run, on_event: OnEvent, checkpoint: Checkpoint | None) -> Session:
        assert run.created
        host = await hosts.ensure(self._settings, headless=run.created.headless)
        return await Session.open(
            self._driver,
            host,
            known=[PageRecord(name, target_id) for name, target_id in run.pages.items()],
            checkpoint=checkpoint,
            viewport=run.created.viewport or self._settings.viewport,
            folder=private_folder(self._settings.run_folder(run.run_id)),
            on_event=on_event,
        )

    async def _close_pages_of(self, run: Run, epoch: int) -> None:
        """Close the context of a run that has ended, if its browser still lives."""
        assert run.created
        for host in hosts.living(self._settings):
            for target_id in list(run.pages.values()):
                with contextlib.suppress(FlowError):
                    page = await attach(self._driver, host, target_id)
                    await page.context.close()
                    break
        await self._append_quietly(run, ev.PageClosed())

    async def _append_quietly(self, run: Run, event: ev.Event) -> None:
        with contextlib.suppress(FlowError):  # someone else has tidied up already
            await self._store.append(run.run_id, event)

    # --- from outside ---

    async def _look_at(self, run_ids: set[str]) -> None:
        """Take note of what others wrote about the runs that this worker has."""
        for run_id in run_ids:
            attempt = self._attempts.get(run_id)
            if attempt is None:
                continue
            run = await self._store.run(run_id)
            if run.owner != self.id or (run.ended and not attempt.finishing):
                self._spawn_suspend(attempt, grace=0)
            elif not run.active and run.attempt == attempt.number:
                # `resume` asked for a new attempt, because the code on disk has changed.
                self._spawn_suspend(attempt, grace=self._settings.grace)
            else:
                attempt.refresh()

    def _spawn_suspend(self, attempt: Attempt, grace: float) -> None:
        if not attempt.suspending:
            attempt.suspending = asyncio.create_task(attempt.suspend(grace))

    async def _release_all(self) -> None:
        """Give every run back: steps in flight may end first."""
        reason = "the worker was told to stop" if self._stopping.is_set() else "the worker had nothing to do"
        await asyncio.gather(
            *(self._release(attempt, reason) for attempt in list(self._attempts.values())), return_exceptions=True
        )
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=10)

    async def _release(self, attempt: Attempt, reason: str) -> None:
        run_id = attempt.run.run_id
        await attempt.suspend(self._settings.grace)
        if attempt.run.owner == self.id and not attempt.run.ended:
            with contextlib.suppress(FlowError):
                await self._store.append(run_id, ev.RunReleased(reason=reason), epoch=attempt.run.epoch)
            self._announce(run_id)

    def _announce(self, run_id: str) -> None:
        presence.ring(self._settings, run_id)

    def _runs_of_frames(self, frames: list[tuple[str, int]]) -> list[tuple[str, str, int]]:
        """Which runs' own code stands in these frames: id, file, line."""
        found = []
        for run_id, attempt in list(self._attempts.items()):
            for file, line in frames:
                if attempt.owns(file, line):
                    found.append((run_id, file, line))
                    break
        return found


class _Heart:
    """The thread that raises the worker's counter, and notices when its event loop stands still."""

    def __init__(
        self,
        worker: str,
        store: Store,
        settings: Settings,
        loop: asyncio.AbstractEventLoop,
        runs_of: Callable[[list[tuple[str, int]]], list[tuple[str, str, int]]],
    ) -> None:
        self._worker = worker
        self._store = store
        self._settings = settings
        self._loop = loop
        self._runs_of = runs_of
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._answered = time.monotonic()
        self._reported = False
        self._thread = threading.Thread(target=self._beat, name="mcp-flow heart", daemon=True)

    def start(self) -> None:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        next_beat = 0.0
        while not self._ended.wait(0.5):
            now = time.monotonic()
            if now >= next_beat:
                self._store.beat(self._worker)
                next_beat = now + BEAT
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._answer)
            self._judge(now - self._answered)

    def _answer(self) -> None:
        self._answered = time.monotonic()
        self._reported = False

    def _judge(self, silent: float) -> None:
        if silent >= self._settings.blocked:
            faulthandler.dump_traceback(all_threads=True)
            sys.stderr.write(f"The event loop stood still for {silent:.0f} s; the worker ends itself.\n")
            os._exit(70)
        if silent >= BLOCKED_AFTER and not self._reported:
            self._reported = True
            for run_id, file, line in self._runs_of(_frames(sys._current_frames().get(self._main))):
                self._store.append_from_thread(run_id, ev.WorkerBlocked(seconds=round(silent, 1), file=file, line=line))


def _frames(frame: FrameType | None) -> list[tuple[str, int]]:
    """File and line of a stack, innermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return found


def _crashed(run: Run) -> str:
    steps = ", ".join(step.key for step in run.running_steps())
    return (
        f"{run.crashes} workers in a row died while they executed this run{f' at step {steps}' if steps else ''}. "
        "Mend what ends the process, then resume the run."
    )


def log_to_stderr(settings: Settings) -> None:
    """Send the process's log to stderr, as much as the settings ask for."""
    logging.basicConfig(
        level=settings.log.upper(), stream=sys.stderr, format="%(asctime)s %(process)d %(levelname)s %(message)s"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)


async def serve(settings: Settings, worker_id: str | None = None, ready_fd: int | None = None) -> None:
    """The body of `mcp-flow worker`."""
    log_to_stderr(settings)
    os.umask(0o077)

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    os.chdir(Path("/"))
    async with Store(settings, "worker") as store:
        await Worker(settings, store, worker_id).serve(ready)
