"""Playwright's driver, its connections to browser hosts, and calls to it that are carried through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import Any, TypeVar

import anyio
from playwright.async_api import Browser, Error, Playwright, async_playwright

from mcp_flow.browser import host as hosts
from mcp_flow.errors import BrowserUnavailable

T = TypeVar("T")

CONNECT_SECONDS = 10
CLOSE_SECONDS = 5
WATCH_SECONDS = 2


class Driver:
    """Playwright's driver: one a process, started when first needed, and again if it has died."""

    def __init__(self) -> None:
        self._starting: asyncio.Task[Playwright] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._browsers: set[Browser] = set()

    async def __aenter__(self) -> Driver:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def connect(self, endpoint: str) -> Browser:
        """A connection of its own to the host at `endpoint`, which it keeps from ending as unused.

        Raises `BrowserUnavailable` where there is no host any more.
        """
        hold = hosts.use(endpoint)
        try:
            browser = await self._connect(endpoint)
        except BaseException:
            hold.close()
            raise
        self._browsers.add(browser)

        def forget(_: Browser) -> None:
            self._browsers.discard(browser)
            hold.close()

        browser.on("disconnected", forget)
        return browser

    async def stop(self) -> None:
        """End the driver and with it every connection; their contexts stay."""
        starting, self._starting = self._starting, None
        if self._watching:
            self._watching.cancel()
        if starting:
            await wind_up(self._stop(starting), CLOSE_SECONDS)

    async def _connect(self, endpoint: str, *, again: bool = True) -> Browser:
        playwright = await self._playwright()
        try:
            return await playwright.chromium.connect(endpoint, timeout=CONNECT_SECONDS * 1000)
        except Error as error:
            if not again or await _lives(playwright):
                raise BrowserUnavailable(f"The browser host does not answer: {error.message}") from error
            await self._replace(playwright)
            return await self._connect(endpoint, again=False)

    async def _playwright(self) -> Playwright:
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            return await asyncio.shield(starting)
        except Exception as error:  # whatever kept Node.js from starting, nobody below us can mend it
            if self._starting is starting:
                self._starting = None
            raise BrowserUnavailable(f"Playwright's driver does not start: {error}") from error

    async def _start(self) -> Playwright:
        playwright = await async_playwright().start()
        self._watching = asyncio.create_task(self._watch(playwright))
        return playwright

    async def _watch(self, playwright: Playwright) -> None:
        # Playwright leaves the calls in flight on its connections waiting for ever when the driver dies.
        while await _lives(playwright):
            await asyncio.sleep(WATCH_SECONDS)
        await self._replace(playwright)

    async def _replace(self, dead: Playwright) -> None:
        """Forget a dead driver, unless someone has done so already; the next connection starts another."""
        starting = self._starting
        if starting and starting.done() and starting.result() is dead:
            self._starting = None
            if self._watching and self._watching is not asyncio.current_task():
                self._watching.cancel()
            await self._stop(starting)

    async def _stop(self, starting: asyncio.Task[Playwright]) -> None:
        browsers, self._browsers = self._browsers, set()
        for browser in browsers:
            # Said on a connection that is dead already, this is what fails its calls in flight.
            with contextlib.suppress(Error):
                await browser.close()
        with contextlib.suppress(Exception):  # a driver that never started, or has died, has nothing to stop
            await (await starting).stop()


async def finish(work: Awaitable[T], seconds: float) -> T:
    """`work` carried through to its end or its deadline, also when the caller is cancelled meanwhile."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds):
            return await work

    task = asyncio.create_task(bounded())
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # nobody asks any more, and asyncio would complain of that
        raise


async def wind_up(work: Awaitable[Any], seconds: float) -> None:
    """`finish` for the end of something, where there is nothing to be done about a failure."""
    with contextlib.suppress(Error, TimeoutError):
        await finish(work, seconds)


async def _lives(playwright: Playwright) -> bool:
    """Whether the driver lives; one that is only slow does."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await (await playwright.request.new_context()).dispose()
    except TimeoutError:
        return True
    except Error:
        return False
    return True
