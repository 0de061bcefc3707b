"""Names of steps: unique where they can be, refused where a replay could not tell them apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from harness import House, open_house, visit

from mcp_flow import config, scope
from mcp_flow.errors import NestedStep, StepError, StepNameTaken

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("scope")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


async def test_uses_of_a_name_are_counted_in_the_task_that_owns_the_scope() -> None:
    with scope.Scope() as top:
        assert [top.key("a"), top.key("b"), top.key("a")] == ["a#1", "b#1", "a#2"]


async def test_a_scope_within_a_scope_is_named_by_its_path_and_the_second_of_a_name_is_another() -> None:
    with scope.Scope() as top:
        with top.child("rows") as rows, rows.child("cell") as cell:
            assert scope.current() is cell
            assert cell.key("save") == "rows/cell/save#1"
        async with top.child("rows") as again:
            assert again.key("save") == "rows~2/save#1"
        assert scope.current() is top


async def test_names_that_look_like_paths_or_counts_can_not_pass_for_others() -> None:
    with scope.Scope() as top:
        keys = [top.key("a/b"), top.child("a").key("b"), top.key("a#1"), top.key("a"), top.key("a%23"), top.key("x\ny")]
    assert keys == ["a%2Fb#1", "a/b#1", "a%231#1", "a#1", "a%2523#1", "x y#1"]


async def test_long_names_are_cut_and_still_told_apart() -> None:
    with scope.Scope() as top:
        one, two = top.key("x" * 1000 + "1"), top.key("x" * 1000 + "2")
    assert one != two
    assert len(one) < 210


@pytest.mark.parametrize("name", ["", " \n"])
async def test_an_empty_name_is_refused(name: str) -> None:
    with scope.Scope() as top, pytest.raises(StepError, match="needs a name"):
        top.key(name)


async def test_in_another_task_a_name_is_used_once() -> None:
    async def other(name: str) -> str:
        return scope.current().key(name)

    with scope.Scope() as top:
        assert await asyncio.create_task(other("a")) == "a#1"
        with pytest.raises(StepNameTaken, match=r"flow\.scope"):
            await asyncio.create_task(other("a"))
        with pytest.raises(StepNameTaken):
            top.key("a")
        top.key("b")
        with pytest.raises(StepNameTaken):
            await asyncio.create_task(other("b"))


async def test_a_task_with_a_scope_of_its_own_counts_for_itself() -> None:
    async def row(number: int) -> list[str]:
        with scope.current().child(f"row {number}") as own:
            return [own.key("save"), own.key("save")]

    with scope.Scope():
        rows = await asyncio.gather(row(1), row(2))
    assert rows == [["row 1/save#1", "row 1/save#2"], ["row 2/save#1", "row 2/save#2"]]


async def test_inside_a_step_the_outer_name_is_in_the_refusal() -> None:
    with scope.inside_step("outer", "outer#1"), pytest.raises(NestedStep, match=r"flow\.page.*'outer'"):
        scope.refuse_nesting("flow.page()")
    scope.refuse_nesting("flow.page()")


async def test_two_steps_of_one_name_side_by_side_are_refused_and_flow_scope_is_named(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await asyncio.gather(*(flow.step("save", did, n) for n in range(2)))
        """
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.type == "StepNameTaken"
    assert "'save'" in run.error.message
    assert "flow.scope" in run.error.message


async def test_steps_of_one_name_side_by_side_work_in_scopes_and_are_told_apart_on_replay(house: House) -> None:
    run_id = await house.start(
        """
        async def row(flow, n):
            with flow.scope(f"row {n}"):
                if n == 0:
                    file = HERE / "did"
                    while not (file.exists() and "1" in file.read_text()):
                        await asyncio.sleep(0.001)
                return await flow.step("save", did, f"saved {n}")

        @workflow
        async def main(flow: Flow) -> list:
            saved = await asyncio.gather(*(row(flow, n) for n in range(2)))
            if not is_open("mended"):
                raise RuntimeError("again")
            return saved
        """
    )
    await house.until(run_id, "failed")
    house.open("mended")
    await house.resume(run_id)
    assert await house.finished(run_id) == ["saved 0", "saved 1"]
    assert house.did() == ["saved 1", "saved 0"], await house.story(run_id)


async def test_a_step_from_a_task_that_no_run_started_says_so(house: House) -> None:
    run_id = await house.start(
        """
        import contextvars

        @workflow
        async def main(flow: Flow) -> str:
            stranger = asyncio.get_running_loop().create_task(
                flow.step("lost", did, "lost"), context=contextvars.Context()
            )
            try:
                await stranger
            except FlowError as error:
                return f"{type(error).__name__}: {error}"
        """
    )
    assert (await house.finished(run_id)).startswith("OutsideRun: 'lost'")
    assert house.did() == []


async def test_a_flow_that_outlives_its_run_does_nothing_more(house: House) -> None:
    run_id = await house.start(
        """
        async def late(flow):
            await until_open("late")
            try:
                await flow.step("late", did, "late")
            finally:
                did("refused")

        @workflow
        async def main(flow: Flow) -> str:
            global kept
            kept = asyncio.create_task(late(flow))
            return "done"
        """
    )
    assert await house.finished(run_id) == "done"
    house.open("late")
    await house.until(run_id, "finished")
    while not house.did():
        await asyncio.sleep(0)
    assert house.did() == ["refused"]
