"""What a run asks for: whom an answer reaches, what fits, and what becomes of a request that nobody needs any more."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from harness import AGENT, PERSON, House, open_house, visit

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.errors import Conflict, InvalidInput, NotAllowed, UnknownRequest

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("requests")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


BRANCHES = """
    @workflow
    async def main(flow: Flow) -> list:
        async def branch(number: int) -> str:
            with flow.scope(f"row {number}"):
                first = await flow.ask("What?", str)
                return f"{number}: {first} {await flow.ask('What?', str)}"

        return list(await asyncio.gather(*(branch(number) for number in range(3))))
    """


# --- whom an answer reaches ---


async def test_in_a_loop_every_answer_reaches_the_occurrence_that_asked(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            return [await flow.ask("What?", str) for _ in range(3)]
        """
    )
    steps = []
    for word in "abc":
        request = await house.waiting(run_id, "waiting-input")
        steps.append(request.opened.key)
        await house.resume(run_id, request_id=request.opened.request_id, value=word)
        # A client that is not sure and calls once more answers nothing else by that.
        assert (
            "Nothing changed" in str(await house.resume(run_id, request_id=request.opened.request_id, value=word))
            or (await house.control.run(run_id)).ended
        )
    assert await house.finished(run_id) == ["a", "b", "c"]
    assert steps == ["What?#1", "What?#2", "What?#3"]


async def test_in_parallel_branches_every_answer_reaches_the_branch_that_asked(house: House) -> None:
    run_id = await house.start(BRANCHES)
    for again in range(2):
        run = await house.until(run_id, "waiting-input")
        asked = {request.opened.key: request.opened.request_id for request in run.open_requests()}
        assert set(asked) == {f"row {number}/What?#{again + 1}" for number in range(3)}
        with pytest.raises(NotAllowed, match=r"More than one thing \(3\)"):
            await house.resume(run_id, value="anything")
        for number in (2, 0, 1):
            request_id = asked[f"row {number}/What?#{again + 1}"]
            await house.resume(run_id, request_id=request_id, value=f"{'ab'[again]}{number}")
    assert await house.finished(run_id) == ["0: a0 b0", "1: a1 b1", "2: a2 b2"]


async def test_the_questions_of_other_branches_stay_the_same_ones_in_the_next_attempt(house: House) -> None:
    run_id = await house.start(BRANCHES)
    first, *others = (await house.until(run_id, "waiting-input")).open_requests()
    open_before = [request.opened.request_id for request in others]
    await house.stop_working()
    house.work()
    await house.resume(run_id, request_id=first.opened.request_id, value="a")
    await house.event(run_id, ev.RequestOpened, lambda event: event.key == "row 0/What?#2")
    run = await house.until(run_id, "waiting-input")
    assert run.attempt == 2
    assert [request.opened.request_id for request in run.open_requests()][:2] == open_before
    assert await house.events(run_id, ev.RequestWithdrawn) == []


async def test_the_text_of_a_request_is_frozen_and_an_edit_asks_anew(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            return await flow.ask("Which colour?", str)
        """
    )
    request = await house.waiting(run_id, "waiting-input")
    house.edit("Which colour?", "Which shade?")
    [row] = await house.control.requests(run_id, [], 10, None)
    assert row.request.prompt == "Which colour?"

    await house.resume(run_id, value="red", request_id=request.opened.request_id)
    anew = await house.waiting(run_id, "waiting-input")
    assert anew.opened.prompt == "Which shade?"
    await house.resume(run_id, value="dark red")
    assert await house.finished(run_id) == "dark red"


# --- what fits ---


async def test_any_type_and_any_form_can_be_asked_for_and_arrives_as_that_type(house: House) -> None:
    run_id = await house.start(
        """
        from typing import Literal

        class Address(BaseModel):
            street: str
            number: int

        @workflow
        async def main(flow: Flow) -> list:
            address = await flow.ask("Where?", Address)
            form = await flow.ask("Who?", {"name": str, "age": (int, 18)})
            names = await flow.ask("Both?", ["first", "last"])
            plain = [await flow.ask(f"{kind}", kind) for kind in (int, list[date], Literal["a", "b"], int | None)]
            return [repr(each) for each in (address, form.name, form.age, names.last, *plain)]
        """
    )
    answers: list[Any] = [
        {"street": "Elm", "number": 3}, {"name": "Ada"}, {"first": "A", "last": "L"}, 7, ["2031-05-01"], "b", None,
    ]  # fmt: skip
    for answer in answers:
        request = await house.waiting(run_id, "waiting-input")
        await house.resume(run_id, request_id=request.opened.request_id, value=answer)
    assert await house.finished(run_id) == [
        "Address(street='Elm', number=3)", "'Ada'", "18", "'L'", "7", "[datetime.date(2031, 5, 1)]", "'b'", "None",
    ]  # fmt: skip


async def test_an_answer_that_does_not_fit_names_each_bad_field_and_nothing_is_journaled(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            return (await flow.ask("Who?", {"name": str, "age": int})).name
        """
    )
    request = await house.waiting(run_id, "waiting-input")
    before = (await house.control.run(run_id)).seq
    for by_id in ({}, {"request_id": request.opened.request_id}):
        with pytest.raises(InvalidInput) as refused:
            await house.resume(run_id, value={"name": 7, "age": "old"}, **by_id)
        assert [line.split(":")[0] for line in refused.value.problems] == ["name", "age"]
    assert (await house.control.run(run_id)).seq == before
    await house.resume(run_id, value={"name": "Ada", "age": 36})
    assert await house.finished(run_id) == "Ada"


async def test_texts_are_checked_as_their_type_reads_them_and_a_foreign_pattern_by_the_type(house: House) -> None:
    run_id = await house.start(
        r"""
        from typing import Annotated
        from uuid import UUID
        from pydantic import AnyUrl, Field

        class Trip(BaseModel):
            day: date
            at: datetime
            leave: type(datetime.min.time())
            stay: timedelta
            ticket: UUID
            site: AnyUrl
            mail: Annotated[str, Field(json_schema_extra={"format": "email"})]

        @workflow
        async def main(flow: Flow) -> list:
            trip = await flow.ask("Which trip?", Trip)
            return [str(trip.day), str(trip.stay), await flow.ask("Whose?", Annotated[str, Field(pattern=r"^\p{L}+$")])]
        """
    )
    await house.waiting(run_id, "waiting-input")
    good = {
        "day": "2031-05-01", "at": "2031-05-01T12:00Z", "leave": "12:30", "stay": "P2D", "mail": "a@b.example",
        "ticket": "6f1c2b4e-8f0e-4f6e-9d55-0b9d7f6f7d10", "site": "https://a.example",
    }  # fmt: skip
    before = (await house.control.run(run_id)).seq
    with pytest.raises(InvalidInput) as refused:
        await house.resume(run_id, value=dict.fromkeys(good, "tomorrow"))
    assert {line.split(":")[0] for line in refused.value.problems} == set(good)
    assert (await house.control.run(run_id)).seq == before
    await house.resume(run_id, value=good)

    asked = await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "Whose?")
    await house.resume(run_id, request_id=asked.request_id, value="Ada 1")
    again = await house.event(run_id, ev.RequestOpened, lambda event: event.put_aside is not None)
    assert "pattern" in str(again.put_aside)
    await house.resume(run_id, request_id=again.request_id, value="Ada")
    assert await house.finished(run_id) == ["2031-05-01", "2 days, 0:00:00", "Ada"]


async def test_what_no_json_schema_describes_can_not_be_asked_for(house: House) -> None:
    for asked in ("threading.Lock", "{'callback': threading.Lock}", "functools.partial"):
        run_id = await house.start(
            f"""
            @workflow
            async def main(flow: Flow):
                await flow.ask("Which?", {asked})
            """
        )
        error = (await house.until(run_id, "failed")).error
        assert error
        assert error.type == "StepError"
        assert "has no JSON Schema" in error.message
        assert error.line == house.line_of("Which?")


async def test_an_answer_to_a_closed_a_foreign_or_an_unknown_request_is_refused_with_what_is_open(house: House) -> None:
    source = """
        @workflow
        async def main(flow: Flow, word: str) -> str:
            return await flow.ask("First?", str) + await flow.ask("Second?", str)
        """
    run_id = await house.start(source, {"word": "a"})
    other = await house.again({"word": "b"})
    first = (await house.waiting(run_id, "waiting-input")).opened.request_id
    foreign = (await house.waiting(other, "waiting-input")).opened.request_id
    await house.resume(run_id, request_id=first, value="x")
    second = await house.event(run_id, ev.RequestOpened, lambda event: event.prompt == "Second?")
    await house.waiting(run_id, "waiting-input")

    with pytest.raises(Conflict, match='was answered already by agent via tool: "x"'):
        await house.resume(run_id, request_id=first, value="y")
    for unknown in (foreign, "q-nobody"):
        with pytest.raises(UnknownRequest, match=second.request_id):
            await house.resume(run_id, request_id=unknown, value="y")
    with pytest.raises(UnknownRequest, match=r"list_pending\(\)"):
        await house.control.approve("q-nobody", AGENT, "approve", None)
    await house.resume(run_id, value="z")
    assert await house.finished(run_id) == "xz"


# --- decisions ---


async def test_a_decision_is_journaled_with_its_note_who_decided_how_and_when(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            decision = await flow.approve("Pay?", data={"total": 7}, by="human", on_deny="return")
            return [bool(decision), decision.note, decision.by]
        """
    )
    request = await house.waiting(run_id, "waiting-approval")
    with pytest.raises(NotAllowed, match=f"mcp-flow approve {request.opened.request_id}"):
        await house.approve(request)
    await house.control.approve(request.opened.request_id, PERSON, "deny", "too dear")
    assert await house.finished(run_id) == [False, "too dear", "person"]
    [recorded] = [r for r in await house.control.events(run_id, 0, 100) if isinstance(r.event, ev.RequestAnswered)]
    assert recorded.event == ev.RequestAnswered(
        request_id=request.opened.request_id, value={"approved": False}, note="too dear", by="person", via="terminal"
    )
    assert recorded.at


async def test_cancelling_withdraws_the_requests_of_a_run_and_denies_none(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            with flow.scope("one"):
                ask = asyncio.create_task(flow.ask("What?", str))
            await asyncio.gather(ask, flow.approve("Pay?"))
        """
    )
    run = await house.until(run_id, "waiting-approval")
    asked = [request.opened.request_id for request in run.open_requests()]
    assert len(asked) == 2
    await house.control.cancel(run_id, AGENT, "no longer needed")
    await house.until(run_id, "cancelled")
    withdrawn = await house.events(run_id, ev.RequestWithdrawn)
    assert [(event.request_id, event.reason) for event in withdrawn] == [(q, "the run was cancelled") for q in asked]
    assert await house.events(run_id, ev.RequestAnswered) == []
    with pytest.raises(Conflict, match="withdrawn"):
        await house.control.approve(asked[1], PERSON, "approve", None)
