"""What every way to a live page shares: calls beside the workflow, clean text, hidden secrets, errors by name."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from playwright._impl.channel_owner import ApiCallOptions
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Frame, Locator, Page
from playwright.async_api import TimeoutError as PlaywrightTimeout

from mcp_flow.errors import FlowError, PageGone
from mcp_flow.secrets import HIDDEN as HIDDEN
from mcp_flow.secrets import SECRET_FIELDS, hide_cards, is_card

T = TypeVar("T")

SHORTEST_REPLACED = 4
"""A shorter secret is hidden only where it stands alone: replaced everywhere, it would wreck the text."""

SECONDS_TO_TELL = 1.0
"""How long a page may take to tell what its secret fields hold, where nothing is lost by not asking."""

INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e01ef]"
)
HELD = """selector => {
  const memory = Symbol.for('mcp_flow secret fields');
  const known = globalThis[memory] ?? {fields: [], values: []};
  const fields = new Set(known.fields.map(field => field.deref()).filter(field => field));
  const search = root => {
    for (const field of root.querySelectorAll(selector)) fields.add(field);
    // By number and not with `of`, which takes several times as long where there are thousands.
    const all = root.getElementsByTagName?.('*') ?? root.querySelectorAll('*');
    for (let i = 0, count = all.length; i < count; i++) if (all[i].shadowRoot) search(all[i].shadowRoot);
  };
  search(document);
  if (!fields.size) return known.values;
  if (!globalThis[memory]) Object.defineProperty(globalThis, memory, {value: known});
  known.fields = [...fields].map(field => new WeakRef(field));
  const values = [...fields].map(field => String(field.value));
  known.values = [...new Set([...values, ...known.values])].filter(value => value).slice(0, 1000);
  return known.values;
}"""
"""What the secret fields of a document hold, and have held whenever this was asked.

It is remembered in the document itself, where no page looks: nothing else lives as long and is seen by every process.
So a field that the page has made a plain one, to show what was typed, stays a secret one.
"""
_WAS_SECRET = """field => {
  const known = globalThis[Symbol.for('mcp_flow secret fields')];
  return Boolean(known?.fields.some(kept => kept.deref() === field));
}"""
_BREAK = re.compile("[\t\n\r\u2028\u2029]+")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


async def aside(page: Page, call: Callable[[], Awaitable[T]]) -> T:
    """The result of `call`, whose Playwright calls go through where those of the workflow are held.

    The gate of a hijacked run (`browser/gate.py`) holds all that its connection asks, a look of ours over it too, but
    for what Playwright takes for internal.
    """

    async def outcome() -> tuple[T, None] | tuple[None, Exception]:
        try:
            return await call(), None
        except Exception as error:  # raised outside: Playwright writes the name of its own call into any error's text
            return None, error

    result, error = await page._impl_obj._wrap_api_call(lambda _zone: outcome(), ApiCallOptions(internal=True))
    if error is not None:
        raise error
    return cast(T, result)


@asynccontextmanager
async def reaching(page: Page, seconds: float) -> AsyncIterator[None]:
    """Turns what Playwright raises into `PageGone`, or `FlowError` for a page silent for `seconds`."""
    if page.is_closed():
        raise gone()
    try:
        async with asyncio.timeout(seconds):
            yield
    except (TimeoutError, PlaywrightTimeout) as error:
        raise FlowError(
            f"The page at {shown_url(page.url)} did not answer within {seconds:g} s: a script in it runs without "
            "end, a dialog is open, or it has not begun to load. Try again; or hijack the run, close the page "
            "with act, and resume has it rebuilt; cancel ends the run."
        ) from error
    except PlaywrightError as error:
        if page.is_closed() or "crashed" in error.message or "has been closed" in error.message:
            raise gone() from error
        raise FlowError(f"The page could not be read: {clean(error.message)[:500]}. Try again.") from error


def gone() -> PageGone:
    """The error for a page that nothing can be read from any more."""
    return PageGone("The page is gone: it was closed or has crashed. get_run says where the run stands.")


def clean(text: str) -> str:
    """`text` in one line, without control, zero-width and bidi characters, lone surrogates replaced."""
    return _LONE_SURROGATE.sub("\ufffd", INVISIBLE.sub("", _BREAK.sub(" ", text)))


def whole(text: str) -> str:
    """`text` with its lone surrogates replaced: it can be encoded, and is unchanged otherwise."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def shortened(text: str, limit: int) -> str:
    """`text`, or its beginning and how many characters are missing, within about `limit` characters."""
    return text if len(text) <= limit else f"{text[: max(0, limit - 24)]}… [{len(text) - limit + 24} more characters]"


def shown_url(url: str, limit: int = 200) -> str:
    """`url` so that no text of the page can be read from it as prose: percent-encoded and capped."""
    return shortened(urllib.parse.quote(clean(url), safe="/:?#[]@!$&'()*+,;=%~-._"), limit)


@dataclass(frozen=True, slots=True)
class Secrets:
    """What the page's secret fields hold: passwords, card numbers, one-time codes."""

    values: frozenset[str] = frozenset()
    pattern: re.Pattern[str] | None = None

    @classmethod
    def of(cls, values: Iterable[str]) -> Secrets:
        """Secrets of these values; empty ones are none."""
        held = frozenset(form for value in values for form in (value, normal(value)) if form)
        forms = {
            form
            for value in held
            if len(value) >= SHORTEST_REPLACED
            for form in (value, urllib.parse.quote(value, safe=""), urllib.parse.quote_plus(value))
        }
        ordered = sorted(forms, key=lambda form: (-len(form), form))
        return cls(held, re.compile("|".join(map(re.escape, ordered))) if ordered else None)

    def __or__(self, other: Secrets) -> Secrets:
        return self if self.values == other.values else Secrets.of(self.values | other.values)

    def hold(self, text: str) -> bool:
        """Whether `text` as a whole is one of them."""
        return bool(self.values) and normal(text) in self.values

    def hide(self, text: str) -> str:
        """`text` with card numbers and secrets hidden, except those too short to be told from other text."""
        return hide_cards(self.pattern.sub(HIDDEN, text) if self.pattern else text)

    def hide_value(self, value: Any) -> Any:
        """A JSON value with the secrets in its texts, keys and numbers hidden, also short ones standing alone."""
        match value:
            case str():
                return HIDDEN if self.hold(value) else self.hide(value)
            case bool() | None:
                return value
            case int() | float():
                shown = json.dumps(value)
                secret = is_card(shown) or (len(shown) >= SHORTEST_REPLACED and self.hold(shown))
                return HIDDEN if secret else value
            case list():
                return [self.hide_value(item) for item in value]
            case dict():
                return {self.hide(key): self.hide_value(item) for key, item in value.items()}
            case _:
                raise TypeError(f"{type(value).__name__} is no JSON")


def normal(text: str) -> str:
    """`text` as Playwright's snapshots show a field's value: white space collapsed, invisible characters gone."""
    return " ".join(clean(text).split())


async def read_secrets(page: Page) -> Secrets:
    """What the secret fields hold now, and held when they were read before, in every frame and open shadow root.

    Raises what Playwright raises.
    """

    async def held(frame: Frame) -> list[str]:
        for attempt in range(3):
            try:
                return list(await frame.evaluate(HELD, SECRET_FIELDS))
            except PlaywrightError as error:
                if frame.is_detached():
                    return []
                if attempt == 2 or "crashed" in error.message or page.is_closed():
                    raise
        raise AssertionError("unreachable")

    async def all_held() -> list[list[str]]:
        return await asyncio.gather(*(held(frame) for frame in page.frames))

    return Secrets.of(value for values in await aside(page, all_held) for value in values)


async def read_secrets_soon(pages: Iterable[Page]) -> Secrets:
    """The same of several pages, of those that answer within a second."""

    async def answered(page: Page) -> Secrets:
        with suppress(PlaywrightError, TimeoutError):
            async with asyncio.timeout(SECONDS_TO_TELL):
                return await read_secrets(page)
        return Secrets()

    found = await asyncio.gather(*(answered(page) for page in pages if not page.is_closed()))
    return Secrets.of(value for secrets in found for value in secrets.values)


async def is_secret_field(page: Page, field: Locator) -> bool:
    """Whether an element is a secret field or was one when they were read; one that is gone may have been."""

    async def asked() -> bool:
        if await field.and_(page.locator(SECRET_FIELDS)).count() or not await field.count():
            return True
        return bool(await field.evaluate(_WAS_SECRET, timeout=SECONDS_TO_TELL * 1000))

    try:
        return await aside(page, asked)
    except PlaywrightError:
        return True
