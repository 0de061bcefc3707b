"""What a run is: the fold of its events, which event may follow, and what its status means. Pure.

`Run` is advanced in place, event by event, because copying a thousand steps for each event would make a run
quadratic. Whoever holds a `Run` advances it or only reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import Any, Literal

from mcp_flow import events as ev
from mcp_flow.errors import IllegalEvent, LeaseLost

Status = Literal[
    "queued",
    "running",
    "paused",
    "waiting-input",
    "waiting-approval",
    "waiting-event",
    "waiting-timer",
    "in-doubt",
    "hijacked",
    "failed",
    "finished",
    "cancelled",
    "continued",
]
TERMINAL: frozenset[Status] = frozenset({"finished", "cancelled", "continued"})

# The status of a run whose branches all wait: the first kind that holds. `failed` and `hijacked` are no
# requests; their places among these are in `Run.status`.
_WAITING: tuple[tuple[ev.RequestKind, Status], ...] = (
    ("approval", "waiting-approval"),
    ("input", "waiting-input"),
    ("pause", "paused"),
    ("event", "waiting-event"),
    ("timer", "waiting-timer"),
    ("takeover", "paused"),
)

_AFTER_END: frozenset[type[ev.Event]] = frozenset(
    (
        ev.RunClaimed,
        ev.RunReleased,
        ev.RunOrphaned,
        ev.WorkerBlocked,
        ev.PageClosed,
        ev.PageObserved,
        ev.PageEvaluated,
        ev.PageActed,
        ev.ArtifactKept,
    )
)
_OWNERS_ONLY: frozenset[type[ev.Event]] = frozenset(
    (
        ev.RunReleased,
        ev.RunParked,
        ev.AttemptStarted,
        ev.AttemptIdled,
        ev.AttemptCompared,
        ev.RunFailed,
        ev.RunFinished,
        ev.StepStarted,
        ev.StepFinished,
        ev.StepFailed,
        ev.StepNondeterministic,
        ev.ValueRecorded,
        ev.RequestOpened,
        ev.PageOpened,
        ev.PageAttached,
        ev.PageLost,
        ev.Logged,
        ev.ProgressReported,
    )
)


@dataclass(slots=True)
class Step:
    """A step, or a fixed value, as the journal has it in its present generation."""

    key: str
    first_seq: int
    generation: int = 0
    status: Literal["started", "finished", "failed", "reset"] = "started"
    fingerprint: str = ""
    tries: int = 0
    once: bool = False
    restore: bool = False
    effect_free: bool = False
    doubted: bool = False
    value: Any = None
    error: ev.Failure | None = None
    url: str | None = None
    code: str = ""
    ms: float = 0.0
    revision: str = ""
    started_at: str = ""
    finished_seq: int = 0

    @property
    def in_doubt(self) -> bool:
        """Whether it may have had its effect without a record of its end."""
        return self.once and (self.status == "started" or (self.status == "failed" and not self.effect_free))


# By position, because `copy` takes four times as long, and a run may have thousands.
_fields_of = attrgetter(*(field.name for field in fields(Step)))


@dataclass(slots=True)
class Request:
    """Something the run waits for, or waited for."""

    opened: ev.RequestOpened
    seq: int
    at: str
    status: Literal["open", "answered", "expired", "withdrawn"] = "open"
    settled_seq: int = 0
    value: Any = None
    note: str | None = None
    by: str | None = None
    via: str | None = None
    event_key: str | None = None
    """The key of the event that answered."""


@dataclass(slots=True)
class Hijack:
    """Who has, or is about to have, the page; `stopped` says where the code stands once it does."""

    requested: ev.HijackRequested
    at: str
    used_at: str
    stopped: ev.RunHijacked | None = None
    expired: bool = False

    @property
    def held(self) -> bool:
        """Whether somebody has, or is about to have, the page."""
        return not self.expired

    @property
    def expires(self) -> datetime | None:
        """When the hold ends unless the page is used before."""
        if self.expired or self.stopped is None:
            return None
        return datetime.fromisoformat(self.used_at) + timedelta(seconds=self.requested.idle_s)


@dataclass(frozen=True, slots=True)
class Received:
    """An event that was sent to the run and that no wait has taken yet."""

    seq: int
    name: str
    payload: Any
    key: str | None = None


@dataclass(slots=True, weakref_slot=True)
class Run:
    """A run as far as its journal goes."""

    run_id: str
    seq: int = 0
    created: ev.RunCreated | None = None
    created_at: str = ""
    updated_at: str = ""
    revision: str = ""
    epoch: int = 0
    owner: str | None = None
    taken_from: str | None = None
    """The owner that the present one took the run from, because its lease was over."""
    left_by: str | None = None
    """The owner that was let go of because its lease was over, as long as nobody else has the run."""
    attempt: int = 0
    active: bool = False
    idle: bool = False
    idle_since: str | None = None
    ended: Status | None = None
    error: ev.Failure | None = None
    output: Any = None
    reason: str | None = None
    steps: dict[str, Step] = field(default_factory=dict)
    requests: dict[str, Request] = field(default_factory=dict)
    waits: dict[str, str] = field(default_factory=dict)
    """The latest request of each key."""
    unanswered: dict[str, Request] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)
    """How often each key was reset; absent is 0."""
    failed_tries: dict[str, int] = field(default_factory=dict)
    remarks: set[str] = field(default_factory=set)
    """The keys of log lines, progress and attachments that need no second entry."""
    pages: dict[str, str] = field(default_factory=dict)
    page_host: str = ""
    """The browser host that has the pages; "" where an older journal does not say."""
    downloads: tuple[dict[str, Any], ...] = ()
    """What is known of the downloads that have begun and have no end yet."""
    page_state: ev.PageState | None = None
    page_since: str | None = None
    parked_since: str | None = None
    url: str | None = None
    """Where the main page was when the last step began."""
    losses: int = 0
    """How often in a row the pages were lost without a step that finished in between."""
    hijack: Hijack | None = None
    by_hand: list[str] = field(default_factory=list)
    """What was done with the page since the code stopped, as Python; it outlives a hold that expires."""
    inbox: tuple[Received, ...] = ()
    event_keys: dict[str, str] = field(default_factory=dict)
    """The names of the events received, by their keys."""
    put_aside_keys: set[str] = field(default_factory=set)
    """The keys of events that could not be used: what is sent under one of them next corrects it."""
    budget: int | None = None
    """How many new steps may begin before the run pauses; None is any number."""
    budget_seq: int = 0
    on_hold: bool = False
    artifacts: list[str] = field(default_factory=list)
    progress: ev.ProgressReported | None = None
    blocked: ev.WorkerBlocked | None = None
    crashes: int = 0
    """How many owners in a row were lost without anything new in the journal."""
    changed_steps: tuple[str, ...] = ()
    unused_steps: tuple[str, ...] = ()
    last_anew: int = 0
    """The `seq` at which something last came out anew: a result, value or answer of a later generation than the first.
    What finished before it may have been computed from what it replaced."""

    @property
    def status(self) -> Status:
        """The one status of the run, in DESIGN's order of precedence."""
        if self.ended:
            return self.ended
        if self.hijack and self.hijack.stopped:
            if self.hijack.held:
                return "hijacked"
            if not self.idle:
                return "paused"
        if not self.idle:
            return "running" if self.owner else "queued"
        open_kinds = {request.opened.kind for request in self.open_requests()}
        if self.hijack and self.hijack.expired:
            open_kinds.add("pause")
        if "in-doubt" in open_kinds:
            return "in-doubt"
        if self.error:
            return "failed"
        return next((status for kind, status in _WAITING if kind in open_kinds), "queued")

    @property
    def wants_worker(self) -> bool:
        """Whether there is work that only a worker can do: code to run, or a page of an ended run to close."""
        if self.ended:
            # An owner that has not taken note of the cancellation yet still has the run's code.
            return bool(self.pages) or (self.ended == "cancelled" and self.owner is not None)
        return not self.idle and not self.on_hold and not (self.hijack and self.hijack.stopped)

    @property
    def awaits_owner(self) -> bool:
        """Whether somebody waits for the owner to react: to let go of a cancelled run, or to stop for a hijack."""
        if self.owner is None:
            return False
        return self.ended == "cancelled" or (self.hijack is not None and self.hijack.stopped is None)

    @property
    def held_since(self) -> str | None:
        """Since when the run holds a page without using it; None where it has none, or someone has taken it."""
        if self.hijack and self.hijack.held:
            return None
        return self.idle_since if self.idle and self.pages and not self.ended else None

    @property
    def hijacked_until(self) -> datetime | None:
        """When the hold on the page ends unless it is used before; a person who is asked to take it has all the time
        there is, because what they do in a window is not seen."""
        asked = any(request.opened.kind == "takeover" for request in self.open_requests())
        return self.hijack.expires if self.hijack and not self.ended and not asked else None

    @property
    def due(self) -> datetime | None:
        """The next deadline: of an open request, or of a hold on the page."""
        moments = [request.opened.expires for request in self.open_requests()]
        moments.append(self.hijacked_until)
        return min((moment for moment in moments if moment), default=None)

    def copy(self) -> Run:
        """A run that is advanced apart from this one."""
        twin = copy(self)
        twin.steps = {key: Step(*_fields_of(step)) for key, step in self.steps.items()}
        twin.requests = {request_id: copy(request) for request_id, request in self.requests.items()}
        twin.unanswered = {request_id: twin.requests[request_id] for request_id in self.unanswered}
        twin.waits, twin.generations, twin.pages = dict(self.waits), dict(self.generations), dict(self.pages)
        twin.remarks, twin.artifacts = set(self.remarks), list(self.artifacts)
        twin.event_keys, twin.failed_tries = dict(self.event_keys), dict(self.failed_tries)
        twin.by_hand = list(self.by_hand)
        twin.put_aside_keys = set(self.put_aside_keys)
        if self.hijack:
            twin.hijack = replace(self.hijack)
        return twin

    @property
    def is_fork(self) -> bool:
        """Whether the run began with the finished steps of another."""
        return self.created is not None and self.created.forked_from is not None

    @property
    def _is_new_fork(self) -> bool:
        return self.is_fork and self.epoch == 0

    def open_requests(self) -> list[Request]:
        """What the run waits for, oldest first."""
        return list(self.unanswered.values())

    def running_steps(self) -> list[Step]:
        """The steps whose try is in flight, or was when the worker died."""
        return [step for step in self.steps.values() if step.status == "started"]

    def failures(self, key: str) -> int:
        """How many tries of a step have failed in all its generations."""
        return self.failed_tries.get(key, 0)

    def generation(self, key: str) -> int:
        """How often `key` was reset."""
        return self.generations.get(key, 0)

    def first_seqs(self) -> dict[str, int]:
        """When each step, value and wait was first there, by key."""
        seqs = {key: step.first_seq for key, step in self.steps.items()}
        for request in self.requests.values():
            if request.opened.kind != "takeover":  # no place in the code asks for that
                seqs.setdefault(request.opened.key, request.seq)
        return seqs

    def wait(self, key: str) -> Request | None:
        """The request of `key` in its present generation, unless it was withdrawn."""
        request = self.requests.get(self.waits.get(key, ""))
        if request is None or request.status == "withdrawn" or request.opened.generation != self.generation(key):
            return None
        return request

    def advance(self, recorded: ev.Recorded) -> None:
        """Take in the next event; raises `IllegalEvent` or `LeaseLost` and changes nothing if it can't follow."""
        if recorded.seq != self.seq + 1:
            raise IllegalEvent(f"Run {self.run_id}: event {recorded.seq} can't follow event {self.seq}.")
        self.check(recorded.event, recorded.epoch)
        self.take(recorded)

    def take(self, recorded: ev.Recorded) -> None:
        """Take in the next event of a journal, which was checked when it was appended."""
        self._apply(recorded)
        self.seq = recorded.seq
        self.updated_at = recorded.at

    def check(self, event: ev.Event, epoch: int | None) -> None:
        """Raise `IllegalEvent` or `LeaseLost` unless `event`, written under `epoch`, may be the next one."""
        if (self.created is None) is not (type(event) is ev.RunCreated):
            raise self._illegal(event, "a journal begins with run.created, once")
        if self.ended and type(event) not in _AFTER_END:
            raise self._illegal(event, f"the run is {self.ended}")
        self._check_epoch(event, epoch)
        if isinstance(event, ev.OfStep):
            self._check_step(event)
            return
        match event:
            case ev.AttemptStarted() if event.attempt != self.attempt + 1:
                raise self._illegal(event, f"attempt {self.attempt + 1} is the next")
            case ev.AttemptIdled() | ev.RunFailed() | ev.RunFinished() | ev.ValueRecorded() | ev.RequestOpened() if (
                not self.active and not _is_takeover(event)
            ):
                raise self._illegal(event, "no attempt is under way")
            case ev.ValueRecorded() if (step := self.steps.get(event.key)) and step.status != "reset":
                raise self._illegal(event, f"{event.key} is there already")
            case ev.RunFinished() if self.open_requests():
                raise self._illegal(event, "requests are still open")
            case ev.RunOrphaned() if event.owner != self.owner:
                raise self._illegal(event, f"its owner is {self.owner or 'nobody'}")
            case ev.RunResumed() if not self.idle and self.owner and not (self.hijack and self.hijack.stopped):
                raise self._illegal(event, "it is running")
            case ev.RequestShared() if not self._is_new_fork or event.opened.request_id in self.requests:
                raise self._illegal(event, "only a fork begins with the history of another run")
            case ev.RunParked() if not self.idle or (self.hijack and self.hijack.held):
                raise self._illegal(event, "it does not wait")
            case ev.PageLost() | ev.AttemptCompared() if not self.active:
                raise self._illegal(event, "no attempt is under way")
            case ev.RequestOpened() if event.request_id in self.requests:
                raise self._illegal(event, f"request {event.request_id} is there already")
            case ev.RequestOpened() if event.generation != self.generation(event.key):
                raise self._illegal(event, f"{event.key} is in generation {self.generation(event.key)}")
            case ev.RequestOpened() if self.wait(event.key):
                raise self._illegal(event, f"{event.key} has a request in this generation")
            case ev.RequestAnswered() | ev.RequestExpired() | ev.RequestWithdrawn():
                request = self.requests.get(event.request_id)
                if event.request_id not in self.unanswered:
                    state = "unknown" if request is None else request.status
                    raise self._illegal(event, f"request {event.request_id} is {state}")
                taken = event.event if isinstance(event, ev.RequestAnswered) else None
                if taken is not None and all(received.seq != taken for received in self.inbox):
                    raise self._illegal(event, f"event {taken} does not wait to be taken")
            case ev.HijackRequested() if self.hijack and self.hijack.held:
                raise self._illegal(event, f"the page is held already: {self.hijack.requested.reason}")
            case ev.RunHijacked() if self.hijack is None or self.hijack.stopped:
                raise self._illegal(event, "no hijack was requested")
            case ev.HijackExpired() if self.hijack is None or not self.hijack.stopped or self.hijack.expired:
                raise self._illegal(event, "nobody holds the page")
            case ev.EventReceived() if event.key and event.key in self.event_keys:
                raise self._illegal(event, f"the event {event.key!r} is there already")
            case ev.HijackReleased() if self.hijack is None:
                raise self._illegal(event, "nobody holds the page")

    def _check_epoch(self, event: ev.Event, epoch: int | None) -> None:
        if type(event) is ev.RunClaimed:
            if epoch != self.epoch + 1:
                raise LeaseLost(f"Run {self.run_id} was claimed by another worker (epoch {self.epoch}).")
        elif epoch is not None and (epoch != self.epoch or self.owner is None):
            raise LeaseLost(
                f"Run {self.run_id}: the lease of epoch {epoch} is over (epoch {self.epoch}, owner "
                f"{self.owner or 'nobody'}); its {event.type} was refused."
            )
        elif epoch is None and type(event) in _OWNERS_ONLY and not _is_takeover(event):
            raise self._illegal(event, "only the run's owner writes it")

    def _check_step(self, event: ev.OfStep) -> None:
        step = self.steps.get(event.key)
        if isinstance(event, ev.StepReset):
            if event.generation != self.generation(event.key) + 1:
                raise self._illegal(event, f"{event.key} is in generation {self.generation(event.key)}")
            return
        if isinstance(event, ev.StepShared):
            if step is not None or not self._is_new_fork:
                raise self._illegal(event, "only a fork begins with the history of another run")
            return
        if isinstance(event, ev.StepSettled):
            if step is None or step.status != "started" or not (self.hijack and self.hijack.stopped):
                raise self._illegal(event, f"{event.key} does not stand still in a hijacked run")
            return
        if isinstance(event, ev.StepDoubted):
            if step is None or not step.once or step.status != "finished":
                raise self._illegal(event, f"{event.key} is no finished step that runs only once")
            return
        if not self.active:
            raise self._illegal(event, "no attempt is under way")
        if isinstance(event, ev.StepNondeterministic):
            if step is None or step.status != "finished":
                raise self._illegal(event, f"{event.key} has not finished")
            return
        if event.generation != self.generation(event.key):
            raise self._illegal(event, f"{event.key} is in generation {self.generation(event.key)}")
        if isinstance(event, ev.StepStarted):
            if step and step.status == "finished":
                raise self._illegal(event, f"{event.key} has finished and is never done twice")
            if step and step.in_doubt:
                raise self._illegal(event, f"{event.key} may have had its effect and runs only once")
        elif step is None or step.status not in ("started", "failed"):
            raise self._illegal(event, f"{event.key} was not started")

    def _illegal(self, event: ev.Event, why: str) -> IllegalEvent:
        return IllegalEvent(
            f"Run {self.run_id}, {self.status if self.created else 'new'}: {event.type} can't follow; {why}."
        )

    def _apply(self, recorded: ev.Recorded) -> None:
        match recorded.event:
            case ev.StepStarted() as event:
                self._start_step(event, recorded)
            case ev.StepFinished() as event:
                self.crashes = self.losses = 0
                step = self.steps[event.key]
                step.status, step.value, step.ms, step.error = "finished", event.value, event.ms, None
                step.revision, step.finished_seq = self.revision, recorded.seq
                self._note_anew(event.key, recorded.seq)
            case ev.StepFailed() as event:
                step = self.steps[event.key]
                step.status, step.error, step.effect_free = "failed", event.error, event.effect_free
                self.failed_tries[event.key] = self.failed_tries.get(event.key, 0) + 1
            case ev.StepReset() as event:
                self._reset(event)
            case ev.StepSettled() as event:
                step = self.steps[event.key]
                step.status, step.value, step.error = "finished", event.value, None
                step.revision, step.finished_seq = self.revision, recorded.seq
                self._note_anew(event.key, recorded.seq)
            case ev.StepDoubted() as event:
                self.steps[event.key].doubted = True
            case ev.StepShared() as event:
                self.steps[event.key] = Step(
                    event.key,
                    recorded.seq,
                    status="finished",
                    fingerprint=event.fingerprint,
                    once=event.once,
                    restore=event.restore,
                    value=event.value,
                    url=event.url,
                    code=event.code,
                    revision=event.revision,
                    started_at=recorded.at,
                    finished_seq=recorded.seq,
                )
            case ev.RequestShared() as event:
                self.waits[event.opened.key] = event.opened.request_id
                self.requests[event.opened.request_id] = Request(
                    event.opened,
                    recorded.seq,
                    recorded.at,
                    "expired" if event.expired else "answered",
                    recorded.seq,
                    event.value,
                    event.note,
                    event.by,
                    event.via,
                )
            case ev.ValueRecorded() as event:
                self.steps[event.key] = Step(
                    event.key,
                    recorded.seq,
                    self.generation(event.key),
                    "finished",
                    value=event.value,
                    revision=self.revision,
                    started_at=recorded.at,
                    finished_seq=recorded.seq,
                )
                self._note_anew(event.key, recorded.seq)
            case ev.RequestOpened() as event:
                self.crashes = 0
                if event.put_aside is not None and (key := self.requests[self.waits[event.key]].event_key):
                    self.event_keys.pop(key, None)
                    self.put_aside_keys.add(key)
                request = Request(event, recorded.seq, recorded.at)
                self.requests[event.request_id] = self.unanswered[event.request_id] = request
                self.waits[event.key] = event.request_id
            case ev.RequestAnswered() as event:
                request = self.unanswered.pop(event.request_id)
                request.status, request.value, request.note = "answered", event.value, event.note
                request.by, request.via, request.settled_seq = event.by, event.via, recorded.seq
                if event.event is not None:
                    request.event_key = next(one.key for one in self.inbox if one.seq == event.event)
                    self.inbox = tuple(received for received in self.inbox if received.seq != event.event)
                if request.opened.kind == "takeover":
                    return  # who hands a page back answers nothing that the run's code has asked
                self._note_anew(request.opened.key, recorded.seq)
                self._wake()
            case ev.RequestExpired() as event:
                request = self.unanswered.pop(event.request_id)
                request.status, request.settled_seq = "expired", recorded.seq
                self._wake()
            case ev.RequestWithdrawn() as event:
                request = self.unanswered.pop(event.request_id)
                request.status, request.settled_seq = "withdrawn", recorded.seq
            case ev.Logged() as event:
                self.remarks.add(event.key)
            case ev.ProgressReported() as event:
                self.progress = event
                self.remarks.add(event.key)
            case ev.ArtifactKept() as event:
                self.artifacts.append(event.file)
                if event.key:
                    self.remarks.add(event.key)
            case ev.PageOpened() as event:
                self.pages[event.name] = event.target_id
                self.page_host = event.host or self.page_host
                self.parked_since = None
                if self.page_state is None:
                    self.page_state, self.page_since = "live", recorded.at
            case ev.PageObserved(what="download-started") as event:
                self.downloads = (*self.downloads, event.details)
            case ev.PageObserved(what="download") as event:
                self._end_download(event.details)
            case ev.PageAttached() as event:
                self.page_state, self.page_since = event.state, recorded.at
            case ev.PageClosed() as event:
                if event.name is None:
                    self.pages.clear()
                else:
                    self.pages.pop(event.name, None)
            case ev.EventReceived() as event:
                self.inbox = (*self.inbox, Received(recorded.seq, event.name, event.payload, event.key))
                if event.key:
                    self.event_keys[event.key] = event.name
                    self.put_aside_keys.discard(event.key)
            case ev.HijackRequested() as event:
                stopped = self.hijack.stopped if self.hijack else None
                self.hijack = Hijack(event, recorded.at, recorded.at, stopped)
            case ev.RunHijacked() as event:
                assert self.hijack
                self.hijack.stopped, self.hijack.used_at = event, recorded.at
            case ev.HijackExpired():
                assert self.hijack
                self.hijack.expired = True
            case ev.PageEvaluated():
                if self.hijack:
                    self.hijack.used_at = recorded.at
            case ev.PageActed() as event:
                if self.hijack:
                    self.hijack.used_at = recorded.at
                    self.by_hand += event.lines
            case ev.HijackReleased():
                self.hijack = None
                self.by_hand.clear()
            case ev.WorkerBlocked() as event:
                self.blocked = event
            case ev.AttemptCompared() as event:
                self.changed_steps, self.unused_steps = tuple(event.changed_steps), tuple(event.unused_steps)
            case _:
                self._move(recorded)

    def _move(self, recorded: ev.Recorded) -> None:
        """Take in the events by which a run changes hands, starts, stops and ends."""
        match recorded.event:
            case ev.RunCreated() as event:
                self.created, self.created_at, self.revision = event, recorded.at, event.revision
                self.on_hold = event.hold
            case ev.RunClaimed() as event:
                assert recorded.epoch is not None
                self.crashes = self.crashes + 1 if self.owner and not self.ended else 0
                self.taken_from, self.left_by = self.owner or self.left_by, None
                self.epoch, self.owner, self.active = recorded.epoch, event.worker, False
            case ev.RunReleased() | ev.RunOrphaned():
                # One that was let go of is not told of it, and may still act on the page.
                self.left_by = self.owner if isinstance(recorded.event, ev.RunOrphaned) else None
                self.owner, self.active = None, False
            case ev.RunParked():
                self.owner, self.active, self.parked_since = None, False, recorded.at
                self.pages.clear()
            case ev.PageLost():
                self.active, self.losses = False, self.losses + 1
                self.pages.clear()
            case ev.AttemptStarted() as event:
                self.attempt, self.revision, self.active, self.idle = (
                    event.attempt,
                    event.revision,
                    True,
                    False,
                )
                self.blocked, self.error = None, None
                self.changed_steps, self.unused_steps = (), ()
            case ev.AttemptIdled():
                if not self.idle and self.open_requests():
                    self.idle, self.idle_since = True, recorded.at
            case ev.RunResumed() as event:
                self.revision, self.error, self.idle, self.active = event.revision, None, False, False
                self.by_hand.clear()
                self.crashes = self.losses = 0
                self.on_hold = False
            case ev.RunBudgeted() as event:
                self.budget, self.budget_seq = event.steps, recorded.seq
            case ev.RunFailed() as event:
                self.error, self.idle, self.active, self.owner = event.error, True, False, None
                self.idle_since = recorded.at
            case ev.RunFinished() as event:
                self._end("finished", recorded.seq)
                self.output = event.output
            case ev.RunCancelled() as event:
                self._end("cancelled", recorded.seq)
                self.reason = event.reason

    def _start_step(self, event: ev.StepStarted, recorded: ev.Recorded) -> None:
        step = self.steps.get(event.key)
        self.url = event.url if event.url is not None else self.url
        resumed = step is not None and step.status == "started" and step.generation == event.generation
        if self.budget and event.number == 1 and not resumed:
            self.budget -= 1
        if step is None:
            step = self.steps[event.key] = Step(event.key, recorded.seq, url=self.url)
        step.status, step.generation, step.fingerprint = "started", event.generation, event.fingerprint
        step.tries, step.once, step.restore = event.number, event.once, event.restore
        step.started_at, step.error, step.effect_free, step.code = recorded.at, None, False, event.code
        self.idle = False

    def _reset(self, event: ev.StepReset) -> None:
        self.generations[event.key] = event.generation
        if step := self.steps.get(event.key):
            step.status, step.generation, step.value, step.error = "reset", event.generation, None, None
            step.doubted = False

    def _note_anew(self, key: str, seq: int) -> None:
        if self.generation(key):
            self.last_anew = seq

    def _end_download(self, about: dict[str, Any]) -> None:
        for number, begun in enumerate(self.downloads):
            if all(begun.get(word) == about.get(word) for word in ("url", "suggested")):
                self.downloads = self.downloads[:number] + self.downloads[number + 1 :]
                return

    def _wake(self) -> None:
        """Let the run go on with an answer, unless it failed: a failure waits for `resume`."""
        if self.error is None:
            self.idle = False
            if self.hijack is None:
                self.by_hand.clear()

    def _end(self, status: Status, seq: int) -> None:
        for request in self.unanswered.values():
            request.status, request.settled_seq = "withdrawn", seq
        self.unanswered.clear()
        self.ended, self.active, self.idle, self.error = status, False, True, None


def _is_takeover(event: ev.Event) -> bool:
    """Whether this opens the one kind of request that comes from outside: a person is to take the page."""
    return isinstance(event, ev.RequestOpened) and event.kind == "takeover"


def step_of(key: str) -> str:
    """The step that a request's key belongs to: its own, or the one in doubt (`?`), to be tried again (`!`), or to come
    next (`|`)."""
    return key.rstrip("?!|")


def asks_for_help(opened: ev.RequestOpened) -> bool:
    """Whether this is a step that can be tried again, with or without the value that it asks for."""
    return opened.key.endswith("!")


def takes(opened: ev.RequestOpened, name: str, payload: Any) -> bool:
    """Whether this open wait takes an event of this name and payload: every value that it must match is there."""
    data = opened.data or {}
    return data.get("event") == name and all(
        _at(payload, path.split(".")) == value for path, value in data.get("match", {}).items()
    )


def _at(payload: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(payload, dict) or part not in payload:
            return None
        payload = payload[part]
    return payload


def fold(run_id: str, journal: Iterable[ev.Recorded]) -> Run:
    """The run that a journal tells of; raises `IllegalEvent` or `LeaseLost` at the first event that can't be."""
    run = Run(run_id)
    for recorded in journal:
        run.advance(recorded)
    return run
