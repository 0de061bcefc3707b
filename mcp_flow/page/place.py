"""Where code runs in a page: in which frame, and with which element at hand."""

from __future__ import annotations

import asyncio
import secrets as tokens
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from playwright.async_api import CDPSession, Frame, Page
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import TimeoutError as PlaywrightTimeout

from mcp_flow.errors import EvaluationError
from mcp_flow.page.guard import clean

KEEP_SECONDS = 0.2
"""How long an element that is not there is waited for before it is counted how many there are."""
OBJECTS = "mcp_flow"
"""The group of what a page keeps for whoever evaluated, such as a promise, until it is let go of."""
_KEEP = "(element, key) => void Object.defineProperty(globalThis, key, {value: element, configurable: true})"


@dataclass(slots=True)
class Place:
    """Where code runs: a session, the context of a child frame, and the name under which the page keeps an element."""

    session: CDPSession
    context: int | None = None
    key: str | None = None

    @property
    def top(self) -> bool:
        """Whether it is the page's main frame."""
        return self.context is None

    @property
    def element(self) -> str:
        """The expression that gives the element, while it is kept."""
        return f"globalThis.{self.key}" if self.key else "undefined"

    async def run(self, expression: str, **options: Any) -> dict[str, Any]:
        """The answer to `Runtime.evaluate`."""
        options["objectGroup"] = OBJECTS
        if self.context is not None:
            options["contextId"] = self.context
        return dict(await self.session.send("Runtime.evaluate", {"expression": expression, **options}))

    async def forget(self) -> None:
        """Let go of the element, if it still is kept."""
        if not self.key:
            return
        let_go, self.key = f"delete {self.element}", None
        with suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(1):
                await self.run(let_go)


async def release(session: CDPSession) -> None:
    """Let go of what the page keeps for this session, which may be used all day."""
    with suppress(PlaywrightError, TimeoutError):
        async with asyncio.timeout(1):
            await session.send("Runtime.releaseObjectGroup", {"objectGroup": OBJECTS})


async def bound(stack: AsyncExitStack, page: Page, top: Place, ref: str | None, selector: str | None) -> Place:
    """Where to evaluate, with the element kept there under an unguessable name until `stack` is left at latest."""
    if ref is None and selector is None:
        return top
    key = f"__mcp_flow_{tokens.token_hex(16)}"
    place = Place(top.session, None, key)

    async def leave() -> None:
        await place.forget()
        if place.session is not top.session:
            with suppress(PlaywrightError, TimeoutError):
                async with asyncio.timeout(1):
                    await place.session.detach()

    # Before it is kept: the other preparations may fail meanwhile and end this one.
    stack.push_async_callback(leave)
    await _keep_element(page, ref, selector, key)
    frame = await _keeper(page, key)
    if frame != page.main_frame:
        place.session = await _session_of(page, frame)
        place.context = await _context_of(place.session, key)
    return place


async def _keep_element(page: Page, ref: str | None, selector: str | None, key: str) -> None:
    found = page.get_by_ref(ref) if ref is not None else page.locator(selector or "")
    named = f"ref {ref!r}" if ref is not None else f"locator {selector!r}"
    try:
        try:
            await found.evaluate(_KEEP, key, timeout=KEEP_SECONDS * 1000)
            return
        except PlaywrightError as error:
            # Counted only where it fails: to count costs as much as to find.
            if (count := await found.count()) == 1 and not isinstance(error, PlaywrightTimeout):
                raise
        if count == 1:  # and it only takes long to find
            await found.evaluate(_KEEP, key)
            return
    except PlaywrightError as error:
        if "selector" not in error.message:
            raise
        count = 0
        if "Invalid frame" not in error.message:
            raise EvaluationError(f"{named} is no selector: {clean(error.message)[:300]}") from error
    hint = "take a new snapshot and use a ref of it" if ref is not None else "it must match exactly one"
    raise EvaluationError(f"{named} matches {count} elements; {hint}.")


async def _keeper(page: Page, key: str) -> Frame:
    """The frame whose page holds `key`."""
    if len(page.frames) > 1:
        for frame, keeps in zip(page.frames, await asyncio.gather(*(_keeps(f, key) for f in page.frames)), strict=True):
            if keeps:
                return frame
    return page.main_frame


async def _keeps(frame: Frame, key: str) -> bool:
    with suppress(PlaywrightError):  # a frame that goes away keeps nothing
        return bool(await frame.evaluate("key => Object.hasOwn(globalThis, key)", key))
    return False


async def _context_of(session: CDPSession, key: str) -> int:
    """The context that keeps `key`: a child frame's number is only told to a session that asks for all of them."""
    contexts: list[int] = []

    def created(event: dict[str, Any]) -> None:
        if event["context"]["auxData"].get("isDefault"):
            contexts.append(event["context"]["id"])

    session.on("Runtime.executionContextCreated", created)
    await session.send("Runtime.enable")
    for context in contexts:
        answer = await Place(session, context).run(f"Object.hasOwn(globalThis, '{key}')", returnByValue=True)
        if answer["result"].get("value") is True:
            return context
    raise EvaluationError("The element's frame went away meanwhile; take a new snapshot.")


async def _session_of(page: Page, frame: Frame) -> CDPSession:
    """A session for the process that `frame` lives in: its own, an ancestor's or the page's."""
    above: Frame | None = frame
    while above is not None and above != page.main_frame:
        try:
            return await page.context.new_cdp_session(above)
        except PlaywrightError as error:
            if "separate CDP session" not in error.message:
                raise
            above = above.parent_frame
    return await page.context.new_cdp_session(page)
