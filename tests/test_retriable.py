"""A step that says it may be tried again: the run stops at it, with its error and a form for what would help."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from harness import House, open_house, visit

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.errors import InvalidInput

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("retriable")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


LOGIN = """
    class Login(BaseModel):
        name: str
        code: int

    @workflow
    async def main(flow: Flow) -> str:
        def sign_in() -> str:
            given = flow.retry_input
            did(f"try {given and given['code']}")
            if given is None or given["code"] != 7:
                raise Retriable("the site refused the code", ask=Login)
            if not is_open("network"):
                raise ConnectionError("no network")
            return given["name"]

        await flow.step("before", did, "before")
        return await flow.step("sign in", sign_in)
    """


async def test_the_run_stops_at_the_step_with_its_error_and_a_form_and_goes_on_with_the_answer(house: House) -> None:
    run_id = await house.start(LOGIN)
    house.open("network")
    request = await house.waiting(run_id, "waiting-input")
    assert request.opened.prompt == "Step 'sign in' failed and can be tried again: the site refused the code"
    assert set((request.opened.answer_schema or {})["properties"]) == {"name", "code"}
    assert (step := (await house.control.run(run_id)).steps["sign in#1"]).error
    assert (step.error.type, step.error.line) == ("Retriable", house.line_of("raise Retriable"))
    with pytest.raises(InvalidInput, match="- code"):
        await house.resume(run_id, value={"name": "Ada", "code": "x"})
    await house.resume(run_id, value={"name": "Ada", "code": 6})
    again = await house.waiting(run_id, "waiting-input")
    assert again.opened.request_id != request.opened.request_id
    await house.resume(run_id, request_id=again.opened.request_id, value={"name": "Ada", "code": 7})
    assert await house.finished(run_id) == "Ada"
    assert house.did() == ["before", "try None", "try 6", "try 7"]


async def test_resume_without_a_value_runs_just_that_step_again_and_asks_its_conditions_not_again(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            def fetch() -> str:
                did("fetch")
                if not is_open("shop"):
                    raise Retriable("the shop is closed")
                return "fetched"

            await flow.approve("Fetch?")
            return await flow.step("fetch", fetch, retries=1, backoff=0, once=True)
        """
    )
    await house.approve(await house.waiting(run_id, "waiting-approval"))
    request = await house.waiting(run_id, "paused")
    assert (request.opened.kind, request.opened.answer_schema) == ("pause", None)
    house.open("shop")
    await house.resume(run_id)
    assert await house.finished(run_id) == "fetched"
    assert house.did() == ["fetch"] * 3
    assert len([e for e in await house.events(run_id, ev.RequestOpened) if e.kind == "approval"]) == 1


async def test_the_question_survives_a_new_attempt_and_an_edit_and_what_was_given_survives_a_failure(
    house: House,
) -> None:
    run_id = await house.start(LOGIN)
    request = await house.waiting(run_id, "waiting-input")
    await house.stop_working()
    house.work()
    house.edit("the site refused the code", "the site refused it")
    await house.resume(run_id, request_id=request.opened.request_id, value={"name": "Ada", "code": 7})
    error = (await house.until(run_id, "failed")).error
    assert error
    assert error.type == "ConnectionError"
    await house.stop_working()
    house.work()
    house.open("network")
    await house.resume(run_id)
    assert await house.finished(run_id) == "Ada"
    assert house.did() == ["before", "try None", "try 7", "try 7"]
    assert len(await house.events(run_id, ev.RequestOpened)) == 1


async def test_a_step_that_is_redone_does_not_find_what_was_given_before(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            def choose() -> str:
                if flow.retry_input is None:
                    raise Retriable("choose", ask=str)
                return flow.retry_input

            word = await flow.step("choose", choose)
            await flow.pause(f"is {word} right?")
            return word
        """
    )
    await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, value="tee")
    await house.waiting(run_id, "paused")
    await house.resume(run_id, rerun=["choose"])
    await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, value="tea")
    assert (await house.waiting(run_id, "paused")).opened.prompt == "is tea right?"
    await house.resume(run_id)
    assert await house.finished(run_id) == "tea"


async def test_where_a_failure_is_to_be_passed_over_nobody_is_asked(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            def fail() -> str:
                raise Retriable("never mind", ask=str)

            return repr(await flow.step("fail", fail, on_fail="continue"))
        """
    )
    assert await house.finished(run_id) == "None"
    assert await house.events(run_id, ev.RequestOpened) == []


async def test_in_two_branches_each_gets_its_own_help(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            def read() -> str:
                if flow.retry_input is None:
                    raise Retriable("what does it say?", ask=str)
                return flow.retry_input

            async def branch(number: int) -> str:
                with flow.scope(f"{number}"):
                    return await flow.step("read", read)

            return list(await asyncio.gather(branch(0), branch(1)))
        """
    )
    run = await house.until(run_id, "waiting-input")
    asked = {request.opened.key: request.opened.request_id for request in run.open_requests()}
    assert set(asked) == {"0/read#1!", "1/read#1!"}
    await house.resume(run_id, request_id=asked["1/read#1!"], value="one")
    await house.resume(run_id, request_id=asked["0/read#1!"], value="zero")
    assert await house.finished(run_id) == ["zero", "one"]
