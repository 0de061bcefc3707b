"""What all tests share: one backend, settings in a folder of their own, and a clock that only moves when asked."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
from clocks import Clock
from forks import Forge

from mcp_flow import catalog, config, presence
from mcp_flow.browser import host
from mcp_flow.config import Settings
from mcp_flow.store import Store

# The pages of the tests are on loopback addresses, which no run reaches unless they are named.
os.environ.setdefault("MCP_FLOW_ALLOW_ORIGINS", "* http://127.0.0.1:* http://localhost:*")

# The processes of the tests are many; each would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Every test has a home folder of its own, and with it would have an empty cache.
os.environ.setdefault("NODE_COMPILE_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "node"))

# A slow machine is no failure, and examples that failed belong into a test, not into a folder.
hypothesis.settings.register_profile("repository", deadline=None, database=None, max_examples=50)
hypothesis.settings.load_profile("repository")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


class SharedChild(catalog._Child):
    """A child that reads workflow files for many readers; none of them ends it."""

    def end(self) -> None:
        """Leave it to the others."""


@pytest.fixture(scope="session")
def shared_child() -> Iterator[Callable[[], SharedChild]]:
    """The child that is shared, another once it has died."""
    start, shared = catalog._Child.start, list[SharedChild]()

    def started() -> SharedChild:
        if not shared or shared[0].control.fileno() < 0 or shared[0].process.poll() is not None:
            child = start()
            shared[:] = [SharedChild(child.process, child.control)]
        return shared[0]

    yield started
    for child in shared:
        catalog._Child.end(child)


@pytest.fixture(scope="module", autouse=True)
def one_reader(request: pytest.FixtureRequest, shared_child: Callable[[], SharedChild]) -> Iterator[None]:
    """One child reads the workflow files of all homes, because its start takes longer than most tests.

    It forks for each file that it reads, and nothing of one is left in it for the next. Not for modules that are about
    the child itself and say `OWN_READER`.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "OWN_READER", False):
            patch.setattr(catalog._Child, "start", shared_child)
        yield


@pytest.fixture(scope="session")
def forge() -> Iterator[Forge]:
    with Forge() as forge:
        yield forge


@pytest.fixture(scope="module", autouse=True)
def forked(request: pytest.FixtureRequest, forge: Forge) -> Iterator[None]:
    """Workers and browser hosts that are started from here are forked, as their imports take longer than most tests.

    Not for modules that are about their start and say `OWN_IMPORTS`. What another process starts, such as a server,
    starts as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "OWN_IMPORTS", False):
            for module in (presence, host):
                patch.setattr(module, "subprocess", SimpleNamespace(Popen=forge.start, DEVNULL=subprocess.DEVNULL))
        yield


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
