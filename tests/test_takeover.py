"""Who has a run's page: an agent or a person, for how long, and how it is handed back."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import anyio.to_thread
import pytest
from clients import call, refusal
from clocks import Clock
from harness import AGENT, PERSON, House, open_house
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.config import Settings
from mcp_flow.errors import Conflict, NotAllowed, RunEnded
from mcp_flow.run import Request, Run
from mcp_flow.server import build

WORKFLOWS = '''
import asyncio
from pathlib import Path

from mcp_flow import Flow, workflow

HERE = Path(__file__).parent


async def until_open(gate: str) -> str:
    while not (HERE / gate).exists():
        await asyncio.sleep(0.005)
    return gate


@workflow
async def asks(flow: Flow) -> str:
    """Ask for a word."""
    await flow.step("first", lambda: 1)
    return await flow.ask("Which word?", str)


@workflow
async def gated(flow: Flow, gate: str) -> str:
    """Two steps, the first of which waits."""
    await flow.step("wait", until_open, gate)
    return await flow.step("after", lambda: "done")


@workflow
async def last(flow: Flow, gate: str) -> str:
    """One step that waits, and the end."""
    return await flow.step("wait", until_open, gate)


@workflow
async def breaks(flow: Flow, gate: str) -> str:
    """Wait outside of every step, then fail."""
    await until_open(gate)
    raise ValueError("broken")


@workflow
async def late(flow: Flow, gate: str) -> str:
    """Wait outside of every step, then ask."""
    await until_open(gate)
    return await flow.ask("Which word?", str)


@workflow
async def naps(flow: Flow) -> str:
    """Sleep for an hour, and ask beside it."""

    async def nap() -> str:
        with flow.scope("nap"):
            await flow.sleep(3600)
            return await flow.step("after", lambda: "after")

    nap = asyncio.create_task(nap())
    return f"{await flow.ask('Which?', str, default='tea', expires=3600)} {await nap}"


@workflow
async def fails(flow: Flow) -> str:
    """Fail."""
    return await flow.step("fail", lambda: str(1 // 0))
'''
IDLE = 600.0


@pytest.fixture(scope="module")
def time() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory, time: Clock) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("takeover")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(WORKFLOWS)
    settings = config.load(home=folder / "home", workflows=folder / "workflows")
    async with open_house(settings, time) as house:
        await house.working()
        yield house
        await house.tidy()


async def asking(house: House) -> tuple[str, Request]:
    """A run with a window, which waits for a word and has opened no page."""
    run_id = await house.control.start("asks", {}, headless=False)
    return run_id, await house.waiting(run_id, "waiting-input")


async def take_over(house: House, run_id: str) -> str:
    """Ask a person to take the page; returns the request."""
    await house.control.hijack(run_id, AGENT, "solve the puzzle", "human")
    run = await house.until(run_id, "hijacked")
    [request] = [request for request in run.open_requests() if request.opened.kind == "takeover"]
    assert (request.opened.by, request.opened.prompt) == ("human", "Take the page over: solve the puzzle")
    return request.opened.request_id


async def open_gate(house: House, gate: str) -> None:
    await anyio.Path(house.settings.workflows / gate).touch()


async def listed(house: House, run_id: str) -> list[str]:
    return [row.request.kind for row in await house.control.requests(run_id, [], 10, None)]


async def hand_back(house: House, run_id: str, request_id: str) -> None:
    await house.control.resume(run_id, PERSON, request_id=request_id)


async def at_terminal(settings: Settings, *arguments: str) -> str:
    """What a command shows at a terminal of its own, which it must leave with success."""

    def run() -> tuple[int, str]:
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(settings.environment())
            os.execv(sys.executable, [sys.executable, "-m", "mcp_flow", *arguments])
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the terminal is closed with its process
            pass
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()

    status, shown = await anyio.to_thread.run_sync(run)
    assert status == 0, shown
    return shown


# --- a person ---


async def test_the_agent_can_do_nothing_with_a_page_that_a_person_holds(house: House) -> None:
    run_id, question = await asking(house)
    request_id = await take_over(house, run_id)
    assert sorted(await listed(house, run_id)) == ["input", "takeover"]
    asked = question.opened.request_id
    refused = [
        house.control.resume(run_id, AGENT),
        house.control.resume(run_id, AGENT, value="x", has_value=True, request_id=asked),
        house.control.resume(run_id, AGENT, request_id=request_id),
        house.control.resume(run_id, AGENT, rerun=["first"]),
        house.control.take_page(run_id, AGENT, "act"),
    ]
    for move in refused:
        with pytest.raises(NotAllowed, match=f"A person holds the page .* mcp-flow answer {request_id} --home "):
            await move
    with pytest.raises(Conflict, match=f"held by the human already since 20.*mcp-flow answer {request_id} --home "):
        await house.control.hijack(run_id, AGENT, "me too")
    async with Client(build(house.settings)) as client:
        said = await refusal(client, "exec_js", run_id=run_id, code="1", mode="write")
        assert "A person holds the page" in said
        run = await call(client, "get_run", run_id=run_id)
        assert (run["status"], run["pending"][1]["kind"]) == ("hijacked", "takeover")
        assert run["next"].startswith(f"a person types: mcp-flow answer {request_id} --home ")
        assert run["why"].startswith("held by the human: solve the puzzle")
    assert (await house.control.run(run_id)).status == "hijacked"
    await hand_back(house, run_id, request_id)


async def test_a_person_hands_a_page_back_and_the_run_waits_for_its_own_question_as_before(house: House) -> None:
    run_id, question = await asking(house)
    request_id = await take_over(house, run_id)
    before = await house.events(run_id, ev.AttemptStarted)
    shown = await at_terminal(house.settings, "answer", request_id)
    assert f"run {run_id} goes on" in shown
    run = await house.control.run(run_id)
    assert (run.status, run.hijack) == ("waiting-input", None)
    assert [request.opened for request in run.open_requests()] == [question.opened]
    assert run.requests[request_id].via == "terminal"
    assert await house.events(run_id, ev.AttemptStarted) == before
    await house.resume(run_id, value="word")
    assert await house.finished(run_id) == "word"


async def test_a_resume_from_a_terminal_hands_a_page_back_too(house: House) -> None:
    run_id, question = await asking(house)
    request_id = await take_over(house, run_id)
    assert f"Run {run_id} goes on." in await at_terminal(house.settings, "resume", run_id)
    run = await house.control.run(run_id)
    assert (run.status, run.requests[request_id].status) == ("waiting-input", "answered")
    assert [request.opened for request in run.open_requests()] == [question.opened]


async def test_a_person_may_do_steps_again_when_handing_the_page_back(house: House) -> None:
    run_id, _ = await asking(house)
    request_id = await take_over(house, run_id)
    await house.control.resume(run_id, PERSON, rerun_from="first")
    run = await house.until(run_id, "waiting-input")
    assert run.requests[request_id].status == "answered"
    assert run.generation("first#1") == 1


async def test_a_run_without_a_window_is_no_run_for_a_person_to_take(house: House) -> None:
    run_id = await house.control.start("asks", {})
    await house.until(run_id, "waiting-input")
    with pytest.raises(NotAllowed, match=r"no window .* headless=false"):
        await house.control.hijack(run_id, AGENT, "see", "human")
    run = await house.control.run(run_id)
    assert (run.status, run.hijack) == ("waiting-input", None)
    async with Client(build(house.settings)) as client:
        assert "headless=false" in await refusal(client, "hijack", run_id=run_id, reason="see", holder="human")


async def test_a_running_run_stands_still_for_a_person_and_its_code_does_not_withdraw_that(house: House) -> None:
    run_id = await house.control.start("gated", {"gate": "one"}, headless=False)
    await house.event(run_id, ev.StepStarted)
    await house.control.hijack(run_id, AGENT, "look", "human")
    [request] = (await house.control.run(run_id)).open_requests()
    await open_gate(house, "one")
    run = await house.until(run_id, "hijacked")
    assert run.steps["wait#1"].status == "finished"
    assert "after#1" not in run.steps
    assert run.requests[request.opened.request_id].status == "open"
    await hand_back(house, run_id, request.opened.request_id)
    assert await house.finished(run_id) == "done"


async def test_a_run_whose_code_asks_while_a_person_is_about_to_take_it_keeps_both_requests(house: House) -> None:
    run_id = await house.control.start("late", {"gate": "two"}, headless=False)
    await house.event(run_id, ev.AttemptStarted)
    await house.control.hijack(run_id, AGENT, "look", "human")
    [request] = (await house.control.run(run_id)).open_requests()
    await open_gate(house, "two")
    await house.until(run_id, "hijacked")
    await hand_back(house, run_id, request.opened.request_id)
    question = await house.waiting(run_id, "waiting-input")
    assert question.opened.kind == "input"
    await house.resume(run_id, value="word")
    assert await house.finished(run_id) == "word"


@pytest.mark.parametrize("holder", ["agent", "human"])
async def test_a_run_that_has_come_to_its_end_keeps_its_page_for_who_wants_it(house: House, holder: Any) -> None:
    gate = f"three {holder}"
    run_id = await house.control.start("last", {"gate": gate}, headless=False)
    await house.event(run_id, ev.StepStarted)
    await house.control.hijack(run_id, AGENT, "look", holder)
    await open_gate(house, gate)
    run = await house.until(run_id, "hijacked")
    assert run.steps["wait#1"].status == "finished"
    assert not run.ended
    await house.control.resume(run_id, PERSON)
    assert await house.finished(run_id) == gate
    assert not await listed(house, run_id)


async def test_a_run_that_fails_before_it_stops_for_a_person_is_theirs_all_the_same(house: House) -> None:
    run_id = await house.control.start("breaks", {"gate": "four"}, headless=False)
    await house.event(run_id, ev.AttemptStarted)
    await house.control.hijack(run_id, AGENT, "look", "human")
    [request] = (await house.control.run(run_id)).open_requests()
    await open_gate(house, "four")
    await house.event(run_id, ev.RunFailed)
    run = await house.until(run_id, "hijacked")
    assert run.error
    await house.control.cancel(run_id, PERSON, "seen")
    assert (await house.control.run(run_id)).requests[request.opened.request_id].status == "withdrawn"


async def test_cancelling_withdraws_a_takeover_and_denies_nothing(house: House) -> None:
    run_id, _ = await asking(house)
    request_id = await take_over(house, run_id)
    await house.control.cancel(run_id, AGENT, "enough")
    run = await house.control.run(run_id)
    assert {request.status for request in run.requests.values()} == {"withdrawn"}
    assert not await listed(house, run_id)
    assert not await house.events(run_id, ev.RequestAnswered)
    with pytest.raises(RunEnded):
        await house.control.hijack(run_id, AGENT, "late")
    with pytest.raises(RunEnded):
        await house.control.take_page(run_id, AGENT, "late")
    assert request_id in run.requests


# --- for how long ---


async def expired(house: House, time: Clock, run_id: str, seconds: float = IDLE) -> Run:
    """The run, after the page was not used for so long."""
    time.tick(seconds)
    await house.control.requests(None, [], 1, None)
    return await house.control.run(run_id)


async def test_a_person_who_is_asked_to_take_a_page_has_it_until_they_say_so(house: House, time: Clock) -> None:
    run_id, question = await asking(house)
    request_id = await take_over(house, run_id)
    run = await expired(house, time, run_id, 10 * IDLE)
    assert run.status == "hijacked"
    async with Client(build(house.settings)) as client:
        [row] = (await call(client, "list_pending", kind="takeover", run_id=run_id))["requests"]
        assert "held_until" not in await call(client, "get_run", run_id=run_id)
    assert {"left_s", "expires"}.isdisjoint(row)
    await hand_back(house, run_id, request_id)
    run = await house.control.run(run_id)
    assert (run.status, run.requests[request_id].status) == ("waiting-input", "answered")
    await house.store.rebuild()
    assert await listed(house, run_id) == ["input"]
    await house.resume(run_id, request_id=question.opened.request_id, value="word")
    assert await house.finished(run_id) == "word"


async def test_code_that_stood_still_is_paused_after_that_and_goes_on_only_with_resume(
    house: House, time: Clock
) -> None:
    run_id = await house.control.start("gated", {"gate": "five"}, headless=False)
    await house.event(run_id, ev.StepStarted)
    await house.control.hijack(run_id, AGENT, "look")
    await open_gate(house, "five")
    run = await house.until(run_id, "hijacked")
    run = await expired(house, time, run_id)
    assert run.status == "paused"
    assert not await listed(house, run_id)
    assert "after#1" not in run.steps
    async with Client(build(house.settings)) as client:
        shown = await call(client, "get_run", run_id=run_id)
        assert shown["next"] == f'resume(run_id="{run_id}")'
        assert shown["why"].startswith("left unused for too long by the agent: look")

    await house.control.take_page(run_id, AGENT, "act")  # a paused run is taken by the act itself
    assert (await house.control.run(run_id)).status == "hijacked"
    run = await expired(house, time, run_id)
    assert run.status == "paused"
    await house.resume(run_id)
    assert await house.finished(run_id) == "done"


async def test_what_was_done_by_hand_is_kept_when_a_hold_expires_until_the_run_goes_on(
    house: House, time: Clock
) -> None:
    waiting, _ = await asking(house)
    stopped = await house.control.start("gated", {"gate": "six"}, headless=False)
    await house.event(stopped, ev.StepStarted)
    await house.control.hijack(stopped, AGENT, "mine")
    await open_gate(house, "six")
    await house.until(stopped, "hijacked")
    await house.control.hijack(waiting, AGENT, "mine")
    async with Client(build(house.settings)) as client:
        for run_id, status in ((waiting, "waiting-input"), (stopped, "paused")):
            await house.control.note_actions(run_id, AGENT, ["await page.click('a')"], "done")
            run = await expired(house, time, run_id)
            assert run.status == status
            await house.control.hijack(run_id, AGENT, "again")
            await house.control.note_actions(run_id, AGENT, ["await page.click('b')"], "done")
            patch = (await call(client, "get_run", run_id=run_id))["patch"]
            assert patch["lines"] == ["await page.click('a')", "await page.click('b')"]
            assert patch["step"] == {waiting: "Which word?#1", stopped: "after"}[run_id]
            await house.resume(run_id)
            assert "patch" not in await call(client, "get_run", run_id=run_id)
    await house.store.rebuild()
    await house.resume(waiting, value="word")
    assert (await house.finished(waiting), await house.finished(stopped)) == ("word", "done")


@pytest.mark.parametrize("released", [False, True])
async def test_a_run_that_waited_goes_on_after_that_only_with_resume_too(
    house: House, time: Clock, released: bool
) -> None:
    run_id = await house.control.start("naps", {})
    await house.until(run_id, "waiting-input")
    await house.control.hijack(run_id, AGENT, "look")
    run = await expired(house, time, run_id)
    assert (run.status, run.hijack and run.hijack.expired) == ("waiting-input", True)
    if released:
        await house.stop_working()
    run = await expired(house, time, run_id, 3600 - IDLE)  # both branches wake at once
    if released:
        await house.working()
    run = await house.until(run_id, "paused")
    assert {request.status for request in run.requests.values()} == {"expired"}
    assert not run.steps
    await house.resume(run_id)
    assert await house.finished(run_id) == "tea after"


async def test_using_the_page_holds_it_longer_and_another_may_take_it_afterwards(house: House, time: Clock) -> None:
    run_id, _ = await asking(house)
    await house.control.hijack(run_id, AGENT, "mine")
    since = (await house.control.run(run_id)).hijack
    assert since
    for _ in range(2):
        time.tick(IDLE - 1)
        await house.control.note_evaluation(run_id, AGENT, "1", "write", "number")
    await house.control.note_actions(run_id, AGENT, ["await page.click('a')"], "done")
    run = await expired(house, time, run_id, IDLE - 1)
    assert run.status == "hijacked"
    with pytest.raises(Conflict) as held:
        await house.control.hijack(run_id, PERSON, "mine now")
    assert f"held by the agent already since {since.at}: 'mine'" in str(held.value)

    run = await expired(house, time, run_id, 1)
    assert run.status == "waiting-input"
    await house.control.hijack(run_id, PERSON, "mine now")
    run = await house.control.run(run_id)
    assert run.hijack
    assert (run.status, run.hijack.requested.holder) == ("hijacked", "human")
    with pytest.raises(NotAllowed, match=f"mcp-flow resume {run_id}"):
        await house.resume(run_id)
    await house.control.resume(run_id, PERSON)
    assert (await house.control.run(run_id)).status == "waiting-input"


async def test_a_failed_run_that_was_taken_is_a_failed_run_again(house: House, time: Clock) -> None:
    run_id = await house.control.start("fails", {})
    await house.until(run_id, "failed")
    await house.control.take_page(run_id, AGENT, "act")
    assert (await house.control.run(run_id)).status == "hijacked"
    run = await expired(house, time, run_id)
    assert run.status == "failed"
    assert len(await house.events(run_id, ev.AttemptStarted)) == 1
