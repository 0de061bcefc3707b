"""Events that runs wait for: to one or to all, before or after anyone waits, and each only once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from harness import AGENT, House, open_house, visit

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.control import LARGEST_PAYLOAD, LONGEST_EVENT, Sent
from mcp_flow.errors import Conflict, InvalidInput, RunEnded, UnknownRun

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("events")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as visited:
        yield visited


PAID = """
    class Payment(BaseModel):
        order: int
        amount: int

    @workflow
    async def main(flow: Flow, order: int) -> int:
        await flow.step("begin", lambda: 1)
        if order < 0:
            await flow.pause("not yet waiting")
        return (await flow.wait_for("paid", Payment, match={"order": abs(order)})).amount
    """


async def test_an_event_reaches_the_run_that_it_names_or_all_whose_match_it_fits(house: House) -> None:
    runs = [await house.start(PAID, {"order": 1}), await house.again({"order": 2}), await house.again({"order": 2})]
    for run_id in runs:
        assert (await house.waiting(run_id, "waiting-event")).opened.data == {
            "event": "paid", "match": {"order": int(run_id != runs[0]) + 1},
        }  # fmt: skip
    assert (await house.control.send_event("paid", {"order": 3, "amount": 9}, AGENT)).took == ()
    assert (await house.control.send_event("posted", {"order": 2, "amount": 9}, AGENT)).took == ()
    assert set((await house.control.send_event("paid", {"order": 2, "amount": 5}, AGENT)).took) == set(runs[1:])
    assert (await house.control.send_event("paid", {"order": 1, "amount": 7}, AGENT, runs[0])).took == (runs[0],)
    assert [await house.finished(run_id) for run_id in runs] == [7, 5, 5]


async def test_an_event_sent_before_anyone_waits_is_kept_for_the_run_that_it_names(house: House) -> None:
    run_id = await house.start(PAID, {"order": -4})
    await house.waiting(run_id, "paused")
    assert (await house.control.send_event("paid", {"order": 4, "amount": 1}, AGENT)).took == ()  # to all: nobody waits
    for amount in (7, 8):
        assert (await house.control.send_event("paid", {"order": 4, "amount": amount}, AGENT, run_id)).took == ()
    await house.resume(run_id)
    assert await house.finished(run_id) == 7
    assert [received.payload["amount"] for received in (await house.control.run(run_id)).inbox] == [8]


async def test_of_two_waits_for_the_same_event_each_takes_one(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            async def branch(number: int) -> int:
                with flow.scope(f"{number}"):
                    return await flow.wait_for("tick", int)

            return list(await asyncio.gather(branch(0), branch(1)))
        """
    )
    await house.until(run_id, "waiting-event")
    for number in (10, 11):
        assert (await house.control.send_event("tick", number, AGENT)).took == (run_id,)
    assert await house.finished(run_id) == [10, 11]


async def test_the_same_key_twice_is_one_event(house: House) -> None:
    source = """
        @workflow
        async def main(flow: Flow, word: str) -> list:
            return [await flow.wait_for("tick", int), await flow.wait_for("tick", int, timeout=600)]
        """
    one, two = await house.start(source, {"word": "a"}), await house.again({"word": "b"})
    for run_id in (one, two):
        await house.waiting(run_id, "waiting-event")

    assert (await house.control.send_event("tick", 1, AGENT, one, "k")).took == (one,)
    await house.event(one, ev.RequestOpened, lambda event: event.key == "tick#2")
    assert (await house.control.send_event("tick", 1, AGENT, one, "k")).took == ()
    assert (await house.control.send_event("tick", 1, AGENT, one, "k")).before
    assert (await house.control.run(one)).inbox == ()
    with pytest.raises(Conflict, match="'k' is that of an event 'tick'"):
        await house.control.send_event("tock", 1, AGENT, one, "k")
    # To all: the run that had it under this key does not have it again, the other does, and then it was sent.
    assert (await house.control.send_event("tick", 1, AGENT, key="k")).took == (two,)
    await house.event(two, ev.RequestOpened, lambda event: event.key == "tick#2")
    assert (await house.control.send_event("tick", 1, AGENT, key="k")).took == ()
    with pytest.raises(Conflict, match="'tick'"):
        await house.control.send_event("tock", 1, AGENT, key="k")
    assert set((await house.control.send_event("tick", 2, AGENT, key="l")).took) == {one, two}
    assert [await house.finished(run_id) for run_id in (one, two)] == [[1, 2], [1, 2]]


async def test_a_key_under_which_nobody_took_an_event_is_still_free_for_who_waits_later(house: House) -> None:
    assert await house.control.send_event("tick", 1, AGENT, key="early") == Sent()
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            return await flow.wait_for("tick", int)
        """
    )
    await house.waiting(run_id, "waiting-event")
    assert (await house.control.send_event("tick", 1, AGENT, key="early")).took == (run_id,)
    assert (await house.control.send_event("tick", 1, AGENT, key="early")).before
    assert await house.finished(run_id) == 1


async def test_an_event_goes_past_a_wait_that_it_does_not_fit_to_the_next_one_of_the_run(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            async def branch(name, schema):
                with flow.scope(name):
                    return await flow.wait_for("tick", schema)

            return list(await asyncio.gather(branch("number", int), branch("word", str)))
        """
    )
    run = await house.until(run_id, "waiting-event")
    assert len(run.open_requests()) == 2
    for payload in ("two", 1):
        assert (await house.control.send_event("tick", payload, AGENT, run_id)).took == (run_id,)
    assert await house.finished(run_id) == [1, "two"]


async def test_a_payload_that_does_not_fit_is_told_to_its_sender_and_those_whom_it_fits_get_it(house: House) -> None:
    strict = await house.start(PAID, {"order": 5})
    house.begin("loose")
    loose = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            return (await flow.wait_for("paid", match={"order": 5}))["amount"]
        """
    )
    request = await house.waiting(strict, "waiting-event")
    await house.waiting(loose, "waiting-event")
    before = (await house.control.run(strict)).seq
    wrong = {"order": 5, "amount": "much"}
    with pytest.raises(InvalidInput, match=f"- amount: .*\n(.*\n)*Taken by {loose}"):
        await house.control.send_event("paid", wrong, AGENT, key="fit")
    with pytest.raises(InvalidInput, match=f"{request.opened.request_id}.*stays open"):
        await house.control.send_event("paid", wrong, AGENT, strict)
    assert await house.finished(loose) == "much"
    assert (await house.control.run(strict)).seq == before
    # The same key with what fits reaches those that refused it.
    assert strict in (await house.control.send_event("paid", wrong | {"amount": 3}, AGENT, key="fit")).took
    assert await house.finished(strict) == 3


async def test_a_kept_event_that_does_not_fit_is_put_aside_and_the_wait_goes_on(house: House) -> None:
    run_id = await house.start(PAID, {"order": -6})
    await house.waiting(run_id, "paused")
    await house.control.send_event("paid", {"order": 6, "amount": "much"}, AGENT, run_id)
    await house.resume(run_id)
    request = await house.waiting(run_id, "waiting-event")
    [reset] = await house.events(run_id, ev.StepReset)
    assert "amount" in reset.reason
    assert request.opened.generation == 1
    await house.control.send_event("paid", {"order": 6, "amount": 6}, AGENT, run_id)
    assert await house.finished(run_id) == 6


async def test_an_event_that_could_not_be_used_is_corrected_under_the_same_key(house: House) -> None:
    source = """
        from typing import Annotated
        from pydantic import AfterValidator

        def even(n):
            if n % 2:
                raise ValueError("not even")
            return n

        @workflow
        async def main(flow: Flow, word: str) -> list:
            sent = {"day": date, "number": Annotated[int, AfterValidator(even)]}
            return [(await flow.wait_for("due", sent)).number, await flow.wait_for("due", timeout=60, default="none")]
        """
    one, two = await house.start(source, {"word": "a"}), await house.again({"word": "b"})
    for run_id in (one, two):
        await house.waiting(run_id, "waiting-event")
    send = house.control.send_event
    with pytest.raises(InvalidInput, match="- day: 'tomorrow' is not a 'date'"):
        await send("due", {"day": "tomorrow", "number": 2}, AGENT, one, "corrected")
    due = {"day": "2031-05-01"}
    assert set((await send("due", due | {"number": 1}, AGENT, key="corrected")).took) == {one, two}
    for run_id in (one, two):
        again = await house.event(run_id, ev.RequestOpened, lambda event: event.put_aside is not None)
        assert "not even" in str(again.put_aside)
    # To one or to all: who could not use it gets it corrected, once.
    assert (await send("due", due | {"number": 2}, AGENT, one, "corrected")).took == (one,)
    await house.event(one, ev.RequestOpened, lambda event: event.key == "due#2")
    assert (await send("due", due | {"number": 2}, AGENT, key="corrected")).took == (two,)
    await house.event(two, ev.RequestOpened, lambda event: event.key == "due#2")
    for run_id in (one, None):
        assert (await send("due", due | {"number": 2}, AGENT, run_id, "corrected")).before
    for run_id in (one, two):
        await send("due", "last", AGENT, run_id)
        assert await house.finished(run_id) == [2, "last"]


async def test_a_wait_can_be_answered_by_hand(house: House) -> None:
    run_id = await house.start(PAID, {"order": 7})
    request = await house.waiting(run_id, "waiting-event")
    with pytest.raises(InvalidInput, match="- amount"):
        await house.resume(run_id, request_id=request.opened.request_id, value={"order": 7, "amount": "x"})
    await house.resume(run_id, request_id=request.opened.request_id, value={"order": 7, "amount": 70})
    assert await house.finished(run_id) == 70


async def test_events_too_long_or_too_large_or_to_nobody_are_refused_by_name(house: House) -> None:
    run_id = await house.start(PAID, {"order": 8})
    await house.waiting(run_id, "waiting-event")
    before = (await house.control.run(run_id)).seq
    for name, payload, key, said in (
        ("", None, None, "1 to 200 characters"),
        ("x" * (LONGEST_EVENT + 1), None, None, "1 to 200 characters, not 201"),
        ("paid", "x" * LARGEST_PAYLOAD, None, "send where it is"),
        ("paid", None, "k" * 201, "key"),
    ):
        with pytest.raises(InvalidInput, match=said):
            await house.control.send_event(name, payload, AGENT, run_id, key)
    with pytest.raises(UnknownRun):
        await house.control.send_event("paid", None, AGENT, "nobody")
    assert (await house.control.run(run_id)).seq == before
    await house.control.cancel(run_id, AGENT, "seen")
    with pytest.raises(RunEnded, match="waits for no event any more"):
        await house.control.send_event("paid", None, AGENT, run_id)


async def test_an_event_s_name_that_is_too_long_is_refused_where_it_is_waited_for(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.wait_for("x" * 201)
        """
    )
    error = (await house.until(run_id, "failed")).error
    assert error
    assert (error.type, error.line) == ("StepError", house.line_of("flow.wait_for("))
