"""A home folder of its own for each test, one host for those that only need some host, and a small site."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_flow import config
from mcp_flow.browser import host
from mcp_flow.browser.driver import Driver
from mcp_flow.browser.host import HostInfo
from mcp_flow.browser.session import Session
from mcp_flow.config import Settings
from mcp_flow.rails import Rails

RAILS = Rails.of(["*", "http://127.0.0.1:*", "http://localhost:*"], [])
PAGE = b"<title>site</title><input id=q><button onclick='window.hits=(window.hits||0)+1'>go</button>"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
async def shared_settings(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    settings = config.load(home=str(tmp_path_factory.mktemp("shared")))
    yield settings
    await host.stop(settings)


@pytest.fixture
async def settings(tmp_path: Path) -> AsyncIterator[Settings]:
    settings = config.load(home=str(tmp_path / "home"))
    yield settings
    await host.stop(settings)


@pytest.fixture
async def shared_host(shared_settings: Settings) -> HostInfo:
    return await host.ensure(shared_settings)


@pytest.fixture(scope="session")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


@pytest.fixture
async def events() -> list[tuple[str, dict[str, Any]]]:
    return []


@pytest.fixture
async def open_session(
    driver: Driver, shared_host: HostInfo, tmp_path: Path, events: list[tuple[str, dict[str, Any]]]
) -> AsyncIterator[Callable[..., Any]]:
    """Opens sessions on the shared host; closes their contexts afterwards."""
    sessions: list[Session] = []

    async def opener(**options: Any) -> Session:
        options = {"viewport": (800, 600), "folder": tmp_path / "run", "run_id": "r1", "rails": RAILS} | options
        session = await Session.open(
            driver, shared_host, on_event=lambda kind, about: events.append((kind, about)), **options
        )
        sessions.append(session)
        return session

    yield opener
    for session in sessions:
        await session.close()


@pytest.fixture(scope="session")
def site() -> Iterator[str]:
    """A loopback site: `/set` sets a cookie, `/file` is a download, everything else a page with a field."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            if self.path == "/set":
                self.send_header("Set-Cookie", "who=ada; Path=/; Max-Age=600")
            if self.path == "/file":
                self.send_header("Content-Disposition", 'attachment; filename="../re port?.csv"')
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(PAGE)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
