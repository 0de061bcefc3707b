"""Moves from outside a run: start, resume, approve, hijack, cancel. Every one is a decision on the folded journal.

Nothing here executes workflow code, and nothing depends on who owns the run: a move is an event in the journal, and
the owner, or the next one, acts on it.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import anyio
import jsonschema

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.catalog import Reader
from mcp_flow.channel import Channel
from mcp_flow.config import Settings, check_id
from mcp_flow.errors import (
    Conflict,
    FlowError,
    InvalidInput,
    NotAllowed,
    RunEnded,
    UnknownRequest,
    UnknownRun,
    UnknownStep,
)
from mcp_flow.leases import Leases
from mcp_flow.revisions import Revision, capture
from mcp_flow.run import Request, Run
from mcp_flow.store import RequestRow, RunRow, Store

STOPPED = frozenset({"paused", "waiting-input", "waiting-approval", "in-doubt", "hijacked", "failed"})
"""The statuses in which somebody is needed: what a caller who waits is told of at once."""
ENDED = frozenset({"finished", "cancelled", "continued"})
STATUSES = (
    "queued", "running", "interrupted", "paused", "waiting-input", "waiting-approval", "waiting-event", "waiting-timer",
    "in-doubt", "hijacked", "failed", "finished", "cancelled", "continued",
)  # fmt: skip


class Control:
    """The moves, on one home folder."""

    def __init__(self, settings: Settings, store: Store, reader: Reader, bell: presence.Doorbell) -> None:
        self._settings = settings
        self._store = store
        self._reader = reader
        self._bell = bell
        self._leases = Leases(settings, store)

    # --- start ---

    async def start(
        self,
        workflow: str,
        input: Any,
        *,
        run_id: str | None = None,
        headless: bool = True,
        viewport: tuple[int, int] | None = None,
    ) -> str:
        """Start a run and return its id; the same id, workflow and input again is that same run.

        Raises `UnknownWorkflow`, `BrokenWorkflow`, `InvalidInput`, `InvalidId`, and `Conflict` for an id in use.
        """
        if run_id is not None:
            check_id(run_id, "run")
            with contextlib.suppress(UnknownRun):
                # A client that asks again must get its run, whatever has become of the file meanwhile.
                created = (await self._store.run(run_id)).created
                if created and created.workflow == workflow and created.input == (input or {}):
                    return run_id
        described, revision = await self._reader.describe(workflow)
        normal = await self._reader.validate(revision, described.function, input)
        created = ev.RunCreated(
            workflow=described.name,
            function=described.function,
            root=revision.root,
            entry=revision.entry,
            revision=revision.hash,
            input=normal,
            headless=headless,
            viewport=viewport,
        )
        new_id = run_id or f"{_stem(described.function)}-{secrets.token_hex(4)}"
        await self._store.save_revision(revision.hash, revision.entry, revision.files)
        try:
            await self._store.create(new_id, created)
        except Conflict:
            run = await self._store.run(new_id)
            if run.created and run.created.workflow == created.workflow and run.created.input == normal:
                return new_id
            raise
        await self._wake(new_id)
        return new_id

    # --- go on ---

    async def resume(
        self,
        run_id: str,
        channel: Channel,
        *,
        value: Any = None,
        has_value: bool = False,
        request_id: str | None = None,
        step: Literal["done", "again"] | None = None,
        rerun: Sequence[str] = (),
    ) -> str | None:
        """Let a stopped run go on, under the code as it is now on disk; returns a remark when nothing changed.

        Raises `RunEnded` with a request or value for an ended run, `UnknownStep`, `InvalidInput`, `NotAllowed`.
        """
        run = await self._store.run(run_id)
        if run.ended:
            return f"Run {run_id} is {run.status}; there is nothing to resume."
        if request_id is not None and request_id not in run.requests:
            raise UnknownRequest(f"Run {run_id} has no request {request_id!r}. {_open_ones(run)}")
        keys = [_find_step(run, name) for name in rerun]
        revision = await self._current_revision(run)

        def plan(run: Run) -> list[ev.Event]:
            if run.ended:
                raise RunEnded(f"Run {run_id} is {run.status}; nothing changes it any more.")
            # What makes a new attempt comes before the release: only while it is held does a live run stand still.
            moves: list[ev.Event] = []
            resets = [
                ev.StepReset(key=key, generation=run.generation(key) + 1, reason=f"rerun by {channel.by}")
                for key in keys
            ]
            answers = self._answers(run, channel, value, has_value, request_id, step)
            executing = run.owner is not None and run.active and not run.idle
            if resets and executing and not run.hijack:
                raise NotAllowed(f"Run {run_id} is running; a step can be redone once it has stopped.")
            changed = revision is not None and revision.hash != run.revision
            anew = not executing and (
                run.error is not None or bool(resets) or (run.idle and changed) or (bool(answers) and changed)
            )
            if anew or (run.hijack and run.hijack.stopped and run.active and (resets or changed)):
                moves += resets
                moves.append(ev.RunResumed(revision=revision.hash if revision else run.revision, by=channel.by))
            if run.hijack:
                moves.append(ev.HijackReleased(by=channel.by))
            return [*moves, *answers]

        appended = await self._store.decide(run_id, plan)
        await self._wake(run_id)
        if not appended:
            run = await self._store.run(run_id)
            return f"Nothing changed: run {run_id} is {run.status}. {_open_ones(run)}"
        return None

    def _answers(
        self,
        run: Run,
        channel: Channel,
        value: Any,
        has_value: bool,
        request_id: str | None,
        step: Literal["done", "again"] | None,
    ) -> list[ev.Event]:
        """The answers that a `resume` gives: to the request named, to the one that fits, or to every pause."""
        open_requests = run.open_requests()
        if request_id is not None:
            return [self._answer(run, run.requests[request_id], channel, value, has_value, step)]
        if step is not None:
            chosen = [r for r in open_requests if r.opened.kind == "in-doubt"]
        elif has_value:
            chosen = [r for r in open_requests if r.opened.kind == "input"]
        else:
            return [self._answer(run, r, channel, None, False, None) for r in open_requests if r.opened.kind == "pause"]
        if len(chosen) != 1:
            what = "is in doubt" if step else "waits for a value"
            count = "Nothing" if not chosen else f"More than one thing ({len(chosen)})"
            raise NotAllowed(f"{count} in run {run.run_id} {what}. {_open_ones(run)}")
        return [self._answer(run, chosen[0], channel, value, has_value, step)]

    def _answer(
        self,
        run: Run,
        request: Request,
        channel: Channel,
        value: Any,
        has_value: bool,
        step: Literal["done", "again"] | None,
    ) -> ev.Event:
        opened = request.opened
        _check_open(run, request, value if has_value else None)
        _check_who(request, channel)
        given: Any = None
        match opened.kind:
            case "approval":
                raise NotAllowed(
                    f"Request {opened.request_id} is an approval, which resume does not give: "
                    f"approve(request_id={opened.request_id!r})."
                )
            case "in-doubt":
                if step is None:
                    raise NotAllowed(
                        f"{opened.prompt} The call: resume(run_id={run.run_id!r}, step='done', value=…) or "
                        f"resume(run_id={run.run_id!r}, step='again')."
                    )
                given = {"step": step} | ({"value": _fitting(opened, value)} if step == "done" else {})
            case "input":
                if not has_value:
                    raise NotAllowed(f"Request {opened.request_id} waits for a value: {opened.prompt}")
                given = _fitting(opened, value)
        return ev.RequestAnswered(request_id=opened.request_id, value=given, by=channel.by, via=channel.via)

    async def approve(
        self, request_id: str, channel: Channel, decision: Literal["approve", "deny"], note: str | None
    ) -> str:
        """Decide an approval; returns the run's id. The same decision again is fine, another is a `Conflict`."""
        run_id = await self.run_of(request_id)

        def plan(run: Run) -> list[ev.Event]:
            request = run.requests[request_id]
            if request.opened.kind != "approval":
                raise NotAllowed(
                    f"Request {request_id} is no approval but of kind {request.opened.kind}: "
                    f"resume(run_id={run_id!r}, request_id={request_id!r}, …) answers it."
                )
            approved = decision == "approve"
            if request.status == "answered" and request.value == {"approved": approved}:
                return []
            _check_open(run, request, {"approved": approved})
            _check_who(request, channel)
            return [
                ev.RequestAnswered(
                    request_id=request_id, value={"approved": approved}, note=note, by=channel.by, via=channel.via
                )
            ]

        await self._store.decide(run_id, plan)
        await self._wake(run_id)
        return run_id

    async def cancel(self, run_id: str, channel: Channel, reason: str) -> None:
        """Stop a run for good; its requests are withdrawn. Raises `RunEnded`, unless it is cancelled already."""

        def plan(run: Run) -> list[ev.Event]:
            if run.status == "cancelled":
                return []
            if run.ended:
                raise RunEnded(f"Run {run_id} is {run.status} already; it can't be cancelled.")
            gone = [
                ev.RequestWithdrawn(request_id=request.opened.request_id, reason="the run was cancelled")
                for request in run.open_requests()
            ]
            return [*gone, ev.RunCancelled(reason=reason, by=channel.by)]

        await self._store.decide(run_id, plan)
        await self._wake(run_id)

    async def hijack(self, run_id: str, channel: Channel, reason: str) -> None:
        """Take the page: at once from a run that stands still, at its next action or step from one that runs.

        Raises `RunEnded`, and `Conflict` naming who holds it already.
        """

        def plan(run: Run) -> list[ev.Event]:
            if run.ended:
                raise RunEnded(f"Run {run_id} is {run.status}; its page is closed.")
            if run.hijack:
                held = run.hijack.requested
                raise Conflict(
                    f"Run {run_id} is held by the {held.holder} already since {run.hijack.at}: {held.reason!r}. "
                    f"resume(run_id={run_id!r}) hands it back."
                )
            moves: list[ev.Event] = [ev.HijackRequested(reason=reason, holder="human" if channel.human else "agent")]
            if run.idle or run.owner is None:
                moves.append(ev.RunHijacked())
            return moves

        await self._store.decide(run_id, plan)
        presence.ring(self._settings, run_id)

    # --- watch ---

    async def wait(self, run_id: str, seconds: float, on_news: Callable[[Run], Awaitable[None]] | None = None) -> Run:
        """The run once it has stopped or ended, or after `seconds`; `on_news` is told when its journal has grown."""
        deadline = anyio.current_time() + seconds
        seen = -1
        while True:
            rings = self._bell.rings
            run = await self._store.run(run_id)
            if run.seq != seen and on_news and seen >= 0:
                await on_news(run)
            seen = run.seq
            await self._keep_due()
            if self.at_rest(run) or anyio.current_time() >= deadline:
                return run
            await self._bell.next_ring(min(1.0, deadline - anyio.current_time()), rings)

    @staticmethod
    def at_rest(run: Run) -> bool:
        """Whether the run has stopped where somebody is needed, or has ended."""
        return run.status in STOPPED or run.status in ENDED

    async def run(self, run_id: str) -> Run:
        """The run as it is now; raises `UnknownRun`, `InvalidId`."""
        check_id(run_id, "run")
        return await self._store.run(run_id)

    async def events(self, run_id: str, since: int, limit: int) -> list[ev.Recorded]:
        """A run's events after `since`."""
        return await self._store.events(run_id, since, limit)

    async def runs(
        self, status: Sequence[str], workflow: str | None, query: str | None, limit: int, before: int | None
    ) -> list[RunRow]:
        """The registry, newest first; a run that may be `interrupted` is among those asked for by that word."""
        if unknown := [word for word in status if word not in STATUSES]:
            raise InvalidInput(f"There is no status {unknown[0]!r}. The statuses: {', '.join(STATUSES)}.")
        stored = ["running" if word == "interrupted" else word for word in status]
        return await self._store.list_runs(stored, workflow, query, limit, before)

    async def requests(
        self, run_id: str | None, kinds: Sequence[str], limit: int, after: tuple[str, str] | None
    ) -> list[RequestRow]:
        """Open requests, oldest first."""
        await self._keep_due()
        return await self._store.open_requests(run_id, kinds, limit, after)

    async def counts(self) -> dict[str, int]:
        """How many runs have each status."""
        return await self._store.count()

    def interrupted(self, status: str, owner: str | None) -> bool:
        """Whether a run that is stored as running has lost its owner."""
        return status == "running" and owner is not None and not presence.is_alive(self._settings, owner)

    async def run_of(self, request_id: str) -> str:
        """The run that a request belongs to; raises `UnknownRequest`."""
        run_id = await self._store.find_request(request_id)
        if run_id is None:
            raise UnknownRequest(f"There is no request {request_id!r}. list_pending() shows the open ones.")
        return run_id

    async def last_place(self, run: Run) -> dict[str, str]:
        """URL and title of the run's main page when it last stopped, as far as they are known."""
        if not run.pages or run.ended:
            return {}
        kept = json.loads(await self._store.load_checkpoint(run.run_id) or "{}")
        place = {}
        for word, values in (("url", kept.get("urls")), ("title", kept.get("titles"))):
            if values and (value := values.get("main") or next(iter(values.values()))):
                place[word] = str(value)
        return place

    async def note_evaluation(self, run_id: str, code: str, mode: Literal["read", "write"], outcome: str) -> None:
        """Journal that code was evaluated in the run's page."""
        with contextlib.suppress(FlowError):  # a remark must not fail what it remarks on
            await self._store.append(run_id, ev.PageEvaluated(code=code[:2000], mode=mode, outcome=outcome[:500]))

    async def keep_awake(self) -> None:
        """Start a worker if any run wants one; what a server does now and then, so that nothing stays behind."""
        await self._keep_due()
        if await self._store.wanting(await self._leases.over()):
            await anyio.to_thread.run_sync(presence.ensure_worker, self._settings)
            presence.ring(self._settings, "")

    # --- inside ---

    async def _keep_due(self) -> None:
        for run_id in await self._store.expire_due():
            await self._wake(run_id)

    async def _wake(self, run_id: str) -> None:
        presence.ring(self._settings, run_id)
        if await self._store.wanting(await self._leases.over()):
            await anyio.to_thread.run_sync(presence.ensure_worker, self._settings)
            presence.ring(self._settings, run_id)

    async def _capture(self, run: Run) -> Revision:
        assert run.created
        return await anyio.to_thread.run_sync(capture, Path(run.created.root), run.created.entry)

    async def _current_revision(self, run: Run) -> Revision | None:
        """The code as it is now on disk, if it differs and can be imported; raises `BrokenWorkflow` if it can't."""
        assert run.created
        revision = await self._capture(run)
        if revision.hash == run.revision:
            return None
        await self._reader.validate(revision, run.created.function, run.created.input)
        await self._store.save_revision(revision.hash, revision.entry, revision.files)
        return revision


def _check_open(run: Run, request: Request, value: Any) -> None:
    """Raise `Conflict` for a request that is settled already."""
    opened = request.opened
    match request.status:
        case "answered":
            who = f"by {request.by} via {request.via}"
            given = json.dumps(request.value, ensure_ascii=False)
            if opened.kind == "approval":
                given = "approved" if request.value["approved"] else "denied"
            raise Conflict(f"Request {opened.request_id} was answered already {who}: {given:.200}.")
        case "expired":
            raise Conflict(f"Request {opened.request_id} expired at {opened.expires}. {_open_ones(run)}")
        case "withdrawn":
            raise Conflict(f"Request {opened.request_id} was withdrawn; the run no longer asks. {_open_ones(run)}")


def _check_who(request: Request, channel: Channel) -> None:
    opened = request.opened
    if opened.by == "human" and not channel.human:
        raise NotAllowed(
            f"Only a person may answer request {opened.request_id} ({opened.prompt!r:.200}). In a terminal: "
            f"mcp-flow {'approve' if opened.kind == 'approval' else 'answer'} {opened.request_id}"
        )


def _fitting(opened: ev.RequestOpened, value: Any) -> Any:
    """`value`, or what it says as JSON where only that fits: some clients send everything as text."""
    problems = _problems(opened, value)
    if problems and isinstance(value, str):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            if not _problems(opened, parsed):
                return parsed
    if problems:
        raise InvalidInput(
            f"The answer does not fit request {opened.request_id} ({opened.prompt!r:.200}), which stays open:", problems
        )
    return value


def _problems(opened: ev.RequestOpened, value: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(opened.answer_schema or {})
    return [
        f"{'.'.join(map(str, error.absolute_path)) or 'the answer'}: {error.message[:300]}"
        for error in validator.iter_errors(value)
    ]


def _find_step(run: Run, name: str) -> str:
    """The key of a step given as its key or its bare name; raises `UnknownStep`."""
    if name in run.steps:
        return name
    found = [key for key in run.steps if key.rpartition("#")[0] == name]
    if len(found) == 1:
        return found[0]
    known = ", ".join(list(run.steps)[:40]) or "none"
    what = "has no step" if not found else "has several steps named"
    raise UnknownStep(f"Run {run.run_id} {what} {name!r}. Its steps: {', '.join(found) if found else known}.")


def _open_ones(run: Run) -> str:
    ids = [f"{r.opened.request_id} ({r.opened.kind}: {r.opened.prompt[:80]!r})" for r in run.open_requests()[:5]]
    return f"Open requests: {', '.join(ids)}." if ids else "It has no open request."


def _stem(function: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", function).strip("-")[:40] or "run"
