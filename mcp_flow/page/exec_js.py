"""Evaluating JavaScript in a live page: read-only as V8 enforces it, or with effects on a stopped run's page."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from playwright.async_api import ConsoleMessage, Frame, Page
from playwright.async_api import Error as PlaywrightError

from mcp_flow.errors import EvaluationError, FlowError, InvalidInput
from mcp_flow.page.access import Answered, cdp_session, dialogs_answered, turn
from mcp_flow.page.fit import Fence
from mcp_flow.page.guard import (
    SECONDS_TO_TELL,
    Secrets,
    aside,
    clean,
    gone,
    reaching,
    read_secrets,
    read_secrets_soon,
    shortened,
)
from mcp_flow.page.packing import PACK, RUN_READ, RUN_WRITE, capped, unpacked, with_sources
from mcp_flow.page.place import OBJECTS, Place, bound, release

SECONDS = 5.0
"""How long the page may take to answer before any code of the caller runs."""
MAX_CONSOLE = 50
MAX_CONSOLE_LINE = 500
SOURCE = "exec_js"
"""The name under which stack traces show the evaluated code."""

_SIDE_EFFECT = "EvalError: Possible side-effect in debug-evaluate"
_NAVIGATING = ("Page.frameRequestedNavigation", "Page.navigatedWithinDocument")
_LOST = ("navigated or closed", "context was destroyed", "Cannot find context", "Promise was collected")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came of evaluated code. `value` is JSON; what JSON lacks is tagged, as in `{"$Map": [[1, 2]]}`.

    `type` names the value ("string", "undefined", "Map", "Element", ...), whose own tag is left away. Where the
    value was `cut`, it is the beginning of its text, and `type` says so. Where it was `abridged` it is whole, but
    texts of functions and descriptions of nodes in it end with a `…`, or symbols that are keys are missing.
    `navigated` is the new URL if the code made the page navigate; `ms` is how long the code took, in milliseconds.
    `dialogs` says of each dialog that the code opened what it asked and how it was closed; `unheard` is how many
    more console lines there were than `console` has. All of it but the figures is text of the page, without
    `secrets`: those that the caller named, and what the page's secret fields held before and after.
    """

    value: Any
    type: str
    console: tuple[str, ...]
    navigated: str | None
    ms: float
    cut: bool
    dialogs: tuple[str, ...] = ()
    abridged: bool = False
    unheard: int = 0
    secrets: Secrets = field(default=Secrets(), compare=False, repr=False)


async def evaluate(
    page: Page,
    code: str,
    *,
    mode: Literal["read", "write"] = "read",
    ref: str | None = None,
    locator: str | None = None,
    timeout_ms: int = 5000,
    max_chars: int = 8000,
    secrets: Iterable[str] = (),
    take: Callable[[], Awaitable[object]] | None = None,
) -> Evaluation:
    """Evaluates `code` in `page`: an expression, statements with `return`, or a function, which is called.

    `ref` (of the latest snapshot) or `locator` (a Playwright selector) binds one element, which the code knows as
    `element` and a function gets as its argument; the code then runs in the element's frame. A promise is awaited.
    `read` lets nothing through that V8 cannot tell to be free of side effects. What secret fields hold, and the
    `secrets`, are hidden in everything that comes back. `take` is called once the code is known to compile and its
    element is found, and may raise `FlowError`: nothing runs then. Calls to one page queue.

    Raises `EvaluationError` when the code throws, does not compile, has a side effect in `read` mode, does not end
    within `timeout_ms`, or its element is not exactly one; `InvalidInput` for code that is empty or both bindings;
    `PageGone`; and `FlowError` when the page does not answer at all.
    """
    if not code.strip():
        raise InvalidInput("code is empty: give an expression, statements with return, or a function.")
    if ref is not None and locator is not None:
        raise InvalidInput("ref and locator both bind the element: give one of them.")
    if page.is_closed():
        raise gone()
    named = Secrets.of(secrets)
    async with turn(page):
        return await aside(page, lambda: _evaluated(page, code, mode, ref, locator, timeout_ms, max_chars, named, take))


async def _evaluated(
    page: Page,
    code: str,
    mode: Literal["read", "write"],
    ref: str | None,
    locator: str | None,
    timeout_ms: int,
    max_chars: int,
    named: Secrets,
    take: Callable[[], Awaitable[object]] | None,
) -> Evaluation:
    before = Secrets()
    after: Secrets | None = None
    outcome: _Outcome | EvaluationError
    async with reaching(page, SECONDS):
        top = Place(await cdp_session(page))
    async with AsyncExitStack() as stack:
        try:
            async with reaching(page, SECONDS):
                reading = asyncio.create_task(read_secrets(page))
                compiling = asyncio.create_task(_compiled(top, code, mode))  # code compiles without its element
                binding = asyncio.create_task(bound(stack, page, top, ref, locator))
                # No task group: on Python 3.11 one whose task fails may leave its caller with a cancellation pending.
                tasks = (reading, compiling, binding)
                try:
                    await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.wait(tasks)
            before = reading.result()
            if take:
                await take()
            attempt = _Attempt(page, binding.result(), code, mode, timeout_ms, max_chars)
            outcome = await attempt.run(compiling.result())
            after = outcome.secrets
        except EvaluationError as error:
            outcome = error
        if after is None:
            # Asked again: the code may have set a secret field, also before it failed.
            told, _ = await asyncio.gather(read_secrets_soon([page]), release(top.session))
            after = told
    secrets = named | before | after
    if isinstance(outcome, _Outcome):
        return outcome.told(secrets, max_chars)
    said = clean_lines(secrets.hide(outcome.quoted)).split("\n") if outcome.quoted else []
    text = "\n".join([clean_lines(secrets.hide(str(outcome))), *Fence().around(said)])
    raise EvaluationError(text, shown_code=secrets.hide(code))


async def _follow(page: Page, place: Place) -> Secrets:
    """What the secret fields hold once the code has begun; its element is let go of.

    Of code that waits this is not the end, but the page remembers what it has set by then and may clear later.
    """
    found, _ = await asyncio.gather(read_secrets(page), place.forget())
    return found


async def _compiled(place: Place, code: str, mode: Literal["read", "write"]) -> str:
    """The code as the text of a function of `element`, in the first form that V8 compiles."""
    stripped = code.strip().rstrip("; \t\r\n")
    keyword = "" if mode == "read" else "async "
    problems = []
    for body in (f"({stripped}\n)", f"{{{code}\n}}"):
        form = f"{keyword}(element) => {body}"
        problem = await _problem(place, code, form)
        if problem is None:
            if mode == "read" and await _has_async(place, code, form):
                raise _unchecked()
            return form
        if mode == "read" and await _problem(place, code, f"async {form}") is None:
            raise _unchecked()
        problems.append(problem)
    # The form that V8 read further into is the one that was meant.
    _, text = max(problems)
    raise EvaluationError(clean_lines(text))


async def _problem(place: Place, code: str, form: str) -> tuple[tuple[int, int], str] | None:
    # Making a function compiles its body and runs nothing; code that breaks out of the form has no effects.
    answer = await place.run(f"({form}, 0)", throwOnSideEffect=True, timeout=int(SECONDS * 1000))
    if (details := answer.get("exceptionDetails")) is None:
        return None
    at = (details.get("lineNumber", 0), details.get("columnNumber", 0))
    message = str(details.get("exception", {}).get("description", details["text"])).split("\n")[0]
    last = code.strip().count("\n")
    return at, f"{message} (line {min(at[0], last) + 1} of the code)"


async def _has_async(place: Place, code: str, form: str) -> bool:
    """Whether `async` stands in it as a keyword and not merely in a text or as a name."""
    other = re.sub(r"\basync\b", "xsync", form)
    return other != form and await _problem(place, code, other) is not None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One evaluation of code that compiles."""

    page: Page
    place: Place
    code: str
    mode: Literal["read", "write"]
    timeout_ms: int
    max_chars: int

    async def run(self, form: str) -> _Outcome:
        """Runs the compiled code."""
        watch = _reading if self.mode == "read" else _watching
        async with watch(self.page, self.place) as seen:
            started = time.perf_counter()
            # Sent right behind the code, which has its element by then: the page answers in order.
            following = asyncio.create_task(_follow(self.page, self.place))
            try:
                packed = await (self._read if self.mode == "read" else self._write)(form, seen)
                ms = (time.perf_counter() - started) * 1000
                secrets = None
                if not seen.waited:
                    with suppress(PlaywrightError, TimeoutError):
                        async with asyncio.timeout(SECONDS_TO_TELL):
                            secrets = await following
            finally:
                following.cancel()
                await asyncio.wait([following])
            navigated = await seen.landed(self.timeout_ms / 1000 - ms / 1000)
        return _Outcome(packed, seen, navigated, ms, secrets)

    async def _read(self, form: str, seen: _Seen) -> dict[str, Any]:
        expression = f"((form, run) => run(form))({form}, {RUN_READ % self._parts()})\n//# sourceURL={SOURCE}"
        # Never awaitPromise here: it calls `then` of any object, outside V8's check for side effects.
        answer = await self._answer(
            self.place.run(expression, throwOnSideEffect=True, timeout=self.timeout_ms), self.timeout_ms / 1000
        )
        result = answer["result"]
        if result.get("subtype") == "promise":
            seen.waited = True
            started = time.perf_counter()
            send = self.place.session.send
            settled = await self._answer(
                send("Runtime.awaitPromise", {"promiseObjectId": result["objectId"]}), self.timeout_ms / 1000
            )
            fields = {k: v for k, v in settled["result"].items() if k in ("objectId", "value", "unserializableValue")}
            answer = await self._answer(
                send(
                    "Runtime.callFunctionOn",
                    {
                        "functionDeclaration": f"function (value) {{ return ({PACK})(value, false, {self._budget}) }}",
                        "objectId": result["objectId"],
                        "arguments": [fields],
                        "throwOnSideEffect": True,
                        "objectGroup": OBJECTS,
                    },
                ),
                max(0.1, self.timeout_ms / 1000 - (time.perf_counter() - started)),
            )
            result = answer["result"]
        if result["type"] == "string":
            return unpacked(result["value"])
        # V8 does not hand out a regular expression's source without side effects; its description has it.
        listed = await self.place.session.send(
            "Runtime.getProperties", {"objectId": result["objectId"], "ownProperties": True}
        )
        items = {item["name"]: item["value"] for item in listed["result"] if "value" in item}
        await release(self.place.session)
        packed = unpacked(items["0"]["value"])
        sources = [items[str(index)]["description"] for index in range(1, int(items["length"]["value"]))]
        packed["v"] = sources[packed["v"]] if packed["t"] == "RegExp" else with_sources(packed["v"], sources)
        return packed

    async def _write(self, form: str, seen: _Seen) -> dict[str, Any]:
        seen.waited = True
        expression = f"((form, run) => run(form))({form}, {RUN_WRITE % self._parts()})\n//# sourceURL={SOURCE}"
        try:
            answer = await self._answer(
                self.place.run(expression, awaitPromise=True, userGesture=True, timeout=self.timeout_ms),
                self.timeout_ms / 1000,
            )
        except _ContextLostError:
            seen.expected = True
            return {"t": "undefined", "v": None, "c": False, "s": False}
        return unpacked(answer["result"]["value"])

    def _parts(self) -> dict[str, Any]:
        return {
            "element": self.place.element,
            "code": json.dumps(self.code),
            "pack": PACK,
            "budget": self._budget,
        }

    @property
    def _budget(self) -> int:
        return self.max_chars + 200

    async def _answer(self, sent: Any, seconds: float) -> dict[str, Any]:
        """V8's answer to running code; raises `EvaluationError` for what the code did or did not do."""
        try:
            # V8's own limit ends a loop first, so that none outlives this process; ours ends what only waits.
            async with asyncio.timeout(seconds + 0.3):
                answer = dict(await sent)
        except TimeoutError:
            raise await self._overdue() from None
        except PlaywrightError as error:
            # A loop ended inside an async function is reported as an internal error.
            if "terminated" in error.message or "Internal error" in error.message:
                raise EvaluationError(
                    f"The code did not end within {self.timeout_ms} ms and was stopped; the page is alive."
                ) from error
            if self.page.is_closed() or "crashed" in error.message:
                raise gone() from error
            if any(words in error.message for words in _LOST):
                if self.mode == "write":
                    raise _ContextLostError from error
                raise EvaluationError("The page navigated meanwhile. Take a new snapshot and try again.") from error
            raise EvaluationError(f"The page refused the evaluation: {clean(error.message)[:300]}") from error
        if "exceptionDetails" in answer:
            raise _thrown(answer["exceptionDetails"])
        return answer

    async def _overdue(self) -> FlowError:
        """Ends what still runs; says whether it ran or only waited."""
        with suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(0.5):
                await self.place.run("0")
                # V8 stops a loop right after an await itself, and then the promise never settles either.
                return EvaluationError(
                    f"The code did not end within {self.timeout_ms} ms: a promise did not settle. It was let go; "
                    "the page is alive."
                )
        if self.page.is_closed():
            return gone()
        # The page compiled the code a moment ago, so what keeps it busy now is this code.
        with suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(1):
                await self.place.session.send("Runtime.terminateExecution")
                await self.place.run("0")
                return EvaluationError(
                    f"The code did not end within {self.timeout_ms} ms and was stopped; the page is alive."
                )
        return FlowError("The page does not answer any more: it has crashed, or a dialog is open in it.")


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What code gave as the page packed it, and what it made the page do.

    `secrets` is what the secret fields held at its end, if the page has told it in the same go.
    """

    packed: dict[str, Any]
    seen: _Seen
    navigated: str | None
    ms: float
    secrets: Secrets | None

    def told(self, secrets: Secrets, max_chars: int) -> Evaluation:
        """The same without `secrets`, the value within `max_chars` characters."""
        packed, seen = self.packed, self.seen
        value, kind, cut = capped(secrets.hide_value(packed["v"]), packed, max_chars)
        return Evaluation(
            value,
            kind,
            _lines(seen.console, secrets),
            self.navigated and secrets.hide(self.navigated),
            round(self.ms, 1),
            cut,
            _lines(list(map(str, seen.dialogs)), secrets),
            bool(packed["s"]),
            max(0, len(seen.console) - MAX_CONSOLE),
            secrets,
        )


class _ContextLostError(Exception):
    """The document that the code ran in is gone: the code navigated."""


def _unchecked() -> EvaluationError:
    return EvaluationError(
        "Async functions and await can't be checked for side effects, so read mode refuses them; nothing ran. "
        'Give the promise itself, it is awaited; or use mode="write" on a stopped run.'
    )


def _thrown(details: dict[str, Any]) -> EvaluationError:
    """What was thrown and where, from V8's details."""
    exception = details.get("exception", {})
    description = str(exception.get("description", exception.get("value", details.get("text", ""))))
    message, _, stack = description.partition("\n    at ")
    if message.startswith(_SIDE_EFFECT):
        return EvaluationError(
            "The code may have a side effect, so read mode stopped it; the page was not changed. (V8 also refuses "
            "some harmless calls: closest, matches, toJSON, console, classes, object spread.) "
            'Write it otherwise, or use mode="write" on a stopped run: hijack stops it.'
        )
    if exception.get("subtype") != "error":
        preview = exception.get("preview", {}).get("properties", [])
        fields = ", ".join(f"{item['name']}: {item.get('value', item['type'])}" for item in preview)
        message += f" {{{fields}}}" if fields else ""
    frames = details.get("stackTrace", {}).get("callFrames", [])
    frame = stack.split("\n")[0]
    if own := re.search(rf"{SOURCE}:(\d+):\d+", frame):
        return EvaluationError(f"The code threw at its line {own[1]}:", message)
    if not frame and frames and frames[0]["url"] == SOURCE:
        return EvaluationError(f"The code threw at its line {frames[0]['lineNumber'] + 1}:", message)
    if frame:
        return EvaluationError("What the code called threw:", f"{message} (at {frame})")
    return EvaluationError("The code threw:", message)


def clean_lines(text: str) -> str:
    """`text` within 2,000 characters, each of its lines clean."""
    return shortened("\n".join(clean(line) for line in text.split("\n")), 2000)


@dataclass  # without slots: Playwright keeps a note on the object whose method listens
class _Seen:
    """What the page did while the code ran: its console lines, its dialogs, whether it was asked to navigate.

    `waited` says that the code may have gone on after the page had answered what was asked behind it.
    """

    page: Page
    console: list[str] = field(default_factory=list)
    dialogs: tuple[Answered, ...] = ()
    expected: bool = False
    waited: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def logged(self, message: ConsoleMessage) -> None:
        self.console.append(f"{message.type}: {message.text}")

    def navigated(self, frame: Frame) -> None:
        if frame == self.page.main_frame:
            self.done.set()

    async def landed(self, seconds: float) -> str | None:
        """The new URL, after waiting for a navigation under way for `seconds`, 3 at most."""
        if self.expected and not self.done.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(min(3.0, max(0.5, seconds))):
                    await self.done.wait()
        return self.page.url if self.done.is_set() else None


@asynccontextmanager
async def _reading(page: Page, place: Place) -> AsyncIterator[_Seen]:
    """Nothing to notice: code in `read` mode can neither log nor navigate nor open a dialog."""
    yield _Seen(page)


@asynccontextmanager
async def _watching(page: Page, place: Place) -> AsyncIterator[_Seen]:
    """Notices what the code makes the page do."""
    seen = _Seen(page)
    main = ""

    def expected(event: dict[str, Any]) -> None:
        if event["frameId"] == main and event.get("disposition", "currentTab") == "currentTab":
            seen.expected = True

    page.on("console", seen.logged)
    page.on("framenavigated", seen.navigated)
    try:
        async with dialogs_answered(page) as dialogs:
            if place.top:
                for name in _NAVIGATING:
                    place.session.on(name, expected)
                async with reaching(page, SECONDS):
                    answers = await asyncio.gather(
                        *(place.session.send(f"Page.{n}") for n in ("enable", "getFrameTree"))
                    )
                main = str(answers[1]["frameTree"]["frame"]["id"])
            yield seen
            seen.dialogs = await dialogs.answered()
    finally:
        page.remove_listener("console", seen.logged)
        page.remove_listener("framenavigated", seen.navigated)
        if place.top:
            for name in _NAVIGATING:
                place.session.remove_listener(name, expected)


def _lines(lines: Sequence[str], secrets: Secrets) -> tuple[str, ...]:
    return tuple(shortened(clean(secrets.hide(line)), MAX_CONSOLE_LINE) for line in lines[:MAX_CONSOLE])
