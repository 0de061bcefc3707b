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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import anyio

from mcp_flow import events as ev
from mcp_flow import presence
from mcp_flow.answers import (
    Given,
    Vault,
    answers_to,
    check_holder,
    check_open,
    check_who,
    end_takeover,
    fitting,
    hand_back,
    open_ones,
    refuse_secrets,
    settle_step,
)
from mcp_flow.browser import host as hosts
from mcp_flow.catalog import Reader
from mcp_flow.channel import Channel
from mcp_flow.config import Settings, check_id
from mcp_flow.errors import (
    BrokenWorkflow,
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
from mcp_flow.revisions import Revision, capture, diff, entry_of, write
from mcp_flow.run import Run, step_of, takes
from mcp_flow.secrets import Secrets, hide_cards, masked, secret_places
from mcp_flow.store import RequestRow, RunRow, Store

OnChange = Literal["accept", "refuse"]
Fate = Literal["taken", "kept", "before", "passed"]
"""What becomes of an event at a run: a wait took it, it is kept for one, it was there before, or nobody wants it."""
LONGEST_EVENT = 200
LARGEST_PAYLOAD = 65_536
LARGEST_SOURCE = 1_000_000
LONGEST_DIFF = 4000
"""Characters of a difference in code that a refusal shows; `get_run` shows half of it."""
STOPPED = frozenset({"paused", "waiting-input", "waiting-approval", "in-doubt", "hijacked", "failed"})
"""The statuses in which somebody is needed: what a caller who waits is told of at once."""
ENDED = frozenset({"finished", "cancelled", "continued"})
STATUSES = (
    "queued", "running", "interrupted", "paused", "waiting-input", "waiting-approval", "waiting-event", "waiting-timer",
    "in-doubt", "hijacked", "failed", "finished", "cancelled", "continued",
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """What became of an event: the runs that took it, or one that keeps it; `before` is one that was sent already."""

    took: tuple[str, ...] = ()
    kept: bool = False
    before: bool = False


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
        hold: bool = False,
        pause_before: Sequence[str] = (),
        single_step: bool = False,
        owner: str | None = None,
    ) -> str:
        """Start a run and return its id; the same id, workflow and input again is that same run.

        With `hold` it stays queued until `resume`; it pauses before the steps named in `pause_before`, or with
        `single_step` before every one, except in production. With an `owner` the new run is that worker's from its
        first moment. Raises `UnknownWorkflow`, `BrokenWorkflow`, `InvalidInput`, `InvalidId`, and `Conflict` for an id
        in use.
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
            hold=hold,
            pause_before=list(pause_before),
            single_step=single_step,
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
        max_steps: int | None = None,
        wake: bool = True,
    ) -> str | None:
        """Let a stopped run go on, under the code as it is now on disk; returns a remark when nothing changed.

        `rerun` resets the steps that it names; `rerun_from` a step and all that first began after it, of which a
        finished `once` step opens a request when it is reached. With `on_change="refuse"` (the default in production)
        edited code is refused with `CodeChanged`, which names the difference. After `max_steps` new steps the run
        pauses. Without `wake` no worker is started.

        Raises, unless the run has ended, `UnknownRequest`, `UnknownStep`, `InvalidInput`, `Conflict`, `NotAllowed`,
        and `BrokenWorkflow` for code that can't be imported.
        """
        given, vault = Given(value, has_value, request_id, step), Vault()
        await self._keep_due()
        run = await self._store.run(run_id)
        if run.ended:
            if request_id in run.requests:
                # Raises for another answer than the first.
                answers_to(run, channel, given, vault, self._settings.typed)
            return f"Run {run_id} is {run.status}; there is nothing to resume."
        if request_id is not None and request_id not in run.requests:
            other = await self._store.find_request(request_id)
            where = f" It is one of run {other}: get_run(run_id={other!r}) shows it." if other else ""
            raise UnknownRequest(f"Run {run_id} has no request {request_id!r}.{where} {open_ones(run)}")
        keys = [_find_step(run, name) for name in rerun]
        start_key = _find_step(run, rerun_from) if rerun_from is not None else None
        revision = await self._current_revision(run, on_change)
        gone = await self._gone_owner(run)
        secret = await self._store.secret_answers(run_id)

        def plan(run: Run) -> list[ev.Event]:
            if run.ended:
                return []
            # What makes a new attempt comes before the release: only while it is held does a live run stand still.
            moves: list[ev.Event] = []
            resets = _resets(run, keys, start_key, channel.by)
            check_holder(run, channel, self._settings.typed)
            settled = settle_step(run, given, channel)
            answers = [] if settled else answers_to(run, channel, given, vault, self._settings.typed)
            answers = [answer for answer in answers if answer.request_id not in _withdrawn(resets)]
            refuse_secrets(run, [answer.value for answer in answers] + [value] * bool(settled), secret)
            lost = gone is not None and run.owner == gone
            executing = run.owner is not None and run.active and not run.idle and not lost
            if resets and executing and not run.hijack:
                raise NotAllowed(f"Run {run_id} is running; a step can be redone once it has stopped.")
            changed = revision is not None and revision.hash != run.revision
            anew = not executing and (
                run.error is not None
                or bool(resets)
                or (changed and (run.idle or run.owner is None or bool(answers)))
                or (lost and not run.idle)
                or run.on_hold
            )
            if lost and (anew or answers):
                moves.append(ev.RunOrphaned(owner=str(gone)))
            stands = run.hijack is not None and run.hijack.stopped is not None and run.active
            if anew or (stands and (resets or settled or changed)):
                moves += resets + settled
                moves.append(ev.RunResumed(revision=revision.hash if revision else run.revision, by=channel.by))
            if run.hijack:
                moves.append(ev.HijackReleased(by=channel.by))
                moves += end_takeover(run, answers, channel)
            kinds = {run.requests[answer.request_id].opened.kind for answer in answers}
            only_answers = bool(kinds) and "pause" not in kinds and not moves
            if max_steps is not None or (run.budget is not None and not only_answers):
                moves.append(ev.RunBudgeted(steps=max_steps))
            return [*moves, *answers]

        appended = await self._store.answer_with_secrets(run_id, plan, vault.kept)
        if wake:
            await self._wake(run_id)
        if not appended:
            run = await self._store.run(run_id)
            return f"Nothing changed: run {run_id} is {run.status}. {open_ones(run)}"
        return None

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
        forked = {"revision": revision.hash, "forked_from": run_id, "fork_step": key, "hold": False}
        created = source.created.model_copy(update=forked)
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
        await self._keep_due()
        run_id = await self.run_of(request_id)
        note = note and masked(note, await self._store.secret_answers(run_id))

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
            check_open(run, request)
            check_who(request, channel, self._settings.typed)
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
        reason = masked(reason, await self._store.secret_answers(run_id))

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

    async def hijack(self, run_id: str, channel: Channel, reason: str, holder: ev.Holder = "agent") -> None:
        """Take the page: at once from a run that stands still, at its next action or step from one that runs.

        With the holder "human" a request is opened for a person, and only a person hands the page back.
        Raises `RunEnded`, `Conflict` naming who holds it already, and `NotAllowed` for a person without a window.
        """
        await self._keep_due()
        person = holder == "human" or channel.human
        reason = masked(reason, await self._store.secret_answers(run_id))

        def plan(run: Run) -> list[ev.Event]:
            if run.ended:
                raise RunEnded(f"Run {run_id} is {run.status}; its page is closed.")
            if run.hijack and run.hijack.held:
                held = run.hijack.requested
                following = hand_back(run, self._settings.typed) if run.hijack.stopped else _awaited(run)
                raise Conflict(
                    f"Run {run_id} is held by the {held.holder} already since {run.hijack.at}: {held.reason!r}. "
                    + following
                )
            assert run.created
            if holder == "human" and run.created.headless:
                raise NotAllowed(
                    f"Run {run_id} has no window in which a person could take its page. Start it with headless=false "
                    f"for that; an agent takes it with hijack(run_id={run_id!r}, reason=…)."
                )
            moves: list[ev.Event] = [
                ev.HijackRequested(
                    reason=reason, holder="human" if person else "agent", idle_s=self._settings.hijack_idle
                )
            ]
            if (run.idle or run.owner is None) and not (run.hijack and run.hijack.stopped):
                moves.append(ev.RunHijacked())
            if holder == "human":
                request_id = f"q-{secrets.token_hex(6)}"
                moves.append(
                    ev.RequestOpened(
                        request_id=request_id,
                        key=f"takeover {request_id}",
                        kind="takeover",
                        prompt=f"Take the page over: {reason}",
                        fingerprint=request_id,
                        by="human",
                    )
                )
            return moves

        await self._store.decide(run_id, plan)
        await self._wake(run_id)

    async def check_page(self, run_id: str, channel: Channel) -> Run:
        """The run, if `take_page` would succeed, which is left to who has something to do with the page.

        Raises `NotAllowed` with the call to make first for a run that goes on and that nobody has taken, `RunEnded`.
        """
        await self._keep_due()
        run = await self.run(run_id)
        if run.ended:
            raise RunEnded(f"Run {run_id} is {run.status}; its page is closed.")
        check_holder(run, channel, self._settings.typed)
        held = run.hijack is not None and run.hijack.held
        if held and not (run.hijack and run.hijack.stopped):
            raise NotAllowed(f"Run {run_id} is {run.status} and has not stopped yet. {_awaited(run)}")
        if not held and run.status not in ("paused", "failed"):
            raise NotAllowed(
                f"Run {run_id} is {run.status}; acting on its page would race with its code. "
                f'hijack(run_id={json.dumps(run_id)}, reason="…") stops it and takes the page first.'
            )
        return run

    async def take_page(self, run_id: str, channel: Channel, reason: str) -> Run:
        """The run, with its page in the caller's hands: one that is paused or has failed is taken by this very call.

        Raises what `check_page` does, and `Conflict`.
        """
        run = await self.check_page(run_id, channel)
        if run.hijack and run.hijack.held:
            return run
        await self.hijack(run_id, channel, reason)
        return await self._store.run(run_id)

    # --- code ---

    async def save_workflow(self, name: str, source: str, expected_revision: str | None = None) -> tuple[str, str]:
        """Write a workflow file, once it can be imported; returns its path and revision. The old one is kept.

        Raises `NotAllowed` where that is not enabled, `Conflict` unless `expected_revision` (the beginning of it will
        do) is what stands there now, `BrokenWorkflow` for a source that can't be imported, `InvalidInput`.
        """
        root = self._settings.workflows
        if not self._settings.save_workflows:
            raise NotAllowed(
                f"Clients may not write workflows here. Edit the files in {root}, or set MCP_FLOW_SAVE_WORKFLOWS=on "
                "and restart the server."
            )
        content = source.encode("utf-8", "surrogateescape")
        if len(content) > LARGEST_SOURCE:
            raise InvalidInput(f"The source has {len(content)} bytes, and may have {LARGEST_SOURCE}.")
        entry = await anyio.to_thread.run_sync(entry_of, root, name)
        revision = await anyio.to_thread.run_sync(capture, root, entry, content)
        if not (found := await self._reader.check(revision)):
            raise BrokenWorkflow(f"{entry} would hold no workflow: none of its functions is marked @workflow.")
        await self._store.save_revision(revision.hash, entry, revision.files)

        def standing() -> Revision | None:
            before = capture(root, entry) if (root / entry).exists() else None
            now = before.hash if before else None
            if (now or "") != (expected_revision or "") and not (
                now and expected_revision and len(expected_revision) >= 8 and now.startswith(expected_revision)
            ):
                stands = f"holds revision {now[:12]}" if now else "is not there"
                raise Conflict(
                    f"{entry} {stands}, not the expected {expected_revision or 'nothing'}; nothing was written. "
                    f"list_workflows(name={found[0]!r}) shows what stands there now."
                )
            return before

        def swap() -> None:
            with presence.changing_of_the_guard(self._settings):
                standing()
                write(root, entry, content)

        # Before it is written over: killed in between, this process would leave nobody who has it.
        if (before := await anyio.to_thread.run_sync(standing)) is not None:
            await self._store.save_revision(before.hash, entry, before.files)
        await anyio.to_thread.run_sync(swap)
        return str(root / entry), revision.hash

    # --- events ---

    async def send_event(
        self, name: str, payload: Any, channel: Channel, run_id: str | None = None, key: str | None = None
    ) -> Sent:
        """Send an event to one run, where it is kept until it is waited for, or to all that wait; returns who took it.

        The same `key` again is the same event: no run receives it twice, unless it could not use what came first, and
        once somebody has taken it, who waits for it only later does not get it.

        Raises `InvalidInput` for a name or payload that is too long, or that does not fit what the run named waits for,
        or any of those that wait (the others get it); `Conflict` for the key of an event of another name; `RunEnded`,
        `UnknownRun`.
        """
        if not 0 < len(name) <= LONGEST_EVENT:
            raise InvalidInput(f"An event's name has 1 to {LONGEST_EVENT} characters, not {len(name)}.")
        if key is not None and not 0 < len(key) <= LONGEST_EVENT:
            raise InvalidInput(f"An event's key has 1 to {LONGEST_EVENT} characters, not {len(key)}.")
        if (size := len(json.dumps(payload))) > LARGEST_PAYLOAD:
            raise InvalidInput(
                f"The payload of event {name!r} has {size} characters of JSON, and may have {LARGEST_PAYLOAD}. "
                "Put the data into a file or a database, and send where it is."
            )
        await self._keep_due()
        if run_id is not None:
            check_id(run_id, "run")
            fate = await self._deliver(run_id, name, payload, key, channel, keep=True)
            await self._wake(run_id)
            return Sent((run_id,) if fate == "taken" else (), kept=fate == "kept", before=fate == "before")
        waiting = await self._store.waiting_for_event(name)
        if key is not None and (before := await self._store.sent_under(key)) is not None:
            if before != name:
                raise _other_event(key, before)
            waiting = [one for one in waiting if key in (await self._store.run(one)).put_aside_keys]
            if not waiting:
                return Sent(before=True)
        took, refused = list[str](), list[InvalidInput]()
        for one in waiting:
            try:
                if await self._deliver(one, name, payload, key, channel, keep=False) == "taken":
                    took.append(one)
            except InvalidInput as error:
                refused.append(error)
        for one in took:
            await self._wake(one)
        if refused:
            got = f"\nTaken by {', '.join(took)}." if took else ""
            raise InvalidInput("\n".join(map(str, refused[:5])) + got)
        if key is not None and took:
            # Only now: one that is sent again because its sender died halfway must reach the rest.
            await self._store.note_sending(key, name)
        return Sent(tuple(took))

    async def _deliver(
        self, run_id: str, name: str, payload: Any, key: str | None, channel: Channel, *, keep: bool
    ) -> Fate:
        """Give an event to a run: to its oldest wait that takes it, else with `keep` to its inbox.

        Raises `InvalidInput` where there are such waits, and none that it fits.
        """
        fate: Fate = "passed"
        secret = await self._store.secret_answers(run_id)

        def plan(run: Run) -> list[ev.Event]:
            nonlocal fate
            fate = "passed"
            if run.ended:
                if keep:
                    raise RunEnded(f"Run {run_id} is {run.status}; it waits for no event any more.")
                return []
            if key is not None and key in run.event_keys:
                if run.event_keys[key] != name:
                    raise _other_event(key, run.event_keys[key])
                fate = "before"
                return []
            refuse_secrets(run, payload, secret)
            received = ev.EventReceived(name=name, payload=payload, key=key, by=channel.by)
            misfit: InvalidInput | None = None
            for request in run.open_requests():
                if request.opened.kind == "event" and takes(request.opened, name, payload):
                    try:
                        value = fitting(request.opened, payload)
                    except InvalidInput as error:
                        misfit = misfit or error
                        continue
                    fate = "taken"
                    return [
                        received,
                        ev.RequestAnswered(
                            request_id=request.opened.request_id,
                            value=value,
                            by=channel.by,
                            via="event",
                            event=run.seq + 1,
                        ),
                    ]
            if misfit:
                raise misfit
            fate = "kept" if keep else "passed"
            return [received] if keep else []

        await self._store.decide(run_id, plan)
        return fate

    # --- watch ---

    async def wait(self, run_id: str, seconds: float, on_news: Callable[[Run], Awaitable[None]] | None = None) -> Run:
        """The run once it has stopped or ended, or after `seconds`; `on_news` is told when its journal has grown."""
        deadline = anyio.current_time() + seconds
        seen = -1
        while True:
            rings = self._bell.rings
            await self._keep_due()
            run = await self._store.run(run_id)
            if run.seq != seen and on_news and seen >= 0:
                await on_news(run)
            seen = run.seq
            if self.at_rest(run) or anyio.current_time() >= deadline:
                return run
            await self._bell.next_ring(min(1.0, deadline - anyio.current_time()), rings)

    @staticmethod
    def at_rest(run: Run) -> bool:
        """Whether the run has stopped where somebody is needed, or has ended."""
        return run.status in STOPPED or run.status in ENDED or (run.on_hold and run.status == "queued")

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
        """The registry, newest first; a run stored as running has the status `interrupted` if its owner died."""
        if unknown := [word for word in status if word not in STATUSES]:
            raise InvalidInput(f"There is no status {unknown[0]!r}. The statuses: {', '.join(STATUSES)}.")
        living = presence.living(self._settings)
        return await self._store.list_runs(status, workflow, query, limit, before, living)

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
        """Whether the browser that has the run's pages lives, as far as the journal says which one that is."""
        assert run.created
        living = hosts.living(self._settings)
        if run.page_host:
            return any(host.identity == run.page_host for host in living)
        return any(host.headless is run.created.headless for host in living)

    async def note_evaluation(
        self, run_id: str, channel: Channel, code: str, mode: Literal["read", "write"], outcome: str
    ) -> None:
        """Journal that code was evaluated in the run's page.

        What is secret on the page is to be hidden in it already, secrets of the home folder and the run are here.
        """
        known = Secrets(self._settings.home).values() | await self._store.secret_answers(run_id)
        # Before the cut: the beginning of a secret would not be known for one.
        code, outcome = (hide_cards(masked(text, known)) for text in (code, outcome))
        event = ev.PageEvaluated(code=code[:2000], mode=mode, outcome=outcome[:500], by=channel.by)
        with contextlib.suppress(FlowError):  # a remark must not fail what it remarks on
            await self._store.append(run_id, event)

    async def note_actions(self, run_id: str, channel: Channel, lines: Sequence[str], outcome: str) -> None:
        """Journal what was done in the run's page."""
        event = ev.PageActed(lines=list(lines), outcome=outcome[:500], by=channel.by)
        with contextlib.suppress(FlowError):  # a remark must not fail what it remarks on
            await self._store.append(run_id, event)

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


def _awaited(run: Run) -> str:
    """What to call while a run that is to be hijacked goes on."""
    return f"It stops at its next action or step: get_run(run_id={json.dumps(run.run_id)}, wait_s=20) waits for that."


def _find_step(run: Run, name: str) -> str:
    """The key of a step given as its key or its bare name; raises `UnknownStep`."""
    first = run.first_seqs()
    known_keys = [*run.steps, *(key for key in run.waits if step_of(key) == key and key in first)]
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
        later = [key for key, seq in first.items() if seq > first[start_key] and step_of(key) == key]
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
        for asked in (request, *(run.wait(key + mark) for mark in "?!|")):
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
        secret = bool(request and secret_places(request.opened.answer_schema))  # lies with the source: asked for anew
        settled = request and request.status in ("answered", "expired") and not secret
        if request and settled and request.seq < before and step_of(key) == key and request.opened.kind != "takeover":
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


def _other_event(key: str, name: str) -> Conflict:
    return Conflict(f"The key {key!r} is that of an event {name!r} that was sent already. Choose another.")


def new_run_id(workflow: str) -> str:
    """A random id for a run, which begins with its workflow's name."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", workflow).strip("-")[:40] or "run"
    return f"{stem}-{secrets.token_hex(4)}"
