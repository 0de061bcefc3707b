"""What reaching a step or a wait again does: DESIGN's replay table as one function each. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from mcp_flow.run import Request, Run, Step


@dataclass(frozen=True, slots=True)
class Reuse:
    """The journal has the result. `deviates` when the arguments differ although nothing had changed."""

    step: Step
    deviates: bool = False


@dataclass(frozen=True, slots=True)
class Execute:
    """Run it; with a `reset` reason its key moves to a new generation first."""

    reset: str | None = None


@dataclass(frozen=True, slots=True)
class Doubt:
    """A `once` step may have had its effect, or would have it again: somebody must look first."""

    why: str


@dataclass(frozen=True, slots=True)
class Settled:
    """The wait was answered, or its deadline has passed."""

    request: Request


@dataclass(frozen=True, slots=True)
class Waiting:
    """The wait is open already."""

    request: Request


@dataclass(frozen=True, slots=True)
class Ask:
    """Open a request; `instead_of` is the one that asked something else under this key."""

    instead_of: Request | None = None


def reach_step(run: Run, key: str, fingerprint: str, *, once: bool) -> Reuse | Execute | Doubt:
    """What happens when the attempt reaches step `key` with arguments of this fingerprint."""
    step = run.steps.get(key)
    if step is None or step.status == "reset":
        return Execute()
    if step.in_doubt:
        if step.error:
            return Doubt(f"it started at {step.started_at} and raised {step.error.type}: {step.error.message}")
        return Doubt(f"it started at {step.started_at} and its end was never recorded")
    if step.status != "finished":
        return Execute()
    if step.doubted:
        return Doubt(f"it started at {step.started_at} and was done, and what comes before it is done again")
    if step.fingerprint == fingerprint:
        return Reuse(step)
    if step.revision == run.revision and run.last_anew < step.finished_seq:
        return Reuse(step, deviates=True)
    if step.once or once:
        return Doubt(f"it started at {step.started_at} and finished with other arguments than it is reached with now")
    return Execute(reset="its arguments changed")


def reach_wait(run: Run, key: str, fingerprint: str, but: str | None = None) -> Settled | Waiting | Ask:
    """What happens when the attempt reaches the wait `key`, whose text and terms have this fingerprint.

    The answer to the request `but` is of no use.
    """
    request = run.wait(key)
    if request is None:
        return Ask()
    if request.opened.fingerprint != fingerprint or request.opened.request_id == but:
        return Ask(instead_of=request)
    return Waiting(request) if request.status == "open" else Settled(request)
