"""One pass of a workflow's function: replay what the journal holds, run the rest, wait, and stop.

`Flow` is its face to authors, `worker.py` its owner. It writes under the epoch it was given, so whatever it does after
losing the run is refused by the store.
"""

from __future__ import annotations

import asyncio
import functools
import json
import secrets as tokens
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import anyio

from mcp_flow import events as ev
from mcp_flow import fingerprint, replay, scope
from mcp_flow.artifacts import Artifacts
from mcp_flow.browser.gate import HeldCall
from mcp_flow.browser.session import BROWSER_ENDED, Checkpoint, OnEvent, Session, is_popup
from mcp_flow.config import Settings
from mcp_flow.definition import MISSING, Codec, Workflow, annotation_of, codec
from mcp_flow.errors import (
    FlowError,
    IllegalEvent,
    InvalidInput,
    LeaseLost,
    OutsideRun,
    Retriable,
    StepError,
    StepResultError,
    StoreError,
)
from mcp_flow.failures import LONGEST_MESSAGE, Exited, describe, told
from mcp_flow.flow import Flow, StepOptions, shape_of
from mcp_flow.masking import Masking
from mcp_flow.pages import Pages
from mcp_flow.run import Request, Run, Step, takes
from mcp_flow.secrets import secret_places
from mcp_flow.store import Store
from mcp_flow.tries import Start, TryFailed, invoke, seconds_before_next

P = ParamSpec("P")
T = TypeVar("T")
Outcome = Literal["finished", "failed", "suspended", "cancelled", "lost"]
OpenSession = Callable[[Run, OnEvent, Checkpoint | None], Coroutine[Any, Any, Session]]

START_DELAY = 0.05
"""Within which the start of a plain step is written, unless its end comes first."""
SETTLE = 0.05
"""How long nothing may happen before several branches count as waiting."""
UNSEEN = frozenset({"timer", "event", "takeover"})
"""The requests for whose opening no record of the page is kept."""
_QUOTING = frozenset({"dialog", "download", "popup", "not-reached"})
"""What the browser does by itself that is told in words or addresses of the page: it may say what was typed."""
DOWNLOAD_SECONDS = 1.0
"""How long a wait is put off for downloads under way, so that whoever looks finds them."""


@dataclass(frozen=True, slots=True)
class PutAside:
    """A request whose answer only the workflow's own type has refused, and why."""

    request: Request
    why: str


def _by_flow(
    call: Callable[Concatenate[Attempt, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Attempt, P], Coroutine[Any, Any, T]]:
    """A call of `Flow`: while it is under way its branch does not count as waiting, but for an answer."""

    @functools.wraps(call)
    async def counted(self: Attempt, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self._calls += 1
        try:
            return await call(self, *args, **kwargs)
        finally:
            self._calls -= 1
            self._touch()
            if self._waits:
                self._check_idle_soon()

    return counted


class Attempt:
    """Executes one run from its top until it finishes, fails or is suspended."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        run: Run,
        epoch: int,
        workflow: Workflow[..., Any],
        source_line: Callable[[str, int], str | None],
        open_session: OpenSession,
        announce: Callable[[str], None],
        lease_is_fresh: Callable[[float], bool],
        slots: AbstractAsyncContextManager[Any] | None,
    ) -> None:
        self.settings = settings
        self.store = store
        self.run = run
        self.pages = Pages(
            store, run, self._append, partial(open_session, run, self._on_page_event), self._attached, epoch
        )
        self.masking = Masking(settings, store, run.run_id, self.pages)
        self.number = run.attempt + 1
        self.finishing = False
        self.suspending: asyncio.Task[None] | None = None
        self.waiting_since: float | None = None
        self._interrupted: StoreError | None = None
        self._epoch = epoch
        self._workflow = workflow
        self._source_line = source_line
        self._announce = announce
        self._lease_is_fresh = lease_is_fresh
        self._ours_since = time.monotonic()
        self._slots = slots or nullcontext()
        self._retry_inputs: dict[str, Any] = {}
        self._reached: set[str] = set()
        self._changed: list[str] = []
        self._artifacts = Artifacts(settings, run.run_id, self.pages, self._append)
        self._noting = asyncio.Lock()
        self._root: asyncio.Task[Any] | None = None
        self._gate = asyncio.Event()
        self._gate.set()
        self._closed = False
        self._busy: dict[str, str] = {}
        self._asked: set[str] = set()
        self._activity = 0
        self._calls = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waits: dict[str, asyncio.Future[None]] = {}
        self._idle_check: asyncio.TimerHandle | None = None
        self._let_pass: dict[str, str] = {}
        self._starts: dict[str, Start] = {}
        self._starts_timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Task[Any]] = set()
        self._observing: set[asyncio.Task[None]] = set()
        self._held = False
        self._taken: ev.HijackRequested | None = None
        self._given_up = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()

    @property
    def waiting(self) -> bool:
        """Whether every branch waits, so that the coroutine may be dropped without loss."""
        return self.run.idle

    def owns(self, file: str, line: int) -> bool:
        """Whether this line is of the workflow's own code."""
        return self._source_line(file, line) is not None

    # --- the pass ---

    async def execute(self) -> Outcome:
        """Run the function to its end, whatever that is, and journal it.

        Raises `StoreError` where the journal could not be written: then nothing more of the attempt is in it.
        """
        try:
            await self._append(ev.AttemptStarted(attempt=self.number, revision=self.run.revision))
            await self.masking.learn()
            self.refresh()
            self._root = asyncio.create_task(self._call(), name=f"{self.run.run_id} attempt {self.number}")
            given_up = asyncio.create_task(self._given_up.wait())
            await asyncio.wait({self._root, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if self._closed:
                return await self._give_up()
            given_up.cancel()
            await self._finish(await self._root)
            return "finished"
        except BaseException as error:  # the boundary to the author's code: it may raise anything
            if error is self._interrupted:
                raise
            if not self._closed and (what := await self.pages.lost(error)) and not self._closed:
                await self.suspend(0, lost=what)
            return await self._end_with(error)
        finally:
            self._closed = True
            self._announce(self.run.run_id)

    async def _end_with(self, error: BaseException) -> Outcome:
        """Journal the error that ended the function, unless the run was ended or lost meanwhile."""
        await self.store.run(self.run.run_id)
        if isinstance(error, LeaseLost) and not self.run.ended:
            return "lost"
        if not self._closed and not self.run.ended:
            try:
                await self._fail(error)
                return "failed"
            except (LeaseLost, IllegalEvent):
                await self.store.run(self.run.run_id)
            except asyncio.CancelledError:
                if not self._interrupted:
                    raise
        if self._closed:
            # Somebody ends the attempt, perhaps because its pages are lost, and what follows has to wait for that.
            return await self._give_up()
        return "cancelled" if self.run.ended else "lost"

    def _superseded(self) -> bool:
        """Whether somebody has had the run go on anew, of which this attempt has not been told yet."""
        ours = self.run.owner is not None and self.run.epoch == self._epoch
        return ours and not self.run.ended and not self.run.active and self.run.attempt == self.number

    async def _give_up(self) -> Outcome:
        await self._given_up.wait()
        if self._interrupted and not self.run.ended:
            raise self._interrupted
        return "cancelled" if self.run.ended else "suspended"

    async def _call(self) -> Any:
        assert self.run.created
        arguments = self._workflow.arguments(self.run.created.input)
        with scope.Scope():
            try:
                value = await self._workflow.fn(Flow(self), **arguments)
                await self._enter()  # whoever is about to take the page must not see it closed instead
                return value
            except (SystemExit, KeyboardInterrupt) as error:
                raise Exited(error) from error

    async def _finish(self, value: Any) -> None:
        output = self._workflow.dump_output(value)
        self.masking.refuse(json.dumps(output), "the workflow's output")

        def plan(run: Run) -> list[ev.Event]:
            compared = self._compared(run, ended=True)
            moot = [
                ev.RequestWithdrawn(request_id=request.opened.request_id, reason="the run finished")
                for request in run.open_requests()
            ]
            return [*moot, *compared, ev.RunFinished(output=output)]

        await self._settle_pages(self.settings.grace)
        self.finishing = True
        await self._decide(plan)

    async def _fail(self, error: BaseException) -> None:
        await self.pages.explain(error)
        failure = await self._described(error, None)
        await self._settle_pages(self.settings.grace)
        artifacts = await self._keep_evidence(f"failure-{self.run.attempt}")
        failure = failure.model_copy(update={"artifacts": artifacts})
        await self.pages.checkpoint()

        def plan(run: Run) -> list[ev.Event]:
            # Whoever was about to take the page has it now: nothing of the run stops any more.
            taken = [ev.RunHijacked(step=failure.step)] if run.hijack and run.hijack.stopped is None else []
            return [*self._compared(run), *taken, ev.RunFailed(error=failure)]

        await self._decide(plan)

    async def suspend(self, grace: float, *, lost: str | None = None) -> None:
        """Stop the attempt where it is: no new step begins, one in flight may end within `grace` seconds.

        With `lost` its pages are gone, which is journaled, and what is left of them is closed.
        """
        self._closed = True
        self._gate.set()
        try:
            # A step that is held at an action does not end by waiting for it.
            with anyio.move_on_after(0 if self._held else grace):
                await self._quiet.wait()
            if not self.run.ended and not lost:
                await self.pages.checkpoint(amid_steps=bool(self._busy or self._interrupted))
            if self._root and not self._root.done():
                self._root.cancel("suspended")
                await asyncio.wait([self._root], timeout=5)
            if not self.run.ended and not lost:
                # After the cancellation: a step must not end well because its question was dismissed.
                await self._settle_pages(grace)
            if lost:
                with suppress(LeaseLost, IllegalEvent):
                    await self._append(ev.PageLost(what=lost))
                await self.pages.close()
            if not self.run.ended:
                await self.detach()
        finally:
            self._given_up.set()

    def _lose(self, what: str) -> None:
        """End the attempt, because its pages are gone: the next one rebuilds them."""
        if not self._closed:
            self._closed = True
            # However short they were: whoever reads of the loss wants to know under which steps it was.
            self._write_starts()
            self.suspending = asyncio.create_task(self.suspend(self.settings.grace, lost=what))

    def _interrupt(self, error: StoreError) -> None:
        """End the attempt, because the journal can't be written: what it does from now on would be lost."""
        if not self._closed:
            self._closed, self._interrupted = True, error
            self.suspending = asyncio.create_task(self.suspend(self.settings.grace))

    async def _journaled(self, writing: Awaitable[T]) -> T:
        """The outcome of a write; where the journal can't be written, or the run goes on anew by now, no code of the
        author goes on with that."""
        try:
            return await writing
        except IllegalEvent as error:
            await self.store.run(self.run.run_id)
            if not self._closed and self._superseded():
                self._closed = True
                self.suspending = asyncio.create_task(self.suspend(self.settings.grace))
            if self._closed:
                raise asyncio.CancelledError("the attempt is over") from error
            raise
        except StoreError as error:
            self._interrupt(error)
            raise asyncio.CancelledError("the journal can't be written") from error

    async def detach(self) -> None:
        """Close the attempt's browser connection: code that ignored its cancellation reaches no page any more."""
        self._closed = True
        if self._idle_check:
            self._idle_check.cancel()
        await self.pages.detach()

    # --- steps ---

    @_by_flow
    async def step(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], options: StepOptions) -> Any:
        """`Flow.step`: reuse, run or doubt, as the journal says."""
        await self._enter(f"flow.step({name!r})", name)
        key = self._key(name)
        digest = fingerprint.of_call(fn, args, self.masking.mask_given)
        shape = codec(annotation_of(fn))
        self._reached.add(key)
        match replay.reach_step(self.run, key, digest, once=options.once):
            case replay.Reuse(step, deviates):
                if step.code and step.code != fingerprint.of_code(fn):
                    self._changed.append(key)
                if deviates:
                    await self._append(ev.StepNondeterministic(key=key, fingerprint=digest))
                if self.pages.rebuilding:
                    self.pages.restored_here = step.restore
                    if step.restore:
                        await self._redo_step(name, step, fn, args, options)
                return self._load(name, shape, step.value)
            case replay.Doubt(why):
                settled, value = await self._ask_doubt(name, key, digest, why, shape)
                if settled:
                    return value
            case replay.Execute(reset) if reset:
                generation = self.run.generation(key) + 1
                await self._append(ev.StepReset(key=key, generation=generation, reason=reset))
        await self._await_help(key)
        await self._pause_before(name, key)
        await self.pages.end_restoring()
        return await self._run_step(name, key, digest, shape, fn, args, options)

    async def _pause_before(self, name: str, key: str) -> None:
        """Stop before a new step where whoever started or resumed the run asked for that."""
        assert self.run.created
        created = self.run.created
        step = self.run.steps.get(key)
        if step is not None and step.status == "started" and step.generation == self.run.generation(key):
            return  # it has begun already, and was let pass then
        named = {name, key, key.rpartition("#")[0]} & set(created.pause_before)
        stops = not self.settings.production and bool(created.single_step or named)
        reason, generation = f"before step {name!r}", self.run.generation(key)
        while True:
            # One request a generation for a breakpoint; for a budget one each time that it was given and is spent.
            terms = f"{generation}:{self.run.budget_seq}"
            asked = self.run.wait(f"{key}|")
            if asked and not asked.opened.fingerprint.startswith(f"{generation}:"):
                asked = None
            if asked and asked.status == "open":
                terms, reason = asked.opened.fingerprint, asked.opened.prompt
            elif self._budget_is_spent() and (asked is None or asked.opened.fingerprint != terms):
                reason = f"before step {name!r}: as many steps as resume allowed have begun"
            elif asked or not stops:
                break
            await self._wait_for(f"{key}|", "pause", reason, terms)
        if self.run.budget is not None:
            self._let_pass[key] = self._begun(key)

    def _budget_is_spent(self) -> bool:
        """Whether as many steps as `resume` allowed have begun, or were let pass and are about to."""
        if self.run.budget is None:
            return False
        # Between the word that it may begin and its start in the journal a step counts here only.
        self._let_pass = {key: begun for key, begun in self._let_pass.items() if self._begun(key) == begun}
        return self.run.budget <= len(self._let_pass)

    def _begun(self, key: str) -> str:
        """What changes in the journal when a step begins."""
        step = self.run.steps.get(key)
        return step.started_at + step.status if step else ""

    async def _run_step(
        self,
        name: str,
        key: str,
        digest: str,
        shape: Codec,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        options: StepOptions,
    ) -> Any:
        number, code = 0, fingerprint.of_code(fn)
        while True:
            number += 1
            started = ev.StepStarted(
                key=key,
                fingerprint=digest,
                generation=self.run.generation(key),
                number=number,
                once=options.once,
                restore=options.restore,
                url=self._moved_to(),
                code=code,
            )
            try:
                async with self._slots:
                    return await self._try_step(name, started, shape, fn, args, options)
            except TryFailed as failed:
                error, wait = failed.error, failed.retry_in
            if wait is not None:
                await asyncio.sleep(wait)
                await self._enter(f"flow.step({name!r})", name)
            elif options.once and not isinstance(error, Retriable):
                since = self.run.steps[key].started_at
                why = f"it started at {since} and raised {type(error).__name__}: {told(error)}"
                why = self.masking.mask(why)[:LONGEST_MESSAGE]
                settled, value = await self._ask_doubt(name, key, digest, why, shape)
                if settled:
                    return value
                number = 0
            elif options.on_fail == "continue":
                await self._append(ev.StepFinished(key=key, generation=started.generation, value=None))
                return None
            elif isinstance(error, Retriable):
                await self._ask_for_help(name, key, error)
                number = 0
            else:
                raise error

    async def _ask_for_help(self, name: str, key: str, error: Retriable) -> None:
        """Stop at a step that may be tried again, until somebody says so; with a form, if it wants a value."""
        shape = shape_of(error.ask) if error.ask is not None else None
        prompt = self.masking.mask(f"Step {name!r} failed and can be tried again: {told(error)}")[:LONGEST_MESSAGE]
        await self._wait_for(
            f"{key}!",
            "input" if shape else "pause",
            prompt,
            self._help_terms(key),
            schema=shape.schema if shape else None,
            by="human" if shape and secret_places(shape.schema) else "anyone",
        )
        self._take_help(key)

    async def _await_help(self, key: str) -> None:
        """Wait, in a later attempt, for the word that a step which may be tried again had asked for."""
        request = self.run.wait(f"{key}!")
        # What was given for an earlier failure is still there for a later try, but not once the step was reset.
        if request and request.opened.fingerprint.startswith(f"{self.run.generation(key)}:"):
            opened = request.opened
            await self._wait_for(
                opened.key, opened.kind, opened.prompt, opened.fingerprint, schema=opened.answer_schema, by=opened.by
            )
            self._take_help(key)

    def _help_terms(self, key: str) -> str:
        """One request a failure: how often the step has failed is what tells them apart."""
        return f"{self.run.generation(key)}:{self.run.failures(key)}"

    def _take_help(self, key: str) -> None:
        request = self.run.wait(f"{key}!")
        self._retry_inputs[key] = self.masking.reveal(request.value, request.opened.answer_schema) if request else None

    def retry_input(self) -> Any:
        """`Flow.retry_input`."""
        return self._retry_inputs.get(scope.running_key() or "")

    async def _try_step(
        self,
        name: str,
        started: ev.StepStarted,
        shape: Codec,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        options: StepOptions,
    ) -> Any:
        """One try; raises `TryFailed` once its failure is journaled."""
        key, generation = started.key, started.generation
        self._begin(key, name)
        start = self._starts[key] = Start(started, self._append, self.append_soon)
        if self._starts_timer is None:
            # One timer for all, armed only while steps run: most steps end before it would do anything.
            self._starts_timer = asyncio.get_running_loop().call_later(START_DELAY, self._write_starts)
        clock = time.perf_counter()
        try:
            if options.once:
                await start.write()
            value = await invoke(name, fn, args, options.timeout, key)
            text, live = self._encode(name, shape, value)
            ms = round((time.perf_counter() - clock) * 1000, 3)
            finished = ev.StepFinished(key=key, generation=generation, value=json.loads(text), ms=ms)
            await self._append(*await start.unwritten(), finished, places=self.pages.moved())
            self.pages.keep_soon()
            return live
        except (LeaseLost, IllegalEvent):
            raise
        except Exception as error:
            await self._see_that_it_failed(name, error)
            effect_free = isinstance(error, Retriable)
            again = started.number <= options.retries and (not options.once or effect_free)
            retry_in = seconds_before_next(options.backoff, started.number) if again else None
            failed = ev.StepFailed(
                key=key,
                generation=generation,
                number=started.number,
                error=await self._described(error, name),
                effect_free=effect_free,
                retry_in=retry_in,
            )
            await self._append(*await start.unwritten(), failed)
            raise TryFailed(error, retry_in) from error
        finally:
            self._starts.pop(key, None)
            self._end(key)

    async def _redo_step(
        self, name: str, step: Step, fn: Callable[..., Any], args: tuple[Any, ...], options: StepOptions
    ) -> None:
        """Do a finished step again on pages that are being rebuilt, tried like any other; its old result stands."""
        number = 0
        while True:
            number += 1
            async with self._slots:
                self._begin(step.key, name)
                try:
                    await self.pages.go_to(step.url)
                    await invoke(name, fn, args, options.timeout, step.key)
                    return
                except (LeaseLost, IllegalEvent):
                    raise
                except Exception as error:
                    await self._see_that_it_failed(name, error)
                    if number > options.retries:
                        if options.on_fail == "continue":
                            return
                        raise
                finally:
                    self._end(step.key)
            await asyncio.sleep(seconds_before_next(options.backoff, number))
            await self._enter(f"flow.step({name!r})", name)

    async def _see_that_it_failed(self, name: str, error: Exception) -> None:
        """Say of which step an error is, and why; one of a lost page is no failure, and ends the attempt."""
        if what := await self.pages.lost(error):
            # No end of the step is journaled: it did not fail, it was interrupted.
            self._lose(what)
            raise asyncio.CancelledError("the page was lost") from error
        await self.pages.explain(error)
        with suppress(AttributeError):
            setattr(error.exit if isinstance(error, Exited) else error, "mcp_flow_step", name)  # noqa: B010

    def _moved_to(self) -> str | None:
        """Where the main page is, unless the journal knows; one that holds a secret is not journaled."""
        url = self.pages.url
        return None if url == self.run.url or (url and self.masking.holds_secret(json.dumps(url))) else url

    async def _ask_doubt(self, name: str, key: str, digest: str, why: str, shape: Codec) -> tuple[bool, Any]:
        """Let somebody look; returns whether the step counts as done, and its value then."""
        prompt = (
            f"Step {name!r} runs only once, and {why}. Look at the page, then say whether it was done: "
            'resume with step="done" and its value, or step="again".'
        )
        step, generation = self.run.steps.get(key), self.run.generation(key)
        finished = step is not None and step.status == "finished"
        # A key of its own: asking anew moves a key to its next generation, and in that the step would just run.
        terms = f"{generation}:{digest}" if finished else f"{generation}"
        known = step.value if finished and step else MISSING
        settled = await self._wait_for(
            f"{key}?",
            "in-doubt",
            prompt,
            terms,
            schema=shape.schema,
            data=why,
            default=known,
            accept=lambda answer: answer["step"] == "again" or shape.load(answer.get("value")),
        )
        answer = settled.value
        if answer["step"] == "again":
            await self._append(ev.StepReset(key=key, generation=generation + 1, reason="somebody looked: again"))
            return False, None
        value = shape.load(answer.get("value"))
        text, live = self._encode(name, shape, value)
        moves: list[ev.Event] = []
        if finished:
            generation += 1
            moves.append(ev.StepReset(key=key, generation=generation, reason="somebody looked: done"))
            code = step.code if step else ""
            moves.append(ev.StepStarted(key=key, fingerprint=digest, generation=generation, once=True, code=code))
        await self._append(*moves, ev.StepFinished(key=key, generation=generation, value=json.loads(text)))
        return True, live

    # --- waits ---

    @_by_flow
    async def wait(
        self,
        kind: ev.RequestKind,
        name: str,
        prompt: str,
        terms: str,
        *,
        schema: dict[str, Any] | None = None,
        data: Any = None,
        by: ev.By = "anyone",
        default: Any = MISSING,
        expires: timedelta | datetime | None = None,
        accept: Callable[[Any], Any] = lambda value: None,
    ) -> Request:
        """Wait for what `prompt` asks for; returns the request once it is answered or expired.

        A time that `expires` gives as a length begins when the request is opened. An answer that `accept` refuses with
        `InvalidInput` is put aside, and the same is asked again.
        """
        # Asked here: a moment that passes while somebody has the page, or while it is rebuilt, was right when given.
        due = None if kind == "timer" else self._moment(expires)
        past = due is not None and due <= self.store.now()
        await self._enter(f"the wait {prompt!r}", name)
        key = self._key(name)
        self._reached.add(key)
        if isinstance(replay.reach_wait(self.run, key, terms), replay.Ask):
            shown = [prompt, data, schema, None if default is MISSING else default]
            self.masking.refuse(json.dumps(shown), f"the request {name!r}")
        # What was asked before, and is asked anew, has a deadline that may have passed meanwhile.
        if past and key not in self.run.waits:
            raise StepError(
                f"The deadline of {prompt!r:.200} is in the past: {expires}. Give seconds, a timedelta, or a moment to "
                "come."
            )
        return await self._wait_for(
            key,
            kind,
            prompt,
            terms,
            schema=schema,
            data=data,
            by=by,
            default=default,
            expires=expires,
            accept=accept,
        )

    async def _wait_for(
        self,
        key: str,
        kind: ev.RequestKind,
        prompt: str,
        terms: str,
        *,
        schema: dict[str, Any] | None = None,
        data: Any = None,
        by: ev.By = "anyone",
        default: Any = MISSING,
        expires: timedelta | datetime | None = None,
        accept: Callable[[Any], Any] = lambda value: None,
    ) -> Request:
        put_aside: PutAside | None = None
        while True:
            settled = await self._wait_once(
                key,
                kind,
                prompt,
                terms,
                schema=schema,
                data=data,
                by=by,
                default=default,
                expires=expires,
                put_aside=put_aside,
            )
            try:
                if settled.status == "answered":
                    accept(settled.value)
                return settled
            except InvalidInput as error:
                # What a check says of a value quotes it, as a rule.
                said = "the workflow's own check refused the answer" if secret_places(schema) else str(error)
                put_aside = PutAside(settled, self.masking.mask(said)[:500])

    async def _wait_once(
        self,
        key: str,
        kind: ev.RequestKind,
        prompt: str,
        terms: str,
        *,
        schema: dict[str, Any] | None,
        data: Any,
        by: ev.By,
        default: Any,
        expires: timedelta | datetime | None,
        put_aside: PutAside | None,
    ) -> Request:
        request_id = f"q-{tokens.token_hex(6)}"
        refused = put_aside.request.opened.request_id if put_aside else None
        reached = replay.reach_wait(self.run, key, terms, but=refused)
        if isinstance(reached, replay.Settled):
            return reached.request
        await self.pages.end_restoring()
        if self._alone():
            await self._settle_pages(DOWNLOAD_SECONDS)
        await self.pages.checkpoint(amid_steps=bool(self._busy))
        alone = self._alone()  # asked here, because the plan runs in the store's thread

        def plan(run: Run) -> list[ev.Event]:
            moves: list[ev.Event] = []
            match replay.reach_wait(run, key, terms, but=refused):
                case replay.Settled():
                    return []
                case replay.Waiting(request):
                    waiting_for = request.opened.request_id
                case replay.Ask(instead_of):
                    waiting_for, generation = request_id, run.generation(key)
                    why, due = "the question changed", self._moment(expires)
                    if put_aside:  # it is the same question, with the time that is left of it
                        why, due = put_aside.why, put_aside.request.opened.expires
                    if instead_of:
                        moves += self._ask_instead(instead_of, generation, why)
                        generation += 1
                    moves.append(
                        ev.RequestOpened(
                            request_id=request_id,
                            key=key,
                            kind=kind,
                            prompt=prompt,
                            fingerprint=terms,
                            generation=generation,
                            answer_schema=schema,
                            data=data,
                            by=by,
                            expires=due,
                            default=None if default is MISSING else default,
                            has_default=default is not MISSING,
                            put_aside=put_aside.why if put_aside else None,
                        )
                    )
                    if settled := self._settled_at_once(run, moves[-1]):
                        return [*moves, settled]
            if alone:
                gone = self._not_asked(run, but={waiting_for}, dealt=moves)
                moves += [event for event in gone if event.request_id in self._asked]
                # What an earlier attempt has asked another branch may be about to come to: `_go_idle` waits for that.
                if all(event.request_id in self._asked for event in gone):
                    moves += [] if run.idle and not moves else [*self._compared(run), ev.AttemptIdled()]
            return moves

        await self._decide(plan)
        if kind not in UNSEEN and (opened := self.run.requests.get(request_id)):
            self._spawn(self._keep_stop(f"stop-{opened.seq}"))
        return await self._until_settled(key, terms)

    def _moment(self, expires: timedelta | datetime | None) -> datetime | None:
        return self.store.now() + expires if isinstance(expires, timedelta) else expires

    def _settled_at_once(self, run: Run, opened: ev.Event) -> ev.Event | None:
        """What settles a request in the moment in which it is opened: a time that is past, an event that is there."""
        assert isinstance(opened, ev.RequestOpened)
        if opened.expires and opened.expires <= self.store.now():
            return ev.RequestExpired(request_id=opened.request_id)
        if opened.kind == "event":
            for received in run.inbox:
                if takes(opened, received.name, received.payload):
                    return ev.RequestAnswered(
                        request_id=opened.request_id, value=received.payload, via="event", event=received.seq
                    )
        return None

    async def _until_settled(self, key: str, terms: str) -> Request:
        reached = replay.reach_wait(self.run, key, terms)
        if isinstance(reached, replay.Settled):
            return reached.request
        assert isinstance(reached, replay.Waiting)
        request_id = reached.request.opened.request_id
        if self.run.idle:  # otherwise whoever watches is told once all branches wait
            self._announce(self.run.run_id)
        self._touch()
        self._asked.add(request_id)
        future = self._waits[request_id] = asyncio.get_running_loop().create_future()
        try:
            if self.run.requests[request_id].status == "open":
                self._check_idle_soon()
                await future
        finally:
            self._waits.pop(request_id, None)
            self._touch()
            self._check_idle_soon()
        await self._enter()
        settled = self.run.requests[request_id]
        if secret_places(settled.opened.answer_schema):
            await self.masking.learn_answers()
        return settled

    @staticmethod
    def _ask_instead(request: Request, generation: int, why: str) -> list[ev.Event]:
        withdrawn = ev.RequestWithdrawn(request_id=request.opened.request_id, reason=why)
        reset = ev.StepReset(key=request.opened.key, generation=generation + 1, reason=why)
        return [withdrawn, reset] if request.status == "open" else [reset]

    def _not_asked(
        self, run: Run, but: set[str] | None = None, dealt: Sequence[ev.Event] = ()
    ) -> list[ev.RequestWithdrawn]:
        """The withdrawals of what no branch waits for any more; a person who is to take the page asks from outside."""
        kept = {event.request_id for event in dealt if isinstance(event, ev.RequestWithdrawn)} | (but or set())
        return [
            ev.RequestWithdrawn(request_id=request_id, reason="no longer asked")
            for request_id, request in run.unanswered.items()
            if request_id not in kept and request_id not in self._waits and request.opened.kind != "takeover"
        ]

    def _compared(self, run: Run, *, ended: bool = False) -> list[ev.Event]:
        """What the replay found, where that is news: steps whose code was edited, and steps that it never reached.

        Until the function has returned, a step counts as not reached only if one that first began later was.
        """
        if self.number == 1 and not run.is_fork:
            return []
        began = {key: step.first_seq for key, step in run.steps.items() if step.status == "finished"}
        last = max((began[key] for key in self._reached & began.keys()), default=0)
        unused = [key for key, seq in began.items() if key not in self._reached and (ended or seq < last)]
        found = tuple(self._changed), tuple(unused)
        if found == (run.changed_steps, run.unused_steps):
            return []
        return [ev.AttemptCompared(changed_steps=list(found[0]), unused_steps=list(found[1]))]

    def _alone(self) -> bool:
        """Whether the calling task is the only branch there is, as far as `Flow` was used."""
        return not self._busy and asyncio.current_task() is self._root and self._tasks <= {self._root}

    def _all_wait(self) -> bool:
        """Whether no branch does anything but wait for an answer, as far as `Flow` was used.

        Branches that the function has left behind at its end are not what the run waits for.
        """
        return 0 < len(self._waits) == self._calls and self._root is not None and not self._root.done()

    def _check_idle_soon(self) -> None:
        """Several branches: call the attempt idle once nothing has happened for a moment."""
        if self._idle_check:
            self._idle_check.cancel()
        if self._closed or self.run.idle or not self._all_wait():
            return
        seen = self._activity

        def check() -> None:
            if seen != self._activity:
                self._check_idle_soon()
            elif self._all_wait() and not self._closed:
                self._spawn(self._go_idle())

        self._idle_check = asyncio.get_running_loop().call_later(SETTLE, check)

    async def _go_idle(self) -> None:
        def plan(run: Run) -> list[ev.Event]:
            open_ids = {request.opened.request_id for request in run.open_requests()}
            if run.idle or not self._all_wait() or not open_ids & set(self._waits):
                return []
            return [*self._not_asked(run), *self._compared(run), ev.AttemptIdled()]

        await self._settle_pages(DOWNLOAD_SECONDS)
        with suppress(LeaseLost, IllegalEvent):
            await self._decide(plan)
        self._announce(self.run.run_id)

    # --- values and remarks ---

    @_by_flow
    async def value(self, name: str, make: Callable[[], Any]) -> Any:
        """A value fixed once for all attempts."""
        await self._enter(f"flow.{name}", name)
        key = self._key(name)
        self._reached.add(key)
        step = self.run.steps.get(key)
        if step and step.status == "finished":
            return step.value
        value = make()
        await self._append(ev.ValueRecorded(key=key, value=value))
        return value

    @_by_flow
    async def log(self, message: str, level: Literal["debug", "info", "warning"]) -> None:
        """`Flow.log`."""
        await self._enter()
        key = self._key(f"log {message}")
        if key not in self.run.remarks:
            text = self.masking.mask(message)[:LONGEST_MESSAGE]
            await self._append(ev.Logged(key=key, message=text, level=level))

    @_by_flow
    async def progress(self, done: float, total: float | None, message: str | None) -> None:
        """`Flow.progress`."""
        await self._enter()
        key = self._key(f"progress {done:g} {total} {message}")
        if key not in self.run.remarks:
            text = self.masking.mask(message)[:LONGEST_MESSAGE] if message else None
            await self._append(ev.ProgressReported(key=key, done=done, total=total, message=text))

    @_by_flow
    async def attach(self, name: str, content: bytes) -> str:
        """`Flow.attach`."""
        await self._enter()
        if Path(name).name != name or name.startswith(".") or len(name) > 120 or not name.isprintable():
            raise StepError(f"An attachment's name is a plain file name, not {name!r}.")
        if not isinstance(content, bytes | bytearray):
            raise StepError(f"Attachment {name!r} takes bytes, not {type(content).__name__}.")
        for secret_name in self.masking.held_in(bytes(content)):
            raise StepError(f"Attachment {name!r} holds the secret {secret_name!r}; it was not kept.")
        key = self._key(f"attach {name}")
        if key in self.run.remarks:
            return str(self._artifacts.folder / name)
        return await self._artifacts.keep(name, bytes(content), key)

    async def _described(self, error: BaseException, step: str | None) -> ev.Failure:
        """An error as the journal keeps it: it may quote what was typed, and what a page shows of that."""
        await self.masking.learn_fields()
        return describe(error, step, self._source_line, self.masking.mask)

    # --- the page ---

    @_by_flow
    async def page(self, name: str) -> Any:
        """`Flow.page`."""
        await self._enter(f"flow.page({name!r})")
        return await self._journaled(self.pages.get(name))

    def _attached(self) -> None:
        if self.run.hijack:
            self._hold_actions()

    def _on_page_event(self, what: str, details: dict[str, Any]) -> None:
        """Journal what the browser did by itself, and end the attempt where that took its pages."""
        if self._closed and what not in ("dialog", "download"):
            return
        name = details.get("name")
        task = asyncio.create_task(self._note_page_event(what, details))
        self._observing.add(task)
        task.add_done_callback(self._observing.discard)
        if what == "browser-gone":
            self._lose(BROWSER_ENDED)
        elif what == "page-crashed" and name is not None:
            self._lose(f"the page {name!r} crashed")
        elif what == "page-closed" and name is not None and not is_popup(name) and self.run.idle:
            # The code stands still, so it was somebody else; closed by the workflow itself it stays closed, and a
            # popup that closes has done its work.
            self._spawn(self._lose_closed(f"the page {name!r} was closed while the run waited"))

    async def _note_page_event(self, what: str, details: dict[str, Any]) -> None:
        async with self._noting:  # in which they came
            if what in _QUOTING:
                await self.masking.learn_fields()
            shown = {word: self.masking.mask(str(value))[:LONGEST_MESSAGE] for word, value in details.items() if value}
            observed = ev.PageObserved(what=what, details=shown)
            match what:
                case "popup":
                    opened = ev.PageOpened(name=details["name"], target_id=details["target_id"])
                    await self._observe(opened, observed, epoch=self._epoch)
                case "page-closed" | "page-crashed" if details.get("name") is not None:
                    await self._observe(ev.PageClosed(name=details["name"]), observed)
                case "download" if "path" in details:
                    await self._keep_download(Path(details["path"]), observed)
                case _:
                    await self._observe(observed)

    async def _lose_closed(self, what: str) -> None:
        # Where the browser ends, its pages close a moment before that is known.
        gone = await self.pages.session.lost() if self.pages.session else None
        self._lose(gone or what)

    async def _settle_pages(self, seconds: float) -> None:
        """Before a stop: what the browser did by itself is brought to its end, and is in the journal."""
        await self.pages.settle(seconds)
        if self._observing:
            await asyncio.wait(self._observing)

    async def _keep_download(self, path: Path, observed: ev.PageObserved) -> None:
        with suppress(OSError):  # whoever has removed it does not want it listed
            await self._observe(observed, await self._artifacts.downloaded(path))

    async def _observe(self, *events: ev.Event, epoch: int | None = None) -> None:
        with suppress(FlowError):  # the run may have ended meanwhile
            await self.store.append(self.run.run_id, *events, epoch=epoch)

    async def _keep_evidence(self, moment: str) -> list[str]:
        """A picture and a record of the page at the moment when the run fails or stops."""
        return await self._artifacts.keep_evidence(moment, self.masking.values)

    async def _keep_stop(self, moment: str) -> None:
        with suppress(FlowError):  # the run has gone on, or ended
            await self._keep_evidence(moment)

    # --- from outside ---

    def refresh(self) -> None:
        """Take note of what others wrote into the journal: answers, a hijack, its end."""
        self._settle_waits()
        hijack = self.run.hijack
        if hijack is None:
            self._held = False
            self._gate.set()
            if self.pages.session:
                self.pages.session.release_actions()
        elif self._gate.is_set():
            self._gate.clear()
            self._taken = hijack.requested
            self._hold_actions()
            if hijack.stopped is None and self.run.idle:
                self._spawn(self._stop_between_steps(None))  # it came to its wait before it heard of the hijack
            elif hijack.stopped and all(request.opened.kind in UNSEEN for request in self.run.open_requests()):
                self._keep_hijack_soon()
        elif self._taken is not hijack.requested:
            # Handed back and taken anew before this attempt heard of either: whatever waits at the gate stops again.
            self._taken = hijack.requested
            self._gate.set()
            self._gate.clear()
            self._hold_actions()

    def _settle_waits(self) -> None:
        for request_id, future in list(self._waits.items()):
            if self.run.requests[request_id].status != "open" and not future.done():
                future.set_result(None)

    def _hold_actions(self) -> None:
        if self.pages.session:
            self.pages.session.hold_actions(self._on_held)

    def _on_held(self, call: HeldCall) -> None:
        """An action stands still: the first is where the code stopped, later ones are of its other tasks."""
        self._held = True
        hijack = self.run.hijack
        if hijack and hijack.stopped is None:
            self._spawn(self._stop_at_action(hijack.at, call, scope.running_key()))

    async def _stop_at_action(self, hijacked_at: str, call: HeldCall, key: str | None) -> None:
        session = self.pages.session
        action = await session.describe(call) if session else call.name
        own = (place for place in call.lines if self.owns(*place))
        file, line = next(own, next(iter(call.lines), (None, None)))
        if start := self._starts.get(key or ""):
            start.write_soon()  # who says what became of the step refers to its start
        said = self.masking.mask(action)[:500]
        await self._hijacked(hijacked_at, ev.RunHijacked(step=key, action=said, file=file, line=line))

    async def _stop_between_steps(self, step: str | None) -> None:
        """No step runs and none may begin: the code stands still."""
        hijack = self.run.hijack
        if hijack and hijack.stopped is None and not self._busy:
            await self._hijacked(hijack.at, ev.RunHijacked(step=step))

    async def _hijacked(self, hijacked_at: str, stopped: ev.RunHijacked) -> None:
        """Journal that the code stands still, once, and keep what its page shows.

        A page that was handed back and taken anew since `hijacked_at` is taken from code that has gone on.
        """

        first = False

        def plan(run: Run) -> list[ev.Event]:
            nonlocal first
            first = run.hijack is not None and run.hijack.stopped is None and run.hijack.at == hijacked_at
            return [stopped] if first else []

        with suppress(LeaseLost, IllegalEvent):
            await self._decide(plan)
            if first:
                self._keep_hijack_soon()
        self._announce(self.run.run_id)

    def _keep_hijack_soon(self) -> None:
        self._spawn(self._keep_stop(f"hijack-{self.run.seq}"))

    # --- inside ---

    async def _enter(self, what: str | None = None, step: str | None = None) -> None:
        """The gate before everything that `Flow` does."""
        if self._closed:
            raise asyncio.CancelledError("the attempt is over")
        if what:
            scope.refuse_nesting(what)
        task = asyncio.current_task()
        if task is not None and task not in self._tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._touch()
        if not self._lease_is_fresh(self._ours_since):
            await self._see_that_it_is_ours()
        if self.run.hijack and self._gate.is_set():
            self.refresh()  # the journal knew of it before the doorbell rang
        while not self._gate.is_set():
            if not self._busy:
                await self._stop_between_steps(step)
            await self._gate.wait()
            if self._closed:
                raise asyncio.CancelledError("the attempt is over")

    async def _see_that_it_is_ours(self) -> None:
        """After a standstill another worker may have the run: nothing may be done before the journal has been asked."""
        asked = time.monotonic()
        run = await self.store.run(self.run.run_id)
        if run.epoch != self._epoch or run.owner is None:
            raise LeaseLost(f"Run {run.run_id} was taken over while this process stood still.")
        self._ours_since = asked

    def _key(self, name: str) -> str:
        try:
            # Only with what the code has got in this attempt: a name that came before must stay the same.
            mask = self.masking.mask_given
            return scope.current().key(mask(name) if mask else name)
        except LookupError as error:
            raise OutsideRun(f"{name!r} was called from a task that no run started.") from error

    def scope(self, name: str) -> scope.Scope:
        """`Flow.scope`."""
        scope.refuse_nesting(f"flow.scope({name!r})")
        return scope.current().child(name)

    def _write_starts(self) -> None:
        self._starts_timer = None
        for start in self._starts.values():
            start.write_soon()

    def _begin(self, key: str, name: str) -> None:
        if key in self._busy:
            raise StepError(f"Step {name!r} is running already.")
        self._busy[key] = name
        self._quiet.clear()
        self._touch()

    def _end(self, key: str) -> None:
        self._busy.pop(key, None)
        if not self._busy:
            self._quiet.set()
        self._touch()
        if not self._busy and not self._gate.is_set() and not self._closed:
            self._spawn(self._stop_between_steps(None))

    def _touch(self) -> None:
        self._activity += 1

    async def _append(self, *events: ev.Event, places: str | None = None) -> None:
        await self._journaled(self.store.append(self.run.run_id, *events, epoch=self._epoch, places=places))

    def append_soon(self, event: ev.Event) -> asyncio.Future[Any]:
        """Queue an event without waiting for it; the future ends when it is durable."""
        return self.store.append_soon(self.run.run_id, event, epoch=self._epoch)

    async def _decide(self, plan: Callable[[Run], Sequence[ev.Event]]) -> None:
        await self._journaled(self.store.decide(self.run.run_id, plan, epoch=self._epoch))

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _encode(self, name: str, shape: Codec, value: Any) -> tuple[str, Any]:
        if type(value).__module__.startswith("playwright."):
            return "null", None
        try:
            text, live = shape.encode(value)
        except ValueError as error:
            raise StepResultError(f"The result of step {name!r} can't be journaled: {error}.") from error
        self.masking.refuse(text, f"the result of step {name!r}")
        return text, live

    def _load(self, name: str, shape: Codec, value: Any) -> Any:
        if value is None or shape.keeps(value):
            return value
        try:
            return shape.decode(json.dumps(value))
        except ValueError as error:
            raise StepResultError(
                f"The journaled result of step {name!r} no longer fits: {error}. Resume with rerun=[{name!r}]."
            ) from error
