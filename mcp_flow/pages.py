"""A run's pages in one attempt: attached when first asked for, rebuilt where they are gone, kept as they move."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from playwright.async_api import Error, Page

from mcp_flow import events as ev
from mcp_flow.browser.session import Checkpoint, Session
from mcp_flow.errors import FlowError, PageGone, StoreError
from mcp_flow.page.guard import Secrets, read_secrets_soon
from mcp_flow.page.snapshot import evidence
from mcp_flow.run import Run
from mcp_flow.store import Store

TITLE_SECONDS = 1.0
"""How long a stop waits for a page's title."""
DOWNLOAD_LOST = "it was under way when its worker ended, and is lost; what began it has to be done again"
KEEPING_SHARE = 0.1
"""The part of the time that may go into keeping what a context stores while steps follow each other."""
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
        epoch: int,
    ) -> None:
        self.session: Session | None = None
        self.restored_here = False
        """Whether the last finished step that was reached has brought the page to its place itself."""
        self._store = store
        self._run = run
        self._append = append
        self._open_session = open_session
        self._on_attached = on_attached
        self._epoch = epoch
        self._opening: asyncio.Task[None] | None = None
        self._places = ""
        self._stored: dict[str, Any] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._keep_again = False
        self._keep_from = 0.0
        self._rebuilt = False
        self._restoring = asyncio.Lock()
        self._settling: set[asyncio.Task[None]] = set()
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

    async def lost(self, error: BaseException) -> str | None:
        """What has become of the pages, where `error` came from their loss; None where it has another cause."""
        session = self.session
        if session is None or not isinstance(error, Error | FlowError):
            return None
        # A page that is gone to us is lost, even where its browser takes a moment longer to go.
        return await session.lost() or (str(error) if isinstance(error, PageGone) else None)

    async def explain(self, error: BaseException) -> None:
        """Have an error say why the net was not reached, where it is of that."""
        if self.session and not getattr(error, "__notes__", None) and (why := await self.session.explain(error)):
            error.add_note(why)

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
        if session is None or not self._unsettled:
            return
        async with self._restoring:
            if not self._unsettled:
                return
            if not self.restored_here:
                for name in list(session.pages):
                    await session.restore_url(name)
            # Not before: what is kept until then would be of a page that is only half rebuilt.
            self._rebuilt = True
            await self.checkpoint()

    def moved(self) -> str | None:
        """Where the pages are now, to be kept with what brought them there; None if that is kept already."""
        session = self.session
        if session is None or self._unsettled:
            return None
        places = json.dumps(session.places())
        if places == self._places:
            return None
        self._places = places
        return places

    async def settle(self, seconds: float) -> None:
        """Before a stop: no dialog stays open over it, and downloads under way get so long to be kept."""
        if session := self.session:
            await session.settle_dialogs()
            await session.settle_downloads(seconds)

    async def checkpoint(self, *, amid_steps: bool = False) -> None:
        """Keep what rebuilds the pages, unless they are being rebuilt: what that needs must outlast it.

        Amid steps the pages may be where only an unfinished one has brought them: they are not to be rebuilt there.
        """
        session = self.session
        if session is None or self._unsettled:
            return
        self._keep_again = False
        try:
            places, data = await look(session)
        except FlowError:
            return  # the page is gone; the checkpoint before it is the last one
        self._stored = json.loads(data)
        with suppress(StoreError):  # as above; the run's next event says whether it can go on
            await self._store.save_checkpoint(self._run.run_id, None if amid_steps else places, data, self._epoch)
            if not amid_steps:
                self._places = places

    def keep_soon(self) -> None:
        """Keep what the context stores by now, beside the run's next work: a step does not wait for it."""
        if self.session is None or self._unsettled:
            return
        self._keep_again = True
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep())

    async def secrets(self) -> Secrets:
        """What the secret fields hold of the pages that say so within a second."""
        with suppress(Exception):  # what is asked for beside an error must not become another
            return await read_secrets_soon(list(self.session.pages.values()) if self.session else [])
        return Secrets()

    async def evidence(self, secrets: Iterable[str]) -> tuple[bytes | None, str | None]:
        """The main page as it looks now, and what it shows and has logged as text; None where there is nothing to see.

        Secret fields and the `secrets` are hidden in both.
        """
        page = self.session.pages.get("main") if self.session else None
        if page is None or page.is_closed():
            return None, None
        with suppress(Exception):  # a page that hangs or is gone has nothing to show
            return await evidence(page, secrets=secrets)
        return None, None

    async def detach(self) -> None:
        """Close the connection; the pages stay."""
        session, self.session = self.session, None
        self._stop_keeping()
        if session:
            with suppress(Exception):  # the connection may be gone already, which is what was wanted
                await session.detach()

    async def close(self) -> None:
        """Close the run's context for good."""
        session, self.session = self.session, None
        self._stop_keeping()
        if session:
            with suppress(Exception):  # the host may be gone, and the pages with it
                await session.close()

    async def _attach(self) -> None:
        # Asked before there is a session, whose own downloads have not lost anybody.
        lost = [
            ev.PageObserved(what="download", details=begun | {"error": DOWNLOAD_LOST}) for begun in self._run.downloads
        ]
        session = await self._open_session(await self._load_checkpoint())
        if session.state == "reattached" and self._half_rebuilt:
            session.state = "restored"
        elif session.state == "restored":
            await self._note_rebuilding()
        self.session = session
        session.on_dialog = self._on_dialog
        if session.state != "live":
            await self._append(ev.PageAttached(state=session.state), *lost)
        self._on_attached()

    def _on_dialog(self) -> None:
        """A dialog that opens while the run waits is not left open either; while a step runs, it is the step's."""
        if self.session and self._run.idle:
            task = asyncio.create_task(self.session.settle_dialogs())
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def _journal(self, session: Session) -> None:
        fresh = [
            ev.PageOpened(name=record.name, target_id=record.target_id, host=session.host)
            for record in await session.records()
            if self._run.pages.get(record.name) != record.target_id
        ]
        if fresh:
            await self._append(*fresh)

    async def _load_checkpoint(self) -> Checkpoint | None:
        kept = await self._store.load_checkpoint(self._run.run_id)
        if kept is None:
            return None
        self._places, self._stored = kept[0], json.loads(kept[1])
        self._half_rebuilt = bool(self._stored.get("rebuilding"))
        return Checkpoint(json.loads(kept[0]), self._stored.get("storage", {}))

    async def _note_rebuilding(self) -> None:
        """Pages found by a later attempt are not to be taken for whole until this one has rebuilt them."""
        self._stored = self._stored | {"rebuilding": True}
        await self._save()

    @property
    def _unsettled(self) -> bool:
        return self.rebuilding and not self._rebuilt

    async def _keep(self) -> None:
        """Keep storage for as long as steps ask for it, and wait in between: what it takes, it may take rarely."""
        while self._keep_again:
            await asyncio.sleep(max(0.0, self._keep_from - time.monotonic()))
            session = self.session
            if session is None or not self._keep_again or self._unsettled or self._run.hijack:
                return
            self._keep_again = False
            began = time.monotonic()
            try:
                storage = (await session.checkpoint()).storage
                if storage != self._stored.get("storage"):
                    self._stored = self._stored | {"storage": storage}
                    await self._save()
            except FlowError:
                return  # the page is gone, or the run; the checkpoint before it is the last one
            now = time.monotonic()
            self._keep_from = now + (now - began) * (1 / KEEPING_SHARE - 1)

    def _stop_keeping(self) -> None:
        self._keep_again = False
        if self._keeping:
            self._keeping.cancel()

    async def _save(self) -> None:
        await self._store.save_checkpoint(self._run.run_id, None, json.dumps(self._stored), self._epoch)


async def look(session: Session) -> tuple[str, str]:
    """A checkpoint of a session as the store keeps it: the places, and storage and titles. Raises `FlowError`."""
    kept = await session.checkpoint()
    return json.dumps(kept.urls), json.dumps({"storage": kept.storage, "titles": await _titles(session)})


async def _titles(session: Session) -> dict[str, list[str]]:
    """URL and title of the pages that say theirs at once."""
    titles = {}
    for name, page in list(session.pages.items()):
        with suppress(Exception):  # a page that is closed, blocked or gone has no title to tell
            async with asyncio.timeout(TITLE_SECONDS):
                titles[name] = [page.url, (await page.title())[:_LONGEST_TITLE]]
    return titles
