"""A run's pages in one attempt: attached when first asked for, rebuilt where they are gone, kept at every stop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any

from playwright.async_api import Page

from mcp_flow import events as ev
from mcp_flow.browser.session import Checkpoint, Session
from mcp_flow.errors import FlowError
from mcp_flow.run import Run
from mcp_flow.secrets import SECRET_FIELDS
from mcp_flow.store import Store

TITLE_SECONDS = 1.0
"""How long a stop waits for a page's title."""
SCREENSHOT_MS = 5000
_LONGEST_TITLE = 200


class Pages:
    """The session of an attempt, from its first page to its end."""

    def __init__(
        self,
        store: Store,
        run: Run,
        append: Callable[..., Awaitable[None]],
        open_session: Callable[[Checkpoint | None], Coroutine[Any, Any, Session]],
        on_attached: Callable[[], None],
    ) -> None:
        self.session: Session | None = None
        self.restored_here = False
        """Whether the last finished step that was reached has brought the page to its place itself."""
        self._store = store
        self._run = run
        self._append = append
        self._open_session = open_session
        self._on_attached = on_attached
        self._opening: asyncio.Task[None] | None = None
        self._rebuilt = False
        self._half_rebuilt = False

    @property
    def rebuilding(self) -> bool:
        """Whether the pages are new ones in the place of those that the finished steps have seen."""
        return self.session is not None and self.session.state == "restored"

    @property
    def url(self) -> str | None:
        """Where the main page is."""
        page = self.session.pages.get("main") if self.session else None
        return page.url if page else None

    async def get(self, name: str) -> Page:
        """The page of this name, opened if there is none; raises `BrowserMissing` or `BrowserUnavailable`."""
        if self.session is None:
            if self._opening is None:
                self._opening = asyncio.create_task(self._attach())
            opening = self._opening
            try:
                # Shielded, because a cancelled opening would leave a context that nobody knows of.
                await asyncio.shield(opening)
            finally:
                if opening.done():
                    self._opening = None
        session = self.session
        if session is None:
            raise asyncio.CancelledError("the attempt is over")
        fresh = name not in session.pages
        page = await session.page(name)
        if fresh:
            await self._journal(session)
            if self._rebuilt:
                await session.restore_url(name)
        return page

    async def go_to(self, url: str | None) -> None:
        """Bring the main page to where it was when a step that restores it first began."""
        if url and self.url != url:
            await (await self.get("main")).goto(url)

    async def end_restoring(self) -> None:
        """Before the first thing that is new: pages go to where the checkpoint saw them."""
        session = self.session
        if session is None or not self.rebuilding or self._rebuilt:
            return
        self._rebuilt = True
        if not self.restored_here:
            for name in list(session.pages):
                await session.restore_url(name)
        await self.checkpoint()

    async def checkpoint(self) -> None:
        """Keep what rebuilds the pages, unless they are being rebuilt: what that needs must outlast it."""
        session = self.session
        if session is None or (self.rebuilding and not self._rebuilt):
            return
        try:
            checkpoint = await session.checkpoint()
        except FlowError:
            return  # the page is gone; the checkpoint before it is the last one
        data = {"urls": checkpoint.urls, "storage": checkpoint.storage, "titles": await _titles(session)}
        await self._store.save_checkpoint(self._run.run_id, json.dumps(data))

    async def screenshot(self) -> bytes | None:
        """The main page as it looks now, secret fields masked; None where there is nothing to see."""
        page = self.session.pages.get("main") if self.session else None
        if page is None or page.is_closed():
            return None
        with suppress(Exception):  # a page that hangs or is gone has no picture
            return await page.screenshot(
                timeout=SCREENSHOT_MS, mask=[frame.locator(SECRET_FIELDS) for frame in page.frames]
            )
        return None

    async def detach(self) -> None:
        """Close the connection; the pages stay."""
        session, self.session = self.session, None
        if session:
            with suppress(Exception):  # the connection may be gone already, which is what was wanted
                await session.detach()

    async def close(self) -> None:
        """Close the run's context for good."""
        session, self.session = self.session, None
        if session:
            with suppress(Exception):  # the host may be gone, and the pages with it
                await session.close()

    async def _attach(self) -> None:
        session = await self._open_session(await self._load_checkpoint())
        if session.state == "reattached" and self._half_rebuilt:
            session.state = "restored"
        elif session.state == "restored":
            await self._note_rebuilding()
        self.session = session
        if session.state != "live":
            await self._append(ev.PageAttached(state=session.state))
        self._on_attached()

    async def _journal(self, session: Session) -> None:
        fresh = [
            ev.PageOpened(name=record.name, target_id=record.target_id)
            for record in await session.records()
            if self._run.pages.get(record.name) != record.target_id
        ]
        if fresh:
            await self._append(*fresh)

    async def _load_checkpoint(self) -> Checkpoint | None:
        text = await self._store.load_checkpoint(self._run.run_id)
        kept = json.loads(text) if text else None
        self._half_rebuilt = bool(kept and kept.get("rebuilding"))
        return Checkpoint(kept["urls"], kept["storage"]) if kept else None

    async def _note_rebuilding(self) -> None:
        """Pages found by a later attempt are not to be taken for whole until this one has rebuilt them."""
        if text := await self._store.load_checkpoint(self._run.run_id):
            noted = json.dumps(json.loads(text) | {"rebuilding": True})
            await self._store.save_checkpoint(self._run.run_id, noted)


async def _titles(session: Session) -> dict[str, str]:
    """The titles of the pages that say theirs at once."""
    titles = {}
    for name, page in session.pages.items():
        with suppress(Exception):  # a page that is closed, blocked or gone has no title to tell
            async with asyncio.timeout(TITLE_SECONDS):
                titles[name] = (await page.title())[:_LONGEST_TITLE]
    return titles
