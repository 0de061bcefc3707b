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
from mcp_flow.store import Store

logger = logging.getLogger(__name__)

DEATH_SECONDS = 5.0
"""How long a killed process may take to be gone."""


class Leases:
    """What this process has seen of the workers' counters, on its own monotonic clock."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._seen: dict[str, tuple[int, float]] = {}

    async def over(self, *, but: str | None = None) -> list[str]:
        """The owners of runs with work to do whose lease is over; `but` is not looked at."""
        owners = [owner for owner in await self._store.owners() if owner != but]
        if not owners:
            return []
        beats = await self._store.beats()
        return [owner for owner in owners if await self._is_over(owner, beats.get(owner))]

    async def _is_over(self, worker: str, beat: tuple[int, int] | None) -> bool:
        if not presence.is_alive(self._settings, worker):
            self._seen.pop(worker, None)
            return True
        # A library process is never ended: it checks its own lease before each step.
        if beat is None or worker.startswith("lib-"):
            return False
        pid, count = beat
        now = time.monotonic()
        last, since = self._seen.get(worker, (None, now))
        if last != count:
            self._seen[worker] = (count, now)
            return False
        if now - since < self._settings.lease:
            return False
        logger.warning("Worker %s (%d) has been silent for %.0f s and is ended.", worker, pid, now - since)
        with contextlib.suppress(ProcessLookupError):
            # Its stack goes to its log first; a stopped process writes it only if it is let go on before it is killed.
            os.kill(pid, signal.SIGUSR1)
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DEATH_SECONDS):
                while presence.is_alive(self._settings, worker):
                    await asyncio.sleep(0.01)
        return not presence.is_alive(self._settings, worker)
