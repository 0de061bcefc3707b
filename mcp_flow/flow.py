"""The authoring API: what a workflow is given as its first parameter.

Imports neither mcp nor playwright, so a workflow file can be read, typed and tested without them. How a step is
replayed or run stands in `attempt.py`; this module says what authors may ask for.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, overload

from pydantic import PydanticUserError, create_model
from pydantic_core import PydanticSerializationError, to_jsonable_python

from mcp_flow import fingerprint
from mcp_flow.definition import MISSING, Codec, codec
from mcp_flow.errors import Denied, RequestExpired, StepError
from mcp_flow.secrets import secret_places

if TYPE_CHECKING:
    from playwright.async_api import Page

    from mcp_flow.attempt import Attempt
    from mcp_flow.scope import Scope

LONGEST_EVENT = 200
T = TypeVar("T")
Backoff = float | Callable[[int], float]
Expiry = float | timedelta | datetime


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to an approval; truthy when it was approved."""

    approved: bool
    note: str | None = None
    by: str | None = None

    def __bool__(self) -> bool:
        return self.approved


class StepOptions(NamedTuple):
    """The keywords of `Flow.step`."""

    retries: int = 0
    backoff: Backoff = 0.5
    timeout: float | None = None
    once: bool = False
    restore: bool = False
    on_fail: Literal["raise", "continue"] = "raise"


class Flow:
    """A run as its workflow sees it. Made by the worker; every method is awaited in the workflow's own tasks."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self._attempt.run.run_id

    @property
    def attempt(self) -> int:
        """Which pass of the function this is, from 1."""
        return self._attempt.run.attempt

    async def page(self, name: str = "main") -> Page:
        """The run's page of this name: a Playwright `Page`, opened when first asked for and kept over attempts.

        Raises `BrowserMissing` or `BrowserUnavailable`.
        """
        page: Page = await self._attempt.page(name)
        return page

    @overload
    async def step(
        self,
        name: str,
        fn: Callable[..., Awaitable[T]],
        *args: Any,
        retries: int = ...,
        backoff: Backoff = ...,
        timeout: float | None = ...,
        once: bool = ...,
        restore: bool = ...,
        on_fail: Literal["raise", "continue"] = ...,
    ) -> T: ...

    @overload
    async def step(
        self,
        name: str,
        fn: Callable[..., T],
        *args: Any,
        retries: int = ...,
        backoff: Backoff = ...,
        timeout: float | None = ...,
        once: bool = ...,
        restore: bool = ...,
        on_fail: Literal["raise", "continue"] = ...,
    ) -> T: ...

    async def step(
        self,
        name: str,
        fn: Callable[..., Any],
        *args: Any,
        retries: int = 0,
        backoff: Backoff = 0.5,
        timeout: float | None = None,
        once: bool = False,
        restore: bool = False,
        on_fail: Literal["raise", "continue"] = "raise",
    ) -> Any:
        """Run `fn(*args)` once for good: its result is journaled, and later attempts get it without running `fn`.

        `retries` more tries follow a failure after `backoff` seconds, doubled each time and drawn at random up to
        that (full jitter), or after `backoff(n)` seconds. `timeout` seconds bound one try. With `once` nothing is
        repeated unless someone has looked; with `restore` it is done again whenever the page had to be rebuilt;
        with `on_fail="continue"` a failure is journaled and the result is None.

        Raises what `fn` raises, `StepTimeout`, `StepResultError` for a result that JSON can't carry, `NestedStep`
        inside another step, and `StepNameTaken` where the name can't be told from another use.
        """
        options = StepOptions(retries, backoff, timeout, once, restore, on_fail)
        if once and restore:
            raise StepError(f"Step {name!r} can't be both once and restore: restoring would repeat it.")
        if retries < 0 or (timeout is not None and timeout <= 0):
            raise StepError(f"Step {name!r}: retries can't be negative, and a timeout is more than 0 seconds.")
        if not callable(fn):
            raise StepError(
                f"Step {name!r} was given {type(fn).__name__}, which can't be called. Pass the function and its "
                "arguments, not the result of calling it: flow.step(name, fn, arg)."
            )
        return await self._attempt.step(name, fn, args, options)

    def scope(self, name: str) -> Scope:
        """A `with` block whose steps are named apart from those outside it; for branches that run side by side."""
        return self._attempt.scope(name)

    # --- waiting ---

    async def pause(self, reason: str = "breakpoint", *, name: str | None = None) -> None:
        """Stop here, page open, until `resume`. Skipped in production mode."""
        if self._attempt.settings.production:
            return
        await self._attempt.wait("pause", name or reason, reason, fingerprint.of(["pause", reason]))

    async def approve(
        self,
        question: str,
        *,
        data: Any = None,
        by: Literal["anyone", "human"] = "anyone",
        expires: Expiry | None = None,
        on_deny: Literal["fail", "return"] = "fail",
        name: str | None = None,
    ) -> Decision:
        """Wait until somebody approves or denies; `data` is shown with the question and bound to the decision.

        Undecided at `expires` (seconds, a timedelta or a moment) counts as denied. Raises `Denied` with the note,
        or returns a falsy decision with `on_deny="return"`.
        """
        _check_word(f"approval {question!r}", "by", by, ("anyone", "human"))
        _check_word(f"approval {question!r}", "on_deny", on_deny, ("fail", "return"))
        shown = _journaled(data, f"the data of approval {question!r}")
        terms = fingerprint.of(["approval", question, shown, by])
        settled = await self._attempt.wait(
            "approval", name or question, question, terms, data=shown, by=by, expires=self._expiry(expires)
        )
        if settled.status == "expired":
            decision = Decision(False, "nobody decided in time")
        else:
            decision = Decision(bool(settled.value["approved"]), settled.note, settled.by)
        if not decision and on_deny == "fail":
            raise Denied(f"{question} was denied" + (f": {decision.note}" if decision.note else "."))
        return decision

    async def ask(
        self,
        prompt: str,
        schema: Any = str,
        *,
        by: Literal["anyone", "agent", "human"] = "anyone",
        default: Any = MISSING,
        expires: Expiry | None = None,
        name: str | None = None,
    ) -> Any:
        """Wait for an answer of the type `schema`: any type pydantic knows, or a dict of field names to types.

        What is typed `SecretStr` only a person can give, at a terminal; it is kept out of the journal, and erased when
        the run ends. At `expires` the `default` is taken; without one `RequestExpired` is raised. Raises `InvalidInput`
        when the default does not fit the schema.
        """
        _check_word(f"question {prompt!r}", "by", by, ("anyone", "agent", "human"))
        shape = shape_of(schema)
        fallback = MISSING if default is MISSING else _journaled(default, f"the default of {prompt!r}")
        if fallback is not MISSING:
            shape.load(fallback)
        if secret_places(shape.schema):
            by = "human"
            if fallback is not MISSING:
                raise StepError(f"{prompt!r} asks for a secret, which has no default: it would stand in the journal.")
        terms = fingerprint.of(["input", prompt, shape.schema, by])
        settled = await self._attempt.wait(
            "input",
            name or prompt,
            prompt,
            terms,
            schema=shape.schema,
            by=by,
            default=fallback,
            expires=self._expiry(expires),
            accept=lambda value: shape.load(self._attempt.masking.reveal(value, shape.schema)),
        )
        if settled.status == "answered":
            return shape.load(self._attempt.masking.reveal(settled.value, shape.schema))
        if fallback is MISSING:
            raise RequestExpired(f"Nobody answered {prompt!r} in time, and it has no default.")
        return shape.load(fallback)

    async def wait_for(
        self,
        event: str,
        schema: Any = Any,
        *,
        match: Mapping[str, Any] | None = None,
        timeout: Expiry | None = None,
        default: Any = MISSING,
        name: str | None = None,
    ) -> Any:
        """Wait for an event that `send_event` sends, and return its payload as the type `schema`.

        `match` names values that the payload must have, with dots between the levels: `{"order.id": 17}`. One that was
        sent to this run before it waited is taken at once; if it does not fit the schema it is put aside, which the
        journal says, and the wait goes on. After `timeout` the `default` is taken; without one `RequestExpired` is
        raised. Raises `StepError` for a name of more than 200 characters.
        """
        if not 0 < len(event) <= LONGEST_EVENT:
            raise StepError(f"An event's name has 1 to {LONGEST_EVENT} characters, not {len(event)}.")
        shape = shape_of(schema)
        if secret_places(shape.schema):
            raise StepError(f"Event {event!r} can't bring a secret: it would stand in the journal. Use flow.ask.")
        wanted = _journaled(dict(match or {}), f"what event {event!r} must match")
        fallback = MISSING if default is MISSING else _journaled(default, f"the default of event {event!r}")
        if fallback is not MISSING:
            shape.load(fallback)
        data = {"event": event} | ({"match": wanted} if wanted else {})
        settled = await self._attempt.wait(
            "event",
            name or event,
            f"the event {event!r}",
            fingerprint.of(["event", data, shape.schema]),
            schema=shape.schema,
            data=data,
            default=fallback,
            expires=self._expiry(timeout),
            accept=shape.load,
        )
        if settled.status == "answered":
            return shape.load(settled.value)
        if fallback is MISSING:
            raise RequestExpired(f"The event {event!r} did not come in time, and the wait has no default.")
        return shape.load(fallback)

    async def sleep(
        self, seconds: float | timedelta | None = None, *, until: datetime | None = None, name: str | None = None
    ) -> None:
        """Sleep for `seconds`, or until a moment, whichever processes come and go meanwhile; not at all if it is past.

        `resume(request_id=…)` ends a sleep early. Raises `StepError` unless exactly one of the two is given.
        """
        if (seconds is None) is (until is None):
            raise StepError("flow.sleep takes seconds, or until=…, and not both.")
        if until is not None:
            what, terms = f"until {until.astimezone(UTC).isoformat()}", until.astimezone(UTC).isoformat()
        else:
            assert seconds is not None
            length = seconds.total_seconds() if isinstance(seconds, timedelta) else float(seconds)
            what, terms = f"for {length:g} s", f"{length!r}"
        moment = self._expiry(until if until is not None else seconds)
        await self._attempt.wait(
            "timer", name or "sleep", f"sleep {what}", fingerprint.of(["timer", terms]), expires=moment
        )

    @property
    def retry_input(self) -> Any:
        """What somebody gave for the `Retriable(ask=…)` that the running step raised before, as plain JSON (a model's
        fields as a dict); None if nothing was."""
        return self._attempt.retry_input()

    # --- what would differ between attempts ---

    async def now(self, name: str = "now") -> datetime:
        """The time, UTC, the same in every attempt."""
        text = await self._attempt.value(name, lambda: self._attempt.store.now().isoformat())
        return datetime.fromisoformat(text)

    async def random(self, name: str = "random") -> float:
        """A random number from 0 up to 1, the same in every attempt."""
        return float(await self._attempt.value(name, random.random))

    async def uuid(self, name: str = "uuid") -> uuid.UUID:
        """A random UUID, the same in every attempt."""
        return uuid.UUID(await self._attempt.value(name, lambda: str(uuid.uuid4())))

    # --- remarks ---

    async def log(self, message: str, level: Literal["debug", "info", "warning"] = "info") -> None:
        """Put a line into the journal, once however often it is replayed."""
        await self._attempt.log(message, level)

    async def progress(self, done: float, total: float | None = None, message: str | None = None) -> None:
        """Say how far the run is; whoever watches it is told."""
        await self._attempt.progress(done, total, message)

    async def attach(self, name: str, content: bytes) -> str:
        """Keep a file in the run's folder; returns its path. Raises `StepError` for a name that is a path."""
        return await self._attempt.attach(name, content)

    def secret(self, name: str) -> str:
        """A secret from `MCP_FLOW_SECRET_<NAME>`, else `secrets.toml` in the home folder; masked wherever it shows.

        Raises `StepError` when there is none, or when `secrets.toml` can be read by others.
        """
        return self._attempt.masking.secret(name)

    def _expiry(self, expires: Expiry | None) -> timedelta | datetime | None:
        """A moment in UTC, or how long after the wait has begun; raises `StepError` for what is no time."""
        try:
            match expires:
                case None:
                    return None
                case datetime():
                    return expires.astimezone(UTC)
                case timedelta():
                    length = expires
                case _:
                    length = timedelta(seconds=float(expires))
            self._attempt.store.now() + length  # past the end of all dates it is refused here
        except (OverflowError, ValueError, TypeError) as error:
            raise StepError(f"{expires!r} is no time to wait for: {error}. Give seconds, or a moment.") from error
        return length


def _check_word(what: str, option: str, given: object, words: Sequence[str]) -> None:
    """Raise `StepError` for a word that an option does not know: a misspelt `by` would ask the wrong one."""
    if given not in words:
        raise StepError(f"{option}={given!r} of {what} is none of {', '.join(map(repr, words))}.")


def shape_of(schema: Any) -> Codec:
    """The codec of an answer: a type as it is, a dict or a list of field names as a form.

    Raises `StepError` for what no JSON Schema can describe: nobody could be told what to answer.
    """
    try:
        shape = _shape(schema)
        described = schema is Any or bool(shape.schema)
    except (PydanticUserError, TypeError, ValueError, NameError) as error:
        raise StepError(f"{schema!r:.200} has no JSON Schema, so it can't be asked for: {error}") from error
    if not described:
        raise StepError(
            f"{schema!r:.200} has no JSON Schema, so it can't be asked for. Use a type that pydantic knows, or a dict "
            "or a list of fields."
        )
    return shape


def _shape(schema: Any) -> Codec:
    if isinstance(schema, Mapping):
        return _form({key: value if isinstance(value, tuple) else (value, ...) for key, value in schema.items()})
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return _form(dict.fromkeys(schema, (str, ...)))
    return codec(schema)


def _form(fields: dict[str, Any]) -> Codec:
    return codec(create_model("Answer", **fields))


def _journaled(value: Any, what: str) -> Any:
    """`value` as plain JSON; models and dates as JSON writes them. Raises `StepError`."""
    try:
        plain = to_jsonable_python(value, inf_nan_mode="constants")
        codec(MISSING).encode(plain)
    except (PydanticSerializationError, ValueError, TypeError) as error:
        raise StepError(f"{what} can't be written as JSON: {error}.") from error
    return plain
