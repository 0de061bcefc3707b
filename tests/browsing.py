"""A site for runs to visit, and looks into their pages from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import anyio
from harness import House
from playwright.async_api import Page

from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.browser.attach import attach
from mcp_flow.browser.driver import Driver

PAGE = """<!doctype html><title>{path}</title><input id=name><button onclick="window.count = (window.count || 0) + 1">
add</button><p id=cookie>{cookie}</p>"""


class Site:
    """A page at every path, which shows its cookie; `/enter` sets one, `/file/<name>` is a download of that name.

    `/held/<name>` is one that does not end before the site does.
    """

    def __init__(self) -> None:
        self.down: set[str] = set()
        """The paths that give no answer."""
        self.ended = threading.Event()
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path in site.down:
                    self.close_connection = True
                    return
                self.send_response(200)
                self.send_header("content-type", "text/html")
                if self.path == "/enter":
                    self.send_header("set-cookie", "who=ada; path=/")
                if self.path.startswith(("/file/", "/held/")):
                    name = unquote(self.path[len("/file/") :])
                    self.send_header("content-disposition", f'attachment; filename="{name}"')
                self.end_headers()
                if self.path.startswith("/held/"):
                    self.wfile.write(b"some of it")
                    site.ended.wait()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(PAGE.format(path=self.path, cookie=self.headers.get("cookie", "nobody")).encode())

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def served(self) -> Iterator[Site]:
        """Answers as long as this is open."""
        with self._server as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield self
            self.ended.set()
            server.shutdown()


@contextlib.asynccontextmanager
async def looking_at(driver: Driver, house: House, run_id: str, name: str = "main") -> AsyncIterator[Page]:
    """The run's page, as somebody else sees it."""
    run = await house.control.run(run_id)
    [host] = hosts.living(house.settings)
    page = await attach(driver, host, run.pages[name])
    try:
        yield page
    finally:
        await page.context.browser.close()  # type: ignore[union-attr]  # the connection alone


async def look(driver: Driver, house: House, run_id: str, script: str) -> Any:
    """What a script finds in the run's page, looked at from outside."""
    async with looking_at(driver, house, run_id) as page:
        return await page.evaluate(script)


async def contexts(driver: Driver, house: House) -> int:
    """How many contexts the browser holds."""
    [host] = hosts.living(house.settings)
    browser = await driver.connect(host.endpoint)
    try:
        return len(browser.contexts)
    finally:
        await browser.close()


async def kill_host(house: House) -> None:
    """End the browser host with kill -9, and wait until it is gone."""
    [host] = hosts.living(house.settings)
    os.kill(host.pid, signal.SIGKILL)
    with anyio.fail_after(20):
        while hosts.living(house.settings):
            await house.bell.next_ring(0.01)


async def crash(page: Page) -> None:
    """End the process that renders a page."""
    cdp = await page.context.new_cdp_session(page)
    async with page.expect_event("crash"):
        # Never answered: it fails when the connection ends.
        asyncio.ensure_future(cdp.send("Page.crash")).add_done_callback(lambda sent: sent.exception())


async def kept(house: House, run_id: str, text: str) -> None:
    """Return once the run's checkpoint holds `text`."""
    try:
        with anyio.fail_after(15):
            while text not in str(await house.store.load_checkpoint(run_id)):
                await house.bell.next_ring(0.01)
    except TimeoutError:
        raise AssertionError(f"no {text!r} kept: {await house.store.load_checkpoint(run_id)}") from None


async def did(house: House, *effects: str) -> None:
    """Return once these are the effects that the workflow has had."""
    try:
        with anyio.fail_after(15):
            while house.did() != list(effects):
                await house.bell.next_ring(0.01)
    except TimeoutError:
        raise AssertionError(f"did {house.did()}") from None


async def losses(house: House, run_id: str) -> list[str]:
    """What became of the run's pages."""
    return [event.what for event in await house.events(run_id, ev.PageLost)]


async def attachments(house: House, run_id: str) -> list[str]:
    """How the pages of each attempt after the first came about."""
    return [event.state for event in await house.events(run_id, ev.PageAttached)]
