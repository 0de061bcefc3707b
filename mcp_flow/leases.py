"""Whose lease is over: the process is gone, or has been silent for too long and was ended here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time

from mcp_flow import presence
from mcp_flow.config import Settings
from mcp_flow.store import Beat, Store

logger = logging.getLogger(__name__)

DEATH_SECONDS = 5.0
"""How long a killed process may take to be gone."""


BLOCKED_SECONDS = 3.0
"""For how long an event loop has stood still when a worker counts as blocked."""


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
        if beat is None:
            return False
        now = time.monotonic()
        last, since = self._seen.get(worker, (None, now))
        if last != beat.number:
            self._seen[worker] = (beat.number, now)
        silent = now - since if last == beat.number else 0.0
        if silent >= self._settings.lease:
            # A library process is never ended: it notices by itself, and its page is taken from it.
            return presence.is_library(worker) or await self._end(worker, beat.pid, f"silent for {silent:.0f} s")
        if awaited and beat.silent >= BLOCKED_SECONDS and not presence.is_library(worker):
            return await self._end(worker, beat.pid, "blocked, and somebody waits for it to stop a run")
        return False

    async def _end(self, worker: str, pid: int, why: str) -> bool:
        """Kill a worker and wait until it is gone: durability makes that cheap."""
        logger.warning("Worker %s (%d) is %s, and is ended.", worker, pid, why)
        with contextlib.suppress(ProcessLookupError):
            # Its stack goes to its log first; a stopped process writes it only if it is let go on before it is killed.
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_SECONDS):
                while presence.is_alive(self._settings, worker):
                    await asyncio.sleep(0.01)
        return not presence.is_alive(self._settings, worker)
