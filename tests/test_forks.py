"""A fork is a run of its own that shares what another had finished; the other one knows nothing of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from harness import House, open_house, visit

from mcp_flow import config
from mcp_flow.errors import BrokenWorkflow, Conflict, InvalidId, NotAllowed, UnknownRun, UnknownStep

pytestmark = pytest.mark.anyio

SOURCE = """
    @workflow
    async def main(flow: Flow, item: str = "tea") -> list:
        first = await flow.step("first", did, f"first {item}")
        chance = await flow.random()
        sure = await flow.approve("Go?", name="go")
        paid = await flow.step("pay", did, "pay", once=True)
        size = await flow.ask("How many?", int, name="size", default=1)
        later = await flow.random()
        last = await flow.step("last", lambda: did(f"last {size}"))
        await flow.step("end", did, "end")
        if not is_open("mended"):
            raise RuntimeError("not yet")
        return [first, chance, bool(sure), paid, size, later, last]
    """


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("forks")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


async def source_of(house: House) -> str:
    """A run of SOURCE that has failed after its last step."""
    run_id = await house.start(SOURCE, {"item": "milk"})
    await house.approve(await house.waiting(run_id, "waiting-approval"), note="fine")
    await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, value=3)
    await house.until(run_id, "failed")
    house.open("mended")
    return run_id


async def test_a_fork_shares_what_finished_before_its_step_and_does_the_rest_itself(house: House) -> None:
    source_id = await source_of(house)
    source = (await house.control.run(source_id)).copy()
    fork_id = await house.control.fork(source_id, "last")
    first, chance, sure, paid, size, later, last = await house.finished(fork_id)
    assert (first, sure, paid, size, last) == ("first milk", True, "pay", 3, "last 3")
    assert [chance, later] == [source.steps["random#1"].value, source.steps["random#2"].value]
    assert house.did() == ["first milk", "pay", "last 3", "end", "last 3", "end"]
    assert fork_id != source_id
    fork = await house.control.run(fork_id)
    assert fork.created
    assert (fork.created.forked_from, fork.created.fork_step) == (source_id, "last#1")
    assert fork.created.input == {"item": "milk"}
    assert not fork.requests.keys() & source.requests.keys()
    assert [request.note for request in fork.requests.values()] == ["fine", None]
    assert await house.store.verify(fork_id) == fork.seq
    # Whatever became of the fork, the source has not heard of it.
    assert await house.control.run(source_id) == source
    await house.resume(source_id)
    assert (await house.finished(source_id))[5] == later
    assert house.did().count("end") == 2


async def test_a_fork_from_an_early_step_asks_and_draws_again_what_came_after(house: House) -> None:
    source_id = await source_of(house)
    source = await house.control.run(source_id)
    fork_id = await house.control.fork(source_id, "pay", "my-fork")
    assert fork_id == "my-fork"
    request = await house.waiting(fork_id, "waiting-input")
    assert request.opened.request_id not in source.requests
    await house.resume(fork_id, value=8)
    _, chance, sure, _, size, later, last = await house.finished(fork_id)
    assert (chance, sure, size, last) == (source.steps["random#1"].value, True, 8, "last 8")
    assert later != source.steps["random#2"].value
    assert house.did() == ["first milk", "pay", "last 3", "end", "pay", "last 8", "end"]


async def test_a_fork_of_a_fork_shares_what_both_have_done(house: House) -> None:
    source_id = await source_of(house)
    child = await house.control.fork(source_id, "last")
    before = await house.finished(child)
    grandchild = await house.control.fork(child, "end")
    assert await house.finished(grandchild) == before
    assert house.did() == ["first milk", "pay", "last 3", "end", "last 3", "end", "end"]
    run = await house.control.run(grandchild)
    assert run.created
    assert run.created.forked_from == child
    assert await house.store.verify(grandchild) == run.seq


async def test_a_fork_runs_the_code_as_it_is_now_and_reports_what_changed_in_what_it_shares(house: House) -> None:
    source_id = await source_of(house)
    house.edit('await flow.step("end", did, "end")', 'await flow.step("end", did, "new end")')
    fork_id = await house.control.fork(source_id, "end")
    await house.finished(fork_id)
    assert house.did()[-1] == "new end"
    house.edit('lambda: did(f"last {size}")', 'lambda: did(f"very last {size}")')
    fork = await house.control.fork(source_id, "end")
    assert (await house.finished(fork))[6] == "last 3"
    assert (await house.control.run(fork)).changed_steps == ("last#1",)


async def test_what_a_fork_shares_is_redone_when_it_is_named(house: House) -> None:
    source_id = await source_of(house)
    house.edit('"mended"', '"mended again"')
    fork_id = await house.control.fork(source_id, "last")
    await house.until(fork_id, "failed")
    house.open("mended again")
    await house.resume(fork_id, rerun=["pay"])
    await house.finished(fork_id)
    assert house.did() == ["first milk", "pay", "last 3", "end", "last 3", "end", "pay"]


async def test_a_doubt_on_what_a_fork_shares_is_shared_with_it(house: House) -> None:
    source_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("first", did, "first")
            await flow.step("pay", did, "pay", once=True)
            await flow.step("confirm", did, "confirm", once=True)
            1 / 0
        """
    )
    await house.until(source_id, "failed")
    await house.resume(source_id, rerun_from="first")
    await house.waiting(source_id, "in-doubt")
    fork_id = await house.control.fork(source_id, "confirm")
    request = await house.waiting(fork_id, "in-doubt")
    assert (request.opened.key, request.opened.default) == ("pay#1?", "pay")
    assert house.did() == ["first", "pay", "confirm", "first"]
    await house.resume(fork_id, step="done")
    await house.until(fork_id, "failed")
    assert house.did() == ["first", "pay", "confirm", "first", "confirm"]


@pytest.mark.parametrize(
    ("step", "refusal", "said"),
    [
        ("nothing", UnknownStep, "has no step 'nothing'.*first#1"),
        ("pay", NotAllowed, "'pay#1' of run .* has not finished.*Finished: first#1"),
        ("go", NotAllowed, "'go#1' of run .* has not finished"),
    ],
)
async def test_a_step_that_is_not_there_or_has_not_finished_is_refused_and_no_run_begins(
    house: House, step: str, refusal: type[Exception], said: str
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("first", did, "first")
            await flow.approve("Go?", name="go")
            await flow.step("pay", lambda: 1 / 0, once=True)
        """
    )
    await house.approve(await house.waiting(run_id, "waiting-approval"))
    await house.until(run_id, "in-doubt")
    before = await house.control.runs([], None, None, 200, None)
    with pytest.raises(refusal, match=said):
        await house.control.fork(run_id, step, "no-fork")
    assert await house.control.runs([], None, None, 200, None) == before


async def test_a_fork_that_can_not_be_is_refused_and_no_run_begins(house: House) -> None:
    source_id = await source_of(house)
    before = await house.control.runs([], None, None, 200, None)
    with pytest.raises(UnknownRun):
        await house.control.fork("nobody", "first")
    with pytest.raises(InvalidId):
        await house.control.fork(source_id, "first", "../x")
    with pytest.raises(Conflict, match="is in use"):
        await house.control.fork(source_id, "last", source_id)
    house.edit("@workflow", "1 / 0\n\n\n@workflow")
    with pytest.raises(BrokenWorkflow, match=rf"{house.file}:\d+: ZeroDivisionError"):
        await house.control.fork(source_id, "last")
    assert await house.control.runs([], None, None, 200, None) == before
