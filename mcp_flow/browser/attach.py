"""Reaching the pages of runs from other processes than the one that executes them: to look in, to tidy up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field
from functools import partial

from playwright.async_api import Browser, Error, Page

from mcp_flow.browser.driver import CLOSE_SECONDS, Driver, wind_up
from mcp_flow.browser.host import HostInfo
from mcp_flow.errors import PageGone

KEPT_SECONDS = 10.0
"""How long a connection is kept after its use: whoever looks or acts does so several times in a row."""


class Visits:
    """The pages of runs as one process reaches them, each time over a connection that nobody else uses.

    To connect takes longer than most of what is done then, so the connection to each host that was used last is kept
    for a while. Not one on which something has failed: with it ends whatever a caller gave up.
    """

    def __init__(self) -> None:
        self._driver = Driver()
        self._kept: dict[str, _Connection] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def page(self, host: HostInfo, target_id: str) -> AsyncIterator[Page]:
        """The page with this target id, to look at or to act on, which stays open. Raises `PageGone`."""
        connection, page = await self._reach(host.endpoint, target_id)
        try:
            yield page
        except BaseException:
            await connection.end()
            raise
        if host.endpoint in self._kept:
            await connection.end()
        else:
            self._kept[host.endpoint] = connection
            expire = partial(self._expire, host.endpoint, connection)
            connection.expiry = asyncio.get_running_loop().call_later(KEPT_SECONDS, expire)

    async def close(self) -> None:
        """End the driver, and with it every connection."""
        kept, self._kept = self._kept, {}
        for connection in kept.values():
            connection.wanted()
        await self._driver.stop()

    async def _reach(self, endpoint: str, target_id: str) -> tuple[_Connection, Page]:
        if kept := self._kept.pop(endpoint, None):
            kept.wanted()
            if page := await kept.page(target_id):
                return kept, page
        # A driver or a host that died meanwhile is noticed on connecting only, and so is what opened a moment ago.
        fresh = _Connection(await self._driver.connect(endpoint))
        if page := await fresh.page(target_id):
            return fresh, page
        raise _not_open()

    def _expire(self, endpoint: str, connection: _Connection) -> None:
        del self._kept[endpoint]
        ending = asyncio.create_task(connection.end())
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


@dataclass(slots=True)
class _Connection:
    """A connection to a host, and the target ids of the pages that have been seen on it."""

    browser: Browser
    ids: dict[Page, str] = field(default_factory=dict)
    expiry: asyncio.TimerHandle | None = None

    async def page(self, target_id: str) -> Page | None:
        """The page with this target id; where it is not there, or nothing answers, None, and the connection ends."""
        found = None
        try:
            with contextlib.suppress(Error, TimeoutError):
                if self.ids and (contexts := self.browser.contexts):
                    # What has closed is heard of before this is answered.
                    async with asyncio.timeout(CLOSE_SECONDS):
                        await contexts[0].cookies("http://localhost")
                found = (await find_pages(self.browser, {target_id}, self.ids)).get(target_id)
        finally:
            if found is None:
                await self.end()
        return found

    def wanted(self) -> None:
        """Do not let it expire."""
        if self.expiry:
            self.expiry.cancel()

    async def end(self) -> None:
        """End it; the pages stay."""
        await wind_up(self.browser.close(), CLOSE_SECONDS)


async def attach(driver: Driver, host: HostInfo, target_id: str) -> Page:
    """The page with this target id, over a connection that is the caller's to end. Raises `PageGone`.

    `await page.context.browser.close()` ends the connection and leaves the page.
    """
    if page := await _Connection(await driver.connect(host.endpoint)).page(target_id):
        return page
    raise _not_open()


def _not_open() -> PageGone:
    return PageGone("The page is not open any more; resume the run to have it rebuilt.")


async def close_context(driver: Driver, host: HostInfo, target_id: str) -> None:
    """Close the context that holds the page with this target id, and the connection for that. Raises `PageGone`."""
    page = await attach(driver, host, target_id)
    await wind_up(page.context.close(), CLOSE_SECONDS)
    if browser := page.context.browser:
        await wind_up(browser.close(), CLOSE_SECONDS)


async def sweep(driver: Driver, host: HostInfo, keep: Collection[str]) -> int:
    """Close the contexts that hold none of these target ids, and say how many there were.

    Only for when no run is executing: a context is made a moment before its pages can be recorded.
    """
    browser = await driver.connect(host.endpoint)
    try:
        kept = {page.context for page in (await find_pages(browser, set(keep))).values()}
        orphans = [context for context in browser.contexts if context not in kept]
        for context in orphans:
            await wind_up(context.close(), CLOSE_SECONDS)
        return len(orphans)
    finally:
        await wind_up(browser.close(), CLOSE_SECONDS)


async def find_pages(
    browser: Browser, wanted: Collection[str], known: dict[Page, str] | None = None
) -> dict[str, Page]:
    """The open pages by target id, as far as they are wanted; `known` are ids that need not be asked for again."""
    if not wanted:
        return {}
    ids = {} if known is None else known
    pages = [page for context in browser.contexts for page in context.pages]
    for closed in ids.keys() - set(pages):
        del ids[closed]
    asked = [page for page in pages if page not in ids]
    found = await asyncio.gather(*map(target_id_of, asked))
    ids |= {page: target_id for page, target_id in zip(asked, found, strict=True) if target_id}
    return {ids[page]: page for page in pages if ids.get(page) in wanted}


async def target_id_of(page: Page) -> str | None:
    """What Chromium calls the page, however many clients come and go; None if it has closed."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            cdp = await page.context.new_cdp_session(page)
            info = await cdp.send("Target.getTargetInfo")
    except (Error, TimeoutError):
        return None
    with contextlib.suppress(Error, TimeoutError):
        # A page that hangs does not answer this; the session ends with the connection then.
        async with asyncio.timeout(0.5):
            await cdp.detach()
    target_id: str = info["targetInfo"]["targetId"]
    return target_id
