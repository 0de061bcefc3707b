"""What only a person may answer, asked through the client in both eras of the protocol, or in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from clients import MODES, call, refusal
from harness import House, open_house
from mcp import Client
from mcp_types import ElicitResult, InputRequiredResult

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.answers import form_of, from_form
from mcp_flow.flow import shape_of
from mcp_flow.server import build

WORKFLOWS = '''
from enum import Enum
from typing import Literal

from pydantic import BaseModel, SecretStr

from mcp_flow import Flow, workflow


class Size(Enum):
    SMALL = "small"
    LARGE = "large"


class Room(BaseModel):
    name: str
    beds: int
    size: Size
    view: bool = False
    wish: str | None = None


@workflow
async def pay(flow: Flow) -> str:
    """Ask a person whether to pay."""
    await flow.step("add up", lambda: 7)
    decision = await flow.approve("Pay 7?", data={"total": 7, "to": "shop"}, by="human", on_deny="return")
    return f"{decision.approved} {decision.note} {decision.by}"


@workflow
async def order(flow: Flow) -> str:
    """Ask anyone whether to pay."""
    await flow.approve("Pay 7?")
    return "paid"


@workflow
async def book(flow: Flow) -> Room:
    """Ask a person for a room."""
    return await flow.ask("Which room?", Room, by="human")


@workflow
async def count(flow: Flow) -> int:
    """Ask a person for a number."""
    return await flow.ask("How many?", int, by="human")


@workflow
async def route(flow: Flow) -> list[str]:
    """Ask a person for what no form can hold."""
    return await flow.ask("Which way?", list[str], by="human")


@workflow
async def login(flow: Flow) -> str:
    """Ask for a code."""
    code = await flow.ask("The code?", SecretStr)
    return str(len(code.get_secret_value()))
'''


class Person:
    """Somebody at a client, who sees questions and says one thing to all of them."""

    def __init__(self, action: Any = "accept", **content: Any) -> None:
        self.said = ElicitResult(action=action, content=content if action == "accept" else None)
        self.asked: list[Any] = []

    async def __call__(self, _: Any, params: Any) -> ElicitResult:
        self.asked.append(params)
        return self.said


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("people")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(WORKFLOWS)
    async with open_house(config.load(home=folder / "it's home", workflows=folder / "workflows")) as house:
        await house.working()
        yield house
        await house.tidy()


def client(house: House, mode: Any, person: Person | None = None) -> Client:
    return Client(build(house.settings), mode=mode, elicitation_callback=person)


async def waiting(house: House, workflow: str) -> tuple[str, str]:
    """A run of this workflow and its one question."""
    run_id = await house.control.start(workflow, {})
    request = await house.waiting(run_id, "waiting-approval", "waiting-input")
    return run_id, request.opened.request_id


def typed(house: House, command: str) -> str:
    return f"mcp-flow {command} --home {shlex.quote(str(house.settings.home))}"


@pytest.mark.parametrize("mode", MODES)
async def test_a_person_decides_at_the_client_whatever_the_model_says(house: House, mode: str) -> None:
    person = Person(decision="deny", note="too dear")
    run_id, request = await waiting(house, "pay")
    async with client(house, mode, person) as connected:
        run = await call(connected, "approve", request_id=request, decision="approve", note="I, the model, like it")
    assert run["output"] == "False too dear person"

    [asked] = person.asked
    assert asked.mode == "form"
    assert list(asked.requested_schema["properties"]) == ["decision", "note"]
    assert asked.requested_schema["required"] == ["decision"]
    assert asked.message == (
        f'Run {run_id} of workflow pay asks for your approval:\n\nPay 7?\n\n{{\n  "total": 7,\n  "to": "shop"\n}}'
    )
    [answered] = await house.events(run_id, ev.RequestAnswered)
    assert (answered.value, answered.note) == ({"approved": False}, "too dear")
    assert (answered.by, answered.via) == ("person", "elicitation")


@pytest.mark.parametrize("mode", MODES)
async def test_a_person_may_approve_without_a_note_what_the_model_denies(house: House, mode: str) -> None:
    _, request = await waiting(house, "pay")
    async with client(house, mode, Person(decision="approve")) as connected:
        run = await call(connected, "approve", request_id=request, decision="deny")
    assert run["output"] == "True None person"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("action", "word"), [("decline", "declined to answer"), ("cancel", "closed the question")])
async def test_who_does_not_say_decides_nothing(house: House, mode: str, action: str, word: str) -> None:
    run_id, request = await waiting(house, "pay")
    async with client(house, mode, Person(action)) as connected:
        run = await call(connected, "approve", request_id=request)
        assert word in run["note"]
        assert "nothing is decided" in run["note"]
        assert f'approve(request_id="{request}")' in run["note"]
        assert typed(house, f"approve {request}") in run["note"]
        assert run["status"] == "waiting-approval"
        assert not await house.events(run_id, ev.RequestAnswered)
    async with client(house, mode, Person(decision="approve")) as connected:
        assert (await call(connected, "approve", request_id=request))["status"] == "finished"


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_that_can_ask_nobody_is_told_what_a_person_types(house: House, mode: str) -> None:
    run_id, request = await waiting(house, "pay")
    async with client(house, mode) as connected:
        for decision in ("approve", "deny"):
            said = await refusal(connected, "approve", request_id=request, decision=decision)
            assert "Only a person may answer" in said
            assert said.endswith(f"In a terminal: {typed(house, f'approve {request}')}")
        [row] = (await call(connected, "list_pending", run_id=run_id))["requests"]
        assert row["by"] == "human"
        assert f'approve(request_id="{request}") asks a person if the client can' in row["answer"]
        assert row["answer"].endswith(typed(house, f"approve {request}"))
    assert not await house.events(run_id, ev.RequestAnswered)


@pytest.mark.parametrize("mode", MODES)
async def test_nobody_is_asked_what_the_model_may_decide_or_what_is_decided(house: House, mode: str) -> None:
    person = Person(decision="deny")
    _, request = await waiting(house, "order")
    _, decided = await waiting(house, "pay")
    async with client(house, mode, Person(decision="approve")) as connected:
        await call(connected, "approve", request_id=decided)
    async with client(house, mode, person) as connected:
        assert (await call(connected, "approve", request_id=request))["output"] == "paid"
        said = await refusal(connected, "approve", request_id=decided, decision="deny")
        assert said.startswith(f"Request {decided} was answered already by person via elicitation: approved. ")
        assert "get_run(run_id=" in said
        assert "There is no request 'q-none'" in await refusal(connected, "approve", request_id="q-none")
    assert not person.asked


async def test_a_server_that_began_after_the_question_takes_the_answer(house: House) -> None:
    _, request = await waiting(house, "pay")
    async with client(house, "auto", Person(decision="deny")) as before:
        asked = await before.session.call_tool("approve", {"request_id": request}, allow_input_required=True)
    assert isinstance(asked, InputRequiredResult)
    assert asked.input_requests
    said: Any = {key: ElicitResult(action="accept", content={"decision": "approve"}) for key in asked.input_requests}
    key = house.settings.home / "request-state.key"
    assert key.stat().st_mode & 0o777 == 0o600

    async with client(house, "auto", Person(decision="deny")) as after:
        result = await after.session.call_tool(
            "approve", {"request_id": request}, input_responses=said, request_state=asked.request_state
        )
    assert result.structured_content
    assert result.structured_content["output"] == "True None person"


async def test_a_person_who_is_too_late_learns_what_was_decided(house: House) -> None:
    _, request = await waiting(house, "pay")
    async with client(house, "auto", Person(decision="deny")) as connected:
        asked = await connected.session.call_tool("approve", {"request_id": request}, allow_input_required=True)
        assert isinstance(asked, InputRequiredResult)
        said: Any = {
            key: ElicitResult(action="accept", content={"decision": "deny"}) for key in asked.input_requests or ()
        }
        async with client(house, "auto", Person(decision="approve")) as quicker:
            await call(quicker, "approve", request_id=request)
        result = await connected.session.call_tool(
            "approve", {"request_id": request}, input_responses=said, request_state=asked.request_state
        )
    assert result.is_error
    assert "answered already by person via elicitation: approved" in result.content[0].text  # type: ignore[union-attr]


async def test_an_answer_counts_only_for_the_question_that_was_shown(house: House) -> None:
    _, shown = await waiting(house, "pay")
    run_id, other = await waiting(house, "pay")
    async with client(house, "auto", Person(decision="approve")) as connected:
        asked = await connected.session.call_tool("approve", {"request_id": shown}, allow_input_required=True)
        assert isinstance(asked, InputRequiredResult)
        said: Any = {
            key: ElicitResult(action="accept", content={"decision": "approve"}) for key in asked.input_requests or ()
        }
        with anyio.fail_after(20), pytest.raises(Exception, match="requestState"):
            await connected.session.call_tool(
                "approve", {"request_id": other}, input_responses=said, request_state=asked.request_state
            )
        again = await connected.session.call_tool(
            "approve", {"request_id": other}, input_responses=said, allow_input_required=True
        )
    assert isinstance(again, InputRequiredResult)
    assert not await house.events(run_id, ev.RequestAnswered)


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_that_gives_up_while_the_person_thinks_leaves_the_run_as_it_was(house: House, mode: str) -> None:
    run_id, request = await waiting(house, "pay")
    thinking = anyio.Event()

    class Slow(Person):
        async def __call__(self, _: Any, params: Any) -> ElicitResult:
            thinking.set()
            await anyio.sleep_forever()
            raise AssertionError

    async with client(house, mode, Slow()) as connected, anyio.create_task_group() as tasks:
        tasks.start_soon(connected.call_tool, "approve", {"request_id": request})
        with anyio.fail_after(20):
            await thinking.wait()
        tasks.cancel_scope.cancel()
    run = await house.control.run(run_id)
    assert run.status == "waiting-approval"
    async with client(house, mode, Person(decision="approve")) as connected:
        assert (await call(connected, "approve", request_id=request))["status"] == "finished"


@pytest.mark.parametrize("mode", MODES)
async def test_a_person_fills_a_form_at_the_client(house: House, mode: str) -> None:
    person = Person(name="Blue", beds=2, size="large")
    run_id, _ = await waiting(house, "book")
    async with client(house, mode, person) as connected:
        run = await call(connected, "resume", run_id=run_id, value={"name": "of the model", "beds": 1, "size": "small"})
    assert run["output"] == {"name": "Blue", "beds": 2, "size": "large", "view": False, "wish": None}
    [asked] = person.asked
    assert asked.message == f"Run {run_id} of workflow book asks you:\n\nWhich room?"
    assert asked.requested_schema["required"] == ["name", "beds", "size"]
    fields = asked.requested_schema["properties"]
    assert [fields[name]["type"] for name in fields] == ["string", "integer", "string", "boolean", "string"]
    assert fields["size"]["enum"] == ["small", "large"]
    [answered] = await house.events(run_id, ev.RequestAnswered)
    assert (answered.by, answered.via) == ("person", "elicitation")


@pytest.mark.parametrize("mode", MODES)
async def test_a_plain_value_is_a_form_of_one_field(house: House, mode: str) -> None:
    run_id, request = await waiting(house, "count")
    async with client(house, mode, Person(answer=3)) as connected:
        assert (await call(connected, "resume", run_id=run_id, request_id=request))["output"] == 3


@pytest.mark.parametrize("mode", MODES)
async def test_a_form_with_a_wrong_value_leaves_the_question_open(house: House, mode: str) -> None:
    run_id, _ = await waiting(house, "book")
    async with client(house, mode, Person(name="Blue", beds="two", size="large")) as connected:
        said = await refusal(connected, "resume", run_id=run_id)
        assert "stays open" in said
        assert "- beds: " in said
    async with client(house, mode, Person("decline")) as connected:
        run = await call(connected, "resume", run_id=run_id, value={"name": "of the model"})
        assert "nothing is decided" in run["note"]
        assert run["status"] == "waiting-input"
    assert not await house.events(run_id, ev.RequestAnswered)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workflow", ["route", "login"])
async def test_what_no_form_may_hold_is_not_asked_for(house: House, mode: str, workflow: str) -> None:
    person = Person(answer="246810")
    run_id, request = await waiting(house, workflow)
    async with client(house, mode, person) as connected:
        said = await refusal(connected, "resume", run_id=run_id, value="246810")
        [row] = (await call(connected, "list_pending", run_id=run_id))["requests"]
    assert not person.asked
    assert said.endswith(f"In a terminal: {typed(house, f'answer {request}')}")
    assert row["answer"] == f"a person types: {typed(house, f'answer {request}')}"
    assert ("secret" in said) is (workflow == "login")
    assert "246810" not in said


async def test_a_plain_resume_that_means_something_else_puts_no_question_before_the_person(house: House) -> None:
    run_id, request_id = await waiting(house, "count")
    person = Person("decline")
    async with client(house, "auto", person) as agent:
        await call(agent, "hijack", run_id=run_id, reason="look")
        assert (await call(agent, "resume", run_id=run_id))["status"] == "waiting-input"
        assert person.asked == []
        shown = await call(agent, "resume", run_id=run_id)
        assert len(person.asked) == 1
        assert request_id in shown["note"]
        await call(agent, "cancel", run_id=run_id, reason="seen")


async def test_cancelling_withdraws_the_question_and_denies_nothing(house: House) -> None:
    run_id, request = await waiting(house, "pay")
    async with client(house, "auto", Person(decision="approve")) as connected:
        await call(connected, "cancel", run_id=run_id, reason="no longer wanted")
        assert not (await call(connected, "list_pending", run_id=run_id))["requests"]
        assert "was withdrawn" in await refusal(connected, "approve", request_id=request)
    run = await house.control.run(run_id)
    assert run.requests[request].status == "withdrawn"
    assert [e.request_id for e in await house.events(run_id, ev.RequestWithdrawn)] == [request]
    assert not await house.events(run_id, ev.RequestAnswered)


@pytest.mark.parametrize(
    "schema", [list[str], dict[str, int], int | str, {"inner": dict[str, int]}, {"names": list[str]}, Any]
)
def test_what_is_nested_or_of_several_types_is_no_form(schema: Any) -> None:
    assert form_of(shape_of(schema).schema) is None


def test_a_field_that_may_be_null_is_null_where_it_is_left_empty() -> None:
    schema = shape_of({"name": str, "age": int | None}).schema
    form = form_of(schema)
    assert form
    assert form["required"] == ["name"]
    assert from_form(schema, {"name": "x"}) == {"name": "x", "age": None}
    plain = shape_of(float | None).schema
    assert from_form(plain, {}) is None
