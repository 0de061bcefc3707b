"""Runs on a home folder of their own: workflows written as source, moved by `Control`, executed by a real worker.

A worker is a task of the test's own loop where that is enough, and a process where it is to be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import textwrap
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import anyio
import anyio.to_thread

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.browser import host as hosts
from mcp_flow.catalog import Reader
from mcp_flow.channel import Channel
from mcp_flow.config import Settings
from mcp_flow.control import ENDED, Control
from mcp_flow.run import Request, Run
from mcp_flow.store import Store
from mcp_flow.worker import Worker

E = TypeVar("E", bound=ev.Event)

AGENT = Channel()
PERSON = Channel(by="person", via="terminal", human=True)

PREAMBLE = '''\
import asyncio, dataclasses, functools, os, threading, time
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from pydantic import BaseModel
from mcp_flow import Decision, Denied, Flow, FlowError, Retriable, workflow

HERE = Path(__file__).with_suffix("")

def did(what):
    """Leave a trace outside of the journal: an effect."""
    HERE.mkdir(exist_ok=True)
    with open(HERE / "did", "a") as file:
        file.write(f"{what}\\n")
    return what

def is_open(gate):
    return (HERE / gate).exists()

async def until_open(gate):
    while not is_open(gate):
        await asyncio.sleep(0.005)

'''
"""What every workflow of these tests begins with."""


class House:
    """One home folder: its files, its moves from outside, and the workers that execute its runs."""

    def __init__(self, settings: Settings, store: Store, reader: Reader, bell: presence.Doorbell) -> None:
        self.settings = settings
        self.store = store
        self.bell = bell
        self.control = Control(settings, store, reader, bell)
        self.file = settings.workflows / "flow.py"
        self._clock = store.now
        self._worker: tuple[Worker, asyncio.Task[None]] | None = None

    # --- the workflow of the present test ---

    def begin(self, name: str) -> None:
        """Give the test a workflow file of its own."""
        self.file = self.settings.workflows / f"{name}.py"

    def write(self, source: str) -> None:
        """Write the test's workflow file."""
        self.settings.workflows.mkdir(parents=True, exist_ok=True)
        self.file.write_text(PREAMBLE + textwrap.dedent(source))

    def edit(self, old: str, new: str) -> None:
        """Change the test's workflow file, as someone who repairs it would."""
        source = self.file.read_text()
        assert old in source
        self.file.write_text(source.replace(old, new))

    def line_of(self, text: str) -> int:
        """The line of the workflow file in which `text` stands."""
        return next(n for n, line in enumerate(self.file.read_text().splitlines(), 1) if text in line)

    def open(self, gate: str) -> None:
        """Let code that waits in `until_open(gate)` go on."""
        self.file.with_suffix("").mkdir(exist_ok=True)
        (self.file.with_suffix("") / gate).touch()

    def did(self) -> list[str]:
        """The effects that the workflow had, in order."""
        path = self.file.with_suffix("") / "did"
        return path.read_text().splitlines() if path.exists() else []

    # --- moves ---

    async def start(self, source: str, input: Any = None, **options: Any) -> str:
        """Write `source`, whose workflow is named `flow`, and start a run of it."""
        self.write(source)
        return await self.again(input, **options)

    async def again(self, input: Any = None, **options: Any) -> str:
        """Start a run of the file as it is."""
        return await self.control.start(f"{self.file.stem}:main", {} if input is None else input, **options)

    async def resume(self, run_id: str, **options: Any) -> str | None:
        """Resume, as an agent."""
        if "value" in options:
            options["has_value"] = True
        return await self.control.resume(run_id, AGENT, **options)

    async def approve(self, request: Request, *, note: str | None = None, deny: bool = False) -> None:
        """Decide an approval, as an agent."""
        await self.control.approve(request.opened.request_id, AGENT, "deny" if deny else "approve", note)

    # --- watching ---

    async def until(self, run_id: str, *statuses: str, seconds: float = 15) -> Run:
        """The run once it has one of these statuses; a run that ended otherwise fails the test at once."""
        try:
            with anyio.fail_after(seconds):
                while True:
                    rings = self.bell.rings
                    run = await self.control.wait(run_id, 0)
                    if run.status in statuses:
                        return run
                    assert run.status not in ENDED, await self.story(run_id)
                    await self.bell.next_ring(0.05, rings)
        except TimeoutError:
            raise AssertionError(f"never {' or '.join(statuses)}\n{await self.story(run_id)}") from None

    async def finished(self, run_id: str, seconds: float = 15) -> Any:
        """The output of the run, once it has finished; a failure fails the test at once."""
        run = await self.until(run_id, "finished", "failed", seconds=seconds)
        assert run.status == "finished", await self.story(run_id)
        return run.output

    async def waiting(self, run_id: str, *statuses: str) -> Request:
        """The one request that the run waits for, once it waits for it."""
        run = await self.until(run_id, *statuses)
        [request] = run.open_requests()
        return request

    async def event(self, run_id: str, kind: type[E], such: Callable[[E], bool] = lambda _: True) -> E:
        """The first event of this kind, once it is in the journal."""
        try:
            with anyio.fail_after(15):
                while True:
                    for event in await self.events(run_id, kind):
                        if such(event):
                            return event
                    await self.bell.next_ring(0.05)
        except TimeoutError:
            raise AssertionError(f"no {kind.type}\n{await self.story(run_id)}") from None

    async def events(self, run_id: str, kind: type[E]) -> list[E]:
        """All events of this kind so far."""
        journal = await self.control.events(run_id, 0, 10_000)
        return [recorded.event for recorded in journal if isinstance(recorded.event, kind)]

    async def story(self, run_id: str) -> str:
        """The journal as text, for whoever reads a failure."""
        journal = await self.control.events(run_id, 0, 10_000)
        run = await self.store.run(run_id)
        return "\n".join([f"{run.status} {run.error}", *(f"{r.seq} {r.epoch} {r.event!r}" for r in journal)])

    # --- workers ---

    def work(self, **settings: Any) -> asyncio.Task[None]:
        """Start a worker in this loop, unless one lives; its task ends when the worker has left."""
        if self._worker is None or self._worker[1].done():
            ready = asyncio.Event()
            store = Store(self.settings, "worker", now=self._clock, at_once=True)
            worker = Worker(dataclasses.replace(self.settings, **settings), store)

            async def serve() -> None:
                async with store:
                    await worker.serve(ready.set)

            self._worker = worker, asyncio.create_task(serve(), name="worker")
        return self._worker[1]

    async def working(self, **settings: Any) -> None:
        """`work`, and return once others can see it."""
        task = self.work(**settings)
        with anyio.fail_after(10):
            while not presence.living(self.settings) and not task.done():
                await self.bell.next_ring(0.005)

    async def stop_working(self) -> None:
        """Tell the worker of this loop to stop, and wait until it has."""
        if self._worker:
            worker, task = self._worker
            worker.stop()
            self._worker = None
            with anyio.fail_after(20):
                await task

    def detached(self) -> list[int]:
        """The process ids of the workers that are processes of their own."""
        pids = []
        for path in (self.settings.home / "workers").glob("*.lock"):
            if presence.is_alive(self.settings, path.stem) and int(path.read_text()) != os.getpid():
                pids.append(int(path.read_text()))
        return pids

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the detached worker, and wait until it is gone."""
        [pid] = self.detached()
        os.kill(pid, number)
        with anyio.fail_after(20):
            while self.detached():
                await self.bell.next_ring(0.01)

    async def tidy(self) -> None:
        """End what the test has left running, and see that every journal holds."""
        for row in await self.control.runs([], None, None, 200, None):
            await self.store.verify(row.run_id)
            if row.status not in ENDED:
                await self.control.cancel(row.run_id, AGENT, "the test is over")

    async def close(self) -> None:
        """End every process of the home folder."""
        with anyio.CancelScope(shield=True):
            await self.stop_working()
            await anyio.to_thread.run_sync(presence.stop_workers, self.settings)
            await hosts.stop(self.settings)


@contextlib.asynccontextmanager
async def open_house(settings: Settings, now: Callable[[], Any] | None = None) -> AsyncIterator[House]:
    """A house, and the end of everything in it."""
    async with Store(settings, "test", now=now) as store, Reader(settings) as reader:
        bell = presence.Doorbell(settings)
        house = House(settings, store, reader, bell)
        try:
            yield house
        finally:
            await house.close()
            bell.close()


@contextlib.asynccontextmanager
async def visit(house: House, name: str) -> AsyncIterator[House]:
    """A house that several tests share, with a worker and a workflow file for this one."""
    house.begin(re.sub(r"\W", "_", name)[:50] + f"_{zlib.crc32(name.encode()):x}")
    await house.working()
    yield house
    await house.tidy()
