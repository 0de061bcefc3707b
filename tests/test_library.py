"""A run as part of a program of one's own: executed in this process, told of as it goes, continued and forked."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner
from clients import stop

from mcp_flow import Workflow, fork_run, run_workflow
from mcp_flow import events as ev
from mcp_flow.cli import main
from mcp_flow.config import Settings
from mcp_flow.errors import InvalidInput, NotAllowed, UnknownStep
from mcp_flow.store import Store

SOURCE = """
import asyncio
from pathlib import Path
from pydantic import BaseModel
from mcp_flow import Flow, workflow

class Sum(BaseModel):
    total: int

def note(folder, what, n):
    with open(Path(folder) / "did", "a") as file:
        file.write(f"{what}\\n")
    return n

@workflow
async def add(flow: Flow, folder: str, numbers: list[int], ask: bool = False) -> Sum:
    first = await flow.step("first", note, folder, "first", numbers[0])
    if ask:
        await flow.approve("Go on?")
    rest = await flow.step("rest", note, folder, "rest", sum(numbers[1:]))
    return Sum(total=first + rest)

running, most = 0, 0

async def busy():
    global running, most
    running += 1
    most = max(most, running)
    for _ in range(20):
        await asyncio.sleep(0)
    running -= 1
    return most

@workflow
async def side_by_side(flow: Flow, count: int) -> int:
    return max(await asyncio.gather(*(flow.step(f"step {n}", busy) for n in range(count))))
"""


@pytest.fixture
async def here(settings: Settings) -> AsyncIterator[Settings]:
    settings.workflows.mkdir(parents=True)
    (settings.workflows / "sums.py").write_text(SOURCE)
    yield settings
    await stop(settings)


@pytest.fixture
def program(here: Settings) -> ModuleType:
    """The file as a program imports it."""
    spec = importlib.util.spec_from_file_location("sums", here.workflows / "sums.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def did(settings: Settings) -> list[str]:
    return (settings.workflows / "did").read_text().splitlines()


async def test_a_function_is_executed_here_and_its_output_has_the_program_s_own_type(
    here: Settings, program: ModuleType
) -> None:
    told: list[ev.Recorded] = []
    given = {"folder": str(here.workflows), "numbers": [1, 2, 3]}
    with anyio.fail_after(20):
        result = await run_workflow(program.add, input=given, run_id="one", on_event=told.append, settings=here)
    assert isinstance(program.add, Workflow)
    assert (result.run_id, result.status, result.error, result.pending) == ("one", "finished", None, [])
    assert result.output == program.Sum(total=6)
    assert [recorded.seq for recorded in told] == list(range(1, len(told) + 1))
    assert [type(recorded.event) for recorded in (told[0], told[-1])] == [ev.RunCreated, ev.RunFinished]
    claimed = next(recorded.event for recorded in told if isinstance(recorded.event, ev.RunClaimed))
    assert claimed.worker.startswith("lib-")
    assert did(here) == ["first", "rest"]


async def test_a_run_that_waits_comes_back_with_its_request_and_goes_on_when_it_is_resumed(here: Settings) -> None:
    given = {"folder": str(here.workflows), "numbers": [1, 2], "ask": True}
    with anyio.fail_after(30):
        stopped = await run_workflow("add", input=given, run_id="one", settings=here)
        assert (stopped.status, stopped.output) == ("waiting-approval", None)
        [request] = stopped.pending
        assert (request["prompt"], request["kind"]) == ("Go on?", "approval")
        async with Store(here, "test") as store:
            answer = ev.RequestAnswered(request_id=request["request_id"], value={"approved": True})
            await store.append("one", answer)
        done = await run_workflow("add", run_id="one", resume=True, settings=here)
    assert (done.status, done.output) == ("finished", {"total": 3})
    assert did(here) == ["first", "rest"]


async def test_resuming_needs_to_know_which_run(here: Settings) -> None:
    with pytest.raises(InvalidInput, match="run_id"):
        await run_workflow("add", resume=True, settings=here)


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (2, 2), (None, 6)])
async def test_no_more_steps_run_at_a_time_than_the_program_allows(
    here: Settings, limit: int | None, most: int
) -> None:
    with anyio.fail_after(20):
        result = await run_workflow("side_by_side", input={"count": 6}, max_concurrency=limit, settings=here)
    assert result.output == most


async def test_a_fork_is_started_by_a_call_and_shares_what_finished_before_its_step(here: Settings) -> None:
    given = {"folder": str(here.workflows), "numbers": [1, 2]}
    with anyio.fail_after(40):
        await run_workflow("add", input=given, run_id="one", settings=here)
        assert await fork_run("one", "rest", new_id="two", settings=here) == "two"
        done = await run_workflow("add", run_id="two", resume=True, settings=here)
        async with Store(here, "test") as store:
            while not (run := await store.run("two")).ended:
                await anyio.sleep(0.02)
            assert (run.status, run.output) == ("finished", {"total": 3})
            assert await store.verify("two") > 0
    assert done.run_id == "two"
    assert did(here) == ["first", "rest", "rest"]
    with pytest.raises(UnknownStep, match="has no step 'pay'"):
        await fork_run("one", "pay", settings=here)


async def test_commands_execute_a_run_here_and_fork_another(here: Settings) -> None:
    given = json.dumps({"folder": str(here.workflows), "numbers": [4, 5], "ask": True})
    environment = here.environment()

    def command(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, arguments, env=environment)
        return result.exit_code, result.output

    status, shown = await anyio.to_thread.run_sync(command, "run", "add", "--input", given, "--id", "one")
    assert (status, json.loads(shown)["status"]) == (0, "waiting-approval")
    status, shown = await anyio.to_thread.run_sync(command, "fork", "one", "first", "--id", "two")
    assert (status, shown.strip()) == (0, "Started run two.")
    status, shown = await anyio.to_thread.run_sync(command, "fork", "one", "rest")
    assert status == 1
    assert "has no step 'rest'" in shown
    with anyio.fail_after(20):
        async with Store(here, "test") as store:
            while (run := await store.run("two")).status != "waiting-approval":
                await anyio.sleep(0.02)
    assert run.created
    assert (run.created.forked_from, run.created.fork_step) == ("one", "first#1")
    assert did(here) == ["first", "first"]


async def test_a_step_that_never_finished_is_no_place_to_fork_from(here: Settings, tmp_path: Path) -> None:
    given = {"folder": str(tmp_path / "nowhere"), "numbers": [1, 2]}
    with anyio.fail_after(20):
        result = await run_workflow("add", input=given, run_id="one", settings=dataclasses.replace(here))
    assert result.status == "failed"
    assert result.error
    assert result.error.step == "first"
    with pytest.raises(NotAllowed, match="has not finished"):
        await fork_run("one", "first", settings=here)
