"""Reaching a run's page from another process: over a connection that is kept for whoever comes back soon."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import anyio
import pytest
from playwright.async_api import Browser, Page
from processes import losing_drivers, own_drivers

from mcp_flow.browser import attach as attaching
from mcp_flow.browser.attach import Visits
from mcp_flow.browser.host import HostInfo
from mcp_flow.errors import PageGone

pytestmark = pytest.mark.anyio
Opener: TypeAlias = Callable[..., Any]


@pytest.fixture
async def visits() -> AsyncIterator[Visits]:
    visits = Visits()
    yield visits
    await visits.close()


def connection(page: Page) -> Browser:
    assert page.context.browser
    return page.context.browser


async def test_who_comes_back_has_the_same_connection_and_sees_what_opened_since(
    visits: Visits, open_session: Opener, shared_host: HostInfo, site: str
) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    (record,) = await session.records()
    async with visits.page(shared_host, record.target_id) as seen:
        first = connection(seen)
        await seen.evaluate("() => { window.visited = 1 }")
    assert await page.evaluate("window.visited") == 1

    other = await open_session(run_id="r2")
    await (await other.page()).goto(f"{site}/other")
    (record_of_other,) = await other.records()
    async with visits.page(shared_host, record_of_other.target_id) as seen:
        assert (connection(seen), seen.url) == (first, f"{site}/other")
    await page.goto(f"{site}/later")
    async with visits.page(shared_host, record.target_id) as seen:
        assert (connection(seen), seen.url) == (first, f"{site}/later")


async def test_two_at_once_have_a_connection_each_of_which_one_is_kept(
    visits: Visits, open_session: Opener, shared_host: HostInfo
) -> None:
    session = await open_session()
    await session.page()
    (record,) = await session.records()
    async with visits.page(shared_host, record.target_id) as one, visits.page(shared_host, record.target_id) as two:
        assert connection(one) is not connection(two)
    assert [connection(page).is_connected() for page in (one, two)] == [False, True]


async def test_a_connection_on_which_something_failed_or_was_given_up_is_ended(
    visits: Visits, open_session: Opener, shared_host: HostInfo
) -> None:
    session = await open_session()
    page = await session.page()
    (record,) = await session.records()
    with pytest.raises(TimeoutError):
        async with visits.page(shared_host, record.target_id) as seen, asyncio.timeout(0.1):
            await seen.evaluate("new Promise(() => {})")
    assert not connection(seen).is_connected()
    await page.close()
    with pytest.raises(PageGone):
        async with visits.page(shared_host, record.target_id):
            pass


async def test_a_page_is_found_again_after_the_driver_has_died(open_session: Opener, shared_host: HostInfo) -> None:
    session = await open_session()
    await session.page()
    (record,) = await session.records()
    with losing_drivers():
        await lose_a_driver_and_find(shared_host, record.target_id)


async def lose_a_driver_and_find(host: HostInfo, target_id: str) -> None:
    visits, before = Visits(), own_drivers()
    async with visits.page(host, target_id):
        (pid,) = own_drivers() - before
    os.kill(pid, signal.SIGKILL)
    async with visits.page(host, target_id) as seen:
        assert await seen.evaluate("1 + 1") == 2
    await visits.close()


async def test_a_page_that_has_closed_since_is_not_handed_out(
    visits: Visits, open_session: Opener, shared_host: HostInfo
) -> None:
    session = await open_session()
    await session.page()
    other = await session.page("other")
    target_ids = {record.name: record.target_id for record in await session.records()}
    async with visits.page(shared_host, target_ids["other"]):
        pass
    await other.close()
    with pytest.raises(PageGone):
        async with visits.page(shared_host, target_ids["other"]):
            pass
    async with visits.page(shared_host, target_ids["main"]) as seen:
        assert not seen.is_closed()


async def test_a_connection_that_nobody_comes_back_to_is_ended(
    visits: Visits, open_session: Opener, shared_host: HostInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "KEPT_SECONDS", 0.01)
    session = await open_session()
    page = await session.page()
    (record,) = await session.records()
    ended = asyncio.Event()
    async with visits.page(shared_host, record.target_id) as seen:
        connection(seen).on("disconnected", lambda _: ended.set())
    with anyio.fail_after(5):
        await ended.wait()
    assert not page.is_closed()
    async with visits.page(shared_host, record.target_id) as again:
        assert connection(again) is not connection(seen)
