"""Acting on a live page: a few actions in one go, what came of them, and the Python that does the same."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from playwright.async_api import CDPSession, Download, Frame, Locator, Page
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import TimeoutError as PlaywrightTimeout

from mcp_flow.errors import ActionFailed, FlowError, PageRefusal, StaleRef
from mcp_flow.page.access import Dialogs, cdp_session, dialogs_answered, turn
from mcp_flow.page.actions import Action, absolute_url, allowed_file, checked
from mcp_flow.page.fit import Fence
from mcp_flow.page.guard import (
    HIDDEN,
    Secrets,
    aside,
    clean,
    gone,
    is_secret_field,
    read_secrets,
    shortened,
    shown_url,
)
from mcp_flow.page.settle import Traffic, settled, traffic_of
from mcp_flow.page.statements import escaped, literal, literals, opening

ACTION_SECONDS = 5.0
"""How long one action may take, its waiting for the element to be ready for it included."""
PATIENT_SECONDS = {"wait": 10.0, "navigate": 15.0, "back": 15.0}
"""The ops that wait for somebody else may take longer."""
TOTAL_SECONDS = 30.0
"""How long all actions of a call may take together: clients give up after a minute."""
ARRIVE_SECONDS = 3.0
"""How long a document that was navigated to may take to arrive before it is taken as it is."""
ANSWER_SECONDS = 5.0
"""How long a server may take to answer a navigation before the call ends without a look at its page."""
REVIVE_SECONDS = 2.0
"""How long a page may be busy before the script that keeps it so is stopped."""
OBSERVE_SECONDS = 10.0
"""How long the look at its end may take."""

Observe = Callable[[], Awaitable[str]]
"""Gives the text of what changed on the page since the last look, or of the page."""
Known = Callable[[str], tuple[str, str | None] | None]
"""Gives role and name of a ref in the last look, None for a ref that it did not hold.

The name is Playwright's own, before anything in it was cleaned, hidden or cut: the element is found by it.
"""
Take = Callable[[], Awaitable[object]]
"""Takes the page from the run's code; raises `FlowError` where that is not to be."""
Explain = Callable[[str], Awaitable[str | None]]
"""Says why a page did not reach the net, where Playwright's message says no more than that."""
Left = Callable[[], Awaitable[str]]
"""Says, when the page is gone, what is left and how to get a page back."""
Mask = Callable[[str], str]
"""Replaces the values of known secrets, each by `[secret NAME]`."""

_NAMELESS = frozenset({"generic", "iframe", "text"})
"""The roles of a snapshot by which Playwright finds no element."""


async def _nothing_left() -> str:
    return "get_run says where the run stands."


@dataclass(frozen=True, slots=True)
class Opened:
    """What an action opened, in one line without anything that is secret; `quoted` is what the page says of it."""

    kind: Literal["popup", "dialog", "download"]
    text: str
    quoted: str = ""


@dataclass(frozen=True, slots=True)
class Healed:
    """A stale ref, and the other element that was used: its role, name and locator, which are text of the page."""

    ref: str
    quoted: str


@dataclass(frozen=True, slots=True)
class Acted:
    """What came of a call's actions. Whatever texts of the page it holds are clean, and its secrets are hidden.

    `done` names those that were carried out and `python` holds the statements that do the same in a workflow.
    `healed` says where another element than that of a stale ref was used. `settled` is whether the page came to rest;
    `navigated` is its new URL, if it has one; `difference` is what `observe` gave. `error`, if an action failed, is
    for the caller to raise: its text holds all of this and says what to call next.
    """

    done: tuple[str, ...]
    python: tuple[str, ...]
    healed: tuple[Healed, ...]
    opened: tuple[Opened, ...]
    navigated: str | None
    settled: bool
    difference: str
    error: FlowError | None
    ms: float


async def act(
    page: Page,
    actions: Sequence[Any],
    *,
    observe: Observe,
    known: Known,
    mask: Mask = str,
    folders: Sequence[Path] = (),
    look: str = "snapshot",
    name: str = "page",
    take: Take | None = None,
    explain: Explain | None = None,
    left: Left = _nothing_left,
) -> Acted:
    """Carries out `actions` on `page`, one after the other, until one fails.

    An element is named by the ref of the latest snapshot or by a Playwright selector. A ref whose element is gone, or
    has another role or name than `known` gives, stands for the only element that has this role and name, if there is
    exactly one. After each action the page is given a second at most to come to rest. Dialogs are answered as the
    action before said, else dismissed. Files are uploaded from `folders` only. `look` is the call that shows the
    page and `name` the page's variable in the workflow, for the texts of errors and of statements. The page is taken
    by `take` when the first action is about to touch it. Calls to one page queue.

    Raises `InvalidInput` for actions that can't be tried, before any is, and `PageGone`.
    """
    chosen = checked(actions, folders)
    if page.is_closed():
        raise gone()
    async with turn(page):
        asked = _Asked(chosen, observe, known, mask, folders, look, name, take, explain, left)
        return await aside(page, lambda: _acted(page, asked))


def report(acted: Acted, failure: Sequence[str] = ()) -> str:
    """What an agent reads about it, one fact a line, what the page shows at its end.

    What comes from the page stands between markers: its own words of a `failure`, of what was healed and of what
    opened, and the Python, in whose locators its names are.
    """
    lines = [f"done in {acted.ms:.0f} ms: {', '.join(acted.done) or 'nothing'}"]
    lines += [
        f"healed: {one.ref} was gone or changed; the only element of its role and name was used" for one in acted.healed
    ]
    lines += [f"{one.kind}: {one.text}" for one in acted.opened]
    if acted.navigated:
        lines.append(f"navigated: {acted.navigated}")
    if not acted.settled:
        lines.append("The page has not come to rest yet.")
    quoted = [*failure, *(f"healed {one.ref}: {one.quoted}" for one in acted.healed)]
    quoted += [f"{one.kind}: {one.quoted}" for one in acted.opened if one.quoted]
    if acted.python:
        quoted += ["python:", *("  " + line for code in acted.python for line in code.split("\n"))]
    return "\n".join([*lines, *Fence().around(quoted), acted.difference])


@dataclass(frozen=True, slots=True)
class _Asked:
    """The actions of one call, and what `act` was given for them."""

    actions: tuple[Action, ...]
    observe: Observe
    known: Known
    mask: Mask
    folders: Sequence[Path]
    look: str
    name: str
    take: Take | None
    explain: Explain | None
    left: Left


async def _acted(page: Page, asked: _Asked) -> Acted:
    started = time.perf_counter()
    async with traffic_of(page) as traffic, dialogs_answered(page) as dialogs, _news_of(page) as news:
        hands = _Hands(page, asked, traffic, dialogs, news)
        try:
            failure = await hands.carry_out_all(asked.actions)
            if isinstance(failure, PageRefusal) and asked.explain:
                why = await asked.explain(f"{failure}\n{failure.quoted}")
                failure = ActionFailed(why) if why else failure
            difference, _ = await asyncio.gather(hands.difference(), hands.learn_secrets())
        finally:
            await hands.put_down()
        opened = [Opened("dialog", f"{one.type} {one.outcome}", one.quoted) for one in await dialogs.answered()]
    opened += [Opened("popup", shown_url(hands.shown(popup.url))) for popup in news.popups]
    opened += [
        Opened(
            "download", f"from {shown_url(hands.shown(d.url))}", json.dumps(d.suggested_filename, ensure_ascii=False)
        )
        for d in news.downloads
    ]
    acted = Acted(
        tuple(hands.shown(one) for one in hands.done),
        hands.statements(),
        tuple(replace(one, quoted=hands.shown(one.quoted)) for one in hands.healed),
        tuple(replace(one, quoted=shortened(hands.shown(one.quoted), 500)) for one in opened),
        shown_url(hands.shown(page.url)) if news.navigated and not page.is_closed() else None,
        hands.settled,
        difference,
        None,
        round((time.perf_counter() - started) * 1000, 1),
    )
    if failure is None:
        return acted
    return _stopped(acted, failure, hands, asked)


def _stopped(acted: Acted, failure: FlowError, hands: _Hands, asked: _Asked) -> Acted:
    """The outcome with the error that ended it, whose text holds everything."""
    at = len(acted.done)
    parts = [f"actions[{at}], {hands.shown(str(asked.actions[at]))}: {hands.shown_lines(str(failure))}"]
    if rest := asked.actions[at + 1 :]:
        parts.append(f"Not begun: {hands.shown(', '.join(map(str, rest)))}.")
    quoted: list[str] = []
    if isinstance(failure, PageRefusal):
        parts.append(f"Next: act with what is left, by the refs below; {asked.look} shows the whole page.")
        quoted = hands.shown_lines(failure.quoted).split("\n") if failure.quoted else []
    return replace(acted, error=type(failure)("\n".join([*parts, report(acted, quoted)])))


class _News:
    """What opened and where the page went meanwhile."""

    def __init__(self, page: Page) -> None:
        self.popups: list[Page] = []
        self.downloads: list[Download] = []
        self.navigated = False
        self._page = page

    def popped_up(self, popup: Page) -> None:
        self.popups.append(popup)

    def downloading(self, download: Download) -> None:
        self.downloads.append(download)

    def landed(self, frame: Frame) -> None:
        self.navigated |= frame == self._page.main_frame


@asynccontextmanager
async def _news_of(page: Page) -> AsyncIterator[_News]:
    news = _News(page)
    page.context.on("page", news.popped_up)
    page.on("download", news.downloading)
    page.on("framenavigated", news.landed)
    try:
        yield news
    finally:
        page.context.remove_listener("page", news.popped_up)
        page.remove_listener("download", news.downloading)
        page.remove_listener("framenavigated", news.landed)


@dataclass(frozen=True, slots=True)
class _Target:
    """An element to act on, and the Python that finds it."""

    locator: Locator
    code: str


class _Hands:
    """What carries out the actions of one call and remembers what came of them."""

    def __init__(
        self,
        page: Page,
        asked: _Asked,
        traffic: Traffic,
        dialogs: Dialogs,
        news: _News,
    ) -> None:
        self.done: list[str] = []
        self.python: list[str] = []
        self.healed: list[Healed] = []
        self.settled = True
        self._page = page
        self._asked = asked
        self._known = asked.known
        self._mask = asked.mask
        self._folders = asked.folders
        self._name = asked.name
        self._taken = asked.take is None
        self._traffic = traffic
        self._dialogs = dialogs
        self._news = news
        self._secrets: Secrets | None = None
        self._in_secret = False
        self._end = asyncio.get_running_loop().time() + TOTAL_SECONDS
        self._until = self._end
        self._session = asyncio.create_task(self._listening_session())

    def shown(self, text: str) -> str:
        """`text` in one clean line, without what is secret."""
        return clean(self._hidden(text))

    def shown_lines(self, text: str) -> str:
        """The same for the text of an error, whose lines stay."""
        return shortened("\n".join(clean(line) for line in self._hidden(text).split("\n")), 2000)

    def statements(self) -> tuple[str, ...]:
        """The Python that does what was done."""
        return tuple(map(self._hidden, self.python))

    async def carry_out_all(self, actions: Sequence[Action]) -> FlowError | None:
        """Does them in order until one fails, and gives that one's error."""
        try:
            for action in actions:
                await self._carry_out(action)
        except FlowError as error:
            return error
        return None

    async def _carry_out(self, action: Action) -> None:
        now = asyncio.get_running_loop().time()
        if self._page.is_closed():
            raise gone()
        if now >= self._end:
            raise ActionFailed(f"not begun, for the call has taken {TOTAL_SECONDS:g} s already.")
        seconds = PATIENT_SECONDS.get(action.op, ACTION_SECONDS)
        self._until = min(now + seconds, self._end)
        self._in_secret = False
        popups, downloads = len(self._news.popups), len(self._news.downloads)
        try:
            async with asyncio.timeout_at(self._until + 0.5):
                statement = await self._perform(action)
        except (TimeoutError, PlaywrightError) as error:
            self.settled = False
            raise self._failed(error, seconds) from error
        self.done.append(str(action))
        if action.op != "dialog":
            self.settled = await settled(self._page, self._traffic)
        if len(self._news.popups) > popups:
            statement = opening(statement, f"{self._name}.expect_popup()", "popup")
        if len(self._news.downloads) > downloads:
            statement = opening(statement, f"{self._name}.expect_download()", "download")
        self.python.append(statement)

    async def _take(self) -> None:
        """Takes the page, before anything is done to it and once only."""
        if not self._taken and self._asked.take:
            await self._asked.take()
        self._taken = True

    async def difference(self) -> str:
        """What `observe` gives, or why there is nothing to be seen."""
        look = self._asked.look
        if self._page.is_closed():
            return f"[The page is closed. {await self._asked.left()}]"
        if not await self._traffic.answered(ANSWER_SECONDS):
            return (
                "[The server has not answered yet, and till then nothing of the page can be read. "
                f"{look} tries again; act can navigate elsewhere.]"
            )
        note = ""
        if not self.settled and not await self._responds():
            if not await self._stop_script():
                return f"[The page does not answer. {look} tries again; cancel ends the run.]"
            note = "[A script of the page ran without end and was stopped.]\n"
        if self._dialogs.answers:
            note += "[No dialog opened after the answer to one was given.]\n"
        try:
            async with asyncio.timeout(OBSERVE_SECONDS):
                return note + await self._asked.observe()
        except TimeoutError:
            return f"{note}[The page could not be read within {OBSERVE_SECONDS:g} s. {look} tries again.]"
        except FlowError as error:
            return f"{note}[The page could not be read: {self.shown(str(error))[:500]}]"
        except PlaywrightError as error:
            said = Fence().around([shortened(self.shown(error.message), 500)])
            return "\n".join([f"{note}[The page could not be read. {look} tries again.]", *said])

    async def learn_secrets(self) -> None:
        """Adds what the page's secret fields hold now to what is hidden."""
        with suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(1):
                self._secrets = (self._secrets or Secrets()) | await read_secrets(self._page)

    async def put_down(self) -> None:
        """Ends what only this call needed."""
        self._session.cancel()
        await asyncio.gather(self._session, return_exceptions=True)
        if not self._session.cancelled() and not self._session.exception():
            self._session.result().remove_listener("Page.windowOpen", self._traffic.window_opening)

    def _hidden(self, text: str) -> str:
        masked = self._mask(text)
        return self._secrets.hide(masked) if self._secrets else masked

    def _failed(self, error: Exception, seconds: float) -> FlowError:
        message = error.message if isinstance(error, PlaywrightError) else ""
        if self._page.is_closed() or "crashed" in message:
            return gone()
        if not isinstance(error, PlaywrightError):
            return ActionFailed(f"it did not end within {seconds:g} s; it may have been done.")
        first, _, log = _abridged(message).partition("\n")
        if isinstance(error, PlaywrightTimeout):
            # The log of an action on a secret field quotes what it was given.
            return ActionFailed(first, "" if self._in_secret else log)
        return ActionFailed("the browser could not do it.", first if self._in_secret else f"{first}\n{log}".rstrip())

    async def _listening_session(self) -> CDPSession:
        """Open before anything is done: only such a session can stop a script without end."""
        session = await cdp_session(self._page)
        session.on("Page.windowOpen", self._traffic.window_opening)
        await session.send("Page.enable")
        return session

    async def _responds(self) -> bool:
        try:
            async with asyncio.timeout(REVIVE_SECONDS):
                await self._page.evaluate("0")
        except TimeoutError:
            return False
        except PlaywrightError:  # a document that was replaced meanwhile has answered, in its way
            return True
        return True

    async def _stop_script(self) -> bool:
        with suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(1):
                await (await asyncio.shield(self._session)).send("Runtime.terminateExecution")
                await self._page.evaluate("0")
                return True
        return False

    @property
    def _ms(self) -> float:
        """What is left of the time for this action; never none, which Playwright would take for no limit."""
        return max(1, round((self._until - asyncio.get_running_loop().time()) * 1000))

    async def _perform(self, action: Action) -> str:
        """Does it and gives the Python that does the same."""
        page, value = self._page, action.text
        if not action.target and action.op != "wait":
            await self._take()
        match action.op:
            case "click":
                target = await self._target(action)
                # Otherwise it would wait for the server to answer a navigation, for as long as that takes.
                await target.locator.click(timeout=self._ms, no_wait_after=True)
                return f"await {target.code}.click()"
            case "hover":
                target = await self._target(action)
                await target.locator.hover(timeout=self._ms)
                return f"await {target.code}.hover()"
            case "fill":
                target = await self._target(action)
                await target.locator.fill(value, timeout=self._ms)
                return f"await {target.code}.fill({self._value(value)})"
            case "type":
                target = await self._target(action)
                await target.locator.press_sequentially(value, timeout=self._ms)
                return f"await {target.code}.press_sequentially({self._value(value)})"
            case "press":
                if not action.target:
                    await page.keyboard.press(value)
                    return f"await {self._name}.keyboard.press({literal(value)})"
                target = await self._target(action)
                await target.locator.press(value, timeout=self._ms, no_wait_after=True)
                key = self._value(value) if len(value) == 1 else literal(value)
                return f"await {target.code}.press({key})"
            case "select":
                target = await self._target(action)
                await target.locator.select_option(action.texts, timeout=self._ms)
                return f"await {target.code}.select_option({literals(action.texts)})"
            case "check":
                target = await self._target(action)
                wanted = action.value is not False
                await target.locator.set_checked(wanted, timeout=self._ms)
                return f"await {target.code}.{'check' if wanted else 'uncheck'}()"
            case "upload":
                return await self._upload(await self._target(action), action.texts)
            case "navigate":
                return await self._navigate(value)
            case "back":
                return await self._go_back()
            case "wait":
                return await self._wait(action)
            case "dialog":
                self._dialogs.answers.append(value)
                answer = "dismiss()" if value == "dismiss" else f"accept({'' if value == 'accept' else literal(value)})"
                return f'{self._name}.once("dialog", lambda dialog: dialog.{answer})'
            case "close":
                await page.close()
                return f"await {self._name}.close()"

    async def _upload(self, target: _Target, values: Sequence[str]) -> str:
        try:
            # Asked again: since all was checked, an action before may have changed what a link leads to.
            paths = [allowed_file(value, self._folders) for value in values]
        except (ValueError, OSError) as error:
            raise ActionFailed(f"{error}.") from error
        files = literals(list(map(str, paths)))
        takes_files = target.locator.and_(self._page.locator("input[type=file], label"))
        if await takes_files.count():
            await target.locator.set_input_files(paths, timeout=self._ms)
            return f"await {target.code}.set_input_files({files})"
        async with self._page.expect_file_chooser(timeout=self._ms) as choosing:
            await target.locator.click(timeout=self._ms, no_wait_after=True)
        await (await choosing.value).set_files(paths, timeout=self._ms)
        click = f"await {target.code}.click()"
        chooser = opening(click, f"{self._name}.expect_file_chooser()", "chooser")
        return f"{chooser}\nawait chooser.set_files({files})"

    async def _navigate(self, value: str) -> str:
        try:
            url = absolute_url(value, self._page.url)
        except ValueError as error:
            raise ActionFailed(f"{error}.") from error
        try:
            await self._page.goto(url, wait_until="commit", timeout=self._ms)
        except PlaywrightError as error:
            if "Download is starting" not in error.message:
                raise
        await self._arrived()
        return f"await {self._name}.goto({literal(url)})"

    async def _go_back(self) -> str:
        before = self._page.url
        response = await self._page.go_back(wait_until="commit", timeout=self._ms)
        if response is None and self._page.url == before:
            raise ActionFailed("there is no page before this one; navigate leads to another.")
        await self._arrived()
        return f"await {self._name}.go_back()"

    async def _arrived(self) -> None:
        """Waits for the document, but not for one that never ends."""
        with suppress(PlaywrightTimeout):
            await self._page.wait_for_load_state("domcontentloaded", timeout=min(self._ms, ARRIVE_SECONDS * 1000))

    async def _wait(self, action: Action) -> str:
        page, value = self._page, action.text
        if not action.target:
            await page.get_by_text(value).filter(visible=True).first.wait_for(timeout=self._ms)
            return f"await {self._name}.get_by_text({literal(value)}).filter(visible=True).first.wait_for()"
        state: Any = value or "visible"
        asked = "" if state == "visible" else f"state={literal(state)}"
        if action.locator:
            await page.locator(action.locator).wait_for(state=state, timeout=self._ms)
            return f"await {self._name}.locator({literal(action.locator)}).wait_for({asked})"
        ref = action.ref or ""
        if state in ("visible", "attached"):
            target = await self._by_ref(ref, action)
            await target.locator.wait_for(state=state, timeout=self._ms)
            return f"await {target.code}.wait_for({asked})"
        found = page.get_by_ref(ref)
        code = await self._code(found)
        await found.wait_for(state=state, timeout=self._ms)
        return f"await {code}.wait_for({asked})" if code else f"# {ref} was {state} already"

    async def _target(self, action: Action) -> _Target:
        """The element of the action, there now and told from all others."""
        found = self._by_ref(action.ref, action) if action.ref else self._by_locator(action.locator or "", action)
        target = await found
        await self._take()
        return target

    async def _by_ref(self, ref: str, action: Action) -> _Target:
        was = self._known(ref)
        found = self._page.get_by_ref(ref)
        tries = [found]
        if was and was[1] and was[0] not in _NAMELESS:
            # A page that uses its elements again, in a list that scrolls, gives the one of this ref to another row.
            # Roles and names of a whole page take long to find out, and only a shadow root's child has no parent.
            near, anywhere = found.locator("xpath=.."), self._page.main_frame
            tries = [_named(near, *was).and_(found), found.and_(_named(anywhere, *was))]
        for one in tries:
            try:
                count, target = await self._examined(one, action)
            except PlaywrightError as error:
                if "Invalid frame" not in error.message:
                    raise
                continue
            if count == 1 and target:
                return target
        if not was:
            raise StaleRef(f"ref {ref} is not on the page, and the last look did not hold it.")
        role, name = was
        if not name or role in _NAMELESS:
            raise StaleRef(f"ref {ref}, {role} without a name to find it by, is gone.")
        return await self._healed(ref, role, name, action)

    async def _healed(self, ref: str, role: str, name: str, action: Action) -> _Target:
        """The only element that has the role and name of a ref that is gone."""

        async def count(locator: Locator) -> int:
            try:
                return await locator.count()
            except PlaywrightError:  # a frame that goes away holds nothing
                return 0

        candidates = [_named(frame, role, name) for frame in self._page.frames]
        counts = await asyncio.gather(*map(count, candidates))
        what = f"{role} {json.dumps(name, ensure_ascii=False)}"
        if sum(counts) == 1:
            count_now, target = await self._examined(candidates[counts.index(1)], action)
            if count_now == 1 and target:
                self.healed.append(Healed(ref, f"{what}, {target.code}"))
                return target
        raise StaleRef(
            f"ref {ref} is gone or changed, and {sum(counts) or 'no'} elements have its role and name.",
            f"ref {ref} was {what}",
        )

    async def _by_locator(self, selector: str, action: Action) -> _Target:
        found = self._page.locator(selector)
        try:
            count, target = await self._examined(found, action)
            if count == 0:
                await found.first.wait_for(state="attached", timeout=self._ms)
                count, target = await self._examined(found, action)
        except PlaywrightTimeout:
            count, target = 0, None
        except PlaywrightError as error:
            if "selector" not in error.message:
                raise
            raise ActionFailed(
                f'locator {selector!r} is no Playwright selector such as role=button[name="Pay"] or css=#pay: '
                f"{error.message[:300]}"
            ) from error
        if target and count == 1:
            return target
        more = " Narrow it, or add >> nth=0." if count else ""
        raise ActionFailed(f"locator {selector!r} matches {count} elements; it must match exactly one.{more}")

    async def _examined(self, locator: Locator, action: Action) -> tuple[int, _Target | None]:
        """How many elements `locator` finds; if there are any, the first with what has to be known of it."""
        count, code, secret, secrets = await asyncio.gather(
            locator.count(), self._code(locator), self._is_secret(locator, action), self._known_secrets()
        )
        self._in_secret = secret
        # Of an element that is not there nothing can be said, and nothing is typed into it.
        self._secrets = secrets | Secrets.of([action.text]) if secret and count else secrets
        return count, _Target(locator, code) if code else None

    async def _code(self, locator: Locator) -> str | None:
        """The Python of a locator that will find the element again, if there is one now."""
        try:
            return f"{self._name}.{escaped(str(await locator.normalize()))}"
        except PlaywrightError:
            return None

    async def _is_secret(self, locator: Locator, action: Action) -> bool:
        if action.op not in ("fill", "type", "press"):
            return False
        return await is_secret_field(self._page, locator)

    async def _known_secrets(self) -> Secrets:
        return self._secrets if self._secrets is not None else await read_secrets(self._page)

    def _value(self, value: str) -> str:
        """What was typed, as Python: a secret by its name, or hidden if it has none."""
        masked = self._mask(value)
        if known := re.fullmatch(r"\[secret (.+)\]", masked):
            return f"flow.secret({literal(known[1])})"
        return literal(HIDDEN if self._in_secret else masked)


def _named(within: Frame | Locator, role: str, name: str | None) -> Locator:
    locator: Locator = within.get_by_role(cast(Any, role), name=name, exact=True)
    return locator


def _abridged(message: str) -> str:
    """Playwright's message without the tries in the middle of its log, which are all alike."""
    lines = [line for line in message.split("\n") if line.strip()]
    last = [line for line in lines[4:] if line not in lines[:4]][-6:]
    return "\n".join([*lines[:4], *last]) or "it failed."
