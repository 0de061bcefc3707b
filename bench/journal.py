"""What a durable step costs: the store and the worker in this process, beside the bare database."""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import pstats
import shutil
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.commits import CommitThread
from mcp_flow.config import Settings
from mcp_flow.revisions import capture
from mcp_flow.store import Store
from mcp_flow.worker import Worker

WORKFLOWS = Path(__file__).resolve().parent / "workflows"
GIVE_UP = 120.0


@dataclass
class Row:
    """A line of the table. `met` is None where there is no aim."""

    what: str
    measured: str
    floor: str = ""
    ratio: str = ""
    aim: str = ""
    met: bool | None = None


class TimedStore(Store):
    """A store that notes when the last claim that got something began and ended, and the load after it."""

    claim_began = claim_ended = loaded = 0.0

    async def claim(self, *given: Any, **more: Any) -> list[tuple[str, int]]:
        began = time.perf_counter()
        claimed = await super().claim(*given, **more)
        if claimed:
            self.claim_began, self.claim_ended, self.loaded = self.claim_began or began, time.perf_counter(), 0.0
        return claimed

    async def run(self, run_id: str) -> Any:
        run = await super().run(run_id)
        self.loaded = self.loaded or time.perf_counter()
        return run


class Home:
    """A fresh home folder, whose runs are made here and executed by a worker of this process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.settings: Settings = config.load(home=folder / name, workflows=WORKFLOWS)
        self.pragmas: dict[str, Any] = {}

    async def create(self, function: str, run_ids: Iterable[str], **input: Any) -> None:
        """Journal runs that wait for a worker, as a server would."""
        revision = capture(WORKFLOWS, "measured.py")
        created = ev.RunCreated(
            workflow=function,
            function=function,
            root=revision.root,
            entry=revision.entry,
            revision=revision.hash,
            input=input,
        )
        async with Store(self.settings, "command") as store:
            self.pragmas = await store.pragmas()
            await store.save_revision(revision.hash, revision.entry, revision.files)
            await asyncio.gather(*(store.create(run_id, created) for run_id in run_ids))

    @contextlib.asynccontextmanager
    async def worker(self, now: Callable[[], datetime] | None = None) -> AsyncIterator[TimedStore]:
        """A worker with a store of its own, and a clock if one is given; it is gone when this is left."""
        async with TimedStore(self.settings, "worker", now=now, at_once=True) as store:
            ready = asyncio.Event()
            task = asyncio.create_task(Worker(self.settings, store).serve(ready.set))
            try:
                yield store
            finally:
                if ready.is_set() and not task.done():
                    signal.raise_signal(signal.SIGTERM)
                await task

    async def until(self, status: str, count: int) -> None:
        """Wait until so many runs have this status, looking from outside the store."""
        deadline = time.perf_counter() + GIVE_UP
        with contextlib.closing(self.look()) as db:
            while True:
                found = dict(db.execute("SELECT status, count(*) FROM run_rows GROUP BY status").fetchall())
                if found.get(status, 0) == count:
                    return
                if found.get("failed") or time.perf_counter() > deadline:
                    why = db.execute("SELECT why FROM run_rows WHERE why NOT NULL LIMIT 1").fetchone()
                    raise RuntimeError(f"{count} runs should be {status}; they are {found}: {why}")
                await asyncio.sleep(0.05)

    async def outputs(self, run_ids: Iterable[str]) -> list[list[float]]:
        """What the runs returned."""
        async with Store(self.settings, "command") as store:
            return [(await store.run(run_id)).output for run_id in run_ids]

    def look(self) -> sqlite3.Connection:
        """A connection that reads the database beside the store."""
        return sqlite3.connect(f"file:{self.settings.database}?mode=ro", uri=True)

    def size(self) -> int:
        """Bytes of the database once everything in the log is in its file."""
        with contextlib.closing(sqlite3.connect(self.settings.database)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return self.settings.database.stat().st_size

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.settings.home)


@contextlib.contextmanager
def profiled(what: str, wanted: bool) -> Iterator[None]:
    """Profile this thread and the store's, and print where the time went."""
    if not wanted:
        yield
        return
    loop, store, work = cProfile.Profile(), cProfile.Profile(), CommitThread._work

    def profiled_work(thread: CommitThread) -> None:
        with contextlib.suppress(ValueError):  # another store's thread is being profiled already
            store.enable()
        try:
            work(thread)
        finally:
            store.disable()

    CommitThread._work = profiled_work  # type: ignore[method-assign]
    loop.enable()
    try:
        yield
    finally:
        loop.disable()
        CommitThread._work = work  # type: ignore[method-assign]
        for name, profile in (("event loop", loop), ("store's thread", store)):
            print(f"\n--- {what}: {name} ---")
            pstats.Stats(profile).strip_dirs().sort_stats("tottime").print_stats(25)


async def bench_steps(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Sequential steps, and the last against the first of them."""
    steps, rounds = (200, 1) if quick else (1000, 5)
    means, medians, floors, drifts = [], [], [], []
    home = Home(folder, "steps")
    for number in range(rounds):
        home = Home(folder, f"steps-{number}")
        await home.create("sequential", ["one"], steps=steps)
        with profiled("sequential steps", profile and number == rounds - 1):
            async with home.worker():
                await home.until("finished", 1)
        (times,) = await home.outputs(["one"])
        taken = [(after - before) * 1000 for before, after in pairwise(times)]
        tenth = steps // 10
        means.append((times[-1] - times[0]) * 1000 / steps)
        medians.append(median(taken))
        drifts.append(sum(taken[-tenth:]) / sum(taken[:tenth]))
        floors.append(floor(home, steps, "step 99#1"))
        home.remove()
    ratio = median(mean / bare for mean, bare in zip(means, floors, strict=True))
    mean, bare, drift = median(means), median(floors), median(drifts)
    return [
        Row(
            f"durable step, {steps:,} in sequence",
            f"{mean:.3f} ms (median step {median(medians):.3f}; rounds {min(means):.3f} to {max(means):.3f})",
            f"{bare:.3f} ms: one INSERT and COMMIT",
            f"{ratio:.2f}x",
            "< 0.35 ms and < 3x",
            mean < 0.35 and ratio < 3,
        ),
        Row("last tenth of them against the first", f"{drift:.2f}x", aim="< 1.2x", met=drift < 1.2),
    ], home.pragmas


def floor(home: Home, inserts: int, key: str) -> float:
    """Milliseconds for one raw INSERT and commit of this key's events' bytes, in the mode and folder of this store."""
    with contextlib.closing(home.look()) as db:
        size = db.execute(
            "SELECT sum(length(at) + length(type) + length(data) + length(hash)) FROM events WHERE data ->> 'key' = ?",
            (key,),
        ).fetchone()[0]
    path = home.settings.home / "floor.db"
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for name in ("journal_mode", "synchronous", "wal_autocheckpoint"):
            db.execute(f"PRAGMA {name} = {home.pragmas[name]}")
        db.execute("CREATE TABLE floor (no INTEGER PRIMARY KEY, bytes BLOB)")
        row = (b"x" * size,)
        began = time.perf_counter()
        for _ in range(inserts):
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO floor (bytes) VALUES (?)", row)
            db.execute("COMMIT")
        return (time.perf_counter() - began) * 1000 / inserts


async def bench_replay(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """A second attempt that finds every step finished; and what the steps weigh."""
    steps, rounds = (200, 1) if quick else (1000, 5)
    totals, parts, weights = [], [], []
    home = Home(folder, "replay")
    for number in range(rounds):
        home = Home(folder, f"replay-{number}")
        await home.create("interrupted", ["one"], steps=steps)
        before = home.size()
        async with home.worker():
            await home.until("paused", 1)
        weights.append((home.size() - before) / steps)
        async with Store(home.settings, "command") as store:
            (request,) = (await store.run("one")).open_requests()
            answer = ev.RequestAnswered(request_id=request.opened.request_id, value=None, by="agent", via="tool")
            await store.append("one", answer)
        with profiled("replay", profile and number == rounds - 1):
            async with home.worker() as store:
                await home.until("finished", 1)
        ((began, passed),) = await home.outputs(["one"])
        marks = [store.claim_began, store.claim_ended, store.loaded, began, passed]
        totals.append((passed - store.claim_began) * 1000)
        parts.append([(after - before) * 1000 for before, after in pairwise(marks)])
        home.remove()
    total, weight = median(totals), median(weights)
    claim, load, begin, pass_ = (median(column) for column in zip(*parts, strict=True))
    return [
        Row(
            f"replay of {steps:,} finished steps",
            f"{total:.1f} ms (claim {claim:.1f}, load {load:.1f}, begin {begin:.1f}, pass {pass_:.1f})",
            aim="< 50 ms",
            met=total < 50,
        ),
        Row("database a step, checkpointed", f"{weight:,.0f} bytes", aim="< 1,024 bytes", met=weight < 1024),
    ], home.pragmas


async def bench_concurrent(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """Many runs in one worker: from a barrier to the last step, and from the first claim to the last journaled end."""
    runs, steps, rounds = (20, 10, 1) if quick else (100, 20, 5)
    names = [f"run-{number}" for number in range(runs)]
    together, whole = [], []
    home = Home(folder, "crowd")
    for number in range(rounds):
        home = Home(folder, f"crowd-{number}")
        await home.create("crowd", names, steps=steps, parties=runs)
        with profiled("concurrent runs", profile and number == rounds - 1):
            async with home.worker():
                await home.until("finished", runs)
        outputs = await home.outputs(names)
        together.append(runs * steps / (max(end for _, end in outputs) - min(began for began, _ in outputs)))
        home.remove()

        home = Home(folder, f"crowd-whole-{number}")
        await home.create("crowd", names, steps=steps, parties=0)
        async with home.worker() as store:
            ahead = time.time() - time.perf_counter()
            await home.until("finished", runs)
        whole.append(runs * steps / (_last_end(home) - ahead - store.claim_began))
        home.remove()
    rate, rate_whole = median(together), median(whole)
    return [
        Row(
            f"{runs} concurrent runs of {steps} steps",
            f"{rate:,.0f} steps/s (rounds {min(together):,.0f} to {max(together):,.0f})",
            aim="> 5,000 steps/s",
            met=rate > 5000,
        ),
        Row("the same from claim to journaled end", f"{rate_whole:,.0f} steps/s"),
    ], home.pragmas


def _last_end(home: Home) -> float:
    """When the last run's end was journaled, in seconds of `time.time`."""
    with contextlib.closing(home.look()) as db:
        (at,) = db.execute("SELECT max(at) FROM events WHERE type = 'run.finished'").fetchone()
    return datetime.fromisoformat(at).timestamp()
