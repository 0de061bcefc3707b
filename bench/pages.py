"""What looking, evaluating, acting and taking over cost an agent, beside raw Playwright on the same pages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from journal import GIVE_UP, WORKFLOWS, Row, profiled
from processes import _command
from survival import AGENT, Outside, outside, site

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.page.act import act
from mcp_flow.page.exec_js import evaluate
from mcp_flow.page.looks import Looks
from mcp_flow.page.snapshot import Look, changes, look

if TYPE_CHECKING:
    from mcp import Client
    from playwright.async_api import Browser, Page

    from mcp_flow.run import Run

CALL = 'snapshot(run_id="shop-12ab34cd"'
KEY = ("shop-12ab34cd", "main")
FACTS = [
    "run shop-12ab34cd (shop): hijacked at step pay#1",
    'next: act(run_id="shop-12ab34cd", actions=[…]), then resume(run_id="shop-12ab34cd")',
]
"""What a server says of a run in front of its page."""
CALLS_FOLLOWED = 300
LOOK_RATIO = 1.3
LOOK_CHARS = 600
ABOVE_EVALUATE = 10.0
ACT_MS = 200.0
STOP_MS = 100.0

_LITERAL = re.compile(rf"{re.escape(CALL)}((?:, \w+=(?:\d+|\"(?:[^\"\\]|\\.)*\"))+)\)")
_ARGUMENT = re.compile(r"(\w+)=(\d+|\"(?:[^\"\\]|\\.)*\")")
_REF = re.compile(r"\[ref=(\w+)\]")

CART = """<p role=status id=cart>The cart is empty.</p><script>
  let count = 0;
  addEventListener("click", event => {
    event.preventDefault();
    cart.textContent = `${++count} in the cart, last ${event.target.textContent}`;
  });
</script>"""
"""A click on anything changes one line, and leads nowhere."""
LINKS = "".join(f"<li><a href='/item/{n}'>Item number {n}</a></li>" for n in range(200))
FIELDS = "".join(f"<label>Field {n}<input name=f{n}></label>" for n in range(50))
SHOP = f"<!doctype html><title>Shop</title><h1>Shop</h1>{CART}<ul>{LINKS}</ul><form>{FIELDS}</form>"


def _catalogue(shelves: int) -> str:
    """A page of sections with cards in wrappers, as shops have them."""

    def card(n: int) -> str:
        return (
            f"<article><div><h3><a href='/book/{n}'>Book {n}</a></h3><p>By author {n % 97}</p></div>"
            f"<span>{5 + n % 40}.90</span><label>Copies<input value={n % 3}></label><button>Buy {n}</button></article>"
        )

    sections = "".join(
        f"<section><h2>Shelf {n}</h2><p>What stands on shelf {n}.</p>{''.join(map(card, range(20 * n, 20 * n + 20)))}"
        "</section>"
        for n in range(shelves)
    )
    return f"<!doctype html><title>Books</title><h1>Books</h1>{CART}<main>{sections}</main>"


def _filled(html: str, nodes: int) -> str:
    """The page with so many notes at its end that it has this number of elements."""
    # Every page has these three, written or not.
    there = len({"html", "head", "body"}) + len(re.findall(r"<[a-z]", html))
    return html + "".join(f"<p>Note {n}</p>" for n in range(nodes - there))


@dataclass(frozen=True)
class Subject:
    """A page to look at, what can be clicked on it by its role and name, and how often it is measured."""

    name: str
    html: str
    role: str
    label: str
    rounds: int

    @property
    def clicked(self) -> str:
        """The selector of what is clicked."""
        return f'role={self.role}[name="{self.label}"s]'


PLAIN = Subject("200 links, 50 inputs", SHOP, "link", "Item number 7", 30)
LARGE = Subject("5,000 nodes", _filled(_catalogue(27), 5000), "button", "Buy 7", 10)


def _subjects(quick: bool) -> tuple[Subject, ...]:
    return (PLAIN,) if quick else (PLAIN, LARGE)


# --- measuring by turns ---

Measure = Callable[[], Awaitable[float]]


async def _by_turns(rounds: int, *measures: Measure) -> list[list[float]]:
    """What each of them gives in every round, in an order that turns about; a first round is thrown away."""
    taken: list[list[float]] = [[] for _ in measures]
    for number in range(rounds + 1):
        places = list(range(len(measures)))
        for place in places if number % 2 else reversed(places):
            found = await measures[place]()
            if number:
                taken[place].append(found)
    return taken


async def _timed(work: Awaitable[Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = await work
    return (time.perf_counter() - began) * 1000, result


def _ratio(mine: Sequence[float], raw: Sequence[float]) -> float:
    """The median of the rounds' ratios: what else the machine does changes from round to round."""
    return median(one / bare for one, bare in zip(mine, raw, strict=True))


def _above(mine: Sequence[float], raw: Sequence[float]) -> float:
    """The median of the rounds' differences."""
    return median(one - bare for one, bare in zip(mine, raw, strict=True))


def _spread(taken: Sequence[float]) -> str:
    return f"{median(taken):.1f} ms ({min(taken):.1f} to {max(taken):.1f})"


@contextlib.asynccontextmanager
async def _browser(folder: Path) -> AsyncIterator[Browser]:
    """The browser that a host would launch, in this process."""
    from playwright.async_api import async_playwright

    from mcp_flow.browser import launch

    found = launch.find(config.load(home=folder, workflows=WORKFLOWS))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=found.path, args=launch.arguments())
        yield browser
        await browser.close()


@contextlib.asynccontextmanager
async def _opened(browser: Browser, subject: Subject) -> AsyncIterator[tuple[Page, str]]:
    """A page that shows the subject, and its address."""
    async with site(subject.html.encode()) as url:
        context = await browser.new_context()
        page = await context.new_page()
        await _arrive(page, url)
        yield page, url
        await context.close()


async def _arrive(page: Page, url: str) -> None:
    """Open the page anew, and wait until it has been laid out: that is the browser's work, whoever looks first."""
    await page.goto(url)
    await page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


# --- looking ---


async def bench_looks(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """A first look, one after an action, the list of what can be acted on, and whether all of that is reached."""
    rows = []
    async with _browser(folder) as browser:
        for subject in _subjects(quick):
            async with _opened(browser, subject) as (page, url):
                seeing, rounds = _Seeing(page, url, subject), 1 if quick else subject.rounds
                for what, measured in (
                    ("first look", seeing.first),
                    ("look after one action", seeing.after_an_action),
                    ('look, mode="interactive"', seeing.interactive),
                ):
                    with profiled(f"{what}, {subject.name}", profile):
                        rows.append(await measured(what, rounds))
                rows += await seeing.recall()
    return rows, {}


class _Seeing:
    """An agent's looks at one page, and Playwright's own."""

    def __init__(self, page: Page, url: str, subject: Subject) -> None:
        self._page = page
        self._url = url
        self._subject = subject
        self._looks = Looks()
        self._said = 0
        self._raw_said = 0
        self._ratio = 0.0

    async def first(self, what: str, rounds: int) -> Row:
        """A look at a document that nobody has looked at."""

        async def ours() -> float:
            await _arrive(self._page, self._url)
            self._looks = Looks()
            return await self._look()

        async def raw() -> float:
            await _arrive(self._page, self._url)
            return await self._raw()

        row = self._row(what, *await _by_turns(rounds, ours, raw))
        row.aim, row.met = f"< {LOOK_RATIO}x", self._ratio < LOOK_RATIO
        return row

    async def after_an_action(self, what: str, rounds: int) -> Row:
        """Clicks, and after each a look of both at what has come of it."""
        await self._look()

        async def ours() -> float:
            await self._page.locator(self._subject.clicked).click()
            return await self._look()

        async def raw() -> float:
            await self._page.locator(self._subject.clicked).click()
            return await self._raw()

        row = self._row(what, *await _by_turns(rounds, ours, raw))
        row.aim, row.met = f"< {LOOK_CHARS} characters", self._said < LOOK_CHARS
        return row

    async def interactive(self, what: str, rounds: int) -> Row:
        """What can be acted on, as a list."""
        return self._row(what, *await _by_turns(rounds, partial(self._look, mode="interactive"), self._raw))

    async def recall(self) -> list[Row]:
        """How many of the elements that can be acted on are reached by following the calls of the answers."""
        await _arrive(self._page, self._url)
        there = await self._page.locator("a[href], button, input").count()
        told = await self._page.aria_snapshot(mode="ai")
        controls = set(re.findall(r"- (?:link|button|textbox)\b.*\[ref=(\w+)\]", told))
        if len(controls) != there:
            raise RuntimeError(f"{there} elements can be acted on, and Playwright's snapshot has {len(controls)}")
        rows = []
        for name, options in (("outline", {}), ("interactive", {"mode": "interactive"})):
            self._looks = Looks()
            answers, refs = await self._followed(options)
            reached = len(controls & refs) / there
            rows.append(
                Row(
                    f"recall from the {name}, {self._subject.name}",
                    f"{reached:.3f} ({len(controls & refs):,} of {there:,}, in {len(answers)} answers of "
                    f"{sum(map(len, answers)):,} characters, the longest {max(map(len, answers)):,})",
                    f"one answer of {len(told):,} characters: raw aria_snapshot",
                    aim="1.0",
                    met=reached == 1.0,
                )
            )
        return rows

    async def _followed(self, options: dict[str, Any]) -> tuple[list[str], set[str]]:
        """The answers that come of every call which an answer names, from the first on, and the refs in them."""
        waiting, asked = [options], {str(options)}
        answers: list[str] = []
        refs: set[str] = set()
        while waiting:
            text = (await self._seen(**waiting.pop())).text
            answers.append(text)
            page, _, after = text.partition("\n<<end ")
            refs.update(_REF.findall(page))
            for arguments in _LITERAL.findall(after):
                given = {name: json.loads(value) for name, value in _ARGUMENT.findall(arguments)}
                if str(given) not in asked:
                    asked.add(str(given))
                    waiting.append(given)
            if len(answers) > CALLS_FOLLOWED:
                raise RuntimeError("the calls never come to an end")
        return answers, refs

    async def _look(self, **options: Any) -> float:
        ms, seen = await _timed(self._seen(**options))
        self._said = len(seen.text)
        return ms

    async def _seen(self, **options: Any) -> Look:
        return await look(self._page, looks=self._looks, key=KEY, facts=FACTS, call=CALL, pages=["main"], **options)

    async def _raw(self) -> float:
        ms, text = await _timed(self._page.aria_snapshot(mode="ai"))
        self._raw_said = len(text)
        return ms

    def _row(self, what: str, taken: Sequence[float], bare: Sequence[float]) -> Row:
        self._ratio = _ratio(taken, bare)
        return Row(
            f"{what}, {self._subject.name}",
            f"{_spread(taken)}, {self._said:,} characters",
            f"{_spread(bare)}, {self._raw_said:,} characters: raw aria_snapshot",
            f"{self._ratio:.2f}x",
        )


# --- evaluating ---


async def bench_evaluation(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Code that reads, of the page and of one element of it."""
    rounds = 5 if quick else 100
    rows = []
    async with _browser(folder) as browser:
        for subject in _subjects(quick):
            async with _opened(browser, subject) as (page, _):
                with profiled(f"evaluation, {subject.name}", profile):
                    rows += await _evaluated(page, subject, rounds)
    return rows, {}


async def _evaluated(page: Page, subject: Subject, rounds: int) -> list[Row]:
    code, read = "document.title", "element => element.textContent"

    async def ours() -> float:
        return (await _timed(evaluate(page, code)))[0]

    async def raw() -> float:
        return (await _timed(page.evaluate(code)))[0]

    async def ours_bound() -> float:
        return (await _timed(evaluate(page, read, locator=subject.clicked)))[0]

    async def raw_bound() -> float:
        return (await _timed(page.locator(subject.clicked).evaluate(read)))[0]

    plain = await _by_turns(rounds, ours, raw)
    bound = await _by_turns(rounds, ours_bound, raw_bound)
    return [
        _above_row(f"exec_js, {subject.name}", *plain),
        _above_row(f"exec_js of an element, {subject.name}", *bound),
    ]


def _above_row(what: str, taken: Sequence[float], bare: Sequence[float]) -> Row:
    above = _above(taken, bare)
    return Row(
        what,
        f"{_spread(taken)}, {above:.1f} ms above",
        f"{_spread(bare)}: raw evaluate",
        f"{_ratio(taken, bare):.1f}x",
        f"< {ABOVE_EVALUATE:.0f} ms above",
        above < ABOVE_EVALUATE,
    )


# --- acting ---


async def bench_acting(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """A click by ref, from the call to the answer with what it changed."""
    rows = []
    async with _browser(folder) as browser:
        for subject in _subjects(quick):
            async with _opened(browser, subject) as (page, _):
                with profiled(f"acting on {subject.name}", profile):
                    rows.append(await _acted(page, subject, 1 if quick else subject.rounds))
    return rows, {}


async def _acted(page: Page, subject: Subject, rounds: int) -> Row:
    looks = Looks()
    common: dict[str, Any] = {"looks": looks, "key": KEY, "call": CALL, "facts": FACTS, "pages": ["main"]}
    ref = await _ref_of(page, subject)
    await look(page, **common)
    said = 0

    async def observe() -> str:
        return (await changes(page, **common)).text

    async def ours() -> float:
        nonlocal said
        click = {"op": "click", "ref": ref}
        ms, acted = await _timed(act(page, [click], observe=observe, known=looks.known(KEY), look=f"{CALL})"))
        if acted.error or not acted.settled:
            raise RuntimeError(f"the click did not end well: {acted.error}")
        said = len(acted.difference)
        return ms

    taken, bare, seen = await _by_turns(rounds, ours, *_raw_clicks(page, ref))
    return _act_row(f"act click to answer, {subject.name}", taken, bare, seen, said)


def _raw_clicks(page: Page, ref: str) -> tuple[Measure, Measure]:
    """A click that tells nothing, and one after which Playwright tells the whole page."""

    async def click() -> float:
        return (await _timed(page.get_by_ref(ref).click()))[0]

    async def click_and_look() -> float:
        return await click() + (await _timed(page.aria_snapshot(mode="ai")))[0]

    return click, click_and_look


def _act_row(what: str, taken: Sequence[float], bare: Sequence[float], seen: Sequence[float], said: int) -> Row:
    return Row(
        what,
        f"{_spread(taken)}, {said:,} characters",
        f"{_spread(bare)}: raw click; {median(seen):.1f} ms: and a raw aria_snapshot",
        f"{_ratio(taken, bare):.1f}x; {_ratio(taken, seen):.1f}x",
        f"< {ACT_MS:.0f} ms",
        median(taken) < ACT_MS,
    )


async def _ref_of(page: Page, subject: Subject) -> str:
    """The ref of what is clicked on this page."""
    told = await page.aria_snapshot(mode="ai")
    return re.findall(rf'- {subject.role} "{re.escape(subject.label)}".* \[ref=(\w+)\]', told)[0]


# --- the same through a client ---


async def bench_calls(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """The tools as an agent has them: a client, a server's process that attaches for each call, a paused run's page."""
    from mcp import Client, StdioServerParameters
    from playwright.async_api import async_playwright

    from mcp_flow.browser import host as hosts

    rounds, subject = 1 if quick else PLAIN.rounds, PLAIN
    command, *arguments = [*_command(), "serve"]
    async with site(subject.html.encode()) as url, outside(folder / "calls") as house:
        run_id = await house.start("paused_page", url=url)
        await house.waiting(run_id)
        parameters = StdioServerParameters(
            command=command, args=arguments, env=os.environ | house.settings.environment()
        )
        async with Client(parameters) as client, async_playwright() as playwright:
            browser = await playwright.chromium.connect(hosts.living(house.settings)[0].endpoint)
            page = await (await browser.new_context()).new_page()
            await _arrive(page, url)
            rows = await _called(_Agent(client, run_id), page, subject, rounds)
            await browser.close()
    return rows, {}


@dataclass
class _Agent:
    """A client's calls about one run."""

    client: Client
    run_id: str
    said: str = ""

    async def __call__(self, tool: str, **arguments: Any) -> float:
        """Milliseconds from the call to its answer, which is kept."""
        ms, result = await _timed(self.client.call_tool(tool, {"run_id": self.run_id} | arguments))
        self.said = "\n".join(block.text for block in result.content if block.type == "text")
        if result.is_error:
            raise RuntimeError(self.said[:2000])
        return float(ms)


async def _called(agent: _Agent, page: Page, subject: Subject, rounds: int) -> list[Row]:
    told = await page.aria_snapshot(mode="ai")
    ref = await _ref_of(page, subject)

    async def raw_look() -> float:
        return (await _timed(page.aria_snapshot(mode="ai")))[0]

    async def raw_evaluation() -> float:
        return (await _timed(page.evaluate("document.title")))[0]

    # The run's page is another one than that of raw Playwright.
    click = {"op": "click", "locator": subject.clicked}
    seen, raw_seen = await _by_turns(rounds, partial(agent, "snapshot", mode="outline"), raw_look)
    looked = Row(
        f"snapshot through a client, {subject.name}",
        f"{_spread(seen)}, {len(agent.said):,} characters",
        f"{_spread(raw_seen)}, {len(told):,} characters: raw aria_snapshot",
        f"{_ratio(seen, raw_seen):.1f}x",
    )
    read = await _by_turns(rounds, partial(agent, "exec_js", code="document.title"), raw_evaluation)
    evaluated = _above_row(f"exec_js through a client, {subject.name}", *read)
    acted = await _by_turns(rounds, partial(agent, "act", actions=[click]), *_raw_clicks(page, ref))
    return [
        looked,
        evaluated,
        _act_row(f"act click to answer through a client, {subject.name}", *acted, len(agent.said)),
    ]


# --- taking over ---


async def bench_hijack(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """From the request of this process to the run of a worker's process that stands still."""
    rounds = 3 if quick else 30
    async with site(SHOP.encode()) as url, outside(folder / "hijack") as house:
        rows = [await _stopped_at_action(house, url, rounds), await _stopped_at_step(house, rounds)]
    return rows, {}


async def _stopped_at_action(house: Outside, url: str, rounds: int) -> Row:
    from playwright.async_api import async_playwright

    from mcp_flow.browser import host as hosts

    run_id = await house.start("clicking", url=url, selector=PLAIN.clicked)
    await house.until(run_id, lambda run: run.steps.get("click#1"))
    async with async_playwright() as playwright:
        browser = await playwright.chromium.connect(hosts.living(house.settings)[0].endpoint)
        page = await (await browser.new_context()).new_page()
        await page.goto(url)
        journaled: list[float] = []
        taken, bare = [], []
        for _ in range(rounds):
            await _at_some_moment()
            ms, run = await _hijacked(house, run_id)
            stopped = run.hijack.stopped
            if not (stopped.action and stopped.line and stopped.step):
                raise RuntimeError(f"it is not said where the run stands: {stopped}")
            taken.append(ms)
            journaled.append(await _in_journal(house, run_id))
            # While the run stands still: so only one page is clicked at a time.
            bare.append(await _paused_raw(page))
            await _handed_back(house, run_id)
        await browser.close()
    await house.control.cancel(run_id, AGENT, "measured")
    return Row(
        "hijack to stopped at an action",
        f"{_spread(taken)}, {median(journaled):.1f} ms of it between the two events",
        f"{_spread(bare)}: raw request_pause to paused",
        f"{_ratio(taken, bare):.1f}x",
        f"< {STOP_MS:.0f} ms",
        median(taken) < STOP_MS,
    )


async def _stopped_at_step(house: Outside, rounds: int) -> Row:
    run_id = await house.start("stepping")
    await house.until(run_id, lambda run: run.steps)
    taken = []
    for _ in range(rounds):
        await _at_some_moment()
        taken.append((await _hijacked(house, run_id))[0])
        await _handed_back(house, run_id)
    await house.control.cancel(run_id, AGENT, "measured")
    ms = median(taken)
    return Row("hijack to stopped between steps", _spread(taken), aim=f"< {STOP_MS:.0f} ms", met=ms < STOP_MS)


async def _at_some_moment() -> None:
    """Wait a little, so that the request does not always meet the same moment of an action."""
    await asyncio.sleep(random.uniform(0.05, 0.15))


async def _hijacked(house: Outside, run_id: str) -> tuple[float, Run]:
    """Milliseconds from the request until it is known here that the run stands still, and the run."""

    async def hijack() -> Run:
        await house.control.hijack(run_id, AGENT, "to look")
        return await house.control.wait(run_id, GIVE_UP)

    ms, run = await _timed(hijack())
    if run.status != "hijacked":
        raise RuntimeError(f"run {run_id} is {run.status}: {run.error}")
    return ms, run


async def _in_journal(house: Outside, run_id: str) -> float:
    """Milliseconds between the last request to stop and the stop, as the journal dates them."""
    at: dict[type[ev.Event], datetime] = {}
    for recorded in await house.store.events(run_id, 0, -1):
        at[type(recorded.event)] = datetime.fromisoformat(recorded.at)
    return (at[ev.RunHijacked] - at[ev.HijackRequested]).total_seconds() * 1000


async def _handed_back(house: Outside, run_id: str) -> None:
    await house.control.resume(run_id, AGENT)
    await house.until(run_id, lambda run: run.status == "running" and not run.hijack)


async def _paused_raw(page: Page) -> float:
    """Milliseconds from a request to pause to the pause of a page that is being clicked."""
    debugger = page.context.debugger
    paused = asyncio.Event()

    def note(*_: object) -> None:
        if debugger.paused_details:
            paused.set()

    async def click_on() -> None:
        while True:
            await page.locator(PLAIN.clicked).click()

    async def pause() -> None:
        await debugger.request_pause()
        await paused.wait()

    debugger.on("pausedstatechanged", note)
    clicking = asyncio.create_task(click_on())
    try:
        await _at_some_moment()
        async with asyncio.timeout(GIVE_UP):
            ms, _ = await _timed(pause())
            clicking.cancel()
            await debugger.resume()
    finally:
        clicking.cancel()
        await asyncio.gather(clicking, return_exceptions=True)
        debugger.remove_listener("pausedstatechanged", note)
    return ms
