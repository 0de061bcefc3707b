"""A page at one moment: its snapshot, address and log, read in one go with its secrets hidden."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from playwright.async_api import ConsoleMessage, Frame, Page
from playwright.async_api import Error as PlaywrightError

from mcp_flow.page.guard import (
    HELD,
    HIDDEN,
    SHORTEST_REPLACED,
    Secrets,
    aside,
    clean,
    is_secret_field,
    normal,
    reaching,
    shown_url,
)
from mcp_flow.page.tree import Line, parse
from mcp_flow.secrets import SECRET_FIELDS, hide_cards

SECONDS = 10.0
"""How long a page may take to be read."""
FIELDS = frozenset({"textbox", "searchbox", "combobox", "spinbutton", "slider"})
"""The roles under which an input field usually shows its value."""

_TRIES = 3
"""A page that navigates while it is read is read again, so often."""
_TURNS = 3
"""After so many turns of the event loop a call is on its way to the browser."""
_FAILED_LOAD = "Failed to load resource: "
"""How Chromium begins what it logs of every request that fails, or is answered with an error."""
_TAIL = 50
"""How many of the last console lines a capture holds."""
_UNASKED = "/favicon.ico"
"""What the browser asks for by itself; no page fails for want of it."""

# What one frame tells of itself in one round trip; null where the page has broken what this needs.
_PROBE = """selector => {
  try {
    const held = HELD;
    const [navigation] = performance.getEntriesByType('navigation');
    return {
      held: held(selector),
      title: String(document.title),
      document: String(performance.timeOrigin),
      status: Number(navigation?.responseStatus) || 0,
    };
  } catch {
    return null;
  }
}""".replace("HELD", HELD)


@dataclass(frozen=True, slots=True)
class Capture:
    """A page at one moment, without invisible characters, its secrets hidden.

    `document` tells this document from those before and after it at the same address; `status` is the HTTP status
    it was answered with, 0 where there is none. What the page's log holds is oldest first: `errors`, `thrown` and
    `failed` all of it, `console` the last lines of every type, each after that, but for those that `failed` tells.
    """

    lines: Sequence[Line]
    url: str
    title: str
    document: str
    status: int
    errors: Sequence[str]
    thrown: Sequence[str]
    failed: Sequence[str]
    console: Sequence[str]
    pages: int
    screenshot: bytes | None = None


async def capture(page: Page, secrets: Iterable[str] = (), *, screenshot: bool = False) -> Capture:
    """The page as it is now, with the `secrets` and what its secret fields hold hidden.

    Raises `PageGone`, and `FlowError` when the page does not answer within 10 s.
    """
    known = Secrets.of(secrets)
    async with reaching(page, SECONDS):
        for attempt in range(1, _TRIES + 1):
            try:
                captured = await _captured(page, known, screenshot, last=attempt == _TRIES)
            except PlaywrightError as error:
                # A navigation takes the document away from under what reads it.
                if attempt == _TRIES or page.is_closed() or "crashed" in error.message:
                    raise
                continue
            if captured is not None:
                return captured
    raise AssertionError("unreachable: the last try returns or raises")


async def _captured(page: Page, known: Secrets, screenshot: bool, *, last: bool) -> Capture | None:
    """A capture; None where the page became another document meanwhile, unless this is the last try."""
    before, snapshot, console, thrown = await aside(page, lambda: _read(page))
    # Asked for again while the answer is parsed: a secret may have been typed in between.
    asking = asyncio.ensure_future(aside(page, lambda: _probe(page)))
    try:
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        lines = parse(snapshot, _clean)
        after = await asking
    finally:
        asking.cancel()
    if before.document != after.document and not last:
        return None
    secrets = known | before.secrets | after.secrets
    settled = before.whole and after.whole and before.secrets.values == after.secrets.values
    lines = await _hide_fields(page, lines, secrets, settled)
    if secrets.pattern or hide_cards(snapshot) is not snapshot:
        lines = [_hidden(line, secrets) for line in lines]
    picture = await _picture(page, lines) if screenshot else None
    logged = [message for message in console if message.type == "error"]
    failed = [message for message in logged if message.text.startswith(_FAILED_LOAD)]
    tail = [message for message in console if not message.text.startswith(_FAILED_LOAD)][-_TAIL:]

    def said(texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(secrets.hide(normal(text)) for text in texts)

    return Capture(
        lines=tuple(lines),
        url=secrets.hide(page.url),
        title=secrets.hide(normal(after.title)),
        document=after.document,
        status=after.status,
        errors=said(message.text for message in logged if not message.text.startswith(_FAILED_LOAD)),
        thrown=said(str(error) for error in thrown),
        failed=said(_failed(message) for message in failed if not _url(message).endswith(_UNASKED)),
        console=said(f"{message.type}: {message.text}" for message in tail),
        pages=len(page.context.pages),
        screenshot=picture,
    )


async def _read(page: Page) -> tuple[_Probed, str, list[ConsoleMessage], list[Any]]:
    # Probe first: the browser answers in this order, so that a secret is read before it can be shown.
    probed, snapshot, console, thrown = await asyncio.gather(
        _probe(page),
        page.aria_snapshot(mode="ai", timeout=SECONDS * 1000),
        page.console_messages(filter="all"),
        page.page_errors(filter="all"),
    )
    return probed, snapshot, console, list(thrown)


def _failed(message: ConsoleMessage) -> str:
    reason = message.text.removeprefix(_FAILED_LOAD).removeprefix("the server responded with a status of ")
    return f"{reason} {shown_url(_url(message), 120)}"


def _url(message: ConsoleMessage) -> str:
    return str(message.location.get("url", ""))


@dataclass(frozen=True, slots=True)
class _Probed:
    """What the frames told; `whole` is False where a page has kept one from telling."""

    title: str
    document: str
    status: int
    secrets: Secrets
    whole: bool


async def _probe(page: Page) -> _Probed:
    async def asked(frame: Frame) -> Any:
        try:
            return await frame.evaluate(_PROBE, SECRET_FIELDS)
        except PlaywrightError:
            if frame == page.main_frame:
                raise
            return None

    frames = list(page.frames)
    main, *others = await asyncio.gather(*(asked(frame) for frame in frames))
    told = [answer for answer in (main, *others) if answer]
    whole = all(answer or frame.is_detached() for answer, frame in zip((main, *others), frames, strict=True))
    status = main["status"] if main else 0
    return _Probed(
        title=str(main["title"]) if main else "",
        document=str(main["document"]) if main else "",
        status=int(status) if isinstance(status, int | float) and 100 <= status <= 599 else 0,
        secrets=Secrets.of(str(value) for answer in told for value in answer["held"]),
        whole=whole,
    )


def _clean(text: str) -> str:
    # Almost all text is plain, and three searches in each of thousands of texts are not free.
    return text if text.isascii() and text.isprintable() else clean(text)


def _hidden(line: Line, secrets: Secrets) -> Line:
    name = None if line.name is None else secrets.hide(line.name)
    text = None if line.text is None else secrets.hide(line.text)
    return line if name == line.name and text == line.text else line._replace(name=name, text=text)


async def _hide_fields(page: Page, lines: list[Line], secrets: Secrets, settled: bool) -> list[Line]:
    """The lines with the values of secret fields hidden, which are told by their element, not by their text."""
    if settled and not secrets.values:
        return lines
    suspects: dict[int, str] = {}
    for index, line in enumerate(lines):
        owner = line if line.role != "text" else lines[line.parent] if line.parent >= 0 else None
        if line.text is None or owner is None or owner.ref is None or line.role.startswith("/"):
            continue
        # While somebody types, a field may show what was read neither before nor after: ask every field then.
        if secrets.hold(line.text) or (not settled and owner.role in FIELDS):
            suspects[index] = owner.ref
    sure = {
        ref
        for index, ref in suspects.items()
        if secrets.hold(text := lines[index].text or "") and len(normal(text)) >= SHORTEST_REPLACED
    }
    asked = [ref for ref in dict.fromkeys(suspects.values()) if ref not in sure]
    found = await asyncio.gather(*(is_secret_field(page, page.get_by_ref(ref)) for ref in asked))
    secret = sure | {ref for ref, is_secret in zip(asked, found, strict=True) if is_secret}
    shown = list(lines)
    for index, ref in suspects.items():
        if ref in secret:
            shown[index] = shown[index]._replace(text=HIDDEN)
    return shown


async def _picture(page: Page, lines: Iterable[Line]) -> bytes:
    """The page as an image, in which its secret fields are covered, and whatever else is hidden in the lines."""
    fields = [frame.locator(SECRET_FIELDS) for frame in page.frames]
    hidden = [page.get_by_ref(line.ref) for line in lines if line.ref and line.text and HIDDEN in line.text]
    return await aside(page, lambda: page.screenshot(mask=[*fields, *hidden], timeout=SECONDS * 1000))
