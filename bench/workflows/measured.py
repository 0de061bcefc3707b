"""The workflows that the benchmark runs. Times are of `time.perf_counter`, one clock for all processes of a machine."""

import asyncio
import time
from typing import Any

from mcp_flow import Flow, workflow


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


async def read_title(page: Any) -> str:
    """A step that asks the page for something."""
    return str(await page.title())


@workflow
async def one_page(flow: Flow, url: str) -> str:
    """A page, a visit, a step."""
    page = await flow.page()
    await page.goto(url)
    return await flow.step("read title", read_title, page)
