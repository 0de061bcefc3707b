"""One Chromium, with one page that is blank again for each test, and a page of its own for a test that may break it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, async_playwright

from mcp_flow import config
from mcp_flow.browser import launch

VIEWPORT = {"width": 800, "height": 600}


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    found = launch.find(config.load())
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found.path, args=launch.arguments())
        yield browser
        await browser.close()


@pytest.fixture(scope="module")
async def shared_page(browser: Browser) -> AsyncIterator[Page]:
    context = await browser.new_context(viewport=VIEWPORT)
    yield await context.new_page()
    await context.close()


@pytest.fixture
async def page(shared_page: Page) -> AsyncIterator[Page]:
    """The page that tests share: a navigation leaves nothing of the document, the variables and timers of a test."""
    yield shared_page
    await shared_page.unroute_all()
    await shared_page.goto("about:blank")


@pytest.fixture
async def own_page(browser: Browser) -> AsyncIterator[Page]:
    """A page in a context of its own, for a test that closes, crashes, hangs or halts it, or says which refs there are:
    those of a page that has been elsewhere begin with the number of their frame."""
    context = await browser.new_context(viewport=VIEWPORT)
    yield await context.new_page()
    await context.close()
