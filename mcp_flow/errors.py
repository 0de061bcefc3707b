"""The conditions that callers can act on, one class each. Pure.

Every message says what happened, where, and what to call or type next, because a message is all that
reaches an agent or a person. Anything that is not one of these is a fault of mcp-flow itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FlowError(Exception):
    """The base of every condition that mcp-flow reports by name."""


class InvalidId(FlowError):
    """An id does not have the form of an id."""


class InvalidInput(FlowError):
    """A value does not fit its schema; `problems` holds one line for each bad field."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message if not problems else message + "\n" + "\n".join(f"- {p}" for p in problems))
        self.problems = tuple(problems)


class UnknownRun(FlowError):
    """No run has this id."""


class UnknownWorkflow(FlowError):
    """No workflow has this name, or two files share it."""


class BrokenWorkflow(FlowError):
    """A workflow file can't be imported; the message holds its error with file and line."""


class CodeChanged(FlowError):
    """The workflow's code is not what the run was executed with, and the caller asked not to accept that."""


class UnknownRequest(FlowError):
    """No request has this id, or it is not this run's."""


class UnknownStep(FlowError):
    """The run has no step of this name."""


class Conflict(FlowError):
    """The id or the request is already taken by something else."""


class NotAllowed(FlowError):
    """The run's status, or who is asking, does not allow this."""


class RunEnded(NotAllowed):
    """The run is finished, cancelled or continued, and nothing changes it any more."""


class IllegalEvent(FlowError):
    """An event can't follow the run's journal as it stands."""


class LeaseLost(FlowError):
    """Another worker owns the run by now, or nobody does; the late writer's event was refused."""


class WorkerCrashed(FlowError):
    """Worker after worker died in a run's code."""


class StoreError(FlowError):
    """The database can't be used: missing, read-only, full, locked, damaged or of another version."""


class BrokenChain(FlowError):
    """A journal's hash chain does not hold; the message names the first broken event."""


class StepError(FlowError):
    """The base of mistakes in how a workflow uses `Flow`, each of them naming the step."""


class StepResultError(StepError):
    """A step's result does not survive the way through JSON and back."""


class StepNameTaken(StepError):
    """A name is used twice where only one use can be told from another."""


class NestedStep(StepError):
    """A step was started inside another step."""


class OutsideRun(StepError):
    """A `Flow` was used where no run is executing it."""


class StepTimeout(StepError):
    """A step did not end within its time."""


class Denied(FlowError):
    """An approval was denied; the message holds the note."""


class RequestExpired(FlowError):
    """Nobody answered in time and the workflow gave no default."""


class Retriable(Exception):
    """Raised by a step to say that it had no effect and may be tried again.

    After its retries the run stops at the step until `resume`. `ask` is the type of a value that would help, as in
    `Flow.ask`; the step finds what was given in `flow.retry_input`, as plain JSON. `on_fail="continue"` passes it over.
    """

    def __init__(self, error: object = "", ask: Any = None) -> None:
        super().__init__(str(error))
        self.ask = ask


class BrowserMissing(FlowError):
    """No usable browser was found; the message names the commands that install one."""


class BrowserUnavailable(FlowError):
    """The browser host did not start or does not answer."""


class PageGone(FlowError):
    """The page was closed, crashed or never opened."""


class PageRefusal(FlowError):
    """Something could not be done in a page; `quoted` is what the page itself says of it, a line or more."""

    def __init__(self, message: str, quoted: str = "") -> None:
        super().__init__(message)
        self.quoted = quoted


class EvaluationError(PageRefusal):
    """Code evaluated in a page failed, ran too long or tried to change the page in `read` mode.

    `shown_code` is the code without what is secret on the page.
    """

    def __init__(self, message: str, quoted: str = "", shown_code: str = "") -> None:
        super().__init__(message, quoted)
        self.shown_code = shown_code


class ActionFailed(PageRefusal):
    """An action could not be carried out on the page; those before it are done and stay done."""


class StaleRef(ActionFailed):
    """A ref of an earlier snapshot no longer stands for one element of the page."""
