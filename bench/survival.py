"""What surviving costs: deaths, waking, a thousand waits, commands between processes, keeping what rebuilds a page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from journal import GIVE_UP, WORKFLOWS, Home, Row
from processes import PAGE, _command

from mcp_flow import config, presence
from mcp_flow.catalog import Reader
from mcp_flow.channel import Channel
from mcp_flow.config import Settings
from mcp_flow.control import Control
from mcp_flow.store import Store

AGENT = Channel()
HOLD = 0.5
"""After how many seconds of waiting a run is parked here."""
STARTED_BARE = """
import sys, time
import mcp_flow.cli, mcp_flow.worker
imported = time.perf_counter()
import asyncio
from playwright.async_api import async_playwright

async def main():
    playwright = await async_playwright().start()
    started = time.perf_counter()
    browser = await playwright.chromium.connect(sys.argv[1])
    print(imported, started, time.perf_counter(), flush=True)
    await browser.close()
    await playwright.stop()

asyncio.run(main())
"""
"""What a worker can't do without on its way to a page: its imports, Playwright's driver, a connection."""


class Outside:
    """A home folder seen and moved from this process, with workers and servers that are processes of their own."""

    def __init__(self, settings: Settings, store: Store, control: Control, bell: presence.Doorbell) -> None:
        self.settings = settings
        self.store = store
        self.control = control
        self.bell = bell

    async def start(self, workflow: str, **input: Any) -> str:
        """Start a run, and a worker if there is none."""
        return await self.control.start(workflow, input)

    async def until(self, run_id: str, condition: Callable[[Any], Any]) -> Any:
        """What is true of the run at last; a run that fails ends the wait."""
        with anyio.fail_after(GIVE_UP):
            while True:
                rings = self.bell.rings
                run = await self.store.run(run_id)
                if found := condition(run):
                    return found
                if run.status in ("failed", "cancelled"):
                    raise RuntimeError(f"run {run_id} is {run.status}: {run.error}")
                await self.bell.next_ring(0.05, rings)

    async def waiting(self, run_id: str) -> str:
        """The id of the request that the run waits for."""
        found = await self.until(run_id, lambda run: run.idle and run.open_requests())
        return str(found[0].opened.request_id)

    async def value(self, run_id: str, step: str) -> Any:
        """The result of a step, once it is in the journal."""
        found = await self.until(run_id, lambda run: _finished(run, step))
        return found.value

    def pid(self) -> int:
        """The process of the one detached worker."""
        (worker,) = presence.living(self.settings)
        return int((self.settings.home / "workers" / f"{worker}.lock").read_text())


def _finished(run: Any, name: str) -> Any:
    step = run.steps.get(f"{name}#1")
    return step if step is not None and step.status == "finished" else None


@contextlib.asynccontextmanager
async def outside(folder: Path, **given: Any) -> AsyncIterator[Outside]:
    """A fresh home folder; every process of it is ended when this is left."""
    settings = config.load(home=folder, workflows=WORKFLOWS, **given)
    try:
        async with Store(settings, "command") as store, Reader(settings) as reader:
            bell = presence.Doorbell(settings)
            try:
                yield Outside(settings, store, Control(settings, store, reader, bell), bell)
            finally:
                bell.close()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.run_process([*_command(), "stop"], env=os.environ | settings.environment(), check=False)


@contextlib.asynccontextmanager
async def server(settings: Settings) -> AsyncIterator[int]:
    """A server with a client that has called it once; its process id."""
    from mcp import Client, StdioServerParameters

    command, *arguments = [*_command(), "serve"]
    before = set(_children())
    parameters = StdioServerParameters(command=command, args=arguments, env=os.environ | settings.environment())
    async with Client(parameters) as client:
        await client.call_tool("list_runs", {})
        (pid,) = set(_children()) - before
        yield pid


def _children() -> Iterator[int]:
    """The servers that this process has started."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            for pid in (task / "children").read_text().split():
                if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    yield int(pid)


# --- from a worker's death to its run's next step ---


async def bench_death(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """A worker is killed in the middle of a step; a server is there, and the page lives."""
    rounds = 1 if quick else 7
    totals, floors, parts = [], [], []
    async with outside(folder / "death") as house, server(house.settings):
        from mcp_flow.browser import host as hosts

        run_id = await house.start("survivor", url=PAGE, rounds=rounds + 1)
        await house.value(run_id, "look 0")
        endpoint = hosts.living(house.settings)[0].endpoint
        for number in range(1, rounds + 1):
            floors.append(_started_bare(endpoint))
            await house.until(run_id, partial(_is_at, step=f"look {number}"))
            killed = time.perf_counter()
            os.kill(house.pid(), signal.SIGKILL)
            looked, alive = await house.value(run_id, f"look {number}")
            if not alive:
                raise RuntimeError("the page is not the one that was there before")
            totals.append(looked - killed)
            timeline = await _timeline(house.store, run_id, time.time() - time.perf_counter() + killed)
            parts.append([((_born(house.pid()) - killed) * 1000, "the next worker's process"), *timeline])
        if profile:
            for part in parts:
                print("\n--- ms since the worker's death ---")
                print("\n".join(f"{ms:8.1f}  {what}" for ms, what in part))
    total, floor = median(totals), median(sum(part) for part in floors)
    own = median(mine - sum(bare) for mine, bare in zip(totals, floors, strict=True))
    imports, driver, connect = (median(column) for column in zip(*floors, strict=True))
    spread = f"{min(totals):.2f} to {max(totals):.2f}"
    born = median(part[0][0] for part in parts)
    bare = f"{floor:.2f} s: imports {imports:.2f}, driver {driver:.2f}, connect {connect:.2f}"
    return [
        Row("worker's death to next step, live page", f"{total:.2f} s ({spread})", bare, "", "< 2 s", total < 2),
        Row(
            "neither imports nor the driver's start",
            f"{own:.2f} s (death to the next worker's process {born:.0f} ms)",
            aim="< 0.3 s",
            met=own < 0.3,
        ),
    ], {}


def _is_at(run: Any, step: str) -> bool:
    found = run.steps.get(f"{step}#1")
    return found is not None and found.status == "started"


def _started_bare(endpoint: str) -> list[float]:
    """Seconds that a bare process needs for the worker's imports, for the driver, and for a connection."""
    began = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-P", "-c", STARTED_BARE, endpoint], stdout=subprocess.PIPE, text=True, check=True
    )
    moments = [began, *map(float, ran.stdout.split())]
    return [after - before for before, after in pairwise(moments)]


def _born(pid: int) -> float:
    """When a process began, in seconds of `time.perf_counter`, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


async def _timeline(store: Store, run_id: str, since: float) -> list[tuple[float, str]]:
    from datetime import datetime

    events = await store.events(run_id, 0, -1)
    moments = [(datetime.fromisoformat(event.at).timestamp() - since, event.event.type) for event in events]
    return [(at * 1000, what) for at, what in moments if at > 0]


# --- waking ---


async def bench_waking(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """From an answer to the end of the next step: of a run that was parked, and of one that has its page yet."""
    from playwright.async_api import async_playwright

    from mcp_flow.browser import host as hosts

    rounds = 1 if quick else 7
    parked, waiting, rebuilt = [], [], []
    async with outside(folder / "waking", hold=HOLD, worker_idle=HOLD) as house:
        # A run that works keeps the worker here, which would leave once it has nothing to do.
        await house.start("busy")
        run_id = await house.start("patient", url=PAGE, rounds=2 * rounds)
        async with async_playwright() as playwright:
            for number in range(rounds):
                request_id = await house.waiting(run_id)
                waiting.append(await _answered(house, run_id, request_id, f"look {2 * number}"))
                request_id = await house.waiting(run_id)
                await house.until(run_id, lambda run: run.parked_since)
                if number == 0:
                    browser = await playwright.chromium.connect(hosts.living(house.settings)[0].endpoint)
                began = time.perf_counter()
                context = await browser.new_context()
                page = await context.new_page()
                await page.goto(PAGE)
                await page.evaluate("document.title")
                rebuilt.append(time.perf_counter() - began)
                await context.close()
                parked.append(await _answered(house, run_id, request_id, f"look {2 * number + 1}"))
            await browser.close()
    awake, woken, floor = median(waiting), median(parked), median(rebuilt)
    return [
        Row(
            "answer to next step's end, parked run",
            f"{woken * 1000:.0f} ms ({min(parked) * 1000:.0f} to {max(parked) * 1000:.0f})",
            f"{floor * 1000:.0f} ms: raw context, page, goto",
            f"{median(mine / bare for mine, bare in zip(parked, rebuilt, strict=True)):.2f}x",
        ),
        Row("the same, run that waits with its page", f"{awake * 1000:.0f} ms"),
    ], {}


async def _answered(house: Outside, run_id: str, request_id: str, step: str) -> float:
    """Seconds from the call that answers to the end of the step that follows."""
    began = time.perf_counter()
    await house.control.approve(request_id, AGENT, "approve", None)
    return float(await house.value(run_id, step)) - began


# --- a thousand waits ---


async def bench_waits(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Memory and time that many runs cost while they wait without a page."""
    count, seconds = (50, 1.0) if quick else (1000, 10.0)
    home = Home(folder, "waits")
    async with outside(home.settings.home, worker_idle=1 if quick else 3) as house, server(house.settings) as serving:
        # One run that works keeps the worker here, which would leave once it has nothing to do.
        working = await house.start("busy")
        await house.until(working, partial(_is_at, step="work"))
        worker = house.pid()
        await asyncio.sleep(seconds)
        before, server_before = _pss(worker), _pss(serving)
        await home.create("waiting", [f"wait-{number}" for number in range(count)])
        presence.ring(house.settings, "")
        await home.until("waiting-approval", count)
        held = _pss(worker)
        await _until_released(house, home, count)
        # What was given back is free for other runs, but the system does not get it: what the waiting runs themselves
        # cost is what a worker has that comes after.
        await _left(house, working)
        working = await house.start("busy")
        await house.until(working, partial(_is_at, step="work"))
        worker = house.pid()
        await asyncio.sleep(seconds)
        kept, server_kept = _pss(worker), _pss(serving)
        began, spent = time.perf_counter(), _cpu(worker, serving)
        await asyncio.sleep(seconds)
        both = (_cpu(worker, serving) - spent) / (time.perf_counter() - began)
        await _left(house, working)
        began, spent = time.perf_counter(), _cpu(serving)
        await asyncio.sleep(seconds)
        alone = (_cpu(serving) - spent) / (time.perf_counter() - began)
    grown, server_grown = (kept - before) / 1024, (server_kept - server_before) / 1024
    return [
        Row(
            f"memory of {count:,} waiting runs",
            f"{grown:.1f} MB more in a worker, {server_grown:.1f} MB in a server",
            f"{before / 1024:.0f} MB: a worker without; {held / 1024:.0f} MB while it holds their coroutines; "
            f"{server_before / 1024:.0f} MB: a server without",
            aim="< 5 MB",
            met=grown + server_grown < 5,
        ),
        Row(
            f"CPU of worker and server, {count:,} waiting",
            f"{both * 100:.2f}% of a core over {seconds:.0f} s",
            aim="< 1%",
            met=both < 0.01,
        ),
        Row(
            "CPU of an idle server, the worker gone",
            f"{alone * 100:.2f}% of a core over {seconds:.0f} s",
            aim="< 1%",
            met=alone < 0.01,
        ),
    ], {}


async def _left(house: Outside, working: str) -> None:
    """Cancel the run that keeps the worker, and wait until the worker has left."""
    await house.control.cancel(working, AGENT, "measured")
    with anyio.fail_after(GIVE_UP):
        while presence.living(house.settings):
            await house.bell.next_ring(0.05)


async def _until_released(house: Outside, home: Home, count: int) -> None:
    sql = "SELECT count(*) FROM run_rows WHERE status = 'waiting-approval' AND owner IS NOT NULL"
    with contextlib.closing(home.look()) as db, anyio.fail_after(GIVE_UP):
        while db.execute(sql).fetchone()[0]:
            await house.bell.next_ring(0.1)


def _pss(pid: int) -> float:
    """Kilobytes of memory that are the process's own, and its share of what it shares."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return float(line.split()[1])
    raise RuntimeError("no Pss")


def _cpu(*pids: int) -> float:
    """Seconds of processor time that the processes have spent."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(field[11]) + int(field[12]) for field in fields) / ticks


# --- commands ---


async def bench_commands(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """From what this process has committed to what the worker's process does about it: goes on, or lets go."""
    count, cancels = (10, 3) if quick else (100, 30)
    approved, resumed, cancelled, floors = [], [], [], []
    async with outside(folder / "commands") as house:
        committed = 0.0
        decide = house.store.decide

        async def timed(*given: Any, **more: Any) -> Any:
            nonlocal committed
            found = await decide(*given, **more)
            committed = time.perf_counter()
            return found

        house.store.decide = timed  # type: ignore[method-assign]
        run_id = await house.start("obedient", rounds=count)
        for number in range(count):
            floors.append(await _rung(house))
            request_id = await house.waiting(run_id)
            await house.control.approve(request_id, AGENT, "approve", None)
            approved.append(await house.value(run_id, f"approved {number}") - committed)
            await house.waiting(run_id)
            await house.control.resume(run_id, AGENT)
            resumed.append(await house.value(run_id, f"resumed {number}") - committed)
        for _ in range(cancels):
            run_id = await house.start("stepping")
            await house.until(run_id, lambda run: run.steps)
            await house.control.cancel(run_id, AGENT, "measured")
            cancelled.append(await _let_go(house, run_id) - committed)
    both = sorted([*approved, *resumed])
    late = both[int(len(both) * 0.95)]
    return [
        Row(
            "command in one process, next step in another",
            f"{median(both) * 1000:.1f} ms (approve {median(approved) * 1000:.1f}, "
            f"resume {median(resumed) * 1000:.1f}; 95% below {late * 1000:.1f})",
            f"{median(floors) * 1000:.2f} ms: a datagram to oneself",
            aim="< 100 ms",
            met=median(both) < 0.1,
        ),
        Row(
            "cancel in one process, run stopped in another",
            f"{median(cancelled) * 1000:.1f} ms ({min(cancelled) * 1000:.1f} to {max(cancelled) * 1000:.1f})",
            aim="< 100 ms",
            met=median(cancelled) < 0.1,
        ),
    ], {}


async def _let_go(house: Outside, run_id: str) -> float:
    """When its owner has stopped a cancelled run and let go of it."""
    with anyio.fail_after(GIVE_UP):
        while True:
            rings = house.bell.rings
            if (await house.store.run(run_id)).owner is None:
                return time.perf_counter()
            await house.bell.next_ring(0.05, rings)


async def _rung(house: Outside) -> float:
    began = time.perf_counter()
    rings = house.bell.rings
    presence.ring(house.settings, "")
    await house.bell.next_ring(1, rings)
    return time.perf_counter() - began


# --- checkpoints ---


async def bench_checkpoints(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Steps that click, beside the same clicks without steps, and beside steps after which nothing is kept."""
    from mcp_flow.pages import Pages

    rounds, clicks = (1, 10) if quick else (7, 60)
    home = Home(folder, "checkpoints")
    with_keeping, without, raw, storage = [], [], [], []
    ratios: dict[str, list[float]] = {"kept": [], "unkept": []}
    keep_soon = Pages.keep_soon
    saved: list[int] = []
    keep = Pages._save

    async def counted(pages: Pages) -> None:
        saved.append(1)
        await keep(pages)

    try:
        async with site(SITE) as url, home.worker():
            Pages._save = counted  # type: ignore[method-assign]
            for number in range(rounds):
                for name, times in (("kept", with_keeping), ("unkept", without)):
                    Pages.keep_soon = keep_soon if name == "kept" else lambda _: None  # type: ignore[method-assign]
                    run_id = f"{name}-{number}"
                    await home.create("clicker", [run_id], url=url, clicks=clicks)
                    presence.ring(home.settings, "")
                    await home.until("finished", len(with_keeping) + len(without) + 1)
                    ((bare, stepped, look),) = await home.outputs([run_id])
                    times.append(stepped)
                    ratios[name].append(stepped / bare)
                    raw.append(bare)
                    storage.append(look)
    finally:
        Pages.keep_soon, Pages._save = keep_soon, keep  # type: ignore[method-assign]
        await anyio.run_process([*_command(), "stop"], env=os.environ | home.settings.environment(), check=False)
    mine, bare, plain = median(with_keeping), median(raw), median(without)
    # Each run's steps against its own raw clicks: what else the machine does changes from run to run.
    share = 1 - median(ratios["unkept"]) / median(ratios["kept"])
    return [
        Row(
            "a click as a step, its page kept",
            f"{mine * 1000:.2f} ms ({plain * 1000:.2f} ms with nothing kept; keeping is {share * 100:.0f}% of it)",
            f"{bare * 1000:.2f} ms: raw click; {median(storage) * 1000:.2f} ms: raw storage_state",
            f"{median(ratios['kept']):.2f}x",
            "keeping < 10%",
            share < 0.1,
        ),
        Row("checkpoints written", f"{len(saved) / rounds / clicks:.2f} a step"),
    ], home.pragmas


SITE = b"""<title>clicks</title><button onclick="
  localStorage.setItem('clicks', ++count); document.cookie = 'clicks=' + count; this.textContent = count
">0</button><script>count = 0</script>"""
"""A page whose button changes cookies and storage."""


@contextlib.asynccontextmanager
async def site(content: bytes) -> AsyncIterator[str]:
    """The address of a page that has this content."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(content))
                writer.write(content)
                await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
    finally:
        listening.close()
