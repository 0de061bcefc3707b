"""Processes are disposable: whoever executes a run may be killed, stopped or blocked, and another goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import AGENT, House, open_house

from mcp_flow import config, presence, worker
from mcp_flow import events as ev

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")) as house:
        yield house
        await house.tidy()


async def gone(task: Any) -> None:
    """Until a worker of this loop has left by itself."""
    with anyio.fail_after(15):
        await task


async def test_a_worker_killed_between_an_effect_and_its_record_is_followed_by_another(house: House) -> None:
    run_id = await house.start(
        """
        def effect():
            did("effect")
            if not is_open("followed"):
                os.mkfifo(HERE / "pipe")
                open(HERE / "pipe").read()
            return "recorded"

        @workflow
        async def main(flow: Flow) -> list:
            first = await flow.step("first", did, "first")
            return [first, await flow.step("effect", effect), flow.attempt]
        """
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "effect#1")
    await house.kill()
    house.open("followed")
    assert (await house.control.run(run_id)).status == "running"
    assert house.control.interrupted("running", (await house.control.run(run_id)).owner)
    before = time.monotonic()
    await house.control.keep_awake()
    assert await house.finished(run_id) == ["first", "recorded", 2]
    assert time.monotonic() - before < 8
    assert house.did() == ["first", "effect", "effect"]
    assert await house.store.verify(run_id) > 5


async def test_a_once_step_in_flight_when_its_worker_was_killed_is_in_doubt_and_never_run_twice(house: House) -> None:
    run_id = await house.start(
        """
        async def pay():
            did("pay")
            await until_open("never")

        @workflow
        async def main(flow: Flow) -> str:
            return await flow.step("pay", pay, once=True)
        """
    )
    await house.event(run_id, ev.StepStarted)
    with anyio.fail_after(10):
        while not house.did():
            await house.bell.next_ring(0.01)
    await house.kill()
    await house.working()
    request = await house.waiting(run_id, "in-doubt")
    assert "its end was never recorded" in request.opened.prompt
    await house.resume(run_id, step="done", value="paid")
    assert await house.finished(run_id) == "paid"
    assert house.did() == ["pay"]


async def test_a_stopped_worker_lets_a_step_in_flight_end_and_gives_the_run_back(house: House) -> None:
    run_id = await house.start(
        """
        async def work():
            await until_open("end")
            return did("work")

        @workflow
        async def main(flow: Flow) -> int:
            await flow.step("work", work)
            await flow.step("after", did, "after")
            return flow.attempt
        """
    )
    await house.event(run_id, ev.StepStarted)
    [pid] = house.detached()
    os.kill(pid, signal.SIGTERM)
    house.open("end")
    released = await house.event(run_id, ev.RunReleased)
    assert "told to stop" in released.reason
    await house.working()
    assert await house.finished(run_id) == 2
    assert house.did() == ["work", "after"]


async def test_an_answer_while_no_worker_lives_starts_one_that_goes_on(house: House) -> None:
    await house.working()
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            await flow.step("before", did, "before")
            return [bool(await flow.approve("Go?")), flow.attempt]
        """
    )
    request = await house.waiting(run_id, "waiting-approval")
    await house.stop_working()
    run = await house.control.run(run_id)
    assert (run.status, run.owner) == ("waiting-approval", None)
    assert not presence.living(house.settings)
    await house.approve(request)
    assert await house.finished(run_id) == [True, 2]
    assert len(house.detached()) == 1
    assert house.did() == ["before"]


async def test_a_worker_killed_while_a_run_waits_leaves_it_waiting(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            return [await flow.ask("What?"), flow.attempt]
        """
    )
    await house.waiting(run_id, "waiting-input")
    await house.kill()
    assert (await house.control.run(run_id)).status == "waiting-input"
    await house.working()
    await house.resume(run_id, value="this")
    assert await house.finished(run_id) == ["this", 2]


async def test_an_idle_worker_leaves_and_releases_what_waits(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "POLL", 60.0)  # it must not leave before it has had the run
    await house.working(worker_idle=0.1)
    leaving = house.work()
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> list:
            return [await flow.ask("What?"), flow.attempt]
        """
    )
    await house.waiting(run_id, "waiting-input")
    monkeypatch.setattr(worker, "POLL", 0.05)
    presence.ring(house.settings, run_id)
    await gone(leaving)
    run = await house.control.run(run_id)
    assert (run.status, run.owner) == ("waiting-input", None)
    await house.working()
    await house.resume(run_id, value="this")
    assert await house.finished(run_id) == ["this", 2]


async def test_several_workers_share_the_runs_and_none_is_executed_twice(house: House) -> None:
    house.write(
        """
        @workflow
        async def main(flow: Flow, number: int) -> int:
            await flow.step("save", did, number)
            return number
        """
    )
    assert await house.finished(await house.again({"number": 0})) == 0
    house.work()
    with anyio.fail_after(10):
        while len(presence.living(house.settings)) < 2:
            await house.bell.next_ring(0.01)
    runs = [await house.again({"number": number}) for number in range(1, 12)]
    assert [await house.finished(run_id) for run_id in runs] == list(range(1, 12))
    assert sorted(map(int, house.did())) == list(range(12))


async def test_a_breakpoint_is_skipped_in_production(house: House) -> None:
    await house.working(env="production")
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            await flow.pause("look")
            return "through"
        """
    )
    assert await house.finished(run_id) == "through"


async def test_code_that_blocks_the_loop_is_named_and_everything_else_goes_on_answering(house: House) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            await flow.step("before", did, "before")
            time.sleep(20)
        """
    )
    await house.event(run_id, ev.StepFinished)
    before = time.monotonic()
    assert (await house.control.run(run_id)).status == "running"
    await house.control.runs([], None, None, 10, None)
    assert time.monotonic() - before < 1
    blocked = await house.event(run_id, ev.WorkerBlocked)
    assert (blocked.file, blocked.line) == (str(house.file), house.line_of("time.sleep(20)"))
    assert 2.5 < blocked.seconds < 6
    await house.control.cancel(run_id, AGENT, "it sleeps")
    await house.kill()


async def test_code_that_swallows_its_cancellation_reaches_the_journal_no_more(house: House) -> None:
    await house.working()
    run_id = await house.start(
        """
        async def stubborn():
            while not is_open("end"):
                try:
                    await until_open("end")
                except asyncio.CancelledError:
                    did("swallowed")

        @workflow
        async def main(flow: Flow):
            await flow.log("before")
            try:
                await stubborn()
                await flow.step("after", did, "after")
            except BaseException as error:
                did(type(error).__name__)
        """
    )
    await house.event(run_id, ev.Logged)
    await house.control.cancel(run_id, AGENT, "enough")
    with anyio.fail_after(10):
        while "swallowed" not in house.did():
            await house.bell.next_ring(0.01)
    house.open("end")
    await house.stop_working()
    assert set(house.did()[:-1]) == {"swallowed"}
    assert house.did()[-1] == "CancelledError"
    ended, released = (await house.control.events(run_id, 0, 100))[-2:]
    assert isinstance(ended.event, ev.RunCancelled)
    assert isinstance(released.event, ev.RunReleased)


async def test_code_that_exits_fails_its_own_run_alone(house: House) -> None:
    source = """
        import sys

        async def leave():
            sys.exit("gone")

        @workflow
        async def main(flow: Flow, how: str):
            await flow.step("before", did, how)
            if how == "exit":
                sys.exit(3)
            if how == "interrupt":
                raise KeyboardInterrupt
            if how == "step":
                await asyncio.gather(flow.step("leave", leave), flow.step("thread", lambda: sys.exit(1)))
            await until_open("end")
            return flow.attempt
        """
    bystander = await house.start(source, {"how": "stay"})
    await house.event(bystander, ev.StepFinished)
    for how, type_, step, line in (
        ("exit", "SystemExit", None, "sys.exit(3)"),
        ("interrupt", "KeyboardInterrupt", None, "raise KeyboardInterrupt"),
        ("step", "SystemExit", "leave", 'sys.exit("gone")'),
    ):
        run_id = await house.again({"how": how})
        run = await house.until(run_id, "failed")
        assert run.error
        assert (run.error.type, run.error.step) == (type_, step), await house.story(run_id)
        assert run.error.line == house.line_of(line)
        assert run.attempt == 1
    house.open("end")
    assert await house.finished(bystander) == 1
    assert len(house.detached()) == 1


async def test_code_that_kills_its_process_does_not_do_so_for_ever(house: House) -> None:
    await house.control.keep_awake()
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow):
            did("start")
            os._exit(9)
        """
    )
    with anyio.fail_after(30):
        while (run := await house.control.run(run_id)).status != "failed":
            await house.control.keep_awake()
            await house.bell.next_ring(0.05)
    assert run.error
    assert run.error.type == "WorkerCrashed"
    assert 2 <= len(house.did()) <= 5


async def test_a_run_that_kills_its_workers_takes_no_other_run_down_with_it(house: House) -> None:
    """All runs of a worker share its death; only the one that causes it fails for it."""
    house.write(
        """
        async def hang():
            await until_open("end")

        @workflow
        async def main(flow: Flow, kill: bool) -> str:
            await flow.step("work", hang if not kill else os.abort)
            return "done"
        """
    )
    poison = await house.again({"kill": True})
    innocent = [await house.again({"kill": False}) for _ in range(4)]
    with anyio.fail_after(60):
        while (await house.control.run(poison)).status != "failed":
            await house.control.keep_awake()
            await house.bell.next_ring(0.02)
    assert "workers in a row died" in str((await house.control.run(poison)).error)
    house.open("end")
    assert [await house.finished(run_id, seconds=30) for run_id in innocent] == ["done"] * 4
