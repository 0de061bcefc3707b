"""A run's own context and pages, over a connection of its own.

The context belongs to the browser host and outlives the connection: detaching leaves everything where it is, and
the next session finds it by the target ids of its pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, cast

import anyio
from playwright.async_api import (
    Browser,
    BrowserContext,
    CDPSession,
    Dialog,
    Download,
    Error,
    Page,
    Request,
    StorageState,
)

from mcp_flow import config
from mcp_flow.browser import host as hosts
from mcp_flow.browser import proxy
from mcp_flow.browser.attach import find_pages
from mcp_flow.browser.driver import CLOSE_SECONDS, Driver, finish, wind_up
from mcp_flow.browser.gate import Gate, HeldCall, OnHeld
from mcp_flow.browser.host import HostInfo
from mcp_flow.errors import BrowserUnavailable, PageGone
from mcp_flow.rails import Rails, place

OnEvent = Callable[[str, dict[str, Any]], None]

OPEN_SECONDS = 30
RESPOND_SECONDS = 5
ANSWER_SECONDS = 1.0
"""How long code that listens to dialogs may take to answer one over which it stops."""
MOST_DIALOGS = 20
"""How many dialogs, one after another, are dismissed of a page that goes on asking."""
BARRIER_SECONDS = 1.0
BROWSER_ENDED = "the browser ended"
MOST_NOT_REACHED = 20
"""Of how many hosts a session reports that its pages could not reach them."""


@dataclass(frozen=True)
class PageRecord:
    """What it takes to find a page again while the browser lives."""

    name: str
    target_id: str


@dataclass(frozen=True)
class Checkpoint:
    """What it takes to rebuild the pages when the browser is gone."""

    urls: dict[str, str] = field(default_factory=dict)
    storage: dict[str, Any] = field(default_factory=dict)


class Session:
    """The pages of one run. Made by `open`, ended by `detach` or `close`."""

    state: Literal["live", "reattached", "restored"]
    """How the pages came about: new, found as they were, or to be rebuilt from the checkpoint."""
    pages: dict[str, Page]
    """The pages that have a name."""
    on_dialog: Callable[[], None] | None = None
    """Told of each dialog that opens, before anybody has answered it."""

    def __init__(
        self,
        browser: Browser,
        *,
        checkpoint: Checkpoint | None,
        viewport: tuple[int, int],
        folder: Path,
        on_event: OnEvent,
        run_id: str,
        endpoint: str,
        server: str | None,
        host_lives: Callable[[], bool] = lambda: True,
    ) -> None:
        self._run_id = run_id
        self._endpoint = endpoint
        self._server = server
        self._not_reached: set[tuple[str, int] | None] = set()
        self._host_lives = host_lives
        self.state = "live"
        self.pages = {}
        self._browser = browser
        self._checkpoint = checkpoint
        self._viewport = viewport
        self._folder = folder
        self._on_event = on_event
        self._context: BrowserContext | None = None
        self._making: asyncio.Task[BrowserContext] | None = None
        self._opening: dict[str, asyncio.Task[Page]] = {}
        self._ids: dict[Page, str] = {}
        self._left: dict[str, str] = {}
        self._naming: set[asyncio.Task[None]] = set()
        self._in_order = asyncio.Lock()
        self._guards: dict[Page, CDPSession] = {}
        self._dialogs: set[Page] = set()
        self._dismissing: set[Page] = set()
        self._answered = asyncio.Event()
        self._answered.set()
        self._saving: set[asyncio.Task[None]] = set()
        self._reports: set[asyncio.Task[None]] = set()
        self._gate = Gate(browser._impl_obj._connection)
        self._ending = False
        self._crashed: str | None = None
        browser.on("disconnected", lambda _: self._report_end())

    @classmethod
    async def open(
        cls,
        driver: Driver,
        host: HostInfo,
        *,
        known: Sequence[PageRecord] = (),
        checkpoint: Checkpoint | None = None,
        viewport: tuple[int, int],
        folder: Path,
        on_event: OnEvent,
        run_id: str,
        rails: Rails | None,
        fence: bool = False,
        host_lives: Callable[[], bool] = lambda: True,
    ) -> Session:
        """A session on the known pages if they live; else one whose pages are made when they are asked for.

        The pages keep to the `rails`, those that are found too; with None they keep to what they kept to, and none are
        made. With `fence` another process may still act on the known pages: they are replaced, so that it reaches
        nothing.
        `host_lives` says whether the host does: its browser may answer for a moment longer, while it closes its pages.
        """
        server = await proxy.admit(host.endpoint, run_id, rails) if rails else None
        browser = await driver.connect(host.endpoint)
        session = cls(
            browser,
            checkpoint=checkpoint,
            viewport=viewport,
            folder=folder,
            on_event=on_event,
            run_id=run_id,
            endpoint=host.endpoint,
            server=server,
            host_lives=host_lives,
        )
        try:
            found = await find_pages(browser, {record.target_id for record in known})
            if found and fence:
                session._checkpoint = await _fence(found, checkpoint)
                session.state = "restored"
            elif found and await session._take_over(found, known):
                session.state = "reattached"
            elif known or checkpoint:
                session.state = "restored"
        except BaseException:
            await session.detach()
            raise
        return session

    async def page(self, name: str = "main") -> Page:
        """The page of this name, made if there is none; its URL is not restored here.

        A cancelled call leaves nothing half made: the page is there for whoever asks next.
        """
        if name not in self.pages and self._naming:
            # A popup that its opener has returned already may be about to get this name.
            await asyncio.wait(self._naming)
        if name in self.pages:
            return self.pages[name]
        if name not in self._opening:
            self._opening[name] = asyncio.create_task(self._open_page(name))
        try:
            return await asyncio.shield(self._opening[name])
        except (Error, TimeoutError) as error:
            raise self._lost(error) from error

    @property
    def host(self) -> str:
        """What tells the host of the pages from others."""
        return hosts.identity(self._endpoint)

    async def records(self) -> list[PageRecord]:
        """What finds the named pages again."""
        return [PageRecord(name, await self._id(page)) for name, page in list(self.pages.items())]

    def places(self) -> dict[str, str]:
        """The URLs of the named pages; pages not rebuilt yet keep what they had."""
        before = self._checkpoint.urls if self._checkpoint else {}
        # Where the browser ends, its pages close a moment before that is known: they are not to be forgotten.
        return before | self._left | {name: page.url for name, page in self.pages.items()}

    async def settle_dialogs(self) -> None:
        """Let code that listens to dialogs answer those that are open, and dismiss the rest.

        One that stays open wedges the page for whoever comes next.
        """
        await asyncio.gather(*map(self._catch_up, list(self._guards)))
        with anyio.move_on_after(ANSWER_SECONDS):
            await self._answered.wait()
        for _ in range(MOST_DIALOGS):
            if not self._dialogs:
                return
            await asyncio.gather(*map(self._dismiss, list(self._dialogs)))

    async def settle_downloads(self, seconds: float) -> None:
        """Return once the downloads under way are kept, or after so long."""
        if self._saving:
            await asyncio.wait(self._saving, timeout=seconds)

    async def lost(self) -> str | None:
        """What has become of the pages, if they are gone by no doing of ours."""
        if self._crashed:
            return self._crashed
        if not self._host_lives():
            return BROWSER_ENDED
        if self._context is None:
            return None if self._browser.is_connected() else BROWSER_ENDED
        try:
            # Asked, because a call may fail before the event that says why.
            await finish(self._context.cookies(), CLOSE_SECONDS)
        except (Error, TimeoutError):
            return self._crashed or BROWSER_ENDED
        return self._crashed

    async def explain(self, error: BaseException) -> str | None:
        """Why the net was not reached, where that is what an action failed of."""
        return await proxy.explain(self._endpoint, self._run_id, error.message) if isinstance(error, Error) else None

    async def checkpoint(self) -> Checkpoint:
        """What rebuilds the named pages; pages not rebuilt yet keep what they had."""
        before = self._checkpoint or Checkpoint()
        if self._context is None:
            return before
        try:
            storage: Mapping[str, Any] = await finish(self._context.storage_state(), CLOSE_SECONDS)
        except (Error, TimeoutError) as error:
            raise self._lost(error) from error
        return Checkpoint(self.places(), dict(storage))

    async def restore_url(self, name: str) -> None:
        """Go where the page of this name was when the checkpoint was taken."""
        page = await self.page(name)
        url = self._checkpoint.urls.get(name) if self._checkpoint else None
        if url and page.url != url:
            await page.goto(url)

    def hold_actions(self, on_held: OnHeld) -> None:
        """Let whatever the run's code asks of its pages from now on stand still; `on_held` is told of each call, in the
        context in which it is made. Others reach the pages as before."""
        self._gate.close(on_held)

    def release_actions(self) -> None:
        """Let what stands still go on."""
        self._gate.open()

    async def describe(self, call: HeldCall) -> str:
        """A call and what it is about, without what it would have typed: `Page.click locator("button")`."""
        about = call.url
        if call.selector:
            utils: Any = self._browser._impl_obj._connection.local_utils()
            with contextlib.suppress(Error):
                told = await utils._channel.asLocatorDescription(selector=call.selector, sdkLanguage="python")
                about = told["description"]
        return f"{call.name} {about}" if about else call.name

    async def detach(self) -> None:
        """Close the connection; the context and its pages stay as they are."""
        self._ending = True
        await wind_up(self._end(), CLOSE_SECONDS)

    async def close(self) -> None:
        """Close the context with all its pages, then the connection."""
        self._ending = True
        await wind_up(self._end(close_context=True), 2 * CLOSE_SECONDS)

    async def _take_over(self, found: Mapping[str, Page], known: Sequence[PageRecord]) -> bool:
        """Make the found pages ours, as far as they respond; False if none does."""
        self._context = context = next(iter(found.values())).context
        self._watch(context)
        records = [record for record in known if record.target_id in found]
        responding = await asyncio.gather(*(_responds(found[record.target_id]) for record in records))
        for record, responds in zip(records, responding, strict=True):
            page = found[record.target_id]
            if responds:
                self.pages[record.name] = page
                self._ids[page] = record.target_id
            else:
                self._on_event("page-unresponsive", {"name": record.name})
                if is_popup(record.name):
                    await wind_up(page.close(), CLOSE_SECONDS)
        missing = [record.name for record in known if record.name not in self.pages]
        if not all(map(is_popup, missing)):
            # A blank page in the place of one of the run's own would pass for that.
            self._context = None
            self.pages.clear()
            self._ids.clear()
            self._checkpoint = await _fence(found, self._checkpoint)
            return False
        for name in missing:
            self._on_event("page-closed", {"name": name})
        await asyncio.gather(*map(self._guard, self.pages.values()))
        for page in context.pages:
            self._watch_page(page)
            if self._name(page) is None:
                self._name_popup(page)
        return True

    async def _ensure_context(self) -> BrowserContext:
        if self._context:
            return self._context
        if self._making is None:
            # A task of its own, because a cancelled `new_context` leaves a context that nobody knows of.
            self._making = asyncio.create_task(self._new_context())
        return await asyncio.shield(self._making)

    async def _new_context(self) -> BrowserContext:
        width, height = self._viewport
        storage = self._checkpoint.storage if self._checkpoint else {}
        assert self._server
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                context = await self._browser.new_context(
                    viewport={"width": width, "height": height},
                    proxy={"server": self._server},
                    storage_state=cast(StorageState, storage) if storage else None,
                )
            self._watch(context)
            self._context = context
            return context
        finally:
            self._making = None

    async def _open_page(self, name: str) -> Page:
        try:
            context = await self._ensure_context()
            async with asyncio.timeout(OPEN_SECONDS):
                page = await context.new_page()
                await self._id(page)
            self.pages[name] = page
            return page
        finally:
            del self._opening[name]

    async def _id(self, page: Page) -> str:
        if page not in self._ids:
            if (target_id := await self._guard(page)) is None:
                raise PageGone("The page has closed or crashed.")
            self._ids[page] = target_id
        return self._ids[page]

    async def _guard(self, page: Page) -> str | None:
        """Hear of the page's dialogs from now on; returns its target id, or None if it has closed.

        Only a session that was there before a dialog opened can dismiss it.
        """
        with contextlib.suppress(Error, TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                cdp = await page.context.new_cdp_session(page)
                cdp.on("Page.javascriptDialogOpening", lambda _: self._on_dialog_opening(page))
                cdp.on("Page.javascriptDialogClosed", lambda _: self._on_dialog_gone(page))
                info = await cdp.send("Target.getTargetInfo")
                with contextlib.suppress(Error, TimeoutError):
                    # A page that hangs does not answer this.
                    async with asyncio.timeout(BARRIER_SECONDS):
                        await cdp.send("Page.enable")
                        # No proxy sees these; for anything else this pattern costs nothing.
                        cdp.on("Fetch.requestPaused", lambda paused: self._report(_refuse(cdp, paused)))
                        await cdp.send("Fetch.enable", {"patterns": [{"urlPattern": "file://*"}]})
                self._guards[page] = cdp
                return str(info["targetInfo"]["targetId"])
        return None

    async def _catch_up(self, page: Page) -> None:
        """Hear of what has happened to the page's dialogs so far: what a session answers comes after what it tells."""
        if cdp := self._guards.get(page):
            await wind_up(cdp.send("Target.getTargetInfo"), BARRIER_SECONDS)

    def _on_dialog_opening(self, page: Page) -> None:
        self._dialogs.add(page)
        self._answered.clear()
        if self.on_dialog:
            self.on_dialog()

    def _on_dialog_gone(self, page: Page) -> None:
        self._dialogs.discard(page)
        if not self._dialogs:
            self._answered.set()

    async def _dismiss(self, page: Page) -> None:
        self._dismissing.add(page)
        # Answered meanwhile, or gone with its page, is as well.
        if cdp := self._guards.get(page):
            await wind_up(cdp.send("Page.handleJavaScriptDialog", {"accept": False}), CLOSE_SECONDS)
        # Scripts may go on to their next dialog: a title comes from the page, or at once where one is open.
        await wind_up(page.title(), BARRIER_SECONDS)
        await self._catch_up(page)
        self._dismissing.discard(page)

    def _name(self, page: Page) -> str | None:
        return next((name for name, other in self.pages.items() if other is page), None)

    def _watch(self, context: BrowserContext) -> None:
        # Dialogs are left to Playwright, which answers them at once unless the workflow listens to them itself:
        # a listener of ours would take them from it. This one only hears of their end.
        context.on("dialogclosed", self._on_dialog)
        context.on("download", self._on_download)
        context.on("page", self._on_page)
        context.on("requestfailed", self._on_failed)

    def _watch_page(self, page: Page) -> None:
        page.on("close", partial(self._on_gone, "page-closed"))
        page.on("crash", partial(self._on_gone, "page-crashed"))

    def _report_end(self) -> None:
        if not self._ending:
            self._on_event("browser-gone", {})

    def _on_dialog(self, dialog: Dialog) -> None:
        url = dialog.page.url if dialog.page else ""
        about = {"type": dialog.type, "message": dialog.message, "url": url}
        if dialog.page in self._dismissing:
            about["answered"] = "dismissed at a stop"
        self._on_event("dialog", about)

    def _on_gone(self, kind: str, page: Page) -> None:
        name = self._name(page)
        self._on_dialog_gone(page)
        self._guards.pop(page, None)
        if name is not None:
            del self.pages[name]
            self._left[name] = page.url
            if kind == "page-crashed":
                self._crashed = f"the page {name!r} crashed"
        self._ids.pop(page, None)
        if not self._ending:
            self._on_event(kind, {"name": name})

    def _on_page(self, page: Page) -> None:
        self._watch_page(page)
        self._name_popup(page)

    def _on_failed(self, request: Request) -> None:
        where, told = place(request.url), self._not_reached
        if proxy.FAILED in (request.failure or "") and where not in told and len(told) < MOST_NOT_REACHED:
            told.add(where)
            self._report(self._report_failed(request.url))

    async def _report_failed(self, url: str) -> None:
        why = await proxy.explain(self._endpoint, self._run_id, f"{proxy.FAILED} at {url}")
        self._on_event("not-reached", {"url": url, "why": why})

    def _on_download(self, download: Download) -> None:
        saving = self._report(self._save(download))
        self._saving.add(saving)
        saving.add_done_callback(self._saving.discard)

    def _report(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)
        return task

    def _name_popup(self, page: Page) -> None:
        naming = self._report(self._report_popup(page))
        self._naming.add(naming)
        naming.add_done_callback(self._naming.discard)

    async def _report_popup(self, page: Page) -> None:
        async with self._in_order:  # in which they opened
            # A page of our own is heard of here before `new_page` returns it.
            if self._opening:
                await asyncio.wait(self._opening.values())
            if self._name(page) is None and (target_id := await self._guard(page)):
                name = next(name for n in count(1) if (name := f"popup-{n}") not in self.pages)
                self.pages[name], self._ids[page] = page, target_id
                self._on_event("popup", {"name": name, "url": page.url, "target_id": target_id})

    async def _save(self, download: Download) -> None:
        about: dict[str, Any] = {"url": download.url, "suggested": download.suggested_filename}
        self._on_event("download-started", about)
        try:
            folder = config.private_folder(self._folder / "downloads")
            with _reserved(folder, download.suggested_filename) as path:
                await download.save_as(path)
        except Error as error:
            self._on_event("download", about | {"error": error.message})
        except OSError as error:
            self._on_event("download", about | {"error": f"{folder}: {error.strerror}"})
        else:
            self._on_event("download", about | {"path": str(path)})

    async def _end(self, *, close_context: bool = False) -> None:
        self._gate.end()
        with contextlib.suppress(Error, TimeoutError):
            if pending := [*self._opening.values(), *([self._making] if self._making else [])]:
                await asyncio.wait(pending, timeout=CLOSE_SECONDS - 1)
            if close_context and self._context:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._context.close()
                await proxy.dismiss(self._endpoint, self._run_id)
        for task in self._reports:
            task.cancel()
        with contextlib.suppress(Error):
            await self._browser.close()

    def _lost(self, error: Exception) -> BrowserUnavailable | PageGone:
        if not self._browser.is_connected():
            return BrowserUnavailable("The browser has gone; resume the run to rebuild its pages.")
        return PageGone(f"The browser did not do it: {error or 'it took too long'}")


async def _refuse(cdp: CDPSession, paused: dict[str, Any]) -> None:
    with contextlib.suppress(Error):  # the page has gone with it
        await cdp.send("Fetch.failRequest", {"requestId": paused["requestId"], "errorReason": "BlockedByClient"})


def is_popup(name: str) -> bool:
    """Whether a page of this name was opened by a page, and not by the run."""
    return re.fullmatch(r"popup-\d+", name) is not None


async def _fence(found: Mapping[str, Page], checkpoint: Checkpoint | None) -> Checkpoint:
    """Close the context of the found pages, after a checkpoint of it as far as one can be had."""
    kept = checkpoint or Checkpoint()
    context = next(iter(found.values())).context
    with contextlib.suppress(Error, TimeoutError):
        storage: Mapping[str, Any] = await finish(context.storage_state(), CLOSE_SECONDS)
        kept = Checkpoint(kept.urls, dict(storage))
    await wind_up(context.close(), CLOSE_SECONDS)
    return kept


async def _responds(page: Page) -> bool:
    """Whether scripts run in the page: not if it has crashed, or shows a dialog whose client has died."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RESPOND_SECONDS):
            while not page.is_closed():
                with contextlib.suppress(Error):  # a navigation may come in between
                    await page.evaluate("1")
                    return True
                await asyncio.sleep(0.05)
    return False


@contextlib.contextmanager
def _reserved(folder: Path, suggested: str) -> Iterator[Path]:
    """A path in `folder` that nobody else has, with as much of the suggested name as is safe."""
    name = re.sub(r"[^\w. -]", "_", Path(suggested).name).strip(". ")[-120:] or "download"
    stem, suffix = Path(name).stem, Path(name).suffix
    number = 1
    while True:
        path = folder / (name if number == 1 else f"{stem} ({number}){suffix}")
        try:
            path.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        break
    try:
        yield path
    except BaseException:
        path.unlink(missing_ok=True)
        raise
