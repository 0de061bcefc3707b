"""What all tests share: one backend, settings in a folder of their own, and a clock that only moves when asked."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import hypothesis
import pytest
from clocks import Clock

from mcp_flow import config
from mcp_flow.config import Settings
from mcp_flow.store import Store

# The pages of the tests are on loopback addresses, which no run reaches unless they are named.
os.environ.setdefault("MCP_FLOW_ALLOW_ORIGINS", "* http://127.0.0.1:* http://localhost:*")

# Every test has a home folder of its own, and with it would have an empty cache.
os.environ.setdefault("NODE_COMPILE_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "node"))

# A slow machine is no failure, and examples that failed belong into a test, not into a folder.
hypothesis.settings.register_profile("repository", deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("repository")


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
    async with Store(settings, "worker", now=clock, at_once=True) as opened:
        yield opened
