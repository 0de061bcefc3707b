"""What an agent sees of a page: the whole captured once, then filtered, compared, cut and fenced in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from playwright.async_api import Page

from mcp_flow.errors import InvalidInput
from mcp_flow.page import compare, views
from mcp_flow.page.capture import Capture, capture
from mcp_flow.page.fit import LARGEST, Answer, Calls, Fence, Header, fitted
from mcp_flow.page.guard import clean, shortened, shown_url
from mcp_flow.page.looks import Key, Looks, Seen
from mcp_flow.page.matching import matching
from mcp_flow.page.tree import Line, Outline, Row, Span, Tree, condense

Mode = Literal["auto", "outline", "interactive", "full", "text"]

MIN_CHARS = 500
USUAL_CHARS = 8000
MOST_CHANGED = 0.6
"""Where more of the page than this has changed, the whole is easier to read than the changes."""
NEWS_SHOWN = 3
RECORD_CHARS = 500_000
"""How much of a page a record keeps."""


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a page: everything that the agent reads, its number, and how many rows of it were left out."""

    text: str
    screenshot: bytes | None
    left_out: int
    number: int = 0


async def look(
    page: Page,
    *,
    looks: Looks,
    key: Key,
    facts: Sequence[str],
    call: str,
    pages: Sequence[str] = (),
    secrets: Iterable[str] = (),
    mode: Mode = "auto",
    since: int | None = None,
    find: str | None = None,
    root: str | None = None,
    max_chars: int = USUAL_CHARS,
    screenshot: bool = False,
) -> Look:
    """What `page` shows, in at most `max_chars` characters, without touching it.

    `looks` remembers what was seen under `key`; `facts` are lines of the server's own, which stand in front, outside
    the markers around the page's text; `pages` are the names of the run's pages. `call` is the beginning of the call
    that asked, such as `snapshot(run_id="r1"`, from which the calls for what was left out are made.

    `auto` is an outline at the first look and on a new document, afterwards what has changed since the last look at
    the page as a whole, or since look `since`; an outline again where more than 60% has. `outline` leaves out
    wrappers and addresses and folds runs of siblings that are alike, `interactive` lists what can be acted on,
    `full` has every line and `text` what can be read.

    `find` keeps the lines that hold this text or match this regular expression, and their ancestors. `root` keeps
    the subtree of one ref, with `e12..` everything from that ref on, with `e12..e40` what lies from it to the end of
    the other's subtree. With either, `auto` is an outline in which the level that was asked for is not folded.

    The values of password fields, card numbers and one-time codes, and the `secrets`, are hidden; in the picture
    the fields are.

    Raises `InvalidInput` for a budget under 500, a bad expression, a ref that the page does not have, or a look that
    is not remembered, `PageGone`, and `FlowError` when the page does not answer within 10 s.
    """
    _check(max_chars, mode, since)
    before = None
    if since is not None:
        before = looks.numbered(key, since)
    elif mode == "auto" and find is None and root is None:
        before = looks.last(key, whole=True)
    captured = await capture(page, secrets, screenshot=screenshot)
    given: dict[str, str | int | None] = {
        "mode": None if mode == "auto" else mode,
        "find": find,
        "root": root,
        "max_chars": None if max_chars == USUAL_CHARS else max_chars,
    }
    calls = Calls(call, {name: value for name, value in given.items() if value is not None})
    asked = _Asked(mode, before, find, root, max_chars, calls)
    view = await _view(captured, asked)
    seen = looks.add(key, captured.document, captured.lines, whole=find is None and root is None and mode != "text")
    header = _header(captured, facts, f"look {seen.number}{view.about}", pages, _news(captured, looks, key))
    answer = Answer(header, view.rows, view.tree, view.span, view.calls, view.notices)
    text, left_out = fitted(answer, Fence(), max_chars)
    return Look(text, captured.screenshot, left_out, seen.number)


async def changes(
    page: Page,
    *,
    looks: Looks,
    key: Key,
    call: str,
    facts: Sequence[str] = (),
    pages: Sequence[str] = (),
    secrets: Iterable[str] = (),
    max_chars: int = USUAL_CHARS,
) -> Look:
    """What has changed since the last look of any kind, as `look` shows it: for the answer to an action.

    Where there is none to compare with, or on a new document, it is an outline: `remember` the page before the
    first action to have a difference of that too.
    """
    last = looks.last(key)
    return await look(
        page,
        looks=looks,
        key=key,
        facts=facts,
        call=call,
        pages=pages,
        secrets=secrets,
        since=last.number if last else None,
        max_chars=max_chars,
    )


async def remember(page: Page, *, looks: Looks, key: Key, secrets: Iterable[str] = ()) -> Seen:
    """Take a look that nobody reads, to compare with. Refs of earlier looks stay usable."""
    captured = await capture(page, secrets)
    return looks.add(key, captured.document, captured.lines, whole=False)


async def record(page: Page, *, secrets: Iterable[str] = ()) -> str:
    """Every line of a page, its address, title and log: what is kept of the moment when a run failed or stopped.

    All of it is text of the page. It has no refs, because nothing can be acted on in a moment that is over.
    """
    return _record(await capture(page, secrets))


async def evidence(page: Page, *, secrets: Iterable[str] = ()) -> tuple[bytes | None, str]:
    """A picture of a page, and the record of it, as of one moment."""
    captured = await capture(page, secrets, screenshot=True)
    return captured.screenshot, _record(captured)


def _record(captured: Capture) -> str:
    status = f" ({captured.status})" if captured.status else ""
    log = [("page error", captured.thrown), ("failed request", captured.failed)]
    lines = [
        f"url: {shown_url(captured.url, 2000)}{status}",
        f"title: {captured.title}",
        *(f"{kind}: {text}" for kind, texts in log for text in texts),
        *(f"console {text}" for text in captured.console),
        "",
        *("  " * line.depth + line._replace(ref=None).shown() for line in captured.lines),
    ]
    return shortened("\n".join(lines), RECORD_CHARS)


def _check(max_chars: int, mode: Mode, since: int | None) -> None:
    if max_chars < MIN_CHARS:
        raise InvalidInput(f"max_chars must be at least {MIN_CHARS}, not {max_chars}.")
    if mode not in get_args(Mode):
        raise InvalidInput(f"mode is one of {', '.join(get_args(Mode))}, not {mode!r}.")
    if since is not None and mode != "auto":
        raise InvalidInput(f'since compares two looks, which mode="{mode}" does not: leave one of the two out.')


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be shown: `before` is the look to compare with, if any."""

    mode: Mode
    before: Seen | None
    find: str | None
    root: str | None
    max_chars: int
    calls: Calls


@dataclass(frozen=True, slots=True)
class _View:
    """The rows of an answer, the calls that continue it, and what to say about it."""

    about: str
    rows: list[Row]
    tree: Tree
    span: Span
    calls: Calls
    notices: list[str]


async def _view(captured: Capture, asked: _Asked) -> _View:
    tree = Tree(captured.lines)
    span = tree.span(asked.root)
    about = ""
    if asked.before is not None:
        if asked.before.document != captured.document:
            about = ", of a new document"
        else:
            view = await _changed(tree, span, asked, asked.before)
            if isinstance(view, _View):
                return view
            about = view
    matched = None
    if asked.find is not None:
        matched = await matching(asked.find, [line.shown() for line in tree.lines])
    limit = asked.max_chars // 8
    form: views.Form = "outline" if asked.mode == "auto" else asked.mode
    rows = views.rows(tree, form, span, matched, limit)
    notices = []
    if matched is not None:
        count = sum(span.start <= index < span.end for index in matched)
        about += f", matches: {count}" if count else ", no line matches; without find the whole page is shown"
    if form == "interactive" and (closed := _closed_list(tree, rows)):
        notices.append(f"[Options: {asked.calls.with_(mode=None, find=None, root=closed)}]")
    if form == "text" and (acts := tree.acts(span.start, span.end)):
        notices.append(f"[{acts} to act on are not listed: {asked.calls.with_(mode='interactive')}]")
    if about and not asked.calls.given.keys() & {"find", "root"} and asked.before is not None:
        about += ", shown whole"
    return _View(about, rows, tree, span, asked.calls, [*notices, *_shortening(tree, span, rows, asked)])


async def _changed(tree: Tree, span: Span, asked: _Asked, before: Seen) -> _View | str:
    """What has changed since a look, or why it is better to show the whole."""
    now = condense(tree)
    difference = compare.compare(condense(Tree(before.lines)), now)
    if difference.share > MOST_CHANGED:
        return f", {min(100, round(difference.share * 100))}% changed since look {before.number}"
    if asked.find is not None or asked.root is not None:
        difference = await _narrowed(now, difference, span, asked.find)
    rows = compare.rows(now, difference, asked.max_chars // 8)
    calls = dataclasses.replace(asked.calls, given={**asked.calls.given, "since": before.number})
    whole = f"[All: {asked.calls.with_(mode='outline', find=None, root=None)}]"
    notices = [whole, *_shortening(tree, span, rows, asked)]
    return _View(f", changed since look {before.number}: {difference}", rows, tree, span, calls, notices)


async def _narrowed(now: Outline, difference: compare.Difference, span: Span, find: str | None) -> compare.Difference:
    """The part of a difference that lies in a span and matches."""
    removed = [part for part in difference.removed if span.start <= max(0, part.under) < span.end]
    inside: Collection[int] = range(span.start, span.end)
    if find is not None:
        count = len(now.tree.lines)
        texts = [*(line.shown() for line in now.tree.lines), *(part.text for part in removed)]
        matched = await matching(find, texts)
        removed = [part for number, part in enumerate(removed, count) if number in matched]
        inside = {index for index in inside if index in matched}
    return difference.only(inside.__contains__, removed)


def _closed_list(tree: Tree, rows: Sequence[Row]) -> str | None:
    """The ref of the first control whose options are only counted."""
    inside = ((row.index, tree.lines[row.index + 1 : row.index + 2]) for row in rows)
    return next((tree.place(index) for index, first in inside if first and _is_option(first[0])), None)


def _is_option(line: Line) -> bool:
    return line.role in ("option", "group") and line.ref is None


def _shortening(tree: Tree, span: Span, rows: Sequence[Row], asked: _Asked) -> list[str]:
    """How to see the texts that had to be shortened."""
    texts = (text for line in tree.lines[span.start : span.end] for text in (line.name, line.text) if text)
    longest = max(map(len, texts), default=0)
    if longest <= min(views.OUTLINED, asked.max_chars // 8) or not any("…(+" in row.text for row in rows):
        return []
    if asked.max_chars >= LARGEST:
        return ["[Texts are shortened; exec_js reads an element's textContent in parts.]"]
    enough = longest <= asked.max_chars // 8
    larger = asked.max_chars if enough else min(LARGEST, -(-longest * 8 // 1000) * 1000)
    mode = asked.mode if asked.mode in ("text", "interactive") and not enough else "full"
    return [f"[Texts are shortened. In full: {asked.calls.with_(mode=mode, max_chars=larger)}]"]


def _news(captured: Capture, looks: Looks, key: Key) -> dict[str, Sequence[str]]:
    """What the page's log has more than at the look before, by what it is."""
    log: dict[str, Sequence[str]] = {
        "console error": captured.errors,
        "page error": captured.thrown,
        "failed request": captured.failed,
    }
    news = {}
    for kind, held in log.items():
        hashes: list[Hashable] = [hash(text) for text in held]
        if count := looks.news(key, kind, hashes):
            news[kind] = held[-count:]
    return news


def _header(
    captured: Capture, facts: Sequence[str], about: str, pages: Sequence[str], news: dict[str, Sequence[str]]
) -> Header:
    counts = [f"{len(texts)} {kind}{'s' if len(texts) > 1 else ''}" for kind, texts in news.items()]
    others = captured.pages - len(pages)
    names = [*pages, *([f"{others} without a name"] if pages and others > 0 else [])]
    parts = [
        about,
        *(["new: " + ", ".join(counts)] if counts else []),
        *(["pages: " + ", ".join(names)] if names else []),
    ]
    # The first of each kind before the second of any: one cause shows as errors of several kinds.
    said = [(place, f"{kind}: {text}") for kind, texts in news.items() for place, text in enumerate(texts)]
    said.sort(key=lambda placed: placed[0])
    status = f" ({captured.status})" if captured.status else ""
    return Header(
        facts=[clean(fact) for fact in facts],
        place=f"url: {shown_url(captured.url)}{status}",
        about="; ".join(parts),
        title=captured.title,
        news=[text for _, text in said[:NEWS_SHOWN]],
    )
