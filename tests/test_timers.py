"""Deadlines and timers, by a clock that is moved: kept to the second, also when no process was there at the time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from clocks import Clock
from harness import AGENT, PERSON, House, open_house

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.errors import Conflict

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(tmp_path: Path, clock: Clock) -> AsyncIterator[House]:
    async with open_house(config.load(home=tmp_path / "home", workflows=tmp_path / "workflows"), clock) as house:
        await house.working()
        yield house
        await house.working()
        await house.tidy()


async def at(house: House, run_id: str, kind: type[ev.Event]) -> list[str]:
    """When events of this kind were journaled."""
    return [r.at for r in await house.control.events(run_id, 0, 1000) if isinstance(r.event, kind)]


SLEEPER = """
    @workflow
    async def main(flow: Flow) -> str:
        await flow.step("before", did, "before")
        await flow.sleep(3600)
        await flow.step("after", did, "after")
        return (await flow.now()).isoformat()
    """


async def test_a_sleep_ends_at_its_second_and_not_one_before(house: House, clock: Clock) -> None:
    run_id = await house.start(SLEEPER)
    request = await house.waiting(run_id, "waiting-timer")
    assert (request.opened.expires, request.opened.prompt) == (clock.time.replace(hour=13), "sleep for 3600 s")
    clock.tick(3599)
    assert await house.control.keep_awake() == 1
    assert (await house.control.run(run_id)).status == "waiting-timer"
    clock.tick(1)
    await house.control.keep_awake()
    await house.finished(run_id)
    assert await at(house, run_id, ev.RequestExpired) == ["2031-05-01T13:00:00.000000Z"]
    assert house.did() == ["before", "after"]


async def test_a_sleep_keeps_its_moment_over_restarts(house: House, clock: Clock) -> None:
    run_id = await house.start(SLEEPER)
    until = (await house.waiting(run_id, "waiting-timer")).opened.expires
    for _ in range(2):
        await house.stop_working()
        clock.tick(1000)
        await house.working()
        request = await house.waiting(run_id, "waiting-timer")
        assert request.opened.expires == until
    await house.stop_working()
    clock.tick(1600)
    await house.working()
    await house.finished(run_id)
    assert house.did() == ["before", "after"]


async def test_a_time_that_is_past_is_over_at_once(house: House, clock: Clock) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.sleep(0)
            await flow.sleep(-5)
            await flow.sleep(timedelta(0))
            await flow.sleep(until=datetime(2031, 1, 1, tzinfo=timezone.utc))
            return flow.attempt
        """
    )
    assert await house.finished(run_id) == 1
    assert len(await house.events(run_id, ev.RequestExpired)) == 4
    assert await house.events(run_id, ev.AttemptIdled) == []


@pytest.mark.parametrize("wrong", ["", "5, until=datetime(2031, 6, 1)", "float('inf')", "timedelta.max"])
async def test_what_is_no_time_is_refused_by_name(house: House, wrong: str) -> None:
    run_id = await house.start(
        f"""
        @workflow
        async def main(flow: Flow):
            await flow.sleep({wrong})
        """
    )
    error = (await house.until(run_id, "failed")).error
    assert error
    assert (error.type, error.line) == ("StepError", house.line_of("flow.sleep("))


async def test_resume_ends_a_sleep_early_and_the_journal_says_who_did(house: House) -> None:
    run_id = await house.start(SLEEPER)
    request = await house.waiting(run_id, "waiting-timer")
    assert "Nothing changed" in str(await house.resume(run_id))
    await house.resume(run_id, request_id=request.opened.request_id)
    assert (await house.finished(run_id)).startswith("2031-05-01T")
    [answered] = await house.events(run_id, ev.RequestAnswered)
    assert (answered.request_id, answered.by, answered.via) == (request.opened.request_id, "agent", "tool")


async def test_thousands_of_timers_cost_no_look_while_none_is_due_and_all_end_together(
    house: House, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            async def branch(number: int) -> int:
                with flow.scope(f"{number}"):
                    await flow.sleep(600)
                    return 1
            return sum(await asyncio.gather(*(branch(number) for number in range(2000))))
        """
    )
    run = await house.until(run_id, "waiting-timer")
    assert len(run.open_requests()) == 2000
    settled = 0
    execute = type(house.store._tx).execute

    def counted(transaction: Any, sql: str, values: Any = ()) -> Any:
        nonlocal settled
        settled += "e.data" in sql or sql.startswith("SELECT seq")
        return execute(transaction, sql, values)

    monkeypatch.setattr(type(house.store._tx), "execute", counted)
    clock.tick(599)
    assert await house.control.keep_awake() == 1
    assert settled < 20  # a look is one minimum over an index, not one for each timer
    monkeypatch.undo()
    clock.tick(1)
    await house.control.keep_awake()
    assert await house.finished(run_id) == 2000


WAITS = {
    "default": ('await flow.ask("Which?", str, default="tea", expires=60)', "finished", "tea"),
    "fails": ('await flow.ask("Which?", str, expires=timedelta(minutes=1))', "failed", "RequestExpired"),
    "denied": ('(await flow.approve("Pay?", expires=60, on_deny="return")).note', "finished", "nobody decided in time"),
    "denied-fails": ('await flow.approve("Pay?", expires=60)', "failed", "Denied"),
    "event-default": ('await flow.wait_for("paid", str, timeout=60, default="no")', "finished", "no"),
    "event-fails": ('await flow.wait_for("paid", timeout=60)', "failed", "RequestExpired"),
}


async def test_at_a_deadline_the_workflow_s_word_holds_also_if_no_process_was_there(house: House, clock: Clock) -> None:
    for present in (True, False):
        runs = {}
        for name, (code, _, _) in WAITS.items():
            house.begin(f"{name}_{present}".replace("-", "_"))
            runs[name] = await house.start(
                f"""
                @workflow
                async def main(flow: Flow) -> str:
                    return {code}
                """
            )
        for run_id in runs.values():
            await house.waiting(run_id, "waiting-input", "waiting-approval", "waiting-event")
        if not present:
            await house.stop_working()
        clock.tick(60 if present else 200_000)
        if not present:
            await house.working()
        await house.control.keep_awake()
        for name, (_, status, outcome) in WAITS.items():
            run = await house.until(runs[name], status)
            assert outcome == (run.output if status == "finished" else run.error and run.error.type), name
            assert len(await house.events(runs[name], ev.RequestExpired)) == 1
            assert await house.events(runs[name], ev.RequestAnswered) == []


async def test_an_answer_after_the_deadline_comes_too_late_even_if_nobody_had_noticed_it(
    house: House, clock: Clock
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            answer = await flow.ask("Which?", str, default="tea", expires=60)
            decision = await flow.approve("Pay?", expires=60, on_deny="return")
            return f"{answer} {bool(decision)} {await flow.wait_for('paid', str, timeout=60, default='no')}"
        """
    )
    request = await house.waiting(run_id, "waiting-input")
    clock.tick(61)
    with pytest.raises(Conflict, match="expired"):
        await house.resume(run_id, request_id=request.opened.request_id, value="coffee")
    request = await house.waiting(run_id, "waiting-approval")
    clock.tick(61)
    with pytest.raises(Conflict, match="expired"):
        await house.control.approve(request.opened.request_id, PERSON, "approve", None)
    await house.waiting(run_id, "waiting-event")
    clock.tick(61)
    assert (await house.control.send_event("paid", "yes", AGENT)).took == ()
    assert await house.finished(run_id) == "tea False no"


async def test_a_time_to_answer_begins_with_the_question_however_long_the_page_was_held_before_it(
    house: House, clock: Clock
) -> None:
    runs = []
    for number, deadline in enumerate(("60", "datetime(2031, 5, 1, 12, 1, tzinfo=timezone.utc)")):
        house.begin(f"held_{number}")
        run_id = await house.start(
            f"""
            @workflow
            async def main(flow: Flow) -> str:
                await flow.step("wait", until_open, "gate")
                return await flow.ask("Which?", str, default="tea", expires={deadline})
            """
        )
        await house.event(run_id, ev.StepStarted)
        await house.control.hijack(run_id, AGENT, "look")
        house.open("gate")
        await house.until(run_id, "hijacked")
        runs.append(run_id)
    clock.tick(61)
    for run_id in runs:
        await house.resume(run_id)
    request = await house.waiting(runs[0], "waiting-input")
    assert request.opened.expires == clock.time + timedelta(seconds=60)
    clock.tick(60)
    await house.control.keep_awake()
    assert [await house.finished(run_id) for run_id in runs] == ["tea", "tea"]


async def test_a_deadline_in_the_past_is_refused_when_asked_and_kept_when_it_passes_later(
    house: House, clock: Clock
) -> None:
    for wrong in ("-1", "datetime(2031, 5, 1, 11, tzinfo=timezone.utc)"):
        run_id = await house.start(
            f"""
            @workflow
            async def main(flow: Flow):
                await flow.ask("Which?", str, expires={wrong})
            """
        )
        error = (await house.until(run_id, "failed")).error
        assert error
        assert (error.type, error.line) == ("StepError", house.line_of("flow.ask("))
        assert "is in the past" in error.message
        assert await house.events(run_id, ev.RequestOpened) == []

    house.begin("absolute")
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            moment = datetime(2031, 5, 1, 14, tzinfo=timezone.utc)
            word = await flow.ask("Which?", str, default="tea", expires=moment, name="which")
            await flow.pause("look")
            return word
        """
    )
    request = await house.waiting(run_id, "waiting-input")
    await house.resume(run_id, request_id=request.opened.request_id, value="coffee")
    await house.waiting(run_id, "paused")
    clock.tick(100_000)
    house.edit("Which?", "Which one?")  # asked anew, now that its time is over
    await house.resume(run_id)
    assert await house.finished(run_id) == "tea"
