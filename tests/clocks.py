"""A clock that only moves when asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class Clock:
    """A time that stands still until it is told to pass."""

    def __init__(self) -> None:
        self.time = datetime(2031, 5, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def tick(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)
