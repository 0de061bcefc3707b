"""DESIGN's replay table, row by row, on journals; and the same rows as a run lives them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from harness import House, open_house, visit

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.errors import UnknownStep
from mcp_flow.replay import Ask, Doubt, Execute, Reuse, Settled, Waiting, reach_step, reach_wait
from mcp_flow.run import Run, fold

# --- the table ---

CREATED = ev.RunCreated(workflow="w", function="w", root="/", entry="w.py", revision="r1")
CLAIMED = ev.RunClaimed(worker="w-1")
FAILURE = ev.Failure(type="ValueError", message="no")
FAILED = ev.RunFailed(error=FAILURE)
DOUBTED = ev.StepDoubted(key="a#1", reason="asked for")
OWNED = (
    ev.AttemptStarted, ev.AttemptIdled, ev.RunFailed, ev.StepStarted, ev.StepFinished, ev.StepFailed,
    ev.ValueRecorded, ev.RequestOpened, ev.RunClaimed,
)  # fmt: skip


def attempt(number: int = 1, revision: str = "r1") -> list[ev.Event]:
    return [CLAIMED, ev.AttemptStarted(attempt=number, revision=revision)]


def started(key: str = "a#1", args: str = "x", once: bool = False, generation: int = 0) -> ev.Event:
    return ev.StepStarted(key=key, fingerprint=args, once=once, generation=generation)


def finished(key: str = "a#1", value: Any = 1, generation: int = 0) -> ev.Event:
    return ev.StepFinished(key=key, value=value, generation=generation)


def failed(key: str = "a#1", effect_free: bool = False) -> ev.Event:
    return ev.StepFailed(key=key, error=FAILURE, effect_free=effect_free)


def reset(key: str = "a#1", generation: int = 1) -> ev.Event:
    return ev.StepReset(key=key, generation=generation, reason="asked for")


def again(revision: str = "r1", number: int = 2) -> list[ev.Event]:
    """A failure, and the attempt that follows it."""
    return [FAILED, ev.RunResumed(revision=revision), *attempt(number, revision)]


def opened(terms: str = "t", generation: int = 0) -> ev.Event:
    return ev.RequestOpened(
        request_id=f"q-{generation}", key="a#1", kind="input", prompt="?", fingerprint=terms, generation=generation
    )


def journal(*events: ev.Event) -> Run:
    epoch, recorded = 0, []
    for seq, event in enumerate([CREATED, *events], 1):
        epoch += isinstance(event, ev.RunClaimed)
        recorded.append(ev.Recorded(seq, "2031-05-01", epoch if isinstance(event, OWNED) else None, event))
    return fold("r", recorded)


STEPS: list[tuple[str, Sequence[ev.Event], bool, type | None]] = [
    ("never reached", attempt(), False, Execute),
    ("never reached, once", attempt(), True, Execute),
    ("finished, same arguments", [*attempt(), started(), finished(), *again()], False, Reuse),
    ("finished, same arguments, new code", [*attempt(), started(), finished(), *again("r2")], False, Reuse),
    ("finished, same arguments, now once", [*attempt(), started(), finished(), *again("r2")], True, Reuse),
    ("started, not finished", [*attempt(), started(), *attempt(2)], False, Execute),
    ("failed", [*attempt(), started(), failed(), *again()], False, Execute),
    ("started, not finished, once", [*attempt(), started(once=True), *attempt(2)], True, Doubt),
    ("started as once, now plain", [*attempt(), started(once=True), *again("r2")], False, Doubt),
    ("once that raised", [*attempt(), started(once=True), failed(), *again()], True, Doubt),
    ("once that raised Retriable", [*attempt(), started(once=True), failed(effect_free=True), *again()], True, Execute),
    ("finished once, doubted", [*attempt(), started(once=True), finished(), DOUBTED, *again()], True, Doubt),
    (
        "finished once, doubted, now plain",
        [*attempt(), started(once=True), finished(), DOUBTED, *again()],
        False,
        Doubt,
    ),
    (
        "finished once, doubted and reset",
        [*attempt(), started(once=True), finished(), DOUBTED, FAILED, reset(), *again()[1:]],
        True,
        Execute,
    ),
    ("reset", [*attempt(), started(), finished(), FAILED, reset(), *again()[1:]], False, Execute),
    ("once, reset", [*attempt(), started(once=True), FAILED, reset(), *again()[1:]], True, Execute),
    (
        "reset and finished again",
        [
            *(*attempt(), started(), finished(), FAILED, reset(), *again()[1:]),
            *(started(generation=1), finished(generation=1), *again(number=3)),
        ],
        False,
        Reuse,
    ),
    (
        "reset and killed again, once",
        [*attempt(), started(), FAILED, reset(), *again()[1:], started(generation=1, once=True), *attempt(3)],
        True,
        Doubt,
    ),
]


@pytest.mark.parametrize(("events", "once", "then"), [row[1:] for row in STEPS], ids=[row[0] for row in STEPS])
def test_what_reaching_a_step_with_the_same_arguments_does(events: Sequence[ev.Event], once: bool, then: type) -> None:
    reached = reach_step(journal(*events), "a#1", "x", once=once)
    assert type(reached) is then
    assert not (isinstance(reached, Reuse) and reached.deviates)
    assert not (isinstance(reached, Execute) and reached.reset)


def test_other_arguments_under_the_same_code_keep_the_result_and_deviate() -> None:
    run = journal(*attempt(), started(), finished(), *again())
    assert reach_step(run, "a#1", "y", once=False) == Reuse(run.steps["a#1"], deviates=True)


def test_other_arguments_under_new_code_reset_the_step() -> None:
    run = journal(*attempt(), started(), finished(), *again("r2"))
    assert reach_step(run, "a#1", "y", once=False) == Execute(reset="its arguments changed")


def test_other_arguments_after_something_came_out_anew_reset_the_step() -> None:
    before = [*attempt(), started("b#1"), finished("b#1"), started(), finished(), FAILED]
    run = journal(*before, reset("b#1"), *again()[1:], started("b#1", generation=1), finished("b#1", generation=1))
    assert reach_step(run, "a#1", "y", once=False) == Execute(reset="its arguments changed")


@pytest.mark.parametrize("then_once", [True, False])
def test_other_arguments_under_new_code_put_a_once_step_in_doubt(then_once: bool) -> None:
    run = journal(*attempt(), started(once=True), finished(), *again("r2"))
    assert isinstance(reach_step(run, "a#1", "y", once=then_once), Doubt)


def test_other_arguments_put_a_step_in_doubt_that_is_once_from_now_on() -> None:
    run = journal(*attempt(), started(), finished(), *again("r2"))
    assert isinstance(reach_step(run, "a#1", "y", once=True), Doubt)


ANSWER = ev.RequestAnswered(request_id="q-0", value=1)
WAITS: list[tuple[str, Sequence[ev.Event], str, type]] = [
    ("never reached", attempt(), "t", Ask),
    ("open", [*attempt(), opened()], "t", Waiting),
    ("open, after a crash", [*attempt(), opened(), *attempt(2)], "t", Waiting),
    ("answered", [*attempt(), opened(), ANSWER], "t", Settled),
    ("answered, new code", [*attempt(), opened(), ANSWER, *again("r2")], "t", Settled),
    ("expired", [*attempt(), opened(), ev.RequestExpired(request_id="q-0")], "t", Settled),
    ("withdrawn", [*attempt(), opened(), ev.RequestWithdrawn(request_id="q-0", reason="")], "t", Ask),
    ("reset", [*attempt(), opened(), ANSWER, FAILED, reset(), *again()[1:]], "t", Ask),
    ("open, other terms", [*attempt(), opened(), *again("r2")], "u", Ask),
    ("answered, other terms", [*attempt(), opened(), ANSWER, *again("r2")], "u", Ask),
    ("answered, other terms, same code", [*attempt(), opened(), ANSWER, *again()], "u", Ask),
]


@pytest.mark.parametrize(("events", "terms", "then"), [row[1:] for row in WAITS], ids=[row[0] for row in WAITS])
def test_what_reaching_a_wait_does(events: Sequence[ev.Event], terms: str, then: type) -> None:
    run = journal(*events)
    reached = reach_wait(run, "a#1", terms)
    assert type(reached) is then
    if terms == "u":
        assert reached == Ask(instead_of=run.requests["q-0"])
    elif isinstance(reached, Ask):
        assert reached.instead_of is None


# --- as runs live it ---


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("replay")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


async def repaired(house: House, run_id: str) -> Any:
    house.open("mended")
    await house.resume(run_id)
    return await house.finished(run_id)


@pytest.mark.anyio
async def test_a_result_stands_though_its_arguments_differ_by_chance_and_that_is_journaled(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            got = await flow.step("save", did, f"attempt {flow.attempt}")
            if not is_open("mended"):
                raise RuntimeError("again")
            return got
        """
    )
    await house.until(run_id, "failed")
    assert await repaired(house, run_id) == "attempt 1"
    assert house.did() == ["attempt 1"]
    assert [event.key for event in await house.events(run_id, ev.StepNondeterministic)] == ["save#1"]


@pytest.mark.anyio
async def test_arguments_changed_by_new_code_run_the_step_again(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            got = await flow.step("save", did, "old")
            await flow.step("other", did, "other")
            if not is_open("mended"):
                raise RuntimeError("again")
            return got
        """
    )
    await house.until(run_id, "failed")
    house.edit('"old"', '"new"')
    assert await repaired(house, run_id) == "new"
    assert house.did() == ["old", "other", "new"]
    assert [event.key for event in await house.events(run_id, ev.StepReset)] == ["save#1"]


@pytest.mark.anyio
async def test_a_step_inserted_before_a_finished_one_runs_alone(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.step("first", did, "first")
            await flow.step("last", did, "last")
            if not is_open("mended"):
                raise RuntimeError("again")
            return flow.attempt
        """
    )
    await house.until(run_id, "failed")
    house.edit('await flow.step("last"', 'await flow.step("between", did, "between")\n    await flow.step("last"')
    assert await repaired(house, run_id) == 2
    assert house.did() == ["first", "last", "between"]


@pytest.mark.anyio
async def test_what_follows_a_step_that_came_out_anew_is_computed_from_it(house: House) -> None:
    run_id = await house.start(
        """
        def read():
            return did(f"read {len(HERE.joinpath('did').read_text()) if HERE.exists() else 0}")

        @workflow
        async def main(flow: Flow) -> str:
            text = await flow.step("read", read)
            got = await flow.step("use", lambda: did(f"use {text}"))
            if not is_open("mended"):
                raise RuntimeError("again")
            return got
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id, rerun=["read"])
    assert await house.finished(run_id) == "use read 18"
    assert house.did() == ["read 0", "use read 0", "read 18", "use read 18"]


@pytest.mark.anyio
async def test_rerun_redoes_the_named_steps_alone_and_once_steps_too(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            for _ in range(2):
                await flow.step("save", did, "save")
            await flow.step("pay", did, "pay", once=True)
            if not is_open("mended"):
                raise RuntimeError("again")
            return flow.attempt
        """
    )
    await house.until(run_id, "failed")
    with pytest.raises(UnknownStep, match="save#1, save#2"):
        await house.resume(run_id, rerun=["save"])
    with pytest.raises(UnknownStep, match="has no step 'nothing'"):
        await house.resume(run_id, rerun=["nothing"])
    house.open("mended")
    await house.resume(run_id, rerun=["save#2", "pay"])
    assert await house.finished(run_id) == 2
    assert house.did() == ["save", "save", "pay", "save", "pay"]


@pytest.mark.anyio
@pytest.mark.parametrize("change", ['"Pay 5?"', '"Pay?", data={"total": 6}'])
async def test_an_answered_approval_does_not_cover_another_question_or_other_data(house: House, change: str) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.approve("Pay?", data={"total": 5}, name="pay")
            if not is_open("mended"):
                raise RuntimeError("again")
            return flow.attempt
        """
    )
    first = await house.waiting(run_id, "waiting-approval")
    await house.approve(first)
    await house.until(run_id, "failed")
    house.edit('"Pay?", data={"total": 5}', change)
    house.open("mended")
    await house.resume(run_id)
    second = await house.waiting(run_id, "waiting-approval")
    assert second.opened.request_id != first.opened.request_id
    await house.approve(second)
    assert await house.finished(run_id) == 2


@pytest.mark.anyio
async def test_an_open_question_that_changes_is_withdrawn_and_asked_anew(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            return await flow.ask("How many?", int, name="count")
        """
    )
    first = await house.waiting(run_id, "waiting-input")
    house.edit("How many?", "How many boxes?")
    await house.resume(run_id)
    await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "How many boxes?")
    second = await house.waiting(run_id, "waiting-input")
    assert (await house.control.run(run_id)).requests[first.opened.request_id].status == "withdrawn"
    await house.resume(run_id, request_id=second.opened.request_id, value=4)
    assert await house.finished(run_id) == 4


@pytest.mark.anyio
@pytest.mark.parametrize("answer", ["done", "again"])
async def test_a_doubt_outlives_an_edit_of_the_steps_arguments(house: House, answer: Any) -> None:
    run_id = await house.start(
        """
        def pay(amount) -> int:
            did(f"pay {amount}")
            if not is_open("mended"):
                raise ConnectionError("lost")
            return amount

        @workflow
        async def main(flow: Flow) -> int:
            return await flow.step("pay", pay, 5, once=True)
        """
    )
    await house.waiting(run_id, "in-doubt")
    for amount in (6, 7):
        house.edit(f"pay, {amount - 1}", f"pay, {amount}")
        await house.resume(run_id)
        await house.event(run_id, ev.AttemptStarted, lambda event, amount=amount: event.attempt == amount - 4)
        await house.waiting(run_id, "in-doubt")
    assert house.did() == ["pay 5"]
    house.open("mended")
    await house.resume(run_id, step=answer, **({"value": 1} if answer == "done" else {}))
    assert await house.finished(run_id) == (1 if answer == "done" else 7)
    assert house.did() == (["pay 5"] if answer == "done" else ["pay 5", "pay 7"])


@pytest.mark.anyio
async def test_a_finished_once_step_with_other_arguments_is_in_doubt_although_one_was_settled_before(
    house: House,
) -> None:
    run_id = await house.start(
        """
        def pay(amount) -> int:
            did(f"pay {amount}")
            raise ConnectionError("lost")

        @workflow
        async def main(flow: Flow) -> int:
            paid = await flow.step("pay", pay, 5, once=True)
            if not is_open("mended"):
                raise RuntimeError("again")
            return paid
        """
    )
    await house.waiting(run_id, "in-doubt")
    await house.resume(run_id, step="done", value=5)
    await house.until(run_id, "failed")
    house.open("mended")
    house.edit("pay, 5", "pay, 6")
    await house.resume(run_id)
    request = await house.waiting(run_id, "in-doubt")
    began = (await house.control.run(run_id)).steps["pay#1"].started_at
    assert f"it started at {began} and finished with other arguments" in request.opened.prompt
    await house.resume(run_id, step="done", value=6)
    assert await house.finished(run_id) == 6
    assert house.did() == ["pay 5"]
