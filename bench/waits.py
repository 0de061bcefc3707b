"""What waiting costs: questions and answers in a live and in a parked run, ten thousand timers, a thousand requests."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

from journal import GIVE_UP, Home, Row, floor, profiled

from mcp_flow import presence
from mcp_flow.app import App, open_app
from mcp_flow.channel import Channel
from mcp_flow.store import Store
from mcp_flow.tools import state

AGENT = Channel()


class Ahead:
    """A clock that can be moved, for the store of a worker in this process."""

    ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


async def bench_waits(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Ask and answer, through a live coroutine and through a replay."""
    rounds = 20 if quick else 200
    home = Home(folder, "asking")
    await home.create("asking", ["one"], questions=rounds + 1)
    async with home.worker(), _app(home) as app:
        live = []
        with profiled("waits", profile):
            for number in range(rounds):
                request_id = await _question(app, "one", number)
                began = time.perf_counter()
                await app.control.resume("one", AGENT, value=number, has_value=True, request_id=request_id)
                await _question(app, "one", number + 1)
                live.append((time.perf_counter() - began) * 1000)
        commits = floor(home, 200, "question 0#1")
    parked = []
    for number in range(3 if quick else 9):
        home = Home(folder, f"parked-{number}")
        await home.create("asking", ["one"], questions=2)
        async with home.worker(), _app(home) as app:
            await _question(app, "one", 0)
        async with home.worker(), _app(home) as app:  # nobody has the run: an answer replays it
            request_id = await _question(app, "one", 0)
            began = time.time()
            await app.control.resume("one", AGENT, value=0, has_value=True, request_id=request_id)
            await _question(app, "one", 1)
            started = [r.at for r in await app.store.events("one") if r.event.type == "step.started"]
            parked.append((datetime.fromisoformat(started[-1]).timestamp() - began) * 1000)
    ask, wake = median(live), median(parked)
    return [
        Row(
            f"answer to the next question, {rounds} in a live run",
            f"{ask:.2f} ms ({min(live):.2f} to {max(live):.2f})",
            f"{4 * commits:.2f} ms: 4 raw commits",
            f"{ask / (4 * commits):.1f}x",
            "< 20 ms",
            ask < 20,
        ),
        Row("answer to the next step of a run that nobody has", f"{wake:.1f} ms", aim="< 100 ms", met=wake < 100),
    ], home.pragmas


async def bench_timers(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Timers, opened in parallel branches, and then all due at once."""
    runs, each = (2, 50) if quick else (100, 100)
    clock, home = Ahead(), Home(folder, "timers")
    names = [f"run-{number}" for number in range(runs)]
    await home.create("sleepers", names, timers=each)
    total = runs * each
    async with home.worker(clock):
        began = time.perf_counter()
        with profiled("timers", profile):
            await home.until("waiting-timer", runs)
            opened = time.perf_counter() - began
            commits = floor(home, 1000, "1/sleep#1")
            async with Store(home.settings, "command", now=clock) as store:
                looks = []
                for _ in range(20):
                    began = time.perf_counter()
                    await store.expire_due()
                    await store.next_due(home.settings.hold, clock())
                    looks.append((time.perf_counter() - began) * 1000)
            clock.ahead = timedelta(days=2)
            began = time.perf_counter()
            presence.ring(home.settings, "")  # a clock that is moved wakes nobody
            await home.until("finished", runs)
        ended = time.perf_counter() - began
    bare = total * commits / 1000
    return [
        Row(
            f"{total:,} timers opened in {runs} runs",
            f"{opened:.2f} s ({opened / total * 1000:.2f} ms each)",
            f"{bare:.2f} s: a raw commit each",
            f"{opened / bare:.1f}x",
            "< 1 ms each",
            opened / total < 0.001,
        ),
        Row(
            f"{total:,} timers due at once, to the last run's end",
            f"{ended:.2f} s ({ended / total * 1000:.2f} ms each)",
            f"{bare:.2f} s: a raw commit each",
            f"{ended / bare:.1f}x",
            "< 1 ms each",
            ended / total < 0.001,
        ),
        Row("a look at them while none is due", f"{median(looks):.2f} ms", aim="< 2 ms", met=median(looks) < 2),
    ], home.pragmas


async def bench_pending(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Open requests, listed page by page and the first page alone."""
    runs = 50 if quick else 1000
    home = Home(folder, "pending")
    await home.create("asking", [f"run-{number}" for number in range(runs)], questions=1)
    async with home.worker():
        await home.until("waiting-input", runs)
    first, whole, bare = [], [], []
    async with _app(home) as app:
        with profiled("pending", profile):
            for _ in range(5):
                began = time.perf_counter()
                page = await state.pending(app, None, None, 20, None)
                first.append((time.perf_counter() - began) * 1000)
                began, seen, cursor = time.perf_counter(), 0, None
                while not seen or cursor:
                    page = await state.pending(app, None, None, 200, cursor)
                    seen, cursor = seen + len(page["requests"]), page.get("cursor")
                whole.append((time.perf_counter() - began) * 1000)
                if seen != runs:
                    raise RuntimeError(f"{seen} of {runs} requests were listed")
                began = time.perf_counter()
                with contextlib.closing(home.look()) as db:
                    db.execute("SELECT data FROM events WHERE type = 'request.opened'").fetchall()
                bare.append((time.perf_counter() - began) * 1000)
    page_ms, all_ms, floor_ms = median(first), median(whole), median(bare)
    return [
        Row(
            f"{runs:,} open requests listed",
            f"{all_ms:.1f} ms",
            f"{floor_ms:.1f} ms: their rows in SQL",
            f"{all_ms / floor_ms:.1f}x",
            "< 250 ms",
            all_ms < 250,
        ),
        Row("the first 20 of them", f"{page_ms:.1f} ms", aim="< 20 ms", met=page_ms < 20),
    ], home.pragmas


@contextlib.asynccontextmanager
async def _app(home: Home) -> AsyncIterator[App]:
    async with open_app(home.settings, "command") as app:
        yield app


async def _question(app: App, run_id: str, number: int) -> str:
    """The id of the question of this number, once the run waits for its answer."""
    run = await app.control.wait(run_id, GIVE_UP)
    for request in run.open_requests():
        if request.opened.prompt == f"question {number}":
            return request.opened.request_id
    raise RuntimeError(f"question {number} was not asked: {run.status} {run.error}")
