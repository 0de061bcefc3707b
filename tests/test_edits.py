"""Code changes between attempts: what is redone, what is told, what is refused, and what nothing changes."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from harness import AGENT, House, open_house, visit

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.catalog import Reader
from mcp_flow.control import Control
from mcp_flow.errors import BrokenWorkflow, CodeChanged, Conflict, InvalidInput, NotAllowed, StoreError, UnknownStep
from mcp_flow.revisions import capture
from mcp_flow.run import Run
from mcp_flow.views import RunView, show_run

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("edits")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


def view(run: Run, **more: Any) -> RunView:
    return show_run(run, status=run.status, folder="", **more)


async def again(house: House, run_id: str, *statuses: str, **options: Any) -> Run:
    """Resume, and the run once its next attempt has come to a stop."""
    attempt = (await house.control.run(run_id)).attempt + 1
    await house.resume(run_id, **options)
    await house.event(run_id, ev.AttemptStarted, lambda event: event.attempt == attempt)
    return await house.until(run_id, *statuses)


# --- what a replay reports ---

THREE_STEPS = """
    def read():
        return did("read")

    @workflow
    async def main(flow: Flow) -> list:
        await flow.step("read", read)
        await flow.step("count", lambda: did("count 1"))
        await flow.step("save", functools.partial(lambda text: did(text), "save"))
        if not is_open("mended"):
            raise RuntimeError("again")
        return [flow.attempt]
    """


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ('return did("read")', 'return did("read again")', ["read#1"]),
        ('"count 1"', '"count 2"', ["count#1"]),
        ("did(text)", "did(text.strip())", ["save#1"]),
        ("def read():", "# A remark\n\n\ndef read():\n    # another one\n", []),
        ("async def main(flow: Flow) -> list:", "async def main(flow: Flow) -> list:\n    await flow.log('x')\n", []),
    ],
    ids=["function", "constant of a lambda", "function within a partial", "lines", "workflow"],
)
async def test_a_finished_step_whose_code_was_edited_keeps_its_result_and_is_reported(
    house: House, old: str, new: str, changed: list[str]
) -> None:
    run_id = await house.start(THREE_STEPS)
    await house.until(run_id, "failed")
    house.edit(old, new)
    house.open("mended")
    run = await again(house, run_id, "finished")
    assert house.did() == ["read", "count 1", "save"]
    assert view(run).get("changed_steps", []) == changed
    assert "unused_steps" not in view(run)
    assert [event.changed_steps for event in await house.events(run_id, ev.AttemptCompared)] == [changed] * bool(
        changed
    )


async def test_a_step_that_is_reported_as_changed_is_redone_by_its_name(house: House) -> None:
    run_id = await house.start(THREE_STEPS)
    await house.until(run_id, "failed")
    house.edit('"count 1"', '"count 2"')
    run = await again(house, run_id, "failed")
    assert run.changed_steps == ("count#1",)
    house.open("mended")
    run = await again(house, run_id, "finished", rerun=list(run.changed_steps))
    assert (run.changed_steps, run.unused_steps) == ((), ())
    assert house.did() == ["read", "count 1", "save", "count 2"]


@pytest.mark.parametrize("last", ["finished", "failed", "paused"])
async def test_a_finished_step_that_is_reached_no_more_is_kept_and_reported(house: House, last: str) -> None:
    run_id = await house.start(THREE_STEPS)
    await house.until(run_id, "failed")
    house.edit('await flow.step("count", lambda: did("count 1"))', "pass")
    if last == "paused":
        house.edit("if not is_open", "await flow.pause()\n    if not is_open")
    if last == "finished":
        house.open("mended")
    run = await again(house, run_id, last)
    assert view(run)["unused_steps"] == ["count#1"]
    assert "changed_steps" not in view(run)
    assert run.steps["count#1"].value == "count 1"
    house.edit("pass", 'await flow.step("count", lambda: did("count 1"))')
    if last != "finished":
        house.open("mended")
        run = await again(house, run_id, "finished", **({} if last == "failed" else {"rerun": ["save"]}))
        assert "unused_steps" not in view(run)
        assert house.did()[:3] == ["read", "count 1", "save"]


async def test_a_first_attempt_and_one_of_the_same_code_report_nothing(house: House) -> None:
    run_id = await house.start(THREE_STEPS)
    await house.until(run_id, "failed")
    house.open("mended")
    run = await again(house, run_id, "finished")
    assert not await house.events(run_id, ev.AttemptCompared)
    assert not {"changed_steps", "unused_steps", "edited"} & view(run).keys()


# --- rerun_from ---

CHAIN = """
    @workflow
    async def main(flow: Flow) -> list:
        await flow.step("first", did, "first")
        before = await flow.random()
        await flow.step("second", did, "second")
        size = await flow.ask("How many?", int, name="size")
        after = await flow.random()
        paid = await flow.step("pay", did, "pay", once=True)
        await flow.step("last", did, "last")
        if not is_open("mended"):
            raise RuntimeError("again")
        return [before, size, after, paid]
    """


async def through(house: House) -> tuple[str, Run]:
    """A run of CHAIN that has failed at its end, and what it was then."""
    run_id = await house.start(CHAIN)
    await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, value=3)
    run = (await house.until(run_id, "failed")).copy()
    house.open("mended")
    return run_id, run


async def test_rerun_from_a_step_redoes_it_and_all_that_began_after_it_waits_and_values_too(house: House) -> None:
    run_id, before = await through(house)
    asked = [*before.requests]
    run = await again(house, run_id, "waiting-input", rerun_from="second")
    [request] = run.open_requests()
    assert request.opened.request_id not in asked
    assert house.did() == ["first", "second", "pay", "last", "second"]
    await house.resume(run_id, value=4)
    await house.waiting(run_id, "in-doubt")
    await house.resume(run_id, step="done")
    first, size, second, paid = await house.finished(run_id)
    assert (first, size, paid) == (before.steps["random#1"].value, 4, "pay")
    assert second != before.steps["random#2"].value
    assert house.did() == ["first", "second", "pay", "last", "second", "last"]
    resets = [event.key for event in await house.events(run_id, ev.StepReset) if "rerun" in event.reason]
    assert resets == ["second#1", "size#1", "random#2", "last#1"]
    assert [event.key for event in await house.events(run_id, ev.StepDoubted)] == ["pay#1"]


async def test_a_finished_once_step_after_the_one_that_is_redone_asks_with_its_old_value_at_hand(house: House) -> None:
    run_id, _ = await through(house)
    await again(house, run_id, "waiting-input", rerun_from="second")
    await house.resume(run_id, value=4)
    request = await house.waiting(run_id, "in-doubt")
    assert (request.opened.has_default, request.opened.default) == (True, "pay")
    assert "what comes before it is done again" in request.opened.prompt
    await house.resume(run_id, step="done", value="paid by hand")
    assert (await house.finished(run_id))[3] == "paid by hand"
    assert house.did().count("pay") == 1


async def test_a_finished_once_step_after_the_one_that_is_redone_is_done_again_when_somebody_says_so(
    house: House,
) -> None:
    run_id, _ = await through(house)
    await again(house, run_id, "in-doubt", rerun_from="random#2")
    await house.resume(run_id, step="again")
    assert (await house.finished(run_id))[3] == "pay"
    assert house.did() == ["first", "second", "pay", "last", "pay", "last"]


async def test_a_doubt_outlives_an_attempt_that_never_reached_it_and_is_raised_once(house: House) -> None:
    run_id, _ = await through(house)
    await again(house, run_id, "waiting-input", rerun_from="second")
    await again(house, run_id, "waiting-input", rerun_from="second")
    assert len(await house.events(run_id, ev.StepDoubted)) == 1
    await house.resume(run_id, value=4)
    await house.waiting(run_id, "in-doubt")
    await house.resume(run_id, step="done")
    assert (await house.finished(run_id))[1] == 4
    assert house.did().count("pay") == 1


async def test_a_once_step_that_rerun_from_itself_names_is_done_again(house: House) -> None:
    run_id, before = await through(house)
    await again(house, run_id, "finished", rerun_from="pay")
    first, size, second, _ = (await house.control.run(run_id)).output
    assert [first, size, second] == [before.steps["random#1"].value, 3, before.steps["random#2"].value]
    assert house.did() == ["first", "second", "pay", "last", "pay", "last"]


async def test_a_once_step_is_done_again_where_rerun_names_it_beside_rerun_from(house: House) -> None:
    run_id, _ = await through(house)
    await again(house, run_id, "finished", rerun_from="random#2", rerun=["pay"])
    assert house.did() == ["first", "second", "pay", "last", "pay", "last"]
    assert not await house.events(run_id, ev.StepDoubted)


async def test_rerun_may_name_a_wait_which_is_then_asked_again(house: House) -> None:
    run_id, before = await through(house)
    await again(house, run_id, "waiting-input", rerun=["size"])
    await house.resume(run_id, value=9)
    assert (await house.finished(run_id))[:3] == [before.steps["random#1"].value, 9, before.steps["random#2"].value]
    assert house.did() == ["first", "second", "pay", "last"]


async def test_a_wait_that_is_open_may_be_asked_again_from_a_step_before_it(house: House) -> None:
    run_id = await house.start(CHAIN)
    first = await house.waiting(run_id, "waiting-input")
    house.open("mended")
    run = await again(house, run_id, "waiting-input", rerun_from="second")
    [second] = run.open_requests()
    assert run.requests[first.opened.request_id].status == "withdrawn"
    assert second.opened.request_id != first.opened.request_id
    await house.resume(run_id, value=1)
    assert (await house.finished(run_id))[1] == 1
    assert house.did() == ["first", "second", "second", "pay", "last"]


async def test_a_step_that_is_not_there_is_refused_with_the_names_there_are_and_nothing_changes(house: House) -> None:
    run_id, before = await through(house)
    for options in ({"rerun_from": "third"}, {"rerun": ["second", "third"]}):
        with pytest.raises(UnknownStep, match=r"has no step 'third'.*first#1.*second#1.*size#1"):
            await house.resume(run_id, **options)
    assert (await house.control.run(run_id)) == before


async def test_a_step_of_a_run_that_is_running_can_not_be_redone(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("first", did, "first")
            await flow.step("long", until_open, "end")
        """
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "long#1")
    seq = (await house.control.run(run_id)).seq
    for options in ({"rerun_from": "first"}, {"rerun": ["first"]}):
        with pytest.raises(NotAllowed, match="is running; a step can be redone once it has stopped"):
            await house.resume(run_id, **options)
    assert (await house.control.run(run_id)).seq == seq


# --- refusing edited code ---

GREETING = """
    @workflow
    async def main(flow: Flow) -> str:
        name = await flow.ask("Who?", name="name")
        greeting = "hello"
        return f"{greeting}, {name}"
    """


async def test_edited_code_is_refused_with_its_difference_where_the_caller_asks_for_that(house: House) -> None:
    run_id = await house.start(GREETING)
    await house.waiting(run_id, "waiting-input")
    before = (await house.control.run(run_id)).copy()
    house.edit('"hello"', '"good evening"')
    with pytest.raises(CodeChanged) as refusal:
        await house.resume(run_id, value="Ada", on_change="refuse")
    message = str(refusal.value)
    assert f"+++ b/{house.file.name}" in message
    assert '-    greeting = "hello"\n+    greeting = "good evening"' in message
    assert 'on_change="accept"' in message
    assert await house.control.run(run_id) == before
    revision = capture(house.settings.workflows, house.file.name)
    with pytest.raises(StoreError, match="is not in the store"):
        await house.store.load_revision(revision.hash)
    await house.resume(run_id, value="Ada", on_change="accept")
    assert await house.finished(run_id) == "good evening, Ada"


async def test_production_refuses_edited_code_unless_it_is_told_to_accept(house: House) -> None:
    settings = dataclasses.replace(house.settings, env="production")
    async with Reader(settings) as reader:
        control = Control(settings, house.store, reader, house.bell)
        run_id = await house.start(GREETING)
        await house.waiting(run_id, "waiting-input")
        seq = (await house.control.run(run_id)).seq
        house.edit('"hello"', '"good evening"')
        with pytest.raises(CodeChanged, match=r'\+    greeting = "good evening"'):
            await control.resume(run_id, AGENT, value="Ada", has_value=True)
        assert (await house.control.run(run_id)).seq == seq
        await control.resume(run_id, AGENT, value="Ada", has_value=True, on_change="accept")
        assert await house.finished(run_id) == "good evening, Ada"


async def test_code_that_is_the_same_is_not_refused(house: House) -> None:
    run_id = await house.start(GREETING)
    await house.waiting(run_id, "waiting-input")
    house.file.touch()
    await house.resume(run_id, value="Ada", on_change="refuse")
    assert await house.finished(run_id) == "hello, Ada"


async def test_a_stopped_run_tells_how_its_code_was_edited(house: House) -> None:
    run_id = await house.start(GREETING)
    await house.waiting(run_id, "waiting-input")
    run = await house.control.run(run_id)
    assert await house.control.edits(run) is None
    house.edit('"hello"', '"good evening"')
    edits = await house.control.edits(run)
    assert edits
    assert '-    greeting = "hello"\n+    greeting = "good evening"' in edits
    assert view(run, edits=edits)["edited"] == edits
    house.edit('"good evening"', '"hello"')
    assert await house.control.edits(run) is None
    house.file.rename(house.file.with_suffix(".away"))
    assert await house.control.edits(run) is None


async def test_a_long_difference_is_cut_and_says_so(house: House) -> None:
    run_id = await house.start(GREETING)
    await house.waiting(run_id, "waiting-input")
    house.file.write_text(house.file.read_text() + "".join(f"line_{n} = {n}\n" for n in range(2000)))
    edits = await house.control.edits(await house.control.run(run_id))
    assert edits
    assert len(edits) < 3000
    assert edits.endswith("lines in all)")
    with pytest.raises(CodeChanged) as refusal:
        await house.resume(run_id, value="Ada", on_change="refuse")
    assert len(str(refusal.value)) < 5000


# --- code that can't be had ---


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def main(:", "SyntaxError"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
@pytest.mark.parametrize("status", ["waiting-input", "failed"])
async def test_a_revision_that_no_longer_imports_is_told_with_its_line_and_the_run_stays_as_it_was(
    house: House, status: str, source: str, said: str
) -> None:
    run_id = await house.start(
        GREETING
        if status == "waiting-input"
        else GREETING.replace("name = await", "if not is_open('x'): 1 / 0\n        name = await")
    )
    before = (await house.until(run_id, status)).copy()
    good = house.file.read_text()
    house.file.write_text(f"{good}\n{source}\n")
    line = len(house.file.read_text().splitlines())
    with pytest.raises(BrokenWorkflow, match=rf"{house.file}:{line}: .*{said}"):
        await house.resume(run_id, **({"value": "Ada"} if status == "waiting-input" else {}))
    assert await house.control.run(run_id) == before
    house.file.write_text(good)
    house.open("x")
    await house.resume(run_id, **({"value": "Ada"} if status == "waiting-input" else {}))
    if status == "failed":
        await house.waiting(run_id, "waiting-input")
        await house.resume(run_id, value="Ada")
    assert await house.finished(run_id) == "hello, Ada"


async def test_a_revision_that_no_longer_takes_the_runs_input_is_refused_and_the_run_stays_as_it_was(
    house: House,
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow, number: int) -> int:
            await flow.pause()
            return number
        """,
        {"number": 5},
    )
    before = (await house.until(run_id, "paused")).copy()
    house.edit("number: int", "number: date")
    with pytest.raises(InvalidInput, match="number"):
        await house.resume(run_id)
    assert await house.control.run(run_id) == before


async def test_a_file_that_is_gone_is_told_and_the_run_stays_as_it_was(house: House) -> None:
    run_id = await house.start(GREETING)
    before = (await house.until(run_id, "waiting-input")).copy()
    house.file.unlink()
    with pytest.raises(BrokenWorkflow, match=rf"{house.file}: the file can't be read"):
        await house.resume(run_id, value="Ada")
    assert await house.control.run(run_id) == before


# --- two answers ---


async def test_the_same_answer_again_is_fine_and_another_is_a_conflict_that_names_the_first(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            first = await flow.ask("How many?", int, name="first")
            return [first, await flow.ask("And then?", int, name="second")]
        """
    )
    request = await house.waiting(run_id, "waiting-input")
    answer = {"request_id": request.opened.request_id}
    await house.resume(run_id, **answer, value=3)
    await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "And then?")
    await house.until(run_id, "waiting-input")
    seq = (await house.control.run(run_id)).seq
    await house.resume(run_id, **answer, value=3)
    with pytest.raises(Conflict, match=rf"{answer['request_id']} was answered already by agent via tool: 3\."):
        await house.resume(run_id, **answer, value=4)
    assert (await house.control.run(run_id)).seq == seq
    await house.resume(run_id, value=5)
    assert await house.finished(run_id) == [3, 5]


async def test_the_same_decision_again_is_fine_and_another_is_a_conflict_that_names_the_first(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> bool:
            return bool(await flow.approve("Pay?", on_deny="return"))
        """
    )
    request = await house.waiting(run_id, "waiting-approval")
    await house.approve(request)
    await house.finished(run_id)
    await house.approve(request)
    with pytest.raises(Conflict, match=r"was answered already by agent via tool: approved\."):
        await house.approve(request, deny=True)
    assert await house.finished(run_id) is True
