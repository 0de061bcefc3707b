"""What all tests share: one backend, settings in a folder of their own, and a clock that only moves when asked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pytest

from mcp_flow import config
from mcp_flow.config import Settings
from mcp_flow.store import Store

# A slow machine is no failure, and examples that failed belong into a test, not into a folder.
hypothesis.settings.register_profile("repository", deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("repository")


class Clock:
    """A time that stands still until it is told to pass."""

    def __init__(self) -> None:
        self.time = datetime(2031, 5, 1, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def tick(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")


@pytest.fixture
async def store(settings: Settings, clock: Clock) -> AsyncIterator[Store]:
    async with Store(settings, "worker", now=clock) as opened:
        yield opened
