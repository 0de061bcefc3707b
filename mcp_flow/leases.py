"""Whose lease is over: the process is gone, or has been silent for too long and was ended here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import time
from functools import partial
from pathlib import Path

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.config import Settings
from mcp_flow.errors import FlowError
from mcp_flow.run import Run
from mcp_flow.store import Beat, Store

logger = logging.getLogger(__name__)

DEATH_SECONDS = 5.0
"""How long a killed process may take to be gone."""
STACK_SECONDS = 0.5
"""How long a process that is to be killed may take to say where it stands."""
LOOKS = 10
"""How often it is looked meanwhile whether it has."""
BEAT = 2.0
"""Seconds between two heartbeats at most."""
BLOCKED_SECONDS = 3.0
"""For how long an event loop has stood still when a worker counts as blocked."""

_FRAME = re.compile(r'^  File "(.*)", line (\d+) in ', re.MULTILINE)


class Leases:
    """What this process has seen of the workers' counters, on its own monotonic clock."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._seen: dict[str, tuple[int, float]] = {}

    async def over(self, *, but: str | None = None) -> list[str]:
        """The owners of runs with work to do whose lease is over; `but` is not looked at."""
        # Runs that are not taken up must be known for waiting before an answer makes them look like the others.
        known = await self._store.owners(waiting=not self._settings.take_up)
        owners = {owner: awaited for owner, awaited in known.items() if owner != but}
        if not owners:
            return []
        beats = await self._store.beats()
        return [owner for owner, awaited in owners.items() if await self._is_over(owner, beats.get(owner), awaited)]

    async def _is_over(self, worker: str, beat: Beat | None, awaited: bool) -> bool:
        if not presence.is_alive(self._settings, worker):
            self._seen.pop(worker, None)
            return True
        number, said = (beat.number, beat.silent) if beat else (0, 0.0)
        now = time.monotonic()
        last, since = self._seen.get(worker, (None, now))
        if last != number:
            self._seen[worker] = (number, now)
        silent = now - since if last == number else 0.0
        if silent >= self._settings.lease:
            # A library process is never ended: it notices by itself, and its page is taken from it.
            return presence.is_library(worker) or await self._end(worker, beat, silent, f"silent for {silent:.0f} s")
        # Code that keeps the interpreter to itself keeps the heart from beating as well.
        blocked = max(said, silent - BEAT)
        if awaited and blocked >= BLOCKED_SECONDS and not presence.is_library(worker):
            return await self._end(worker, beat, blocked, "blocked, and somebody waits for it to stop a run")
        return False

    async def _end(self, worker: str, beat: Beat | None, silent: float, why: str) -> bool:
        """Kill a worker and wait until it is gone: durability makes that cheap. Where its code stood is journaled."""
        # One that has just come or gone has no process id to be killed by.
        with contextlib.suppress(OSError, ValueError):
            pid = beat.pid if beat else presence.pid_of(self._settings, worker)
            stack = await self._stack_of(worker, pid)
            logger.warning("Worker %s (%d) is %s, and is ended. %s", worker, pid, why, stack)
            with contextlib.suppress(FlowError):  # a remark must not keep alive what it remarks on
                await self._report(worker, stack, silent)
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_SECONDS):
                while presence.is_alive(self._settings, worker):
                    await asyncio.sleep(0.01)
        return not presence.is_alive(self._settings, worker)

    async def _stack_of(self, worker: str, pid: int) -> str:
        """Where the process's threads stand, as far as it says so within `STACK_SECONDS`."""
        path = presence.stack_path(self._settings, worker)
        if _is_stopped(pid) or not path.exists():
            return ""
        told = path.stat().st_size
        os.kill(pid, signal.SIGUSR1)
        before, stack = b"", b""
        for _ in range(LOOKS):
            await asyncio.sleep(STACK_SECONDS / LOOKS)
            before, stack = stack, path.read_bytes()[told:]
            if stack and stack == before:
                break
        return stack.decode(errors="replace")

    async def _report(self, worker: str, stack: str, silent: float) -> None:
        """Journal at which line of its own code a run keeps its worker, unless the worker has said so itself.

        Of several runs that execute the same file each is told. Before the worker is ended: once another has the run,
        it would be news of that one.
        """
        if not stack:
            return
        runs = {run_id: await self._files_of(run_id) for run_id in await self._store.executed_by(worker)}
        for frames in _frames(stack):
            found = [(run_id, next((f for f in frames if f[0] in files), None)) for run_id, files in runs.items()]
            for run_id, frame in found:
                if frame:
                    blocked = ev.WorkerBlocked(seconds=round(silent, 1), file=runs[run_id][frame[0]], line=frame[1])
                    await self._store.decide(run_id, partial(_news, worker, blocked))
            if any(frame for _, frame in found):
                return

    async def _files_of(self, run_id: str) -> dict[str, str]:
        """The files of a run's code, by their names as faulthandler writes them."""
        run = await self._store.run(run_id)
        assert run.created
        _, files = await self._store.load_revision(run.revision)
        paths = [os.path.join(run.created.root, name) for name in files]
        return {path.encode("ascii", "backslashreplace").decode(): path for path in paths}


def _news(worker: str, blocked: ev.WorkerBlocked, run: Run) -> list[ev.Event]:
    return [blocked] if run.owner == worker and not run.blocked else []


def _is_stopped(pid: int) -> bool:
    """Whether the process stands still by a signal: it answers nothing, and is not to be let go on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _frames(stack: str) -> list[list[tuple[str, int]]]:
    """File and line of faulthandler's frames, innermost first: those of the loop's thread, then those of all others.

    The system hands a signal to the main thread, which is the loop's. Where it only waits for its turn, another
    thread keeps the interpreter to itself.
    """
    threads = re.split(r"^(?=Thread |Current thread )", stack, flags=re.MULTILINE)
    loop = [text for text in threads if text.startswith("Current thread ")]
    others = [text for text in threads if text.startswith("Thread ")]
    return [[(file, int(line)) for file, line in _FRAME.findall("".join(texts))] for texts in (loop, others)]
