"""Faults by name, planted in a process before it enters the product's code.

A name says who dies, on which side of the COMMIT of which event, and of which of several that read the same:

    worker before step.finished pay#1      between the effect and its record
    host after page.opened main
    all before attempt.idled (2)

The one seam is `_Connection.commit`, through which every write transaction of a process ends. What the transaction
has appended is read from the database itself, so nothing in the product knows of faults and no time plays a part.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.config import Settings
from mcp_flow.run import Run
from mcp_flow.store import _Connection

Victim = Literal["worker", "server", "host", "all"]
When = Literal["before", "after"]
Deed = Literal["kill", "stop"]
Report = Callable[..., None]

_NAME = re.compile(rf"({'|'.join(get_args(Victim))}) (before|after) (.+?)(?: \((\d+)\))?")


@dataclass(frozen=True)
class Fault:
    """A death at an event's boundary; `str` gives its name, `named` reads it."""

    victim: Victim
    when: When
    event: str
    nth: int = 1

    @classmethod
    def named(cls, name: str) -> Fault:
        """The fault of this name."""
        match = _NAME.fullmatch(name)
        assert match, f"{name!r} names no fault"
        return cls(cast(Victim, match[1]), cast(When, match[2]), match[3], int(match[4] or 1))

    def __str__(self) -> str:
        return f"{self.victim} {self.when} {self.event}" + (f" ({self.nth})" if self.nth > 1 else "")


@dataclass(frozen=True)
class Appended:
    """An event that a transaction is about to commit: what tells it from others of its run, and what sort it is of."""

    run_id: str
    seq: int
    label: str
    kind: str


def plant(
    settings: Settings, run_id: str, fault: Fault | None, others: Sequence[int], deed: Deed, tell: Report
) -> None:
    """From here on tell what this process commits of a run, and let the fault strike when its time has come.

    The victims `worker` and `server` are this very process, `all` are it, the browser host and the processes `others`.
    With the deed `stop` a victim is not killed but stands still, until it is told to go on.
    """
    met: Counter[str] = Counter()

    def before(appended: list[Appended]) -> bool:
        met.update(event.label for event in appended)
        tell(commit=[[event.seq, event.label, event.kind] for event in appended])
        due = fault and any(event.label == fault.event and met[event.label] == fault.nth for event in appended)
        if fault and due and fault.when == "before":
            strike(appended[0].seq - 1)
        return bool(due)

    def after(appended: list[Appended], due: bool) -> None:
        if fault and due and fault.when == "after":
            strike(appended[-1].seq)

    def strike(seq: int) -> None:
        assert fault
        tell(struck=str(fault), seq=seq)
        if fault.victim == "all":
            for pid in others:
                os.kill(pid, signal.SIGKILL)
        if fault.victim in ("host", "all"):
            _kill_hosts(settings)
        if fault.victim != "host":
            os.kill(os.getpid(), signal.SIGKILL if deed == "kill" else signal.SIGSTOP)

    commit = _Connection.commit

    def watched(connection: _Connection) -> None:
        appended = [event for event in _appended(connection) if event.run_id == run_id]
        if not appended:
            commit(connection)
            return
        due = before(appended)
        commit(connection)
        after(appended, due)

    setattr(_Connection, "commit", watched)  # noqa: B010


def _appended(connection: _Connection) -> list[Appended]:
    """What the open transaction has put into journals."""
    found = []
    for run_id, before in connection.transaction._touched.items():
        run = connection.transaction.fold(run_id)[2]
        rows = connection.execute(
            "SELECT e.seq, e.type, e.data FROM events e JOIN journals j ON j.no = e.run"
            " WHERE j.run_id = ? AND e.seq > ? ORDER BY e.seq",
            (run_id, before),
        )
        for seq, type_, data in rows.fetchall():
            event = ev.decode(type_, data)
            found.append(Appended(run_id, seq, f"{type_} {_subject(run, event)}".rstrip(), _kind(run, event)))
    return found


def _subject(run: Run, event: Any) -> str:
    """What an event is about, in words that are the same in every run of a workflow."""
    if (request_id := getattr(event, "request_id", None)) is not None:
        return run.requests[request_id].opened.key
    names = ("key", "name", "what", "file", "state")
    return next((str(value) for name in names if (value := getattr(event, name, None))), "")


def _kind(run: Run, event: ev.Event) -> str:
    """The sort of an event: its type, and whether a step may be repeated. Remarks are all of one sort."""
    if isinstance(event, ev.ValueRecorded | ev.Logged | ev.ProgressReported | ev.ArtifactKept):
        return "remark"
    if isinstance(event, ev.OfStep):
        step = run.steps[event.key]
        return f"{event.type} {'once' if step.once else 'restore' if step.restore else 'plain'}"
    return event.type


def _kill_hosts(settings: Settings) -> None:
    """Kill the browser host, and return when neither it nor its endpoint answers any more."""
    found = hosts.living(settings)
    for host in found:
        os.kill(host.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while hosts.living(settings) or any(_answers(host.endpoint) for host in found):
        assert time.monotonic() < deadline, "the browser host does not die"


def _answers(endpoint: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(endpoint)
        except OSError:
            return False
    return True
