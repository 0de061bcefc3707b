"""The workflows that the benchmark runs. Times are of `time.perf_counter`, one clock for all processes of a machine."""

import asyncio
import time
from itertools import count
from typing import Any

from mcp_flow import Flow, workflow

HERE = ["http://127.0.0.1:*"]
"""The origins of the benchmark's own pages."""


async def trivial(number: int) -> int:
    """A step that costs nothing itself."""
    return number


@workflow
async def sequential(flow: Flow, steps: int) -> list[float]:
    """Steps one after another; returns the time before the first and after each."""
    times = [time.perf_counter()]
    for number in range(steps):
        await flow.step(f"step {number}", trivial, number)
        times.append(time.perf_counter())
    return times


@workflow
async def interrupted(flow: Flow, steps: int) -> list[float]:
    """Steps, then a pause; returns when the last attempt began and when it was past the last step."""
    began = time.perf_counter()
    for number in range(steps):
        await flow.step(f"step {number}", trivial, number)
    passed = time.perf_counter()
    await flow.pause("look")
    return [began, passed]


class Barrier:
    """Lets `parties` runs of one worker go at the same moment, again and again."""

    def __init__(self) -> None:
        self._arrived = 0
        self._open = asyncio.Event()

    async def wait(self, parties: int) -> None:
        self._arrived += 1
        gate = self._open
        if self._arrived == parties:
            self._arrived, self._open = 0, asyncio.Event()
            gate.set()
        await gate.wait()


BARRIER = Barrier()


@workflow
async def crowd(flow: Flow, steps: int, parties: int) -> list[float]:
    """Steps, begun once all `parties` runs are here (0: at once); returns when they began and ended."""
    if parties:
        await BARRIER.wait(parties)
    began = time.perf_counter()
    for number in range(steps):
        await flow.step(f"step {number}", trivial, number)
    return [began, time.perf_counter()]


@workflow
async def asking(flow: Flow, questions: int) -> int:
    """Questions one after another, a step after each answer."""
    answers = 0
    for number in range(questions):
        answers += await flow.ask(f"question {number}", int)
        await flow.step(f"step {number}", trivial, number)
    return answers


@workflow
async def sleepers(flow: Flow, timers: int) -> int:
    """Timers side by side."""

    async def branch(number: int) -> int:
        with flow.scope(str(number)):
            await flow.sleep(86_400)
            return 1

    return sum(await asyncio.gather(*(branch(number) for number in range(timers))))


async def read_title(page: Any) -> str:
    """A step that asks the page for something."""
    return str(await page.title())


@workflow(allow_origins=HERE)
async def one_page(flow: Flow, url: str) -> str:
    """A page, a visit, a step."""
    page = await flow.page()
    await page.goto(url)
    return await flow.step("read title", read_title, page)


LOOKS = count()


async def look(page: Any) -> list[Any]:
    """When the page answered, and whether it is the page that was marked; only the first of a process returns."""
    if next(LOOKS):
        await asyncio.Event().wait()
    marked = await page.evaluate("window.marked === true")
    return [time.perf_counter(), marked]


@workflow(allow_origins=HERE)
async def survivor(flow: Flow, url: str, rounds: int) -> int:
    """A page, and steps of which each needs a worker of its own."""
    page = await flow.page()
    await flow.step("open", page.goto, url)
    await flow.step("mark", page.evaluate, "window.marked = true")
    for number in range(rounds + 1):
        await flow.step(f"look {number}", look, page)
    return rounds


async def read(page: Any) -> float:
    """When the page answered."""
    await page.evaluate("document.title")
    return time.perf_counter()


@workflow(allow_origins=HERE)
async def patient(flow: Flow, url: str, rounds: int) -> None:
    """A page, then questions with a step after each."""
    page = await flow.page()
    await flow.step("open", page.goto, url)
    for number in range(rounds):
        await flow.approve(f"go on with {number}?")
        await flow.step(f"look {number}", read, page)


@workflow
async def waiting(flow: Flow) -> bool:
    """A step and a question, without a page."""
    await flow.step("first", trivial, 1)
    return bool(await flow.approve("go on?"))


@workflow
async def busy(flow: Flow) -> None:
    """A step that does not end."""
    await flow.step("work", asyncio.Event().wait)


async def now() -> float:
    """A step that says when it ran."""
    return time.perf_counter()


@workflow
async def obedient(flow: Flow, rounds: int) -> None:
    """Commands, and a step after each."""
    for number in range(rounds):
        await flow.approve(f"approve {number}?")
        await flow.step(f"approved {number}", now)
        await flow.pause(f"pause {number}")
        await flow.step(f"resumed {number}", now)


@workflow(allow_origins=HERE)
async def clicker(flow: Flow, url: str, clicks: int) -> list[float]:
    """Seconds a click takes by itself and as a step, and the seconds that a look at the context's storage takes."""
    page = await flow.page()
    await page.goto(url)
    button = page.get_by_role("button")
    await button.click()
    began = time.perf_counter()
    for _ in range(clicks):
        await button.click()
    bare = time.perf_counter() - began
    began = time.perf_counter()
    for number in range(clicks):
        await flow.step(f"click {number}", button.click)
    stepped = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(5):
        await page.context.storage_state()
    return [bare / clicks, stepped / clicks, (time.perf_counter() - began) / 5]


@workflow(allow_origins=HERE)
async def paused_page(flow: Flow, url: str) -> None:
    """A page that waits for somebody."""
    page = await flow.page()
    await page.goto(url)
    await flow.pause("look")


async def click_on(page: Any, selector: str) -> None:
    """A step that clicks without end."""
    while True:
        await page.locator(selector).click()


@workflow(allow_origins=HERE)
async def clicking(flow: Flow, url: str, selector: str) -> None:
    """A page, and a step that acts on it all the time."""
    page = await flow.page()
    await page.goto(url)
    await flow.step("click", click_on, page, selector)


@workflow
async def stepping(flow: Flow) -> None:
    """Short steps without end, and no page."""
    for number in count():
        await flow.step(f"step {number}", asyncio.sleep, 0.02)
