"""One run, one owner: what happens to the runs of a process that died, blocks, stands still or has nothing to do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from harness import AGENT, House, open_house

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.views import show_run
from mcp_flow.worker import CLAIM_AT_ONCE

pytestmark = pytest.mark.anyio


@pytest.fixture
async def house(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    settings = getattr(request, "param", {})
    async with open_house(config.load(home=tmp_path / "home", workflows=tmp_path / "workflows", **settings)) as house:
        yield house
        await house.tidy()


async def awake_until(house: House, condition: Callable[[], object], seconds: float = 30) -> None:
    """Do what a server does now and then, until something holds."""
    with anyio.fail_after(seconds):
        while not condition():
            await house.control.keep_awake()
            await house.bell.next_ring(0.05)


# --- runs that are taken up by nobody ---

left_alone = pytest.mark.parametrize("house", [{"take_up": False}], indirect=True)


@left_alone
async def test_a_run_whose_worker_was_killed_is_left_alone_where_that_is_wanted_until_somebody_resumes_it(
    house: House,
) -> None:
    source = """
        @workflow
        async def main(flow: Flow, name: str = "first") -> int:
            await flow.step("before", did, name)
            if name == "first":
                await flow.step("long", until_open, "end")
            return flow.attempt
        """
    run_id = await house.start(source)
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "long#1")
    await house.kill()
    house.open("end")
    run = await house.control.run(run_id)
    seq = run.seq
    await house.control.keep_awake()
    assert not presence.living(house.settings)
    # A worker that is there for another run leaves it alone as well.
    assert await house.finished(await house.again({"name": "second"})) == 1
    run = await house.control.run(run_id)
    assert (run.seq, house.control.interrupted(run.status, run.owner)) == (seq, True)
    await house.resume(run_id)
    assert await house.finished(run_id) == 2
    assert house.did() == ["first", "second"]
    assert len(await house.events(run_id, ev.RunOrphaned)) == 1


@left_alone
@pytest.mark.parametrize("how", ["resume", "approve", "expire"])
async def test_a_run_that_waits_goes_on_when_it_is_answered_although_its_owner_is_dead_and_nothing_is_taken_up(
    house: House, how: str
) -> None:
    asked = {"resume": "ask('Go?')", "approve": "approve('Go?')", "expire": "ask('Go?', default='yes', expires=2)"}
    run_id = await house.start(
        f"""
        @workflow
        async def main(flow: Flow) -> int:
            await flow.step("before", did, "before")
            await flow.{asked[how]}
            return flow.attempt
        """
    )
    request = await house.waiting(run_id, "waiting-approval" if how == "approve" else "waiting-input")
    await house.kill()
    if how == "resume":
        await house.resume(run_id, value="yes")
    if how == "approve":
        await house.approve(request)
    # The deadline of the third passes while it is waited for.
    assert await house.finished(run_id) == 2
    assert house.did() == ["before"]


@pytest.mark.parametrize("house", [{"take_up": False, "worker_idle": 1}], indirect=True)
async def test_an_interrupted_run_that_nobody_takes_up_can_be_cancelled_page_and_all_and_hijacked(house: House) -> None:
    source = """
        @workflow
        async def main(flow: Flow, with_page: bool) -> int:
            if with_page:
                page = await flow.page()
                await flow.step("open", page.set_content, "<title>t</title>")
            await flow.step("long", until_open, "end")
            return flow.attempt
        """
    cancelled = await house.start(source, {"with_page": True})
    taken = await house.again({"with_page": False})
    for run_id in (cancelled, taken):
        await house.event(run_id, ev.StepStarted, lambda event: event.key == "long#1")
    await house.kill()
    await house.control.hijack(taken, AGENT, "look")
    run = await house.control.run(taken)
    assert (run.status, run.owner) == ("hijacked", None)
    await house.control.cancel(cancelled, AGENT, "enough")
    await house.event(cancelled, ev.PageClosed)
    run = await house.until(cancelled, "cancelled")
    while run.owner or await house.store.load_checkpoint(cancelled):
        await house.bell.next_ring(0.05)
        run = await house.control.run(cancelled)
    assert not run.pages
    house.open("end")
    house.edit("return flow.attempt", "return flow.attempt + 40")
    await house.resume(taken)
    assert await house.finished(taken) == 42


# --- a loop that stands still ---

BLOCKING = """
    @workflow
    async def main(flow: Flow, blocks: bool = True) -> int:
        await flow.step("before", did, "blocks" if blocks else "waits")
        if blocks and flow.attempt == 1:
            time.sleep(60)
        await flow.step("long", until_open, "end")
        return flow.attempt
    """


@pytest.mark.parametrize("move", ["cancel", "hijack"])
async def test_a_blocked_worker_is_killed_for_whoever_stops_its_run_and_its_other_runs_go_on_elsewhere(
    house: House, move: str
) -> None:
    bystander = await house.start(BLOCKING, {"blocks": False})
    await house.event(bystander, ev.StepStarted, lambda event: event.key == "long#1")
    [first] = house.detached()
    run_id = await house.again()
    blocked = await house.event(run_id, ev.WorkerBlocked)
    assert (blocked.file, blocked.line) == (str(house.file), house.line_of("time.sleep(60)"))
    run = await house.control.run(run_id)
    assert f"{house.file}:{blocked.line}" in show_run(run, status=run.status, folder="")["why"]
    await house.control.keep_awake()
    assert house.detached() == [first]  # nobody waits for it yet
    before = time.monotonic()
    if move == "cancel":
        await house.control.cancel(run_id, AGENT, "it sleeps")
        await awake_until(house, lambda: first not in house.detached())
    else:
        await house.control.hijack(run_id, AGENT, "it sleeps")
        await awake_until(house, lambda: first not in house.detached())
        run = await house.until(run_id, "hijacked")
        assert run.attempt == 2
    assert time.monotonic() - before < 8
    await awake_until(house, lambda: house.detached())
    house.open("end")
    assert await house.finished(bystander) == 2
    if move == "hijack":
        await house.resume(run_id)
        assert await house.finished(run_id) == 2
    else:
        await house.event(run_id, ev.RunReleased)
        assert (await house.control.run(run_id)).owner is None
    assert house.did() == ["waits", "blocks"]


@pytest.mark.parametrize("house", [{"lease": 600}], indirect=True)
async def test_a_worker_whose_code_keeps_the_interpreter_to_itself_is_killed_for_whoever_cancels_its_run(
    house: House,
) -> None:
    source = """
        import re

        @workflow
        async def main(flow: Flow, blocks: bool = True) -> int:
            await flow.step("before", did, "blocks" if blocks else "waits")
            if blocks:
                re.match(r"(a+)+$", "a" * 60 + "b")
            await flow.step("long", until_open, "end")
            return flow.attempt
        """
    bystander = await house.start(source, {"blocks": False})
    await house.event(bystander, ev.StepStarted, lambda event: event.key == "long#1")
    [first] = house.detached()
    run_id = await house.again()
    await house.event(run_id, ev.StepFinished)
    await house.control.cancel(run_id, AGENT, "it is lost in a regular expression")
    await awake_until(house, lambda: first not in house.detached())
    [blocked] = await house.events(run_id, ev.WorkerBlocked)
    assert (blocked.file, blocked.line) == (str(house.file), house.line_of("re.match"))
    house.open("end")
    assert await house.finished(bystander) == 2
    await house.event(run_id, ev.RunReleased)
    assert house.did() == ["waits", "blocks"]


async def test_a_worker_is_dead_although_a_process_lives_that_a_step_of_it_has_forked(house: House) -> None:
    run_id = await house.start(
        """
        import multiprocessing

        def stay():
            did(os.getpid())
            while not is_open("end"):
                time.sleep(0.01)

        @workflow
        async def main(flow: Flow) -> int:
            if flow.attempt == 1:
                multiprocessing.get_context("fork").Process(target=stay).start()
                await until_open("end")
            return await flow.step("after", lambda: flow.attempt)
        """
    )
    with anyio.fail_after(15):
        while not house.did():
            await house.bell.next_ring(0.05)
    await house.kill()
    await house.control.keep_awake()
    assert await house.finished(run_id) == 2
    [child] = house.did()
    os.kill(int(child), 0)
    house.open("end")


async def test_a_run_is_claimed_although_as_many_as_are_claimed_at_once_are_suspected_of_killing_workers(
    house: House,
) -> None:
    source = """
        @workflow
        async def main(flow: Flow, suspected: bool) -> int:
            if suspected:
                await until_open("end")
            return flow.attempt
        """
    house.write(source)
    first = await house.again({"suspected": True}, hold=True)
    created = (await house.control.run(first)).created
    assert created
    for number in range(CLAIM_AT_ONCE):
        await house.store.create(f"s{number}", created.model_copy(update={"hold": False}), owner="w-1")
    # A second owner is dead as well, without anything new in their journals.
    assert len(await house.store.claim("w-2", ["w-1"], CLAIM_AT_ONCE)) == CLAIM_AT_ONCE
    assert await house.finished(await house.again({"suspected": False})) == 1


# --- a process that is not to be killed ---

LIBRARY = """
import asyncio, os, sys
from mcp_flow import config, events as ev
from mcp_flow.errors import FlowError
from mcp_flow.store import Store
from mcp_flow.worker import Worker

async def main():
    settings = config.load()
    async with Store(settings, "library") as store:
        worker = Worker(settings, store, "lib-1", only="mine")
        serving = asyncio.create_task(worker.serve(lambda: print("ready", flush=True)))
        await asyncio.to_thread(sys.stdin.readline)
        while worker._tasks:  # until it has noticed by itself
            await asyncio.sleep(0.01)
        worker.stop()
        await serving
        try:
            await store.append("mine", ev.Logged(key="late", message="late"), epoch=1)
        except FlowError as error:
            print(type(error).__name__, flush=True)

asyncio.run(main())
"""


def library(house: House) -> subprocess.Popen[str]:
    """A program that executes the run `mine` itself."""
    return subprocess.Popen(
        [sys.executable, "-c", LIBRARY],
        env=os.environ | house.settings.environment() | {"IN_LIBRARY": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("house", [{"lease": 2.0}], indirect=True)
@pytest.mark.parametrize("where", ["in a step", "between steps"])
async def test_a_library_process_that_stood_still_loses_its_run_to_another_lives_on_and_does_nothing_more(
    house: House, where: str
) -> None:
    process = library(house)
    assert process.stdout
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        run_id = await house.start(
            f"""
            GATE = "library" if "IN_LIBRARY" in os.environ else "worker"

            @workflow
            async def main(flow: Flow) -> int:
                await flow.step("first", did, "first " + GATE)
                if {where == "in a step"}:
                    await flow.step("long", until_open, GATE)
                else:
                    await until_open(GATE)
                await flow.step("after", lambda: did("after " + GATE))
                await flow.step("end", until_open, "end")
                return flow.attempt
            """,
            run_id="mine",
        )
        await house.event(run_id, ev.StepFinished)
        if where == "in a step":
            await house.event(run_id, ev.StepStarted, lambda event: event.key == "long#1")
        assert (await house.control.run(run_id)).owner == "lib-1"
        process.send_signal(signal.SIGSTOP)
        with anyio.fail_after(30):
            while (run := await house.control.run(run_id)).epoch == 1:
                await house.control.keep_awake()
                await house.bell.next_ring(0.05)
        assert process.poll() is None
        assert run.taken_from == "lib-1"
        assert run.owner != "lib-1"
        seq = run.seq
        house.open("library")
        process.send_signal(signal.SIGCONT)
        said, _ = await asyncio.to_thread(process.communicate, "end\n", 30)
        assert said == "LeaseLost\n"
        assert process.returncode == 0
        assert house.did() == ["first library"]
        assert not [r for r in await house.control.events(run_id, 0, 100) if r.epoch == 1 and r.seq > seq]
        house.open("worker")
        house.open("end")
        assert await house.finished(run_id) == 2
        assert house.did() == ["first library", "after worker"]
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)


# --- runs that only wait ---


@pytest.mark.parametrize("house", [{"worker_idle": 0.3}], indirect=True)
async def test_a_coroutine_that_waits_is_dropped_while_other_runs_go_on(house: House) -> None:
    source = """
        @workflow
        async def main(flow: Flow, busy: bool) -> int:
            await flow.step("before", did, "busy" if busy else "waits")
            await flow.step("long", until_open, "end") if busy else await flow.ask("What?")
            return flow.attempt
        """
    busy = await house.start(source, {"busy": True})
    waits = await house.again({"busy": False})
    released = await house.event(waits, ev.RunReleased)
    assert released.reason == "it waits"
    run = await house.control.run(waits)
    assert (run.status, run.owner) == ("waiting-input", None)
    assert not await house.events(busy, ev.RunReleased)
    assert len(presence.living(house.settings)) == 1
    await house.resume(waits, value="this")
    assert await house.finished(waits) == 2
    house.open("end")
    assert await house.finished(busy) == 1
    assert sorted(house.did()) == ["busy", "waits"]


@pytest.mark.parametrize("house", [{"hold": 0.05}], indirect=True)
async def test_a_run_without_a_page_holds_nothing_and_is_never_parked(house: House) -> None:
    await house.working()
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> int:
            await flow.ask("What?")
            return flow.attempt
        """
    )
    await house.waiting(run_id, "waiting-input")
    run = await house.control.run(run_id)
    assert run.idle_since
    assert (run.held_since, run.parked_since) == (None, None)
    assert await house.control.keep_awake() is None
    assert not await house.store.wanting(presence.living(house.settings), held_before=house.store.now())
    await house.stop_working()
    await house.working()
    await house.resume(run_id, value="this")
    assert await house.finished(run_id) == 2
    assert not await house.events(run_id, ev.RunParked)
