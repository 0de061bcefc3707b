"""Who may use a live page: one caller at a time, each with the page's one CDP session and its dialogs answered."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from weakref import WeakValueDictionary

import anyio
from playwright.async_api import CDPSession, Dialog, Page
from playwright.async_api import Error as PlaywrightError

from mcp_flow.page.guard import aside

ANSWER_SECONDS = 2.0
"""How long the browser may take to close a dialog."""

_turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
_sessions: dict[Page, CDPSession] = {}


def turn(page: Page) -> asyncio.Lock:
    """The lock under which callers take turns with this page, over whichever connection each of them has it."""
    # The browser names its pages, so that one page has the same name on every connection.
    return _turns.setdefault(page._impl_obj._guid, asyncio.Lock())


async def cdp_session(page: Page) -> CDPSession:
    """The page's CDP session on this connection, opened once: that takes longer than most evaluations."""
    if page in _sessions:
        return _sessions[page]
    session = await page.context.new_cdp_session(page)

    def forget(_: object) -> None:
        _sessions.pop(page, None)

    session.on("close", forget)
    page.on("close", forget)
    if browser := page.context.browser:
        browser.on("disconnected", forget)
    _sessions[page] = session
    return session


@dataclass(frozen=True, slots=True)
class Answered:
    """A dialog that opened, and what became of it: accepted, dismissed, answered by the workflow, or neither."""

    type: str
    message: str
    outcome: str

    @property
    def quoted(self) -> str:
        """What it said, which is text of the page."""
        return json.dumps(self.message, ensure_ascii=False)

    def __str__(self) -> str:
        return f"{self.type} {self.quoted} {self.outcome}"


class Dialogs:
    """The dialogs of a page and its popups while somebody acts on it; each is answered when it opens."""

    def __init__(self, page: Page) -> None:
        self.answers: deque[str] = deque()
        """How the next ones are to be answered: "accept", "dismiss", or the text that a prompt is accepted with."""
        self._page = page
        self._tasks: list[asyncio.Task[Answered]] = []

    def opened(self, dialog: Dialog) -> None:
        """Answer `dialog` as planned; otherwise dismiss it, but let a page that is being left go."""
        planned = self.answers.popleft() if self.answers else None
        answer = planned or ("accept" if dialog.type == "beforeunload" else "dismiss")
        self._tasks.append(asyncio.create_task(self._answer(dialog, answer)))

    async def answered(self) -> tuple[Answered, ...]:
        """All that have opened, each of them closed by now."""
        return tuple(await asyncio.gather(*self._tasks))

    async def _answer(self, dialog: Dialog, answer: str) -> Answered:
        async def close() -> None:
            if answer == "dismiss":
                await dialog.dismiss()
            elif answer == "accept":
                await dialog.accept()
            else:
                await dialog.accept(answer)

        outcome = "dismissed" if answer == "dismiss" else "accepted"
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await aside(self._page, close)
        except PlaywrightError:
            # A listener of the workflow's own hears of it at the same time; the page goes on either way.
            outcome = "answered by the workflow"
        except TimeoutError:
            outcome = "not answered"
        return Answered(dialog.type, dialog.message, outcome)


@asynccontextmanager
async def dialogs_answered(page: Page) -> AsyncIterator[Dialogs]:
    """Answers every dialog of the page's context meanwhile, and leaves none open: it would wedge its page."""
    dialogs = Dialogs(page)
    page.context.on("dialog", dialogs.opened)
    try:
        yield dialogs
    finally:
        page.context.remove_listener("dialog", dialogs.opened)
        with anyio.CancelScope(shield=True):
            await dialogs.answered()
