"""The process that executes runs: claim, replay, execute, append; and give back what it can't keep.

A worker gets its work only by claiming it from the store. Everything it holds (coroutines, leases, connections) can be
lost at any instant: another worker claims the runs, replays them and attaches to the pages that still live.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.attempt import Attempt, Outcome
from mcp_flow.browser import host as hosts
from mcp_flow.browser import proxy
from mcp_flow.browser.attach import close_context, sweep
from mcp_flow.browser.driver import Driver
from mcp_flow.browser.host import HostInfo
from mcp_flow.browser.session import Checkpoint, OnEvent, PageRecord, Session
from mcp_flow.config import Settings, keep_compiled, private_folder
from mcp_flow.definition import Workflow, workflows_in
from mcp_flow.errors import (
    BrokenWorkflow,
    BrowserUnavailable,
    FlowError,
    IllegalEvent,
    LeaseLost,
    PageGone,
    StoreError,
    WorkerCrashed,
)
from mcp_flow.failures import untyped
from mcp_flow.leases import BEAT, BLOCKED_SECONDS, Leases
from mcp_flow.pages import look
from mcp_flow.rails import Rails
from mcp_flow.revisions import Revision, load, source_line
from mcp_flow.run import Run
from mcp_flow.secrets import Secrets, hide_cards
from mcp_flow.store import Store

logger = logging.getLogger(__name__)

POLL = 1.0
"""Seconds between two looks for what no doorbell told of."""
SOONEST = 0.005
"""Seconds that lie between two looks at least."""
CLAIM_AT_ONCE = 50
MAX_RUNNING = 200

OPEN_TRIES = 3
"""How many browser hosts may die in a row while a run asks them for its page."""
MAX_CRASHES = 3
"""How many workers in a row may die at the same place of a run before it counts as failed."""
TRUSTED_AFTER = 5.0
"""Seconds that a run suspected of killing workers lives before the next such run is taken beside it."""
AGAIN_SECONDS = 0.1
"""How long a run that was dropped is kept from the next attempt at first; twice as long each further time."""
LONGEST_AGAIN_SECONDS = 10.0
MAX_LOSSES = 3
"""How often in a row a run's pages may be lost at the same place before it counts as failed."""

Resolved = tuple[Workflow[..., object], Callable[[str, int], str | None]]


class Worker:
    """Executes runs until it has had nothing to do for `settings.worker_idle` seconds, or is told to stop.

    With `only` it executes that one run, for the program that it is a part of, and leaves the program's signals alone;
    at most `max_concurrency` of the run's steps run at a time then.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        worker_id: str | None = None,
        *,
        only: str | None = None,
        max_concurrency: int | None = None,
    ) -> None:
        self.id = worker_id or f"w-{secrets.token_hex(4)}"
        self._only = only
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._settings = settings
        self._store = store
        self._driver = Driver()
        self._attempts: dict[str, Attempt] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._taken: dict[str, int] = {}
        """The last epoch of each run that was taken."""
        self._stopping = asyncio.Event()
        self._leases = Leases(settings, store)
        self._heart: _Heart | None = None
        self._drops: dict[str, int] = {}
        self._suspect: str | None = None
        self._suspected_at = 0.0
        self._lock: presence.LifeLock | None = None

    async def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Claim and execute until idle or stopped; `ready` is called once the worker can be found by others."""
        presence.sweep(self._settings)
        self._lock = presence.LifeLock(self._settings, self.id)
        bell = presence.Doorbell(self._settings)
        heart = _Heart(self.id, self._store, self._settings, asyncio.get_running_loop(), self._runs_of_frames)
        held = contextlib.ExitStack()
        if self._only is None:
            held.enter_context(_telling_its_stack(presence.stack_path(self._settings, self.id)))
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        self._heart = heart
        heart.start()
        try:
            # Before anything is claimed: a counter that was never seen can't be seen to stand still.
            await self._store.first_beat(self.id)
            ready()
            await self._work(bell)
        finally:
            self.stop()
            await self._release_all()
            await self._driver.stop()
            heart.stop()
            # First: whoever finds the counter gone must not take the worker for one that has not begun it yet.
            self._retire()
            with contextlib.suppress(FlowError):
                await self._store.forget_worker(self.id)
            held.close()
            bell.close()
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
            looked = self._store.now()
            now_version = await self._store.data_version()
            rung |= set(self._attempts) if "" in rung or (now_version != version and not rung) else set()
            version = now_version
            bell.watch(self._settings)
            await self._look_at(rung)
            self._release_idle()
            await self._claim()
            if self._executing():
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= self._settings.worker_idle and await self._may_leave():
                return
            rung = await self._next_ring(bell, looked)

    async def _next_ring(self, bell: presence.Doorbell, looked: datetime) -> set[str]:
        """Wait for a ring, or until something is due that was not yet when the worker last looked."""
        due = await self._store.next_due(self._settings.hold, looked)
        seconds = min(POLL, max(SOONEST, (due - self._store.now()).total_seconds())) if due else POLL
        ring = asyncio.ensure_future(bell.wait(seconds))
        stop = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({ring, stop}, return_when=asyncio.FIRST_COMPLETED)
            return ring.result() if ring.done() else set()
        finally:
            ring.cancel()
            stop.cancel()

    async def _may_leave(self) -> bool:
        """Leave only if no work came in between; whoever starts a worker meanwhile waits for that to be certain."""
        if self._only is not None:
            return False
        guard = presence.changing_of_the_guard(self._settings)
        await asyncio.to_thread(guard.__enter__)
        try:
            if await self._has_work():
                return False
            await self._release_all()
            if await self._has_work():  # what was answered while it was being released
                return False
            await self._sweep_contexts()
            # While the guard is held: who looks for a worker from now on must not take this one for it.
            self._retire()
            return True
        finally:
            guard.__exit__(None, None, None)

    async def _has_work(self) -> bool:
        return await self._store.wanting(await self._takeable(), held_before=self._held_before())

    def _retire(self) -> None:
        lock, self._lock = self._lock, None
        if lock:
            lock.release()

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
        self._acquit()
        takeable, held_before = await self._takeable(), self._held_before()
        # Nobody rings for what this very process has written.
        await self._look_at(set(await self._store.expire_due()))
        if not await self._store.wanting(takeable, held_before=held_before, only=self._only):
            return
        limit = min(room, CLAIM_AT_ONCE)
        claimed = await self._store.claim(
            self.id, takeable, limit, held_before=held_before, only=self._only, such=self._trusts
        )
        for run_id, epoch in claimed:
            self.take(run_id, epoch)

    def _trusts(self, run: Run) -> bool:
        """Whether to take a run whose workers have died: one that has seen it twice only while no other is suspected.

        All runs of a worker share its death. Taken one at a time, the one that causes it is told from its neighbours.
        """
        if not run.owner or run.ended or run.crashes + 1 < MAX_CRASHES - 1:
            return True
        if self._suspect is not None:
            return self._suspect == run.run_id
        self._suspect, self._suspected_at = run.run_id, time.monotonic()
        return True

    def _acquit(self) -> None:
        """Suspect a run no longer that has ended, has got further, or has lived on for a while."""
        attempt = self._attempts.get(self._suspect or "")
        going = self._suspect in self._tasks and (attempt is None or attempt.run.crashes)
        if not going or time.monotonic() - self._suspected_at >= TRUSTED_AFTER:
            self._suspect = None

    def take(self, run_id: str, epoch: int) -> None:
        """Execute a run that is this worker's since `epoch`; whoever comes second with that, or with less, is too late.

        A run that is resumed in a program is claimed by its worker, and taken by whoever resumes it.
        """
        if self._taken.get(run_id, 0) >= epoch:
            return
        self._taken[run_id] = epoch
        task = asyncio.create_task(self._hold(run_id, epoch), name=f"run {run_id}")
        self._tasks[run_id] = task
        task.add_done_callback(partial(self._forget, run_id))

    async def _takeable(self) -> list[str]:
        """The owners whose runs this worker may take up by itself."""
        over = await self._leases.over(but=self.id)
        if self._settings.take_up:
            return over
        await self._store.orphan_idle(over)
        return []

    def _held_before(self) -> datetime:
        return self._store.now() - timedelta(seconds=self._settings.hold)

    def _release_idle(self) -> None:
        """Drop the coroutines of runs that have waited for a while: an answer replays them as well."""
        now = time.monotonic()
        # A page is parked by whoever claims its run, which its owner has to let go of for that.
        idle = min(self._settings.worker_idle, self._settings.hold)
        for attempt in list(self._attempts.values()):
            hijack = attempt.run.hijack
            if not attempt.waiting or (hijack and hijack.held):
                attempt.waiting_since = None
            elif attempt.waiting_since is None:
                attempt.waiting_since = now
            elif now - attempt.waiting_since >= idle and not attempt.suspending:
                attempt.suspending = asyncio.create_task(self._release(attempt, "it waits"))

    def _forget(self, run_id: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(run_id) is task:
            del self._tasks[run_id]
            self._store.forget(run_id)
        if not task.cancelled() and (error := task.exception()):
            logger.error("Run %s was not given back: %s", run_id, error, exc_info=error)

    # --- one run ---

    async def _hold(self, run_id: str, epoch: int) -> None:
        """Carry a run, and give it back whatever comes of that: nobody claims a run whose owner lives."""
        try:
            await self._carry(run_id, epoch)
            self._drops.pop(run_id, None)
        except Exception as error:  # the boundary of one run: what it raises must not leave it without anybody
            logger.error("Run %s was dropped: %s", run_id, error, exc_info=error)
            drops = self._drops[run_id] = self._drops.get(run_id, 0) + 1
            await self._pause(drops)
            await self._give_back(run_id, epoch, f"it was dropped: {type(error).__name__}: {error}"[:500])

    async def _give_back(self, run_id: str, epoch: int, reason: str, *, insist: bool = True) -> None:
        """Release a run, however often the journal can't be written; only once if the worker is about to leave."""
        for tries in count(1):
            try:
                await self._store.append(run_id, ev.RunReleased(reason=reason), epoch=epoch)
                break
            except StoreError:
                if self._stopping.is_set() or not insist:
                    return
                await self._pause(tries)
            except FlowError:  # somebody else has it, or has let go of it
                return
        self._announce(run_id)

    async def _pause(self, times: int) -> None:
        """Wait before something is done again that has failed so often, unless the worker is to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(LONGEST_AGAIN_SECONDS, AGAIN_SECONDS * 2 ** min(times, 20))):
                await self._stopping.wait()

    async def _carry(self, run_id: str, epoch: int) -> None:
        """Execute a claimed run until it ends, fails, or is given back."""
        run = await self._store.run(run_id)
        while True:
            if run.ended:
                await self._close_pages_of(run)
                await self._let_go(run, epoch)
                return
            if run.idle:
                await self._park(run, epoch)
                # Parked and woken meanwhile, it may be ours again, but then another task has it.
                if run.owner != self.id or run.epoch != epoch:
                    return
            try:
                if run.crashes >= MAX_CRASHES:
                    raise WorkerCrashed(_crashed(run))
                if run.losses >= MAX_LOSSES:
                    raise PageGone(_lost(run))
                workflow, line_of = await self._resolve(run)
            except FlowError as error:
                await self._refuse(run, epoch, error)
                return
            rails = self._settings.rails & workflow.rails
            attempt = Attempt(
                self._settings,
                self._store,
                run,
                epoch,
                workflow,
                line_of,
                partial(self._open_session, rails=rails),
                self._announce,
                self._lease_is_fresh,
                self._slots,
            )
            self._attempts[run_id] = attempt
            try:
                outcome = await attempt.execute()
            except Exception:
                await attempt.detach()
                raise
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
                if had_session:
                    await self._append_quietly(run, ev.PageClosed())
                else:
                    await self._close_pages_of(run)
            await self._let_go(run, epoch)
            return True
        await attempt.detach()
        ours = run.owner == self.id and run.epoch == epoch
        if outcome != "suspended" or not ours or run.active or self._stopping.is_set():
            return True
        if run.idle:
            # Its page was lost while it waited: whoever answers wakes it, and the page is rebuilt then.
            await self._append_quietly(run, ev.RunReleased(reason="its page was lost"), epoch)
        return run.idle

    async def _let_go(self, run: Run, epoch: int) -> None:
        """Say that nobody has an ended run any more."""
        if run.awaits_owner:
            await self._append_quietly(run, ev.RunReleased(reason=f"it is {run.status}"), epoch)
        self._announce(run.run_id)

    async def _park(self, run: Run, epoch: int) -> None:
        """Close the page of a run that has held it without use, after a last checkpoint."""
        checkpoint = await self._store.load_checkpoint(run.run_id)
        half_rebuilt = checkpoint is not None and json.loads(checkpoint[1]).get("rebuilding")
        session: Session | None = None
        with contextlib.suppress(FlowError):  # the page may be gone already; the checkpoint before is the last then
            kept = Checkpoint(json.loads(checkpoint[0])) if checkpoint else None
            if hosts.living(self._settings):  # a browser is not started in order to close a page of it
                session = await self._open_session(run, lambda *_: None, kept)
            if session and session.state == "reattached" and not half_rebuilt:
                places, data = await look(session)
                await self._store.save_checkpoint(run.run_id, places, data, epoch)
        try:
            await self._store.append(run.run_id, ev.RunParked(), epoch=epoch)
        except FlowError as error:  # as a rule an answer or a hijack came first, and has the page
            if session:
                await session.detach()
            if not isinstance(error, IllegalEvent | LeaseLost):
                raise
            if run.idle:
                await self._append_quietly(run, ev.RunReleased(reason="it was not parked"), epoch)
            return
        if session:
            await session.close()
        self._announce(run.run_id)

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

    async def _open_session(
        self, run: Run, on_event: OnEvent, checkpoint: Checkpoint | None, *, rails: Rails | None = None
    ) -> Session:
        assert run.created
        before = run.taken_from
        for _ in range(OPEN_TRIES):
            host = await hosts.ensure(self._settings, headless=run.created.headless)
            try:
                return await Session.open(
                    self._driver,
                    host,
                    known=[PageRecord(name, target_id) for name, target_id in run.pages.items()],
                    checkpoint=checkpoint,
                    viewport=run.created.viewport or self._settings.viewport,
                    folder=private_folder(self._settings.run_folder(run.run_id)),
                    on_event=on_event,
                    run_id=run.run_id,
                    rails=rails,
                    # A library process that stands still is not killed, and may go on at any moment.
                    fence=bool(before and presence.is_library(before) and presence.is_alive(self._settings, before)),
                    host_lives=partial(self._lives, host),
                )
            except BrowserUnavailable:
                # A host may die between its answer and our connection, which waits for the driver's start.
                if self._lives(host):
                    raise
        raise BrowserUnavailable(f"The browser host died {OPEN_TRIES} times in a row; look at logs/host.log.")

    def _lives(self, host: HostInfo) -> bool:
        return host in hosts.living(self._settings)

    async def _close_pages_of(self, run: Run) -> None:
        """Close the context of a run that has ended, if its browser still lives."""
        assert run.created
        for host in hosts.living(self._settings):
            for target_id in list(run.pages.values()):
                with contextlib.suppress(FlowError):
                    await close_context(self._driver, host, target_id)
                    await proxy.dismiss(host.endpoint, run.run_id)
                    break
        await self._append_quietly(run, ev.PageClosed())

    async def _append_quietly(self, run: Run, event: ev.Event, epoch: int | None = None) -> None:
        with contextlib.suppress(FlowError):  # someone else has tidied up already
            await self._store.append(run.run_id, event, epoch=epoch)

    def _lease_is_fresh(self, since: float) -> bool:
        return self._heart is None or self._heart.is_fresh(since)

    # --- from outside ---

    async def _look_at(self, run_ids: set[str]) -> None:
        """Take note of what others wrote about the runs that this worker has."""
        for run_id in run_ids:
            attempt = self._attempts.get(run_id)
            if attempt is None or attempt.suspending:
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
            *(self._release(attempt, reason, insist=False) for attempt in list(self._attempts.values())),
            return_exceptions=True,
        )
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=10)

    async def _release(self, attempt: Attempt, reason: str, *, insist: bool = True) -> None:
        await attempt.suspend(self._settings.grace)
        if attempt.run.owner == self.id and not attempt.run.ended:
            await self._give_back(attempt.run.run_id, attempt.run.epoch, reason, insist=insist)

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
        self._answered = self._beaten = time.monotonic()
        self._woke = 0.0
        self._reported = False
        self._thread = threading.Thread(target=self._beat, name="mcp-flow heart", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _beat(self) -> None:
        next_beat = 0.0
        every = min(BEAT, self._settings.lease / 4)
        while not self._ended.wait(min(0.5, every)):
            now = time.monotonic()
            silent = now - self._answered
            newly_blocked = silent >= BLOCKED_SECONDS and not self._reported
            if now >= next_beat or newly_blocked:
                if now - self._beaten >= self._settings.lease / 2:
                    self._woke = now
                self._store.beat(self._worker, silent)
                self._beaten = now
                next_beat = now + every
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._answer)
            self._judge(silent)

    def is_fresh(self, since: float) -> bool:
        """Whether the counter has risen so steadily since then that nobody can have taken the lease for expired.

        After a standstill this thread may be the first to go on: that it beats again says nothing of what it missed.
        """
        return self._woke <= since and time.monotonic() - self._beaten < self._settings.lease / 2

    def _answer(self) -> None:
        self._answered = time.monotonic()
        self._reported = False

    def _judge(self, silent: float) -> None:
        if silent >= self._settings.blocked:
            faulthandler.dump_traceback(all_threads=True)
            sys.stderr.write(f"The event loop stood still for {silent:.0f} s; the worker ends itself.\n")
            os._exit(70)
        if silent >= BLOCKED_SECONDS and not self._reported:
            self._reported = True
            for run_id, file, line in self._runs_of(_frames(sys._current_frames().get(self._main))):
                self._store.append_from_thread(run_id, ev.WorkerBlocked(seconds=round(silent, 1), file=file, line=line))


@contextlib.contextmanager
def _telling_its_stack(path: Path) -> Iterator[None]:
    """Meanwhile SIGUSR1 makes this process write where its threads stand, whatever they are at."""
    with path.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            path.unlink(missing_ok=True)


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


def _lost(run: Run) -> str:
    steps = ", ".join(step.key for step in run.running_steps())
    return (
        f"The run's pages were lost {run.losses} times in a row{f' at step {steps}' if steps else ''}: the browser "
        "ended, or a page crashed. Look at logs/host.log in the home folder, then resume the run."
    )


class _Masking(logging.Formatter):
    """Log lines without secrets."""

    def __init__(self, settings: Settings) -> None:
        self._secrets = Secrets(settings.home)
        super().__init__("%(asctime)s %(process)d %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        self._secrets.learn()
        text = super().format(record)
        if record.name == "asyncio" and record.exc_info and (error := record.exc_info[1]) and str(error):
            # A task that nobody awaits is an author's: what it says may quote a page, whose secrets nobody knows here.
            text = text.replace(repr(error), type(error).__name__).replace(str(error), "[not logged]")
        return untyped(hide_cards(self._secrets.mask(text)))


def log_to_stderr(settings: Settings) -> None:
    """Send the process's log to stderr, as much as the settings ask for."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Masking(settings))
    logging.basicConfig(level=settings.log.upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)


async def serve(settings: Settings, worker_id: str | None = None, ready_fd: int | None = None) -> None:
    """The body of `mcp-flow worker`."""
    log_to_stderr(settings)
    os.umask(0o077)
    keep_compiled(settings)

    def ready() -> None:
        if ready_fd is not None:
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    os.chdir(Path("/"))
    async with Store(settings, "worker", at_once=True) as store:
        await Worker(settings, store, worker_id).serve(ready)
