"""Processes of the product within 30 ms: forked from one that has imported everything, each with a fault planted.

A child's socket is its sign of life. It carries lines of JSON (ready, what is committed, which fault strikes, which
call is made), and its end is the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import socket
import threading
import traceback
from functools import partial
from typing import Any

import anyio
from faults import Deed, Fault, plant
from forks import Forking

from mcp_flow.config import Settings, load, private_folder

PRELOADED = ("playwright.async_api", "mcp_flow.worker", "mcp_flow.server", "mcp_flow.app", "mcp", "shop")


@dataclasses.dataclass(frozen=True)
class Committed:
    """An event of the run that a child has committed, or was about to."""

    seq: int
    label: str
    kind: str


class Child:
    """A forked process as its parent knows it."""

    def __init__(self, run_id: str, connection: socket.socket) -> None:
        self.run_id = run_id
        self._connection = connection
        self.pid = 0
        self.ready = asyncio.Event()
        self.dead = asyncio.Event()
        self.done = asyncio.Event()
        """Set when an agent has seen its run to the end."""
        self.commits: list[list[Committed]] = []
        self.struck: str | None = None
        self.seq = 0
        """The last event in the journal when the fault struck."""
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error: str | None = None
        self._news = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        reader, writer = await asyncio.open_connection(sock=self._connection, limit=1 << 20)
        with contextlib.suppress(ConnectionResetError):
            async for line in reader:
                self._hear(json.loads(line))
        self.dead.set()
        self.ready.set()
        self._news.set()
        writer.close()

    def _hear(self, said: dict[str, Any]) -> None:
        match said:
            case {"pid": pid}:
                self.pid = pid
            case {"ready": _}:
                self.ready.set()
            case {"done": _}:
                self.done.set()
            case {"commit": events}:
                self.commits.append([Committed(*event) for event in events])
            case {"struck": name, "seq": seq}:
                self.struck, self.seq = name, seq
            case {"call": [tool, arguments]}:
                self.calls.append((tool, arguments))
            case {"error": text}:
                self.error = text
        self._news.set()

    async def until_struck(self) -> None:
        """Return when the fault strikes, or the process has ended without it."""
        while self.struck is None and not self.dead.is_set():
            await self._news.wait()
            self._news.clear()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process still lives."""
        if not self.dead.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Kill the process and return when it is gone."""
        self.signal(signal.SIGKILL)
        with anyio.fail_after(10):
            await self.dead.wait()


class Nursery(Forking):
    """Where children come from; a context manager. Those that are left are killed at its end."""

    def __init__(self) -> None:
        super().__init__("nursery")
        self._children: list[Child] = []

    async def worker(
        self,
        settings: Settings,
        run_id: str,
        fault: Fault | None = None,
        *,
        others: tuple[int, ...] = (),
        deed: Deed = "kill",
        worker_id: str | None = None,
        only: bool = True,
    ) -> Child:
        """A worker that can be found by others; with `only` it takes no run but this."""
        return await self._start(
            "work", settings, run_id, fault, others, deed, worker_id=worker_id, only=run_id if only else None
        )

    async def agent(self, settings: Settings, run_id: str, fault: Fault | None = None, **input: Any) -> Child:
        """A server and the agent that is its client, who sees the run to its end."""
        return await self._start("attend", settings, run_id, fault, (), "kill", input=input)

    async def end(self, run_id: str) -> None:
        """Kill the children that are there for this run."""
        for child in self._children:
            if child.run_id == run_id:
                await child.kill()
        self._children = [child for child in self._children if child.run_id != run_id]

    async def _start(
        self,
        entry: str,
        settings: Settings,
        run_id: str,
        fault: Fault | None,
        others: tuple[int, ...],
        deed: Deed,
        **arguments: Any,
    ) -> Child:
        ours, theirs = socket.socketpair()
        request = {
            "entry": entry,
            "environment": settings.environment(),
            "run_id": run_id,
            "fault": fault and dataclasses.astuple(fault),
            "others": others,
            "deed": deed,
            "arguments": arguments,
        }
        ours.sendall(json.dumps(request).encode() + b"\n")
        ours.setblocking(False)
        with theirs:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        child = Child(run_id, ours)
        self._children.append(child)
        with anyio.fail_after(30):
            await child.ready.wait()
        assert not child.dead.is_set(), f"the {entry} process ended at its start: {child.error}"
        return child


# --- the other side ---


def serve(_: list[str]) -> None:
    """Fork for every request until stdin ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    control = socket.socket(fileno=os.dup(0))
    children: set[int] = set()
    while True:
        word, handles, _, _ = socket.recv_fds(control, 1, 1)
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
        if not word:
            break
        connection = socket.socket(fileno=handles[0])
        pid = os.fork()
        if pid == 0:
            control.close()
            with connection.makefile("rb") as lines:
                _live(connection, json.loads(lines.readline()))
        connection.close()
        children.add(pid)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _live(connection: socket.socket, request: dict[str, Any]) -> None:
    """What a child does from its fork to its end."""

    def tell(**said: Any) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(said).encode() + b"\n")

    status = 1
    try:
        os.setsid()
        os.environ.update(request["environment"])
        settings = load()
        log = os.open(
            private_folder(settings.home / "logs") / "crash.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
        )
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        threading.Thread(target=_end_with_parent, args=[connection], daemon=True).start()
        tell(pid=os.getpid())
        fault = Fault(*request["fault"]) if request["fault"] else None
        plant(settings, request["run_id"], fault, request["others"], request["deed"], tell)
        entries = {"work": _work, "attend": _attend}
        body = partial(entries[request["entry"]], settings, request["run_id"], tell)
        anyio.run(partial(body, **request["arguments"]))
        status = 0
    except BaseException:  # the boundary of a process: its parent gets to know
        tell(error=traceback.format_exc())
    finally:
        os._exit(status)


def _end_with_parent(connection: socket.socket) -> None:
    """End this process when the one that asked for it is gone, however that came about."""
    with contextlib.suppress(OSError):
        connection.recv(1)
    os._exit(1)


async def _work(settings: Settings, run_id: str, tell: Any, worker_id: str | None, only: str | None) -> None:
    from mcp_flow.store import Store
    from mcp_flow.worker import Worker, log_to_stderr

    log_to_stderr(settings)
    async with Store(settings, "worker", at_once=True) as store:
        await Worker(settings, store, worker_id, only=only).serve(partial(tell, ready=True))


async def _attend(settings: Settings, run_id: str, tell: Any, input: dict[str, Any]) -> None:
    from mcp import Client
    from shop import attend

    from mcp_flow.server import build

    async with Client(build(settings)) as client:
        tell(ready=True)
        await attend(client, run_id, input, lambda tool, arguments: tell(call=[tool, arguments]))
        tell(done=True)
        await anyio.sleep_forever()
