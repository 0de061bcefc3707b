"""What can happen to a run: frozen event types, named once, in the past tense. Pure.

An event is stored as its type and the compact JSON of its fields, defaults left out, so a journal stays small
and a field added later reads as its default in older journals. Golden journals in `tests/journals/` freeze the names.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticSerializationError

from mcp_flow.errors import BrokenChain

RequestKind = Literal["pause", "input", "approval", "event", "timer", "in-doubt", "takeover"]
By = Literal["anyone", "agent", "human"]
Holder = Literal["agent", "human"]
PageState = Literal["live", "reattached", "restored"]


class Failure(BaseModel):
    """An error as the journal keeps it: `file`, `line` and `source` point into the workflow's own code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    message: str
    step: str | None = None
    file: str | None = None
    line: int | None = None
    source: str | None = None
    artifacts: list[str] = []


class Event(BaseModel):
    """The base of all events; `type` is the stored name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    type: ClassVar[str]

    def encoded(self) -> str:
        """The compact JSON that is stored and hashed; half of a surrogate pair, which UTF-8 can't hold, is replaced."""
        try:
            return self.model_dump_json(exclude_defaults=True)
        except PydanticSerializationError:
            return type(self).model_validate(_whole(self.model_dump())).model_dump_json(exclude_defaults=True)


# --- the run ---


class RunCreated(Event):
    """A run was asked for. `function` is the workflow's name in `entry`, a file of `revision` under `root`."""

    type: ClassVar[str] = "run.created"
    workflow: str
    function: str
    root: str
    entry: str
    revision: str
    input: dict[str, Any] = {}
    headless: bool = True
    viewport: tuple[int, int] | None = None
    forked_from: str | None = None
    fork_step: str | None = None
    hold: bool = False
    pause_before: list[str] = []
    single_step: bool = False


class RunClaimed(Event):
    """A worker took the run; the event's own epoch is the new one."""

    type: ClassVar[str] = "run.claimed"
    worker: str


class RunReleased(Event):
    """The owner gave the run back, keeping its page."""

    type: ClassVar[str] = "run.released"
    reason: str


class RunOrphaned(Event):
    """The owner was found to be gone; somebody else may have the run."""

    type: ClassVar[str] = "run.orphaned"
    owner: str


class RunParked(Event):
    """A run that had waited for its hold gave up its page and its owner; a checkpoint rebuilds the page."""

    type: ClassVar[str] = "run.parked"


class AttemptStarted(Event):
    """The workflow's function was entered from its top."""

    type: ClassVar[str] = "attempt.started"
    attempt: int
    revision: str


class AttemptIdled(Event):
    """Every branch of the attempt waits for an open request."""

    type: ClassVar[str] = "attempt.idled"


class AttemptCompared(Event):
    """What an attempt found when it replayed: finished steps whose function reads differently now, or never reached."""

    type: ClassVar[str] = "attempt.compared"
    changed_steps: list[str] = []
    unused_steps: list[str] = []


class RunResumed(Event):
    """Somebody let a stopped run go on, under `revision`."""

    type: ClassVar[str] = "run.resumed"
    revision: str
    by: str = "anyone"


class RunBudgeted(Event):
    """Somebody let the run begin so many new steps before it pauses again; None takes such a limit away."""

    type: ClassVar[str] = "run.budgeted"
    steps: int | None = None


class RunFailed(Event):
    """The attempt ended with an error; the page stays open and `resume` goes on from it."""

    type: ClassVar[str] = "run.failed"
    error: Failure


class RunFinished(Event):
    """The function returned; `output` is its value as JSON."""

    type: ClassVar[str] = "run.finished"
    output: Any = None


class RunCancelled(Event):
    """The run was stopped for good."""

    type: ClassVar[str] = "run.cancelled"
    reason: str
    by: str = "anyone"


# --- steps ---


class OfStep(Event):
    """The base of what happens to a step, in a generation of its key."""

    key: str
    generation: int = 0


class StepStarted(OfStep):
    """A try of a step began; `url` is where the run's page was, if it was elsewhere when the step before began.

    `code` is the hash of the function's own code, which says later whether that was edited.
    """

    type: ClassVar[str] = "step.started"
    fingerprint: str
    number: int = 1
    once: bool = False
    restore: bool = False
    url: str | None = None
    code: str = ""


class StepFinished(OfStep):
    """A step's result, which no attempt computes again in this generation."""

    type: ClassVar[str] = "step.finished"
    value: Any = None
    ms: float = 0.0


class StepFailed(OfStep):
    """A try ended with an error. `effect_free` is the step's own word (`Retriable`) that nothing happened."""

    type: ClassVar[str] = "step.failed"
    error: Failure
    number: int = 1
    effect_free: bool = False
    retry_in: float | None = None


class StepReset(OfStep):
    """A step's key moved to a new generation, so it runs again."""

    type: ClassVar[str] = "step.reset"
    generation: int
    reason: str


class StepSettled(OfStep):
    """Somebody who had the page did the work of the step that stood still; the value stands for its result."""

    type: ClassVar[str] = "step.settled"
    value: Any = None
    by: str = "anyone"


class StepDoubted(OfStep):
    """A finished `once` step is not to be taken for done without someone looking: what came before it is redone."""

    type: ClassVar[str] = "step.doubted"
    reason: str


class StepNondeterministic(OfStep):
    """A finished step was reached with other arguments although nothing had changed; its result stands."""

    type: ClassVar[str] = "step.nondeterministic"
    fingerprint: str


class StepShared(OfStep):
    """A finished step, or a fixed value, of the run that this one was forked from."""

    type: ClassVar[str] = "step.shared"
    fingerprint: str = ""
    value: Any = None
    once: bool = False
    restore: bool = False
    url: str | None = None
    code: str = ""
    revision: str = ""


class ValueRecorded(Event):
    """A value that would differ between attempts (`now`, `random`, `uuid`) was fixed."""

    type: ClassVar[str] = "value.recorded"
    key: str
    value: Any = None


# --- requests ---


class RequestOpened(Event):
    """A run began to wait for something; the text is frozen here.

    `put_aside` says why the answer that the same question had before could not be used.
    """

    type: ClassVar[str] = "request.opened"
    request_id: str
    key: str
    kind: RequestKind
    prompt: str
    fingerprint: str
    generation: int = 0
    answer_schema: dict[str, Any] | None = None
    data: Any = None
    by: By = "anyone"
    expires: datetime | None = None
    default: Any = None
    has_default: bool = False
    put_aside: str | None = None


class RequestAnswered(Event):
    """Somebody answered. An approval's value is `{"approved": bool}`; `event` is the `seq` of an event that answered.

    Of a secret the value holds a reference, `{"$secret": …}`; the secret itself lies outside of the journal.
    """

    type: ClassVar[str] = "request.answered"
    request_id: str
    value: Any = None
    note: str | None = None
    by: str = "anyone"
    via: str = "tool"
    event: int | None = None


class RequestExpired(Event):
    """The deadline passed; the request's default, denial or failure holds."""

    type: ClassVar[str] = "request.expired"
    request_id: str


class RequestWithdrawn(Event):
    """The run no longer waits for this."""

    type: ClassVar[str] = "request.withdrawn"
    request_id: str
    reason: str


class EventReceived(Event):
    """An event was sent to the run; it is kept until a wait takes it. The same `key` is not received twice."""

    type: ClassVar[str] = "event.received"
    name: str
    payload: Any = None
    key: str | None = None
    by: str = "anyone"


class RequestShared(Event):
    """A settled request of the run that this one was forked from; `key` is its step's."""

    type: ClassVar[str] = "request.shared"
    opened: RequestOpened
    expired: bool = False
    value: Any = None
    note: str | None = None
    by: str | None = None
    via: str | None = None


# --- the page and those who take it ---


class PageOpened(Event):
    """A named page of the run exists in the browser under this target id; `host` tells that browser from others."""

    type: ClassVar[str] = "page.opened"
    name: str
    target_id: str
    host: str = ""


class PageAttached(Event):
    """An attempt has the run's pages: as they were, found again, or rebuilt."""

    type: ClassVar[str] = "page.attached"
    state: PageState


class PageClosed(Event):
    """One page is gone, or with no name the run's whole context is closed."""

    type: ClassVar[str] = "page.closed"
    name: str | None = None


class PageLost(Event):
    """The pages were lost while the attempt had them, and with them the attempt; the next one rebuilds them."""

    type: ClassVar[str] = "page.lost"
    what: str


class PageObserved(Event):
    """The browser did something that nobody asked for: a dialog, a download, a popup, a crash.

    A `download-started` ends with a `download` of the same `url` and `suggested` name, that has a `path` or an `error`.
    """

    type: ClassVar[str] = "page.observed"
    what: str
    details: dict[str, Any] = {}


class PageEvaluated(Event):
    """Code was evaluated in the page from outside."""

    type: ClassVar[str] = "page.evaluated"
    code: str
    mode: Literal["read", "write"]
    outcome: str
    by: str = "agent"


class PageActed(Event):
    """Somebody who held the page acted on it; `lines` are the Python that does the same."""

    type: ClassVar[str] = "page.acted"
    lines: list[str]
    outcome: str
    by: str = "agent"


class HijackRequested(Event):
    """Somebody wants the page; the run stops at its next action or step.

    Unused for `idle_s` seconds the hold expires, unless a person was asked to take the page.
    """

    type: ClassVar[str] = "hijack.requested"
    reason: str
    holder: Holder = "agent"
    idle_s: float = 600.0


class RunHijacked(Event):
    """The run's code stands still and the holder has the page.

    `step` is the key of the step whose `action` stands still, or the name of one that was about to begin or failed.
    """

    type: ClassVar[str] = "run.hijacked"
    step: str | None = None
    action: str | None = None
    file: str | None = None
    line: int | None = None


class HijackExpired(Event):
    """The holder did not use the page for too long, and has it no more; code that stood still stays so."""

    type: ClassVar[str] = "hijack.expired"


class HijackReleased(Event):
    """The page was handed back."""

    type: ClassVar[str] = "hijack.released"
    by: str = "anyone"


# --- remarks ---


class Logged(Event):
    """A line of `flow.log`, journaled once however often it is replayed."""

    type: ClassVar[str] = "log.written"
    key: str
    message: str
    level: Literal["debug", "info", "warning"] = "info"


class ProgressReported(Event):
    """How far the workflow says it is."""

    type: ClassVar[str] = "progress.reported"
    key: str
    done: float
    total: float | None = None
    message: str | None = None


class ArtifactKept(Event):
    """A file was put into the run's folder; `key` is set when the workflow attached it."""

    type: ClassVar[str] = "artifact.kept"
    file: str
    size: int
    sha256: str
    key: str | None = None


class WorkerBlocked(Event):
    """The worker's event loop stood still here."""

    type: ClassVar[str] = "worker.blocked"
    seconds: float
    file: str | None = None
    line: int | None = None


TYPES: dict[str, type[Event]] = {
    cls.type: cls
    for cls in (
        RunCreated, RunClaimed, RunReleased, RunOrphaned, RunParked, AttemptStarted, AttemptIdled, AttemptCompared,
        RunResumed, RunBudgeted, RunFailed, RunFinished, RunCancelled, StepStarted, StepFinished, StepFailed, StepReset,
        StepSettled, StepDoubted, StepShared, StepNondeterministic, ValueRecorded, RequestOpened, RequestAnswered,
        RequestExpired, RequestWithdrawn, RequestShared, EventReceived, PageOpened, PageAttached, PageClosed, PageLost,
        PageObserved, PageEvaluated, PageActed, HijackRequested, RunHijacked, HijackExpired, HijackReleased, Logged,
        ProgressReported, ArtifactKept, WorkerBlocked,
    )
}  # fmt: skip


def _whole(value: Any) -> Any:
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case list() | tuple():
            return [_whole(item) for item in value]
        case dict():
            return {_whole(key): _whole(item) for key, item in value.items()}
        case _:
            return value


class Recorded(NamedTuple):
    """An event at its place in a journal. `at` is UTC and informs only; the order is `seq`."""

    seq: int
    at: str
    epoch: int | None
    event: Event


def decode(type_: str, data: str) -> Event:
    """The event stored as `type_` and `data`; raises `BrokenChain` when it is none that this version knows."""
    cls = TYPES.get(type_)
    if cls is None:
        raise BrokenChain(
            f"The journal holds an event of type {type_!r}, which this version of mcp-flow does not know."
        )
    return cls.model_validate_json(data)


def genesis(run_id: str) -> bytes:
    """What the first entry of a run's journal is chained to: no journal passes for another's."""
    return hashlib.sha256(run_id.encode()).digest()


def chain(previous: bytes, seq: int, at: str, epoch: int | None, type_: str, data: str) -> bytes:
    """The hash of an entry: sha256 over the previous hash and the stored fields, each ended by a newline.

    None of the fields before `data` can hold a newline, so no two entries share one preimage.
    """
    head = f"{seq}\n{at}\n{'' if epoch is None else epoch}\n{type_}\n{data}"
    return hashlib.sha256(previous + head.encode("utf-8", "surrogatepass")).digest()
