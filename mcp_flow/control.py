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
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import anyio
import jsonschema

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.browser import host as hosts
from mcp_flow.catalog import Reader
from mcp_flow.channel import Channel
from mcp_flow.config import Settings, check_id
from mcp_flow.errors import (
    CodeChanged,
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
from mcp_flow.revisions import Revision, capture, diff
from mcp_flow.run import Request, Run
from mcp_flow.store import RequestRow, RunRow, Store

OnChange = Literal["accept", "refuse"]
LONGEST_DIFF = 4000
"""Characters of a difference in code that a refusal shows; `get_run` shows half of it."""
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
        owner: str | None = None,
    ) -> str:
        """Start a run and return its id; the same id, workflow and input again is that same run.

        With an `owner` the new run is that worker's from its first moment. Raises `UnknownWorkflow`, `BrokenWorkflow`,
        `InvalidInput`, `InvalidId`, and `Conflict` for an id in use.
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
        return await self.begin(created, revision, run_id, owner)

    async def begin(
        self, created: ev.RunCreated, revision: Revision, run_id: str | None = None, owner: str | None = None
    ) -> str:
        """`start` for code and input that were checked already; raises `InvalidId` and `Conflict`."""
        new_id = run_id or new_run_id(created.function)
        await self._store.save_revision(revision.hash, revision.entry, revision.files)
        try:
            await self._store.create(new_id, created, owner=owner)
        except Conflict:
            run = await self._store.run(new_id)
            if run.created and run.created.workflow == created.workflow and run.created.input == created.input:
                return new_id
            raise
        if owner is None:
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
        rerun_from: str | None = None,
        on_change: OnChange | None = None,
        wake: bool = True,
    ) -> str | None:
        """Let a stopped run go on, under the code as it is now on disk; returns a remark when nothing changed.

        `rerun` resets the steps that it names; `rerun_from` a step and all that first began after it, of which a
        finished `once` step opens a request when it is reached. With `on_change="refuse"` (the default in production)
        edited code is refused with `CodeChanged`, which names the difference. Without `wake` no worker is started.

        Raises `RunEnded` with a request or value for an ended run, `UnknownStep`, `InvalidInput`, `NotAllowed`,
        and `BrokenWorkflow` for code that can't be imported.
        """
        run = await self._store.run(run_id)
        if run.ended:
            if request_id in run.requests:
                self._answers(run, channel, value, has_value, request_id, step)  # another answer than the first
            return f"Run {run_id} is {run.status}; there is nothing to resume."
        if request_id is not None and request_id not in run.requests:
            raise UnknownRequest(f"Run {run_id} has no request {request_id!r}. {_open_ones(run)}")
        keys = [_find_step(run, name) for name in rerun]
        start_key = _find_step(run, rerun_from) if rerun_from is not None else None
        revision = await self._current_revision(run, on_change)
        gone = await self._gone_owner(run)

        def plan(run: Run) -> list[ev.Event]:
            if run.ended:
                raise RunEnded(f"Run {run_id} is {run.status}; nothing changes it any more.")
            # What makes a new attempt comes before the release: only while it is held does a live run stand still.
            moves: list[ev.Event] = []
            resets = _resets(run, keys, start_key, channel.by)
            answers = self._answers(run, channel, value, has_value, request_id, step)
            answers = [answer for answer in answers if answer.request_id not in _withdrawn(resets)]
            lost = gone is not None and run.owner == gone
            executing = run.owner is not None and run.active and not run.idle and not lost
            if resets and executing and not run.hijack:
                raise NotAllowed(f"Run {run_id} is running; a step can be redone once it has stopped.")
            changed = revision is not None and revision.hash != run.revision
            anew = not executing and (
                run.error is not None
                or bool(resets)
                or (run.idle and changed)
                or (bool(answers) and changed)
                or (lost and not run.idle)
            )
            if lost and (anew or answers):
                moves.append(ev.RunOrphaned(owner=str(gone)))
            if anew or (run.hijack and run.hijack.stopped and run.active and (resets or changed)):
                moves += resets
                moves.append(ev.RunResumed(revision=revision.hash if revision else run.revision, by=channel.by))
            if run.hijack:
                moves.append(ev.HijackReleased(by=channel.by))
            return [*moves, *answers]

        appended = await self._store.decide(run_id, plan)
        if wake:
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
    ) -> list[ev.RequestAnswered]:
        """The answers that a `resume` gives: to the request named, to the one that fits, or to every pause."""
        open_requests = run.open_requests()
        if request_id is not None:
            request = run.requests[request_id]
            if _says_the_same(request, value, has_value, step):
                return []
            return [self._answer(run, request, channel, value, has_value, step)]
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
    ) -> ev.RequestAnswered:
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
                if step == "done" and not has_value and opened.has_default:
                    value = opened.default
                given = {"step": step} | ({"value": _fitting(opened, value)} if step == "done" else {})
            case "input":
                if not has_value:
                    raise NotAllowed(f"Request {opened.request_id} waits for a value: {opened.prompt}")
                given = _fitting(opened, value)
        return ev.RequestAnswered(request_id=opened.request_id, value=given, by=channel.by, via=channel.via)

    async def fork(self, run_id: str, from_step: str, new_id: str | None = None) -> str:
        """Start a run that shares what finished in another before `from_step`; returns its id.

        It has a page of its own, with the storage of the other's last checkpoint, where the step's page was; steps with
        `restore` are done again. Raises `UnknownStep`, `NotAllowed` for a step that never finished, and `Conflict`.
        """
        if new_id is not None:
            check_id(new_id, "run")
        source = await self.run(run_id)
        assert source.created
        key = _find_step(source, from_step)
        if (step := source.steps.get(key)) is None or step.status != "finished":
            raise NotAllowed(
                f"Step {key!r} of run {run_id} has not finished, so nothing can be forked from it. "
                f"Finished: {', '.join(k for k, s in source.steps.items() if s.status == 'finished') or 'none'}."
            )
        revision = await self._capture(source)
        await self._reader.validate(revision, source.created.function, source.created.input)
        await self._store.save_revision(revision.hash, revision.entry, revision.files)
        created = source.created.model_copy(update={"revision": revision.hash, "forked_from": run_id, "fork_step": key})
        kept = await self._store.load_checkpoint(run_id)
        places = json.dumps({"main": step.url} if step.url else {})
        data = json.dumps({"storage": json.loads(kept[1]).get("storage", {}) if kept else {}, "rebuilding": True})
        new_id = new_id or new_run_id(source.created.function)
        shared = _shared(source, step.first_seq)
        checkpoint = (places, data) if step.url or kept else None
        await self._store.create(new_id, created, *shared, checkpoint=checkpoint)
        await self._wake(new_id)
        return new_id

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

        await self._let_go()
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
        await self._wake(run_id)

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

    async def last_place(self, run: Run) -> dict[str, Any]:
        """Where the run's pages were when that was last kept, and whether their browser is gone."""
        kept = await self._store.load_checkpoint(run.run_id)
        if run.ended or kept is None or not (places := json.loads(kept[0])):
            return {}
        name = "main" if "main" in places else next(iter(places))
        url, title = json.loads(kept[1]).get("titles", {}).get(name, (None, None))
        place: dict[str, Any] = {"url": places[name]}
        # A title is asked for at stops only; the page may have moved on since.
        if title and url == places[name]:
            place["title"] = title
        if len(run.pages) > 1:
            place["pages"] = {other: places.get(other, "") for other in run.pages}
        return place

    def browser_lives(self, run: Run) -> bool:
        """Whether there is a browser that can have the run's pages."""
        assert run.created
        return any(host.headless is run.created.headless for host in hosts.living(self._settings))

    async def note_evaluation(self, run_id: str, code: str, mode: Literal["read", "write"], outcome: str) -> None:
        """Journal that code was evaluated in the run's page."""
        with contextlib.suppress(FlowError):  # a remark must not fail what it remarks on
            await self._store.append(run_id, ev.PageEvaluated(code=code[:2000], mode=mode, outcome=outcome[:500]))

    async def keep_awake(self) -> float | None:
        """Start a worker if any run wants one, so that nothing stays behind; returns the seconds until the next is due.

        What a server does now and then, and when something is due.
        """
        looked = self._store.now()
        await self._keep_due()
        await self._wake("")
        # Later than that look only: what was due by then and could not be dealt with is looked at again in a second.
        due = await self._store.next_due(self._settings.hold, looked)
        return (due - self._store.now()).total_seconds() if due else None

    # --- inside ---

    async def _let_go(self) -> None:
        """Where nothing is taken up: let go of runs that wait, so that an answer wakes them without their owner.

        Once answered they could not be told from those whose owner died at work.
        """
        if not self._settings.take_up:
            await self._store.orphan_idle(await self._leases.over())

    async def _keep_due(self) -> None:
        await self._let_go()
        for run_id in await self._store.expire_due():
            await self._wake(run_id)

    async def _wake(self, run_id: str) -> None:
        if run_id:
            presence.ring(self._settings, run_id)
        over = await self._leases.over()
        if not self._settings.take_up:
            await self._store.orphan_idle(over)
            over = []
        held_before = self._store.now() - timedelta(seconds=self._settings.hold)
        if await self._store.wanting(over, held_before=held_before):
            await anyio.to_thread.run_sync(presence.ensure_worker, self._settings)
            presence.ring(self._settings, run_id)

    async def _gone_owner(self, run: Run) -> str | None:
        """The owner of a run, if it is gone."""
        if run.owner is None:
            return None
        alive = presence.is_alive(self._settings, run.owner) and run.owner not in await self._leases.over()
        return None if alive else run.owner

    async def _capture(self, run: Run) -> Revision:
        assert run.created
        return await anyio.to_thread.run_sync(capture, Path(run.created.root), run.created.entry)

    async def _current_revision(self, run: Run, on_change: OnChange | None) -> Revision | None:
        """The code as it is now on disk, if it differs and can be imported.

        Raises `CodeChanged` where a difference is to be refused, and `BrokenWorkflow` for code that can't be imported.
        """
        assert run.created
        revision = await self._capture(run)
        if revision.hash == run.revision:
            return None
        if (on_change or ("refuse" if self._settings.production else "accept")) == "refuse":
            raise CodeChanged(
                f"The code of run {run.run_id} has changed since it last ran, and nothing was resumed. "
                f'resume(run_id={run.run_id!r}, on_change="accept") goes on with it:\n'
                + await self._difference(run, revision, LONGEST_DIFF)
            )
        await self._reader.validate(revision, run.created.function, run.created.input)
        await self._store.save_revision(revision.hash, revision.entry, revision.files)
        return revision

    async def edits(self, run: Run) -> str | None:
        """How the code on disk differs from what a stopped run was executed with, as a diff; None if it does not."""
        if run.ended or not run.idle:
            return None
        with contextlib.suppress(FlowError):  # a file that is gone is reported by whoever resumes
            revision = await self._capture(run)
            if revision.hash != run.revision:
                return await self._difference(run, revision, LONGEST_DIFF // 2)
        return None

    async def _difference(self, run: Run, revision: Revision, limit: int) -> str:
        _, before = await self._store.load_revision(run.revision)
        return diff(before, revision.files, limit)


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


def _says_the_same(request: Request, value: Any, has_value: bool, step: str | None) -> bool:
    """Whether the request was answered just so: who asks again because no reply came is not to get an error."""
    opened, given = request.opened, request.value
    if request.status != "answered":
        return False
    match opened.kind:
        case "approval":
            return False
        case "in-doubt":
            said = value if has_value or not opened.has_default else opened.default
            return bool(given["step"] == step and (step == "again" or given["value"] == said))
        case "input":
            return has_value and given in (value, _parsed(value))
        case _:
            return True


def _parsed(value: Any) -> Any:
    """What a text says as JSON; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


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
    known_keys = [*run.steps, *(key for key in run.waits if not key.endswith("?"))]
    if name in known_keys:
        return name
    found = [key for key in known_keys if key.rpartition("#")[0] == name]
    if len(found) == 1:
        return found[0]
    known = ", ".join(known_keys[:40]) or "none"
    what = "has no step" if not found else "has several steps named"
    raise UnknownStep(f"Run {run.run_id} {what} {name!r}. Its steps: {', '.join(found) if found else known}.")


def _resets(run: Run, keys: Sequence[str], start_key: str | None, by: str) -> list[ev.Event]:
    """The events after which the named steps, and all that first began after `start_key`, are done again."""
    first = run.first_seqs()
    later: list[str] = []
    if start_key is not None:
        # An in-doubt request lives and falls with its step.
        later = [key for key, seq in first.items() if seq > first[start_key] and not key.endswith("?")]
    events: list[ev.Event] = []
    for key in dict.fromkeys([*keys, *([start_key] if start_key else []), *sorted(later, key=lambda key: first[key])]):
        step, request = run.steps.get(key), run.wait(key)
        named = key in keys or key == start_key
        if step and step.once and step.status == "finished" and not named:
            if not step.doubted:
                events.append(ev.StepDoubted(key=key, generation=step.generation, reason=f"rerun_from by {by}"))
            continue
        if step and step.in_doubt and not named:
            continue
        for asked in (request, run.wait(f"{key}?")):
            if asked and asked.status == "open":
                events.append(ev.RequestWithdrawn(request_id=asked.opened.request_id, reason=f"rerun by {by}"))
        events.append(ev.StepReset(key=key, generation=run.generation(key) + 1, reason=f"rerun by {by}"))
    return events


def _withdrawn(events: Sequence[ev.Event]) -> set[str]:
    return {event.request_id for event in events if isinstance(event, ev.RequestWithdrawn)}


def _shared(source: Run, before: int) -> list[ev.Event]:
    """What a fork takes over: the steps, values and answers of `source` that finished and began before `before`."""
    events: list[tuple[int, ev.Event]] = []
    for key, step in source.steps.items():
        if step.status == "finished" and step.first_seq < before:
            shared = ev.StepShared(
                key=key,
                fingerprint=step.fingerprint,
                value=step.value,
                once=step.once,
                restore=step.restore,
                url=step.url,
                code=step.code,
                revision=step.revision,
            )
            events.append((step.first_seq, shared))
            if step.doubted:
                doubted = ev.StepDoubted(key=key, reason=f"it is in doubt in run {source.run_id}")
                events.append((step.first_seq, doubted))
    for key in source.waits:
        request = source.wait(key)
        if request and request.seq < before and request.status in ("answered", "expired") and not key.endswith("?"):
            fresh = {"request_id": f"q-{secrets.token_hex(6)}", "generation": 0}
            answered = ev.RequestShared(
                opened=request.opened.model_copy(update=fresh),
                expired=request.status == "expired",
                value=request.value,
                note=request.note,
                by=request.by,
                via=request.via,
            )
            events.append((request.seq, answered))
    return [event for _, event in sorted(events, key=lambda pair: pair[0])]


def _open_ones(run: Run) -> str:
    ids = [f"{r.opened.request_id} ({r.opened.kind}: {r.opened.prompt[:80]!r})" for r in run.open_requests()[:5]]
    return f"Open requests: {', '.join(ids)}." if ids else "It has no open request."


def new_run_id(workflow: str) -> str:
    """A random id for a run, which begins with its workflow's name."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", workflow).strip("-")[:40] or "run"
    return f"{stem}-{secrets.token_hex(4)}"
