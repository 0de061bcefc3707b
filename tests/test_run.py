"""A run is the fold of its events: what may follow what, what the status is, and that nothing else gets in."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_flow import events as ev
from mcp_flow.errors import FlowError, IllegalEvent, LeaseLost
from mcp_flow.run import Run, fold

JOURNALS = Path(__file__).parent / "journals"
AT = "2031-05-01T12:00:00.000000Z"
ERROR = ev.Failure(type="ValueError", message="no such button", step="a#1", file="shop.py", line=7)

CREATED = ev.RunCreated(workflow="buy", function="buy", root="/w", entry="buy.py", revision="r1")
FORKED = CREATED.model_copy(update={"forked_from": "source", "fork_step": "b#1"})
CLAIMED = ev.RunClaimed(worker="w1")
RELEASED = ev.RunReleased(reason="stopping")
IDLED = ev.AttemptIdled()
RESUMED = ev.RunResumed(revision="r2")
FAILED = ev.RunFailed(error=ERROR)
FINISHED = ev.RunFinished(output=1)
CANCELLED = ev.RunCancelled(reason="enough")
HIJACK = ev.HijackRequested(reason="look")
HIJACKED = ev.RunHijacked(step="a#1")
HANDED_BACK = ev.HijackReleased()
PAGE = ev.PageOpened(name="main", target_id="t")
PAGE_CLOSED = ev.PageClosed()
PAGE_LOST = ev.PageLost(what="the browser ended")
PARKED = ev.RunParked()
ORPHANED = ev.RunOrphaned(owner="w1")
COMPARED = ev.AttemptCompared(changed_steps=["a#1"], unused_steps=["b#1"])
DOUBTED = ev.StepDoubted(key="a#1", reason="asked")
SHARED_STEP = ev.StepShared(key="a#1", fingerprint="f", value=1, url="/cart", revision="r0")

Move = tuple[ev.Event, int | None]


def attempt(number: int) -> ev.AttemptStarted:
    return ev.AttemptStarted(attempt=number, revision="r1")


def start(key: str = "a#1", **fields: Any) -> ev.StepStarted:
    return ev.StepStarted(key=key, fingerprint="f", **fields)


def done(key: str = "a#1", **fields: Any) -> ev.StepFinished:
    return ev.StepFinished(key=key, **fields)


def broke(key: str = "a#1", **fields: Any) -> ev.StepFailed:
    return ev.StepFailed(key=key, error=ERROR, **fields)


def reset(key: str = "a#1", generation: int = 1) -> ev.StepReset:
    return ev.StepReset(key=key, generation=generation, reason="asked")


def opened(request_id: str = "q1", kind: ev.RequestKind = "approval", **fields: Any) -> ev.RequestOpened:
    fields = {"key": f"{request_id}#1", "prompt": "Pay?", "fingerprint": "f"} | fields
    return ev.RequestOpened(request_id=request_id, kind=kind, **fields)


def answered(request_id: str = "q1") -> ev.RequestAnswered:
    return ev.RequestAnswered(request_id=request_id, value={"approved": True})


def shared_request(request_id: str = "q1", **fields: Any) -> ev.RequestShared:
    return ev.RequestShared(opened=opened(request_id), **fields)


def journal(*moves: Move) -> list[ev.Recorded]:
    return [ev.Recorded(seq, AT, epoch, event) for seq, (event, epoch) in enumerate(moves, 1)]


def run_after(*moves: Move) -> Run:
    return fold("r", journal(*moves))


def outcome(run: Run, event: ev.Event, epoch: int | None) -> Literal["follows", "illegal", "lease lost"]:
    """What the run makes of an event; a refused one must change nothing."""
    before = copy.deepcopy(run)
    refusal: FlowError
    try:
        run.advance(ev.Recorded(run.seq + 1, AT, epoch, event))
    except (IllegalEvent, LeaseLost) as error:
        refusal = error
    else:
        assert run.seq == before.seq + 1
        return "follows"
    assert run == before
    if isinstance(refusal, LeaseLost):
        return "lease lost"
    assert event.type in str(refusal)
    return "illegal"


QUEUED: list[Move] = [(CREATED, None)]
OWNED: list[Move] = [*QUEUED, (CLAIMED, 1)]
RUNNING: list[Move] = [*OWNED, (attempt(1), 1)]
IN_FLIGHT: list[Move] = [*RUNNING, (start(), 1)]
ONCE: list[Move] = [*RUNNING, (start(once=True), 1)]
ASKING: list[Move] = [*RUNNING, (opened(), 1), (IDLED, 1)]
HOLDING: list[Move] = [*RUNNING, (PAGE, 1), (opened(), 1), (IDLED, 1)]
FORK: list[Move] = [(FORKED, None)]

# The situations that a run can be in: how it got there, its status, whether a worker should take it, what may
# come next and what may not. "w:" is written by the owner (epoch 1), "late:" under an epoch that is over.
SITUATIONS: dict[str, tuple[list[Move], str, bool]] = {
    "queued": (QUEUED, "queued", True),
    "claimed": (OWNED, "running", True),
    "running": (RUNNING, "running", True),
    "step in flight": (IN_FLIGHT, "running", True),
    "once step in flight": (ONCE, "running", True),
    "step finished": ([*IN_FLIGHT, (done(), 1)], "running", True),
    "step failed": ([*IN_FLIGHT, (broke(), 1)], "running", True),
    "once step finished": ([*ONCE, (done(), 1)], "running", True),
    "once step doubted": ([*ONCE, (done(), 1), (DOUBTED, None)], "running", True),
    "once step failed": ([*ONCE, (broke(), 1)], "running", True),
    "once step failed without effect": ([*ONCE, (broke(effect_free=True), 1)], "running", True),
    "step reset": ([*IN_FLIGHT, (done(), 1), (reset(), 1)], "running", True),
    "asking, other branches at work": ([*RUNNING, (opened(), 1)], "running", True),
    "asking, idle": (ASKING, "waiting-approval", False),
    "asking, released": ([*ASKING, (RELEASED, 1)], "waiting-approval", False),
    "asking, holding a page": (HOLDING, "waiting-approval", False),
    "asking, orphaned": ([*ASKING, (ORPHANED, None)], "waiting-approval", False),
    "asking, parked": ([*HOLDING, (PARKED, 1)], "waiting-approval", False),
    "parked, answered": ([*HOLDING, (PARKED, 1), (answered(), None)], "queued", True),
    "asking, page lost": ([*HOLDING, (PAGE_LOST, 1)], "waiting-approval", False),
    "answered, idle owner": ([*ASKING, (answered(), None)], "running", True),
    "answered after release": ([*ASKING, (RELEASED, 1), (answered(), None)], "queued", True),
    "failed": ([*IN_FLIGHT, (broke(), 1), (FAILED, 1)], "failed", False),
    "failed while asking": ([*RUNNING, (opened(), 1), (FAILED, 1)], "failed", False),
    "resumed": ([*RUNNING, (FAILED, 1), (RESUMED, None)], "queued", True),
    "orphaned": ([*IN_FLIGHT, (ORPHANED, None)], "queued", True),
    "page lost": ([*IN_FLIGHT, (PAGE_LOST, 1)], "running", True),
    "taken by another": ([*RUNNING, (CLAIMED, 2)], "running", True),
    "hijack requested": ([*IN_FLIGHT, (HIJACK, None)], "running", True),
    "hijacked": ([*IN_FLIGHT, (HIJACK, None), (HIJACKED, 1)], "hijacked", False),
    "handed back": ([*IN_FLIGHT, (HIJACK, None), (HIJACKED, 1), (HANDED_BACK, None)], "running", True),
    "finished": ([*RUNNING, (FINISHED, 1)], "finished", False),
    "finished, page open": (
        [*RUNNING, (PAGE, 1), (FINISHED, 1)],
        "finished",
        True,
    ),
    "cancelled, not noticed by its owner": ([*ASKING, (CANCELLED, None)], "cancelled", True),
    "cancelled": ([*ASKING, (CANCELLED, None), (RELEASED, 1)], "cancelled", False),
    "fork": (FORK, "queued", True),
    "fork with history": ([*FORK, (SHARED_STEP, None), (shared_request(), None)], "queued", True),
    "fork, claimed": ([*FORK, (CLAIMED, 1)], "running", True),
}

# All that is tried in each situation.
MOVES: dict[str, Move] = {
    "created": (CREATED, None),
    "claim 1": (CLAIMED, 1),
    "claim 2": (CLAIMED, 2),
    "claim 3": (CLAIMED, 3),
    "release": (RELEASED, 1),
    "attempt 1": (attempt(1), 1),
    "attempt 2": (attempt(2), 1),
    "idle": (IDLED, 1),
    "resume": (RESUMED, None),
    "fail": (FAILED, 1),
    "finish": (FINISHED, 1),
    "finish from outside": (FINISHED, None),
    "cancel": (CANCELLED, None),
    "start": (start(), 1),
    "start anew": (start(generation=1), 1),
    "done": (done(), 1),
    "done from outside": (done(), None),
    "done anew": (done(generation=1), 1),
    "broke": (broke(), 1),
    "reset": (reset(), None),
    "reset too far": (reset(generation=2), None),
    "nondeterministic": (ev.StepNondeterministic(key="a#1", fingerprint="g"), 1),
    "value": (ev.ValueRecorded(key="now#1", value=1), 1),
    "value of step": (ev.ValueRecorded(key="a#1", value=1), 1),
    "ask": (opened("q2"), 1),
    "ask again": (opened("q3", key="q1#1"), 1),
    "ask same id": (opened("q1", key="other#1"), 1),
    "answer": (answered(), None),
    "expire": (ev.RequestExpired(request_id="q1"), None),
    "withdraw": (ev.RequestWithdrawn(request_id="q1", reason="changed"), None),
    "page": (PAGE, 1),
    "page closed": (PAGE_CLOSED, None),
    "page lost": (PAGE_LOST, 1),
    "park": (PARKED, 1),
    "orphan": (ORPHANED, None),
    "orphan of another": (ev.RunOrphaned(owner="w9"), None),
    "doubt": (DOUBTED, None),
    "compare": (COMPARED, 1),
    "share step": (SHARED_STEP, None),
    "share request": (shared_request(), None),
    "looked": (ev.PageEvaluated(code="1", mode="read", outcome="ok"), None),
    "hijack": (HIJACK, None),
    "stop": (HIJACKED, None),
    "hand back": (HANDED_BACK, None),
    "log": (ev.Logged(key="l", message="m"), 1),
    "log from outside": (ev.Logged(key="l", message="m"), None),
}

_ANYTIME = {"claim 2", "reset", "cancel", "page closed", "looked", "hijack"}
_OWNER_ANYTIME = {"release", "page", "log", "orphan"}
_ACTIVE = {"idle", "fail", "value", "ask", "ask again", "attempt 2", "page lost", "compare"}
_RUNNING = _ANYTIME | _OWNER_ANYTIME | _ACTIVE | {"start", "ask same id", "value of step", "finish"}
_IN_FLIGHT = _RUNNING - {"value of step"} | {"done", "broke"}
_Q1_OPEN = {"answer", "expire", "withdraw"}
_ENDED = {"page closed", "looked", "claim 2", "release", "orphan"}

FOLLOW: dict[str, set[str]] = {
    "queued": _ANYTIME - {"claim 2"} | {"claim 1", "resume"},
    "claimed": _ANYTIME | _OWNER_ANYTIME | {"attempt 1"},
    "running": _RUNNING,
    "step in flight": _IN_FLIGHT,
    "once step in flight": _IN_FLIGHT - {"start"},
    "step finished": _RUNNING - {"start", "value of step"} | {"nondeterministic"},
    "step failed": _IN_FLIGHT,
    "once step finished": _RUNNING - {"start", "value of step"} | {"nondeterministic", "doubt"},
    "once step doubted": _RUNNING - {"start", "value of step"} | {"nondeterministic", "doubt"},
    "once step failed": _IN_FLIGHT - {"start"},
    "once step failed without effect": _IN_FLIGHT,
    "step reset": _RUNNING - {"start", "reset"} | {"start anew", "reset too far"},
    "asking, other branches at work": _RUNNING - {"finish", "ask again", "ask same id"} | _Q1_OPEN,
    "asking, idle": _RUNNING - {"finish", "ask again", "ask same id"} | _Q1_OPEN | {"resume", "park"},
    "asking, released": _ANYTIME | _Q1_OPEN | {"resume"},
    "asking, holding a page": _RUNNING - {"finish", "ask again", "ask same id"} | _Q1_OPEN | {"resume", "park"},
    "asking, orphaned": _ANYTIME | _Q1_OPEN | {"resume"},
    "asking, parked": _ANYTIME | _Q1_OPEN | {"resume"},
    "parked, answered": _ANYTIME | {"resume"},
    "asking, page lost": _ANYTIME | _OWNER_ANYTIME | _Q1_OPEN | {"attempt 2", "resume", "park"},
    "answered, idle owner": _RUNNING - {"ask again", "ask same id"},
    "answered after release": _ANYTIME | {"resume"},
    "failed": _ANYTIME | {"resume"},
    "failed while asking": _ANYTIME | _Q1_OPEN | {"resume"},
    "resumed": _ANYTIME | {"resume"},
    "orphaned": _ANYTIME | {"resume"},
    "page lost": _ANYTIME | _OWNER_ANYTIME | {"attempt 2"},
    "taken by another": _ANYTIME - {"claim 2"} | {"claim 3", "orphan"},
    "hijack requested": _IN_FLIGHT - {"hijack"} | {"stop", "hand back"},
    "hijacked": _IN_FLIGHT - {"hijack"} | {"hand back", "resume"},
    "handed back": _IN_FLIGHT,
    "finished": _ENDED,
    "finished, page open": _ENDED,
    "cancelled, not noticed by its owner": _ENDED,
    "cancelled": _ENDED - {"release", "orphan"},
    "fork": _ANYTIME - {"claim 2"} | {"claim 1", "resume", "share step", "share request"},
    "fork with history": _ANYTIME - {"claim 2"} | {"claim 1", "resume"},
    "fork, claimed": _ANYTIME | _OWNER_ANYTIME | {"attempt 1"},
}


# What the owner of epoch 1 may no longer write, because the run is not, or no more, its own.
_NOT_OWNED = {
    "queued",
    "asking, released",
    "asking, orphaned",
    "asking, parked",
    "parked, answered",
    "orphaned",
    "answered after release",
    "failed",
    "failed while asking",
    "resumed",
    "taken by another",
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_situation_has_its_status_and_says_whether_it_wants_a_worker(situation: str) -> None:
    moves, status, wants_worker = SITUATIONS[situation]
    run = run_after(*moves)
    assert (run.status, run.wants_worker) == (status, wants_worker)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_only_what_may_follow_in_a_situation_follows(situation: str) -> None:
    moves, _, _ = SITUATIONS[situation]
    found = {name: outcome(run_after(*moves), *move) for name, move in MOVES.items()}
    assert {name for name, what in found.items() if what == "follows"} == FOLLOW[situation]


@pytest.mark.parametrize("situation", sorted(_NOT_OWNED))
def test_whoever_has_no_lease_is_told_so(situation: str) -> None:
    moves, _, _ = SITUATIONS[situation]
    for name in ("release", "start", "done", "log", "fail", "finish", "idle", "page lost", "park", "compare"):
        assert outcome(run_after(*moves), *MOVES[name]) == "lease lost", name


@pytest.mark.parametrize("situation", ["running", "asking, idle", "failed", "taken by another"])
def test_a_claim_under_an_epoch_that_is_not_the_next_is_too_late(situation: str) -> None:
    moves, _, _ = SITUATIONS[situation]
    epoch = run_after(*moves).epoch
    for late in (epoch - 1, epoch, epoch + 2, None):
        assert outcome(run_after(*moves), CLAIMED, late) == "lease lost"


@pytest.mark.parametrize("situation", ["running", "step in flight"])
def test_only_the_owner_writes_what_the_code_did(situation: str) -> None:
    moves, _, _ = SITUATIONS[situation]
    names = ("start", "done", "broke", "ask", "value", "log", "page", "finish", "fail", "idle", "release")
    for name in (*names, "page lost", "park", "compare"):
        assert outcome(run_after(*moves), MOVES[name][0], None) == "illegal", name


def test_nothing_comes_before_a_run_was_created() -> None:
    for name, (event, epoch) in MOVES.items():
        expected = "follows" if name == "created" else "illegal"
        assert outcome(Run("r"), event, epoch) == expected, name


def test_an_event_follows_only_the_one_before_it() -> None:
    run = run_after(*RUNNING)
    for seq in (0, 3, 5):
        with pytest.raises(IllegalEvent, match=f"event {seq} can't follow event 3"):
            run.advance(ev.Recorded(seq, AT, 1, start()))


KINDS: list[tuple[ev.RequestKind, str]] = [
    ("in-doubt", "in-doubt"),
    ("approval", "waiting-approval"),
    ("input", "waiting-input"),
    ("pause", "paused"),
    ("event", "waiting-event"),
    ("timer", "waiting-timer"),
]


@pytest.mark.parametrize(("position", "kind", "status"), [(i, *pair) for i, pair in enumerate(KINDS)])
def test_an_idle_run_shows_the_first_of_what_it_waits_for(position: int, kind: ev.RequestKind, status: str) -> None:
    waits = [(opened(f"q{i}", kind=other), 1) for i, (other, _) in enumerate(KINDS) if i >= position]
    assert run_after(*RUNNING, *reversed(waits)).status == "running"
    assert run_after(*RUNNING, *reversed(waits), (IDLED, 1)).status == status


def test_in_doubt_is_shown_before_failed_and_failed_before_every_other_wait() -> None:
    assert run_after(*RUNNING, (opened(kind="in-doubt"), 1), (FAILED, 1)).status == "in-doubt"
    for kind, _ in KINDS[1:]:
        assert run_after(*RUNNING, (opened(kind=kind), 1), (FAILED, 1)).status == "failed"


def test_hijacked_is_shown_before_whatever_else_the_run_waits_for() -> None:
    for before in (ASKING, [*RUNNING, (opened(kind="in-doubt"), 1), (IDLED, 1)], [*RUNNING, (FAILED, 1)]):
        assert run_after(*before, (HIJACK, None), (HIJACKED, None)).status == "hijacked"


def test_an_answer_that_came_before_the_worker_noticed_leaves_the_run_running() -> None:
    run = run_after(*RUNNING, (opened(), 1), (answered(), None), (IDLED, 1))
    assert (run.status, run.wants_worker) == ("running", True)


def test_a_branch_that_starts_a_step_makes_an_idle_run_running() -> None:
    run = run_after(*ASKING, (start(), 1))
    assert run.status == "running"
    assert outcome(run, done(), 1) == "follows"
    assert outcome(run, IDLED, 1) == "follows"
    assert run.status == "waiting-approval"


def test_an_answer_does_not_wake_a_failed_run() -> None:
    run = run_after(*RUNNING, (opened(), 1), (FAILED, 1), (answered(), None))
    assert (run.status, run.wants_worker, run.requests["q1"].status) == ("failed", False, "answered")


def test_the_next_deadline_is_the_earliest_of_the_open_requests() -> None:
    early, late = datetime(2031, 5, 1, tzinfo=UTC), datetime(2031, 6, 1, tzinfo=UTC)
    moves = [*RUNNING, (opened("q1", expires=late), 1), (opened("q2", expires=early), 1), (opened("q3"), 1)]
    assert run_after(*moves).due == early
    assert run_after(*moves, (ev.RequestExpired(request_id="q2"), None)).due == late
    assert run_after(*RUNNING, (opened("q3"), 1)).due is None


def test_an_ended_run_waits_for_nothing() -> None:
    expires = datetime(2031, 5, 1, tzinfo=UTC)
    run = run_after(*RUNNING, (opened(expires=expires), 1), (IDLED, 1), (CANCELLED, None))
    assert run.open_requests() == []
    assert run.due is None
    assert (run.requests["q1"].status, run.requests["q1"].settled_seq) == ("withdrawn", run.seq)


def test_a_withdrawn_or_reset_wait_may_be_opened_again_and_an_answered_one_not() -> None:
    again = opened("q9", key="q1#1")
    withdrawn: Move = (ev.RequestWithdrawn(request_id="q1", reason="changed"), None)
    assert outcome(run_after(*ASKING, withdrawn), again, 1) == "follows"
    assert outcome(run_after(*ASKING, (answered(), None)), again, 1) == "illegal"
    moved: list[Move] = [*ASKING, (answered(), None), (reset("q1#1"), None)]
    assert outcome(run_after(*moved), again, 1) == "illegal"
    assert outcome(run_after(*moved), opened("q9", key="q1#1", generation=1), 1) == "follows"


def test_a_fixed_value_is_fixed_until_it_is_reset() -> None:
    value = ev.ValueRecorded(key="now#1", value=2)
    run = run_after(*RUNNING, (ev.ValueRecorded(key="now#1", value=1), 1))
    assert outcome(run, value, 1) == "illegal"
    assert outcome(run, reset("now#1"), None) == "follows"
    assert outcome(run, value, 1) == "follows"
    assert (run.steps["now#1"].value, run.steps["now#1"].generation) == (2, 1)


def test_a_step_keeps_where_and_when_it_first_started() -> None:
    run = run_after(*RUNNING, (start(url="/first"), 1), (broke(), 1), (start(number=2, url="/second"), 1), (done(), 1))
    step = run.steps["a#1"]
    assert (step.first_seq, step.url, step.tries, step.status, step.error) == (4, "/first", 2, "finished", None)


def test_the_last_failure_of_a_once_step_says_whether_it_may_have_had_its_effect() -> None:
    spared = run_after(*ONCE, (broke(), 1), (broke(effect_free=True), 1))
    doubtful = run_after(*ONCE, (broke(effect_free=True), 1), (broke(), 1))
    again = start(number=2, once=True)
    assert (outcome(spared, again, 1), outcome(doubtful, again, 1)) == ("follows", "illegal")


def test_a_finished_step_remembers_the_revision_that_it_finished_under() -> None:
    moves = [*IN_FLIGHT, (done(), 1), (FAILED, 1), (RESUMED, None), (CLAIMED, 2)]
    second = ev.AttemptStarted(attempt=2, revision="r2")
    run = run_after(*moves, (second, 2), (start("b#1"), 2), (done("b#1"), 2))
    assert (run.steps["a#1"].revision, run.steps["b#1"].revision, run.revision) == ("r1", "r2", "r2")


def at(seq: int) -> str:
    return f"2031-05-01T12:00:{seq:02}.000000Z"


def run_in_time(*moves: Move) -> Run:
    """`run_after`, where each event comes a second after the one before."""
    return fold("r", [ev.Recorded(seq, at(seq), epoch, event) for seq, (event, epoch) in enumerate(moves, 1)])


AWAITING: list[tuple[str, list[Move], bool]] = [
    ("running", RUNNING, False),
    ("hijack requested", [*RUNNING, (HIJACK, None)], True),
    ("hijack requested of nobody", [*QUEUED, (HIJACK, None)], False),
    ("hijacked", [*RUNNING, (HIJACK, None), (HIJACKED, 1)], False),
    ("hijack requested, owner gone", [*RUNNING, (HIJACK, None), (ORPHANED, None)], False),
    ("cancelled while running", [*RUNNING, (CANCELLED, None)], True),
    ("cancelled while queued", [*QUEUED, (CANCELLED, None)], False),
    ("cancelled, and let go of", [*RUNNING, (CANCELLED, None), (RELEASED, 1)], False),
    ("finished", [*RUNNING, (FINISHED, 1)], False),
]


@pytest.mark.parametrize(("moves", "awaited"), [row[1:] for row in AWAITING], ids=[row[0] for row in AWAITING])
def test_an_owner_is_awaited_while_it_has_not_seen_a_hijack_or_the_end_of_its_run(
    moves: list[Move], awaited: bool
) -> None:
    assert run_after(*moves).awaits_owner is awaited


HELD: list[tuple[str, list[Move], int | None]] = [
    ("asking, with a page", HOLDING, 6),
    ("asking, said to be idle again", [*HOLDING, (IDLED, 1)], 6),
    ("asking for another thing since", [*HOLDING, (answered(), None), (opened("q2"), 1), (IDLED, 1)], 9),
    ("failed, with a page", [*RUNNING, (PAGE, 1), (FAILED, 1)], 5),
    ("failed while it waited", [*HOLDING, (FAILED, 1)], 7),
    ("asking, released", [*HOLDING, (RELEASED, 1)], 6),
    ("asking, without a page", ASKING, None),
    ("asking, its page closed", [*HOLDING, (PAGE_CLOSED, None)], None),
    ("asking, its page lost", [*HOLDING, (PAGE_LOST, 1)], None),
    ("at work", [*RUNNING, (PAGE, 1)], None),
    ("answered", [*HOLDING, (answered(), None)], None),
    ("hijacked", [*HOLDING, (HIJACK, None), (HIJACKED, None)], None),
    ("handed back", [*HOLDING, (HIJACK, None), (HIJACKED, None), (HANDED_BACK, None)], 6),
    ("parked", [*HOLDING, (PARKED, 1)], None),
    ("cancelled", [*HOLDING, (CANCELLED, None)], None),
]


@pytest.mark.parametrize(("moves", "since"), [row[1:] for row in HELD], ids=[row[0] for row in HELD])
def test_a_run_holds_its_page_since_it_last_came_to_stand_still(moves: list[Move], since: int | None) -> None:
    assert run_in_time(*moves).held_since == (since and at(since))


def test_a_parked_run_has_no_page_until_it_opens_one_and_says_since_when() -> None:
    parked = run_in_time(*HOLDING, (PARKED, 1))
    assert (parked.pages, parked.parked_since, parked.owner, parked.page_state) == ({}, at(7), None, "live")
    woken: list[Move] = [*HOLDING, (PARKED, 1), (answered(), None), (CLAIMED, 2), (attempt(2), 2)]
    assert run_in_time(*woken).parked_since == at(7)
    again = run_in_time(*woken, (ev.PageAttached(state="restored"), 2), (PAGE, 2))
    assert (again.pages, again.parked_since, again.page_state) == ({"main": "t"}, None, "restored")


def test_a_lost_page_ends_the_attempt_and_leaves_the_run_to_its_owner() -> None:
    run = run_after(*IN_FLIGHT, (PAGE, 1), (PAGE_LOST, 1))
    assert (run.pages, run.active, run.owner, run.losses) == ({}, False, "w1", 1)
    assert outcome(run, done(), 1) == "illegal"
    assert outcome(run, attempt(2), 1) == "follows"
    assert outcome(run, start(number=2), 1) == "follows"


def test_losses_count_in_a_row_until_a_step_finishes_or_somebody_resumes() -> None:
    lost: list[Move] = [*IN_FLIGHT, (PAGE_LOST, 1), (attempt(2), 1), (PAGE_LOST, 1), (attempt(3), 1)]
    assert run_after(*lost).losses == 2
    assert run_after(*lost, (start(), 1)).losses == 2
    assert run_after(*lost, (done(), 1)).losses == 0
    assert run_after(*lost, (FAILED, 1)).losses == 2
    assert run_after(*lost, (FAILED, 1), (RESUMED, None)).losses == 0
    assert run_after(*lost, (done(), 1), (PAGE_LOST, 1)).losses == 1


def test_a_claim_says_from_whom_the_run_was_taken() -> None:
    second: Move = (ev.RunClaimed(worker="w2"), 2)
    assert run_after(*OWNED).taken_from is None
    assert run_after(*RUNNING, second).taken_from == "w1"
    assert run_after(*RUNNING, (RELEASED, 1), second).taken_from is None
    assert run_after(*RUNNING, (ORPHANED, None), second).taken_from == "w1"
    assert run_after(*RUNNING, (ORPHANED, None), second, (ev.RunClaimed(worker="w3"), 3)).taken_from == "w2"
    assert run_after(*RUNNING, second, (ev.RunClaimed(worker="w3"), 3)).taken_from == "w2"


def test_only_an_owner_that_was_lost_at_work_counts_as_a_crash() -> None:
    second: Move = (ev.RunClaimed(worker="w2"), 2)
    assert run_after(*RUNNING, second).crashes == 1
    assert run_after(*RUNNING, second, (ev.RunClaimed(worker="w3"), 3)).crashes == 2
    assert run_after(*RUNNING, (RELEASED, 1), second).crashes == 0
    assert run_after(*RUNNING, (ORPHANED, None), (RESUMED, None), second).crashes == 0
    assert run_after(*RUNNING, (CANCELLED, None), second).crashes == 0


def test_a_run_knows_where_its_page_was_when_the_last_step_began() -> None:
    first = [*RUNNING, (start(url="/a"), 1), (done(), 1)]
    assert run_after(*RUNNING).url is None
    assert run_after(*first).url == "/a"
    second: list[Move] = [*first, (start("b#1"), 1), (done("b#1"), 1)]
    run = run_after(*second, (start("c#1", url="/b"), 1))
    assert (run.url, {key: step.url for key, step in run.steps.items()}) == (
        "/b",
        {"a#1": "/a", "b#1": "/a", "c#1": "/b"},
    )


def test_an_idle_run_says_since_when_and_no_later_event_moves_that() -> None:
    assert run_in_time(*ASKING).idle_since == at(5)
    assert run_in_time(*ASKING, (IDLED, 1), (RELEASED, 1)).idle_since == at(5)
    assert run_in_time(*RUNNING, (FAILED, 1)).idle_since == at(4)


def test_an_orphaned_run_is_nobody_s_and_its_owner_is_too_late() -> None:
    run = run_after(*IN_FLIGHT, (ORPHANED, None))
    assert (run.owner, run.active, run.epoch) == (None, False, 1)
    assert outcome(run, done(), 1) == "lease lost"
    assert outcome(run, ORPHANED, None) == "illegal"
    assert outcome(run, CLAIMED, 2) == "follows"


def test_a_doubt_on_a_finished_step_lasts_until_the_step_is_reset() -> None:
    paid: list[Move] = [*ONCE, (done(value=7), 1), (DOUBTED, None)]
    step = run_after(*paid).steps["a#1"]
    assert (step.status, step.doubted, step.value, step.in_doubt) == ("finished", True, 7, False)
    over: list[Move] = [*paid, (FAILED, 1), (RESUMED, None), (CLAIMED, 2), (attempt(2), 2)]
    assert run_after(*over).steps["a#1"].doubted
    assert not run_after(*over, (reset(), 2)).steps["a#1"].doubted


@pytest.mark.parametrize("step", [[], IN_FLIGHT[3:], [*IN_FLIGHT[3:], (done(), 1)], ONCE[3:]])
def test_only_a_finished_step_that_runs_once_can_be_doubted(step: list[Move]) -> None:
    assert outcome(run_after(*RUNNING, *step), DOUBTED, None) == "illegal"


def test_a_fork_begins_with_what_another_run_has_done_and_was_told() -> None:
    answer = shared_request("q1", value={"approved": True}, note="fine", by="person", via="terminal")
    late = shared_request("q2", expired=True)
    run = run_after(*FORK, (SHARED_STEP, None), (answer, None), (late, None))
    step = run.steps["a#1"]
    assert (run.is_fork, run.status, run.open_requests()) == (True, "queued", [])
    assert (step.status, step.value, step.fingerprint, step.url, step.revision) == ("finished", 1, "f", "/cart", "r0")
    assert (step.first_seq, step.finished_seq) == (2, 2)
    first, second = run.requests.values()
    assert (first.status, first.value, first.note, first.by, first.via) == (
        "answered",
        {"approved": True},
        "fine",
        "person",
        "terminal",
    )
    assert second.status == "expired"
    assert run.wait("q1#1") is first
    assert run.wait("q2#1") is second


def test_a_fork_takes_over_nothing_more_once_it_was_claimed_and_another_run_never_does() -> None:
    for event in (SHARED_STEP, shared_request()):
        assert outcome(run_after(*FORK), event, None) == "follows"
        assert outcome(run_after(*FORK, (event, None)), event, None) == "illegal"
        assert outcome(run_after(*FORK, (CLAIMED, 1)), event, None) == "illegal"
        assert outcome(run_after(*QUEUED), event, None) == "illegal"


def test_what_a_fork_took_over_is_never_done_again() -> None:
    run = run_after(*FORK, (SHARED_STEP, None), (shared_request(), None), (CLAIMED, 1), (attempt(1), 1))
    assert outcome(run, start(), 1) == "illegal"
    assert outcome(run, opened("q9", key="q1#1"), 1) == "illegal"
    assert outcome(run, start("b#1"), 1) == "follows"


def test_what_a_replay_found_stands_until_the_next_attempt() -> None:
    compared = run_after(*RUNNING, (COMPARED, 1))
    assert (compared.changed_steps, compared.unused_steps) == (("a#1",), ("b#1",))
    failed: list[Move] = [*RUNNING, (COMPARED, 1), (FAILED, 1), (RESUMED, None), (CLAIMED, 2)]
    assert run_after(*failed).changed_steps == ("a#1",)
    again = run_after(*failed, (attempt(2), 2))
    assert (again.changed_steps, again.unused_steps) == ((), ())


def test_everything_in_a_run_has_a_first_time_that_a_later_generation_does_not_move() -> None:
    moves: list[Move] = [*RUNNING, (start("a#1"), 1), (done("a#1"), 1), (ev.ValueRecorded(key="now#1", value=1), 1)]
    moves += [(opened("q1"), 1), (answered(), None), (reset("a#1"), 1), (start("a#1", generation=1), 1)]
    moves += [(reset("q1#1"), 1), (opened("q2", key="q1#1", generation=1), 1)]
    assert run_after(*moves).first_seqs() == {"a#1": 4, "now#1": 6, "q1#1": 7}


def test_a_copy_of_a_run_is_equal_and_goes_its_own_way() -> None:
    run = run_after(*HOLDING, (HIJACK, None), (ev.ArtifactKept(file="f", size=1, sha256="s"), None))
    twin = run.copy()
    assert twin == run
    before = copy.deepcopy(run)
    for event in (answered(), HIJACKED, reset("q1#1"), PAGE_CLOSED, CANCELLED):
        assert outcome(twin, event, None) == "follows"
    assert run == before


# --- any sequence at all ---


@dataclass
class Model:
    """A second, much smaller telling of which moves are legal: what the property tests hold the fold against."""

    created: bool = False
    ended: str | None = None
    epoch: int = 0
    owned: bool = False
    active: bool = False
    idle: bool = False
    failed: bool = False
    attempt: int = 0
    generations: dict[str, int] = field(default_factory=lambda: dict.fromkeys("ab", 0))
    steps: dict[str, str] = field(default_factory=lambda: dict.fromkeys("ab", "absent"))
    """absent, started, failed, doubtful (a once step without a known end), spared (one whose last try said that it had
    no effect), finished or paid (finished as a once step)"""
    open: dict[str, str] = field(default_factory=dict)
    """The open requests and their keys."""
    used: set[str] = field(default_factory=set)
    taken: set[tuple[str, int]] = field(default_factory=set)
    """Keys and generations that have a request that is open or was answered."""
    opened_as: dict[str, tuple[str, int]] = field(default_factory=dict)
    hijack: Literal["no", "requested", "stopped"] = "no"

    def verdict(self, event: ev.Event, epoch: int | None) -> str:
        if isinstance(event, ev.RunCreated) or not self.created:
            return "follows" if isinstance(event, ev.RunCreated) and not self.created and epoch is None else "refused"
        if isinstance(event, ev.RunClaimed):
            return "follows" if epoch == self.epoch + 1 else "refused"
        if epoch is not None and not (self.owned and epoch == self.epoch):
            return "refused"
        return "follows" if self.legal(event, owner=epoch is not None) else "refused"

    def legal(self, event: ev.Event, owner: bool) -> bool:
        going, at_work = not self.ended, owner and self.active and not self.ended
        match event:
            case ev.RunReleased():
                return owner
            case ev.RunOrphaned():
                return self.owned
            case ev.PageOpened():
                return owner and going
            case ev.RunParked():
                return owner and going and self.idle and self.hijack == "no"
            case ev.PageLost():
                return at_work
            case ev.StepDoubted():
                return going and self.steps[event.key] == "paid"
            case ev.PageClosed():
                return True
            case ev.RunCancelled():
                return going
            case ev.AttemptStarted():
                return owner and going and event.attempt == self.attempt + 1
            case ev.AttemptIdled() | ev.RunFailed():
                return at_work
            case ev.RunFinished():
                return at_work and not self.open
            case ev.RunResumed():
                return going and (self.idle or not self.owned or self.hijack == "stopped")
            case ev.StepStarted():
                fits = event.generation == self.generations[event.key]
                return at_work and fits and self.steps[event.key] in ("absent", "started", "failed", "spared")
            case ev.StepFinished() | ev.StepFailed():
                fits = event.generation == self.generations[event.key]
                return at_work and fits and self.steps[event.key] in ("started", "failed", "doubtful", "spared")
            case ev.StepReset():
                return going and event.generation == self.generations[event.key] + 1
            case ev.RequestOpened():
                fresh = event.request_id not in self.used and (event.key, event.generation) not in self.taken
                return at_work and fresh and event.generation == self.generations[event.key]
            case ev.RequestAnswered() | ev.RequestExpired() | ev.RequestWithdrawn():
                return going and event.request_id in self.open
            case ev.HijackRequested():
                return going and self.hijack == "no"
            case ev.RunHijacked():
                return going and self.hijack == "requested"
            case ev.HijackReleased():
                return going and self.hijack != "no"
        raise AssertionError(event)

    def take(self, event: ev.Event, epoch: int | None) -> None:
        match event:
            case ev.RunCreated():
                self.created = True
            case ev.RunClaimed():
                assert epoch
                self.epoch, self.owned, self.active = epoch, True, False
            case ev.RunReleased() | ev.RunOrphaned() | ev.RunParked():
                self.owned = self.active = False
            case ev.PageLost():
                self.active = False
            case ev.AttemptStarted():
                self.attempt, self.active, self.idle, self.failed = event.attempt, True, False, False
            case ev.AttemptIdled():
                self.idle = self.idle or bool(self.open)
            case ev.RunFailed():
                self.failed, self.idle, self.owned, self.active = True, True, False, False
            case ev.RunResumed():
                self.failed = self.idle = self.active = False
            case ev.RunFinished() | ev.RunCancelled():
                self.ended = "finished" if isinstance(event, ev.RunFinished) else "cancelled"
                self.active = False
                self.open.clear()
            case ev.StepStarted():
                self.steps[event.key] = "doubtful" if event.once else "started"
                self.idle = False
            case ev.StepFinished():
                once = self.steps[event.key] in ("doubtful", "spared")
                self.steps[event.key] = "paid" if once else "finished"
            case ev.StepFailed():
                once = self.steps[event.key] in ("doubtful", "spared")
                self.steps[event.key] = ("spared" if event.effect_free else "doubtful") if once else "failed"
            case ev.StepReset():
                self.generations[event.key], self.steps[event.key] = event.generation, "absent"
            case ev.RequestOpened():
                self.open[event.request_id] = event.key
                self.used.add(event.request_id)
                self.opened_as[event.request_id] = event.key, event.generation
                self.taken.add((event.key, event.generation))
            case ev.RequestAnswered() | ev.RequestExpired() | ev.RequestWithdrawn():
                del self.open[event.request_id]
                if isinstance(event, ev.RequestWithdrawn):
                    self.taken.discard(self.opened_as[event.request_id])
                elif not self.failed:
                    self.idle = False
            case ev.HijackRequested():
                self.hijack = "requested"
            case ev.RunHijacked():
                self.hijack = "stopped"
            case ev.HijackReleased():
                self.hijack = "no"

    @property
    def status(self) -> str:
        if self.ended:
            return self.ended
        if self.hijack == "stopped":
            return "hijacked"
        if not self.idle:
            return "running" if self.owned else "queued"
        if self.failed:
            return "failed"
        return "waiting-approval" if self.open else "queued"


# Every event that the model knows, with numbers that fit at some time or other.
EVENTS: list[ev.Event] = [
    CREATED, CLAIMED, RELEASED, IDLED, RESUMED, FAILED, FINISHED, CANCELLED, PAGE_CLOSED, HIJACK, HIJACKED, HANDED_BACK,
    ORPHANED, PARKED, PAGE, PAGE_LOST, *(ev.StepDoubted(key=key, reason="asked") for key in "ab"),
    *(attempt(number) for number in (1, 2, 3)),
    *(start(key, generation=g, once=once) for key in "ab" for g in (0, 1, 2) for once in (False, True)),
    *(done(key, generation=g) for key in "ab" for g in (0, 1, 2)),
    *(broke(key, generation=g, effect_free=free) for key in "ab" for g in (0, 1, 2) for free in (False, True)),
    *(reset(key, generation) for key in "ab" for generation in (1, 2)),
    *(opened(i, key=key, generation=g) for i in ("q1", "q2", "q3") for key in "ab" for g in (0, 1)),
    *(answered(i) for i in ("q1", "q2", "q3")),
    *(ev.RequestExpired(request_id=i) for i in ("q1", "q2", "q3")),
    *(ev.RequestWithdrawn(request_id=i, reason="changed") for i in ("q1", "q2", "q3")),
]  # fmt: skip


def legal_moves(model: Model) -> list[Move]:
    """The moves that the model allows; those that end a run come last and rarely, or no run would grow old."""
    moves = [(e, n) for e in EVENTS for n in (None, model.epoch, model.epoch + 1) if model.verdict(e, n) == "follows"]
    lively = [move for move in moves if not isinstance(move[0], ev.RunFinished | ev.RunCancelled)]
    return [*lively, *lively, *moves]


numbers = st.integers(0, 2**16)


@given(st.lists(st.tuples(st.booleans(), numbers, st.integers(-1, 2)), min_size=30, max_size=60))
def test_any_event_follows_exactly_when_it_is_legal_and_a_refused_one_changes_nothing(
    choices: list[tuple[bool, int, int]],
) -> None:
    model, run = Model(), Run("r")
    for likely, number, offset in choices:
        if likely:
            legal = legal_moves(model)
            event, epoch = legal[number % len(legal)]
        else:
            event = EVENTS[number % len(EVENTS)]
            epoch = None if offset == 2 else max(0, model.epoch + offset)
        expected = model.verdict(event, epoch)
        found = outcome(run, event, epoch)
        assert (found == "follows") is (expected == "follows"), (event, epoch, found)
        if found == "follows":
            model.take(event, epoch)
        if model.created:
            assert run.status == model.status


@given(st.lists(numbers, min_size=30, max_size=60))
def test_any_legal_sequence_folds_and_folding_its_stored_form_gives_the_same_run(choices: list[int]) -> None:
    model, moves = Model(), list[Move]()
    for number in choices:
        legal = legal_moves(model)
        move = legal[number % len(legal)]
        model.take(*move)
        moves.append(move)
    recorded = journal(*moves)
    run = fold("r", recorded)
    assert run.status == model.status
    stored = [(r, ev.decode(r.event.type, r.event.encoded())) for r in recorded]
    assert fold("r", [ev.Recorded(r.seq, r.at, r.epoch, event) for r, event in stored]) == run


# --- golden journals ---


def summary(run: Run) -> dict[str, Any]:
    """What a golden journal must come to."""
    return {
        "status": run.status,
        "wants_worker": run.wants_worker,
        "owner": run.owner,
        "epoch": run.epoch,
        "attempt": run.attempt,
        "revision": run.revision,
        "steps": {key: [step.status, step.generation, step.tries, step.value] for key, step in run.steps.items()},
        "requests": {
            request_id: [request.opened.kind, request.status, request.value]
            for request_id, request in run.requests.items()
        },
        "pages": run.pages,
        "page_state": run.page_state,
        "hijack": run.hijack and (run.hijack.stopped.action if run.hijack.stopped else "requested"),
        "error": run.error and run.error.message,
        "output": run.output,
        "reason": run.reason,
        "artifacts": run.artifacts,
        "progress": run.progress and [run.progress.done, run.progress.total],
    }


def read_golden(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    first, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    return first["summary"], lines


GOLDEN = sorted(JOURNALS.glob("*.jsonl"), key=lambda path: path.name)


def test_the_golden_journals_are_there() -> None:
    assert [path.stem for path in GOLDEN] == [
        "cancelled",
        "failed-and-resumed",
        "finished-with-approval",
        "hijacked",
        "in-doubt",
        "nondeterministic",
    ]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_journal_still_folds_to_what_it_was(path: Path) -> None:
    expected, lines = read_golden(path)
    journal = [ev.Recorded(e["seq"], e["at"], e["epoch"], ev.decode(e["type"], json.dumps(e["data"]))) for e in lines]
    assert summary(fold(lines[0]["run_id"], journal)) == expected


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_events_of_a_golden_journal_would_be_stored_the_same_way_today(path: Path) -> None:
    for entry in read_golden(path)[1]:
        event = ev.decode(entry["type"], json.dumps(entry["data"]))
        assert (event.type, json.loads(event.encoded())) == (entry["type"], entry["data"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_journal_without_any_one_of_its_events_does_not_fold(path: Path) -> None:
    _, lines = read_golden(path)
    journal = [ev.Recorded(e["seq"], e["at"], e["epoch"], ev.decode(e["type"], json.dumps(e["data"]))) for e in lines]
    for left_out in range(len(journal) - 1):
        with pytest.raises(FlowError):
            fold("r", [*journal[:left_out], *journal[left_out + 1 :]])
