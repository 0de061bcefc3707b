"""Stopping a run by hand: breakpoints in the code and beside it, a budget of steps, a start that is held back."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from harness import AGENT, House, open_house, visit

from mcp_flow import config, run_workflow
from mcp_flow import events as ev
from mcp_flow.errors import Conflict

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("breakpoints")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


STEPS = """
    @workflow
    async def main(flow: Flow) -> int:
        for name in "abc":
            await flow.step(name, did, name)
        return flow.attempt
    """
BRANCHES = """
    @workflow
    async def main(flow: Flow) -> int:
        async def branch(number: int) -> None:
            with flow.scope(f"{number}"):
                await flow.step("save", did, f"{number}")

        await asyncio.gather(*(branch(number) for number in range(5)))
        return flow.attempt
    """


async def test_flow_pause_stops_with_its_reason_until_resume(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            await flow.pause("look at the total")
            return "on"
        """
    )
    request = await house.waiting(run_id, "paused")
    assert (request.opened.kind, request.opened.prompt) == ("pause", "look at the total")
    await house.resume(run_id)
    assert await house.finished(run_id) == "on"


async def test_pause_before_stops_at_the_steps_named_and_again_when_they_are_redone(house: House) -> None:
    run_id = await house.start(STEPS, pause_before=["b"])
    assert (await house.waiting(run_id, "paused")).opened.prompt == "before step 'b'"
    assert house.did() == ["a"]
    await house.resume(run_id)
    assert await house.finished(run_id) == 1

    house.begin("redone")
    run_id = await house.start(STEPS.replace("return", "await flow.pause('end')\n        return"), pause_before=["b"])
    await house.waiting(run_id, "paused")
    await house.resume(run_id)
    await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "end")
    await house.waiting(run_id, "paused")
    await house.resume(run_id, rerun=["b"])
    await house.event(run_id, ev.RequestOpened, lambda event: event.key == "b#1|" and event.generation == 1)
    assert house.did() == ["a", "b", "c"]
    await house.resume(run_id)
    await house.event(run_id, ev.StepFinished, lambda event: event.generation == 1)
    assert house.did() == ["a", "b", "c", "b"]


async def test_pause_before_knows_a_step_in_a_scope_by_its_name_and_by_its_path(house: House) -> None:
    run_id = await house.start(BRANCHES, pause_before=["3/save"])
    assert (await house.waiting(run_id, "paused")).opened.key == "3/save#1|"
    assert sorted(house.did()) == ["0", "1", "2", "4"]
    await house.resume(run_id)
    await house.finished(run_id)

    house.begin("every_branch")
    run_id = await house.start(BRANCHES, pause_before=["save"])
    run = await house.until(run_id, "paused")
    assert len(run.open_requests()) == 5
    assert house.did() == []
    await house.resume(run_id)
    await house.finished(run_id)


async def test_single_step_stops_before_every_step_and_at_none_twice(house: House) -> None:
    run_id = await house.start(STEPS, single_step=True)
    for done, name in enumerate("abc"):
        await house.event(run_id, ev.RequestOpened, lambda event, name=name: event.key == f"{name}#1|")
        await house.waiting(run_id, "paused")
        assert house.did() == list("abc")[:done]
        if name == "b":  # a worker that dies meanwhile changes nothing
            await house.stop_working()
            house.work()
        await house.resume(run_id)
    await house.finished(run_id)
    assert len(await house.events(run_id, ev.RequestOpened)) == 3


async def test_resume_with_max_steps_pauses_after_so_many_new_steps(house: House) -> None:
    run_id = await house.start(STEPS, hold=True)
    await house.resume(run_id, max_steps=1)
    assert "as many steps as resume allowed" in (await house.waiting(run_id, "paused")).opened.prompt
    assert house.did() == ["a"]
    await house.stop_working()
    house.work()
    await house.resume(run_id, max_steps=1)
    await house.event(run_id, ev.RequestOpened, lambda event: event.key == "c#1|")
    await house.waiting(run_id, "paused")
    assert house.did() == ["a", "b"]
    await house.resume(run_id)
    await house.finished(run_id)


async def test_an_answer_in_between_does_not_lift_the_limit_of_max_steps(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.step("a", did, "a")
            number = await flow.ask("How many?", int)
            await flow.step("b", did, "b")
            await flow.step("c", did, "c")
            return number
        """,
        hold=True,
    )
    await house.resume(run_id, max_steps=2)
    await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, value=7)
    await house.waiting(run_id, "paused")
    assert house.did() == ["a", "b"]
    await house.resume(run_id)
    assert await house.finished(run_id) == 7


async def test_max_steps_counts_over_parallel_branches(house: House) -> None:
    run_id = await house.start(BRANCHES, hold=True)
    await house.resume(run_id, max_steps=2)
    run = await house.until(run_id, "paused")
    assert len(house.did()) == 2
    assert len(run.open_requests()) == 3
    await house.resume(run_id, max_steps=1)
    await house.event(run_id, ev.RequestOpened, lambda event: event.request_id not in run.requests)
    assert len(house.did()) == 3
    await house.until(run_id, "paused")
    await house.resume(run_id)
    await house.finished(run_id)


async def test_a_step_that_asks_for_help_is_not_stopped_before_once_more(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            def read() -> str:
                if flow.retry_input is None:
                    raise Retriable("what does it say?", ask=str)
                return flow.retry_input

            return await flow.step("read", read)
        """,
        hold=True,
    )
    await house.resume(run_id, max_steps=1)
    request = await house.waiting(run_id, "waiting-input")
    await house.stop_working()
    house.work()
    await house.resume(run_id, request_id=request.opened.request_id, value="it", max_steps=1)
    assert await house.finished(run_id) == "it"
    assert len(await house.events(run_id, ev.RequestOpened)) == 1


async def test_a_run_that_is_held_waits_for_resume_and_asking_for_it_again_starts_nothing(house: House) -> None:
    run_id = await house.start(STEPS, hold=True, run_id="held-1")
    assert await house.again(run_id="held-1") == run_id
    run = await house.control.wait(run_id, 30)  # at rest: nobody waits 30 s for it
    assert (run.status, run.on_hold, run.attempt) == ("queued", True, 0)
    assert house.did() == []
    await house.resume(run_id)
    assert await house.finished(run_id) == 1


async def test_no_breakpoint_stops_a_run_in_production(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows", env="production")
    async with open_house(settings) as house:
        await house.working()
        source = STEPS.replace("return", "await flow.pause('look')\n        return")
        run_id = await house.start(source, pause_before=["b"], single_step=True)
        assert await house.finished(run_id) == 1
        assert await house.events(run_id, ev.RequestOpened) == []


async def test_a_run_is_resumed_with_its_own_input_and_no_other(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")
    async with open_house(settings) as house:
        house.write(
            """
            @workflow
            async def main(flow: Flow, word: str, times: int = 1) -> str:
                await flow.pause("look")
                return word * times
            """
        )
        here = dataclasses.replace(settings)
        stopped = await run_workflow("main", input={"word": "a"}, run_id="one", settings=here)
        assert stopped.status == "paused"
        before = (await house.control.run("one")).seq
        with pytest.raises(Conflict, match=r'another input: \{"word": "a"'):
            await run_workflow("main", input={"word": "b"}, run_id="one", resume=True, settings=here)
        with pytest.raises(Conflict, match="not of 'other'"):
            await run_workflow("other", run_id="one", resume=True, settings=here)
        assert (await house.control.run("one")).seq == before
        with pytest.raises(Conflict):
            await house.control.start("main", {"word": "b"}, run_id="one")
        done = await run_workflow("main", input={"word": "a"}, run_id="one", resume=True, settings=here)
        assert done.output == "a"


async def test_a_fork_of_a_run_that_was_held_is_not_held(house: House) -> None:
    run_id = await house.start(STEPS, hold=True)
    await house.resume(run_id)
    await house.finished(run_id)
    fork = await house.control.fork(run_id, "b")
    assert await house.finished(fork) == 1
    assert house.did() == ["a", "b", "c", "b", "c"]
    await house.control.resume(fork, AGENT)
