"""The cases of the crash matrix: a run, a fault, a recovery, and a judgement.

The boundaries are those of a run that nothing disturbs, as its processes tell of them while they commit. Events that
share a transaction share a boundary. Nothing here lists the events, so a new one gets its case by itself.
"""

from __future__ import annotations

import itertools
import os
import re
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
from clients import call, stop
from faults import Fault, Victim
from mcp import Client
from nursery import Child, Committed, Nursery
from shop import SLOW, TEA, WORKFLOW, Site, attend, begun

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.config import Settings
from mcp_flow.server import build
from mcp_flow.store import Store

E = TypeVar("E", bound=ev.Event)

FULL = os.environ.get("MCP_FLOW_TEST_MATRIX") == "full"
"""Whether everybody dies at every boundary; otherwise only the worker does, and the others at one of each kind."""
SIDE_BY_SIDE = 3
CASE_SECONDS = 60.0


@dataclass(frozen=True)
class Boundary:
    """Where a transaction ends: its last event, which of that label it is, and its kind."""

    event: str
    nth: int
    kind: str

    def fault(self, victim: Victim, when: Any) -> Fault:
        """The death of `victim` on one side of this boundary."""
        return Fault(victim, when, self.event, self.nth)


@dataclass(frozen=True)
class Witness:
    """What had happened when the fault struck: the last event in the journal, and the steps begun, if all were dead."""

    seq: int
    begun: Counter[str] | None = None


class Matrix:
    """One home folder, one site and one server that lives, on which cases are played."""

    def __init__(self, settings: Settings, site: Site, nursery: Nursery, client: Client, store: Store) -> None:
        self.settings = settings
        self.site = site
        self.nursery = nursery
        self.client = client
        self.store = store
        self._numbers = itertools.count(1)

    async def boundaries(self, *, paged: bool) -> list[Boundary]:
        """Where a run's worker commits."""
        run_id, input = self._new_run("undisturbed", paged)
        worker = await self.nursery.worker(self.settings, run_id)
        await attend(self.client, run_id, input)
        await self._end(run_id, paged, None, worker)
        return _boundaries(worker.commits)

    async def moves(self) -> list[Boundary]:
        """Where the server commits through which a run is seen to its end."""
        run_id, input = self._new_run("undisturbed", False)
        server = await self.nursery.agent(self.settings, run_id, **input)
        worker = await self.nursery.worker(self.settings, run_id)
        while not server.done.is_set():
            assert not server.dead.is_set(), server.error
            await anyio.sleep(0.01)
        await server.kill()
        await self._end(run_id, False, None, worker)
        return _boundaries(server.commits)

    async def play(self, faults: Iterable[Fault], *, paged: bool, side_by_side: int = SIDE_BY_SIDE) -> None:
        """Play a case for each fault. Those that fail do so together at the end, each with its run's journal."""
        faults = list(dict.fromkeys(faults))
        assert faults
        failures: dict[str, str] = {}
        room = anyio.Semaphore(side_by_side)

        async def one(fault: Fault) -> None:
            async with room:
                run_id, input = self._new_run(str(fault), paged)
                try:
                    with anyio.fail_after(CASE_SECONDS):
                        await self._case(fault, run_id, input)
                except Exception:
                    failures[str(fault)] = f"{traceback.format_exc()}\n{await self._story(run_id)}"
                finally:
                    await self.nursery.end(run_id)

        async with anyio.create_task_group() as group:
            for fault in faults:
                group.start_soon(one, fault)
        told = "\n\n".join(f"=== {name}\n{text}" for name, text in failures.items())
        assert not failures, f"{len(failures)} of {len(faults)} failed: {', '.join(failures)}\n\n{told}"
        print(f"{len(faults)} cases")

    # --- one case ---

    async def _case(self, fault: Fault, run_id: str, input: dict[str, Any]) -> None:
        if input["paged"]:
            await hosts.ensure(self.settings)
        play = {"worker": self._worker_dies, "host": self._host_dies, "all": self._all_die, "server": self._server_dies}
        witness, worker = await play[fault.victim](fault, run_id, input)
        await self._end(run_id, input["paged"], witness, worker)

    async def _worker_dies(self, fault: Fault, run_id: str, input: dict[str, Any]) -> tuple[Witness, Child]:
        worker = await self.nursery.worker(self.settings, run_id, fault)
        async with anyio.create_task_group() as group:
            group.start_soon(attend, self.client, run_id, input)
            witness = await self._death(fault, worker, run_id)
            follower = await self.nursery.worker(self.settings, run_id)
        return witness, follower

    async def _host_dies(self, fault: Fault, run_id: str, input: dict[str, Any]) -> tuple[Witness, Child]:
        worker = await self.nursery.worker(self.settings, run_id, fault)
        await attend(self.client, run_id, input)
        await worker.until_struck()
        assert (worker.struck, worker.dead.is_set()) == (str(fault), False), worker.error
        return Witness(worker.seq), worker

    async def _all_die(self, fault: Fault, run_id: str, input: dict[str, Any]) -> tuple[Witness, Child]:
        server = await self.nursery.agent(self.settings, run_id, **input)
        # The fault is the worker's, which takes the server and the browser host along.
        worker = await self.nursery.worker(self.settings, run_id, fault, others=(server.pid,))
        witness = await self._death(fault, worker, run_id)
        await server.dead.wait()
        follower = await self.nursery.worker(self.settings, run_id)
        await attend(self.client, run_id, input)
        return witness, follower

    async def _server_dies(self, fault: Fault, run_id: str, input: dict[str, Any]) -> tuple[None, Child]:
        worker = await self.nursery.worker(self.settings, run_id)
        server = await self.nursery.agent(self.settings, run_id, fault, **input)
        await server.dead.wait()
        assert server.struck == str(fault), server.error
        tool, arguments = server.calls[-1]
        # Its client does not know whether it was heard, and asks the next server the same again.
        assert (await call(self.client, tool, **arguments))["run_id"] == run_id
        await attend(self.client, run_id, input)
        return None, worker

    async def _death(self, fault: Fault, worker: Child, run_id: str) -> Witness:
        """Until the worker is dead; what had happened by then."""
        await worker.dead.wait()
        assert worker.struck == str(fault), f"struck: {worker.struck}\n{worker.error}"
        # Those who wait for the run would look for news by themselves, but only once a second.
        presence.ring(self.settings, run_id)
        return Witness(worker.seq, begun(self._trace(run_id)))

    async def _end(self, run_id: str, paged: bool, witness: Witness | None, worker: Child) -> None:
        """See that the finished run's page is closed, end its worker, and judge the run."""
        with anyio.fail_after(15):
            while (await self.store.run(run_id)).pages:
                await anyio.sleep(0.01)
        await worker.kill()
        await self.store.verify(run_id)
        journal = await self.store.events(run_id, 0, 10_000)
        Judgement(run_id, paged, journal, self.site.posted(run_id), begun(self._trace(run_id)), witness).pronounce()

    def _new_run(self, name: str, paged: bool) -> tuple[str, dict[str, Any]]:
        """An id that says what the run is for, and its input."""
        run_id = f"{re.sub(r'[^a-z.]+', '-', name)[:50]}-{next(self._numbers)}"
        return run_id, {"site": self.site.url, "trace": str(self._trace(run_id)), "paged": paged}

    def _trace(self, run_id: str) -> Path:
        return self.settings.workflows / f"{run_id}.begun"

    async def _story(self, run_id: str) -> str:
        """What became of a run, for whoever reads of a failure."""
        lines = [f"posted {dict(self.site.posted(run_id))}, begun {dict(begun(self._trace(run_id)))}"]
        lines += [f"{r.seq} {r.epoch} {r.event!r:.300}" for r in await self.store.events(run_id, 0, 10_000)]
        return "\n".join(lines)


@asynccontextmanager
async def open_matrix(folder: Path, site: Site, nursery: Nursery) -> AsyncIterator[Matrix]:
    """A matrix on a home folder of its own, and the end of all processes in it."""
    settings = config.load(home=folder / "home", workflows=folder / "workflows", worker_idle=600)
    settings.workflows.mkdir()
    (settings.workflows / "shop.py").write_text(WORKFLOW)
    async with Store(settings, "test") as store, Client(build(settings)) as client:
        # While this one lives no server starts a worker, and each case decides who executes its run.
        sentry = await nursery.worker(settings, "nobody")
        try:
            yield Matrix(settings, site, nursery, client, store)
        finally:
            with anyio.CancelScope(shield=True):
                await sentry.kill()
                await stop(settings)


@dataclass
class Judgement:
    """What must hold of a finished run, whatever befell it."""

    run_id: str
    paged: bool
    journal: Sequence[ev.Recorded]
    posted: Counter[str]
    begun: Counter[str]
    witness: Witness | None
    rebuilt: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.rebuilt = [
            r.seq for r in self.journal if isinstance(r.event, ev.PageAttached) and r.event.state == "restored"
        ]

    def pronounce(self) -> None:
        """Raise `AssertionError` at the first thing that does not hold."""
        self._everything_is_recorded_once()
        self._nothing_failed_but_what_was_to_fail()
        self._the_result_is_right()
        self._the_payment_was_made_once()
        self._only_what_was_in_flight_happened_twice()

    def _everything_is_recorded_once(self) -> None:
        for kind in (ev.StepFinished, ev.ValueRecorded, ev.Logged, ev.ProgressReported):
            keys = Counter((event.key, getattr(event, "generation", 0)) for _, event in self._of(kind))
            assert keys
            assert set(keys.values()) == {1}, f"{kind.type}: {keys}"
        kinds = Counter(event.kind for _, event in self._of(ev.RequestOpened) if event.kind != "in-doubt")
        assert kinds == {"input": 1, "approval": 1}
        answered = Counter(event.request_id for _, event in self._of(ev.RequestAnswered))
        assert set(answered.values()) == {1}
        assert [event.file for _, event in self._of(ev.ArtifactKept) if event.key] == ["receipt.txt"]
        assert len(list(self._of(ev.RunFinished))) == 1

    def _nothing_failed_but_what_was_to_fail(self) -> None:
        failed = {event.error.step for _, event in self._of(ev.RunFailed)}
        assert failed == {"frail"}, f"failed at {failed}"
        assert {event.key for _, event in self._of(ev.StepFailed)} == {"frail#1"}

    def _the_result_is_right(self) -> None:
        values = {event.key: event.value for _, event in self._of(ev.ValueRecorded)}
        [(_, finished)] = self._of(ev.RunFinished)
        seen = finished.output.pop("seen")
        assert finished.output == {
            "at": values["now#1"],
            "token": values["uuid#1"],
            "weighed": f"weigh {self.run_id}",
            "tea": TEA,
            "number": f"pay {self.run_id}",
        }
        if self.paged:
            self._the_page_was_right(*seen)

    def _the_page_was_right(self, path: str, cookies: list[str], name: str, half: int | None) -> None:
        """At its place and signed in. A half-filled form goes with its browser; a cookie outlives it from a stop on."""
        filled, seen = self._seq_of_end("fill"), self._seq_of_end("look")
        asked = next(seq for seq, _ in self._of(ev.RequestOpened))
        rebuilt = [seq for seq in self.rebuilt if filled < seq < seen]
        assert (path, name, half) == ("/cart", *(("", None) if rebuilt else ("Ada", 42)))
        if not rebuilt or (self.witness and asked <= self.witness.seq):
            assert cookies == ["cart=half", "who=ada"]
        else:
            # What a step has stored is kept beside the next steps, so the last of it may be lost with the browser.
            assert "who=ada" in cookies

    def _the_payment_was_made_once(self) -> None:
        assert self.posted["pay"] == 1, f"paid {self.posted['pay']} times"
        doubts = [seq for seq, event in self._of(ev.RequestOpened) if event.kind == "in-doubt"]
        if self.witness and self.witness.begun is not None:
            started = any(event.key == "pay#1" for seq, event in self._of(ev.StepStarted) if seq <= self.witness.seq)
            assert len(doubts) == (started and not self._had_finished("pay"))
        assert len(doubts) <= (self.witness is not None)

    def _only_what_was_in_flight_happened_twice(self) -> None:
        """Everything else happened once; but a step that restores the page does so whenever that is rebuilt."""
        steps = ("weigh", "wrap", "frail", "tell", *(("sign-in", "fill") if self.paged else ()))
        began = self.witness.begun if self.witness else Counter()
        in_flight = [what for what in steps if began is None or began[what]]
        in_flight = [what for what in in_flight if self.witness and not self._had_finished(what)]
        twice = []
        for what in steps:
            count = self.posted[what]
            if what == "sign-in" and self.witness and self._had_finished(what):
                count -= sum(seq > self.witness.seq for seq in self.rebuilt)
            if count == 2 and what in in_flight:
                twice.append(what)
            else:
                assert count == 1, f"{what} happened {count} times; in flight: {in_flight}"
        assert len(twice if began is None else in_flight) <= 1, f"in flight: {in_flight}, done twice: {twice}"
        if began is not None and self.witness:
            assert all(self.begun[what] == 2 for what in in_flight if what != "frail")

    def _had_finished(self, what: str) -> bool:
        """Whether a step's end was in the journal when the fault struck."""
        return self.witness is not None and self._seq_of_end(what) <= self.witness.seq

    def _seq_of_end(self, what: str) -> int:
        return next(seq for seq, event in self._of(ev.StepFinished) if event.key == f"{what}#1")

    def _of(self, kind: type[E]) -> Iterator[tuple[int, E]]:
        return ((r.seq, r.event) for r in self.journal if isinstance(r.event, kind))


def _boundaries(commits: Sequence[Sequence[Committed]]) -> list[Boundary]:
    met: Counter[str] = Counter()
    found = []
    for events in commits:
        met.update(event.label for event in events)
        last = events[-1]
        # What a stop leaves is kept only if nobody has answered by then.
        if last.label.startswith("artifact.kept stop-"):
            continue
        # Whether a plain step's start is a transaction of its own is a matter of time; that of a slow one always is.
        if last.kind not in ("step.started plain", "step.started restore") or last.label == f"step.started {SLOW}#1":
            found.append(Boundary(last.label, met[last.label], last.kind))
    return found


def one_of_each_kind(boundaries: Sequence[Boundary]) -> list[Boundary]:
    """A boundary of each kind, in the time in which the run has its page rather than before or after it."""
    labels = [boundary.event for boundary in boundaries]
    span = range(labels.index("page.opened main"), labels.index("step.finished look#1"))
    chosen: dict[str, Boundary] = {}
    for place in sorted(range(len(boundaries)), key=lambda place: (place not in span, -place)):
        chosen.setdefault(boundaries[place].kind, boundaries[place])
    return [boundary for boundary in boundaries if boundary in chosen.values()]
