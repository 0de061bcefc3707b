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

from pydantic import create_model
from pydantic_core import PydanticSerializationError, to_jsonable_python

from mcp_flow import fingerprint
from mcp_flow.definition import MISSING, Codec, codec
from mcp_flow.errors import Denied, RequestExpired, StepError

if TYPE_CHECKING:
    from playwright.async_api import Page

    from mcp_flow.attempt import Attempt
    from mcp_flow.scope import Scope

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
        shown = _journaled(data, f"the data of approval {question!r}")
        terms = fingerprint.of(["approval", question, shown, by])
        settled = await self._attempt.wait(
            "approval", name or question, question, terms, data=shown, by=by, expires=self._moment(expires)
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

        At `expires` the `default` is taken; without one `RequestExpired` is raised. Raises `InvalidInput` when the
        default does not fit the schema.
        """
        shape = _shape(schema)
        fallback = MISSING if default is MISSING else _journaled(default, f"the default of {prompt!r}")
        if fallback is not MISSING:
            shape.load(fallback)
        terms = fingerprint.of(["input", prompt, shape.schema, by])
        settled = await self._attempt.wait(
            "input",
            name or prompt,
            prompt,
            terms,
            schema=shape.schema,
            by=by,
            default=fallback,
            expires=self._moment(expires),
            accept=shape.load,
        )
        if settled.status == "answered":
            return shape.load(settled.value)
        if fallback is MISSING:
            raise RequestExpired(f"Nobody answered {prompt!r} in time, and it has no default.")
        return shape.load(fallback)

    # --- what would differ between attempts ---

    async def now(self, name: str = "now") -> datetime:
        """The time, UTC, the same in every attempt."""
        text = await self._attempt.value(name, lambda: datetime.now(UTC).isoformat())
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
        return self._attempt.secret(name)

    def _moment(self, expires: Expiry | None) -> datetime | None:
        match expires:
            case None:
                return None
            case datetime():
                return expires.astimezone(UTC)
            case timedelta():
                return self._attempt.store.now() + expires
            case _:
                return self._attempt.store.now() + timedelta(seconds=expires)


def _shape(schema: Any) -> Codec:
    """The codec of an answer: a type as it is, a dict or a list of field names as a form."""
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
