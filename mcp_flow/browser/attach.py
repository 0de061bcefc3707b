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


@dataclass(slots=True)
class _Connection:
    browser: Browser
    ids: dict[Page, str] = field(default_factory=dict)
    expiry: asyncio.TimerHandle | None = None


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
        connection = await self._connection(host.endpoint)
        try:
            if page := (await find_pages(connection.browser, {target_id}, connection.ids)).get(target_id):
                yield page
            else:
                raise PageGone("The page is not open any more; resume the run to have it rebuilt.")
        except BaseException:
            await wind_up(connection.browser.close(), CLOSE_SECONDS)
            raise
        if host.endpoint in self._kept:
            await wind_up(connection.browser.close(), CLOSE_SECONDS)
        else:
            self._kept[host.endpoint] = connection
            expire = partial(self._expire, host.endpoint, connection)
            connection.expiry = asyncio.get_running_loop().call_later(KEPT_SECONDS, expire)

    async def close(self) -> None:
        """End the driver, and with it every connection."""
        await self._driver.stop()

    async def _connection(self, endpoint: str) -> _Connection:
        if kept := self._kept.pop(endpoint, None):
            if kept.expiry:
                kept.expiry.cancel()
            if kept.browser.is_connected():
                return kept
        return _Connection(await self._driver.connect(endpoint))

    def _expire(self, endpoint: str, connection: _Connection) -> None:
        del self._kept[endpoint]
        ending = asyncio.create_task(wind_up(connection.browser.close(), CLOSE_SECONDS))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


async def attach(driver: Driver, host: HostInfo, target_id: str) -> Page:
    """The page with this target id, over a connection of its own, for someone who only looks in.

    `await page.context.browser.close()` ends the connection and leaves the page. Raises `PageGone`.
    """
    browser = await driver.connect(host.endpoint)
    try:
        if page := (await find_pages(browser, {target_id})).get(target_id):
            return page
        raise PageGone("The page is not open any more; resume the run to have it rebuilt.")
    except BaseException:
        await wind_up(browser.close(), CLOSE_SECONDS)
        raise


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
