"""Every kind of wait, with a kill -9 of every process between question and answer, and the answer from another one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from harness import AGENT, PERSON, House, open_house

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.run import Request

pytestmark = pytest.mark.anyio

WAITS = {
    "ask": 'await flow.ask("What?", str)',
    "form": '(await flow.ask("Who?", {"name": str})).name',
    "approve": '(await flow.approve("Pay?", on_deny="return")).note',
    "event": 'await flow.wait_for("paid", str)',
    "kept": 'await flow.wait_for("kept", str)',
    "pause": 'str(await flow.pause("look"))',
    "timer": 'str(await flow.sleep(86_400))',
    "short": 'str(await flow.sleep(90_000))',
    "default": 'await flow.ask("Which?", str, default="tea", expires=90_000)',
    "retriable": 'await flow.step("sign in", sign_in, flow)',
    "by-command": 'await flow.ask("By whom?", str)',
    "by-command-approved": '(await flow.approve("Send?")).by',
}  # fmt: skip
SOURCE = """
    def sign_in(flow) -> str:
        if flow.retry_input is None:
            raise Retriable("refused", ask=str)
        return flow.retry_input

    @workflow
    async def main(flow: Flow) -> list:
        await flow.step("before", did, "before")
        answer = {wait}
        await flow.step("after", did, "after")
        return [answer, flow.attempt]
    """


class Ahead:
    """The time as it is for a process that comes later."""

    ahead = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


@pytest.fixture(scope="module")
def time() -> Ahead:
    return Ahead()


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory, time: Ahead) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("survive")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows"), time) as house:
        yield house


@pytest.fixture(scope="module")
async def waiting(house: House) -> dict[str, Request]:
    """What each of the runs waits for, once the one process that executed them is killed."""
    runs = {}
    for name, wait in WAITS.items():
        house.begin(name.replace("-", "_"))
        runs[name] = await house.start(SOURCE.replace("{wait}", wait), run_id=name)
    for run_id in runs.values():
        await house.event(run_id, ev.AttemptIdled)
    requests = {name: next(iter((await house.control.run(name)).requests.values())) for name in runs}
    await house.kill()
    return requests


async def command(house: House, *words: str) -> str:
    """What a command of another process said."""
    run = subprocess.run
    arguments = [sys.executable, "-m", "mcp_flow", *words, "--home", str(house.settings.home)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = await anyio.to_thread.run_sync(lambda: run(arguments, capture_output=True, text=True, env=environment))
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_kill_of_every_process_leaves_all_requests_open_as_they_were(
    house: House, waiting: dict[str, Request]
) -> None:
    rows = {row.run_id: row.request for row in await house.store.open_requests(limit=50)}
    assert rows == {name: request.opened for name, request in waiting.items()}
    assert house.detached() == []


async def test_after_that_every_answer_reaches_its_run_whichever_process_gives_it_and_time_passes(
    house: House, waiting: dict[str, Request], time: Ahead
) -> None:
    request = {name: each.opened.request_id for name, each in waiting.items()}
    assert "goes on" in await command(house, "answer", request["by-command"], "me")
    assert "goes on" in await command(house, "approve", request["by-command-approved"])
    await house.resume("ask", value="this")
    await house.resume("form", request_id=request["form"], value={"name": "Ada"})
    await house.control.approve(request["approve"], PERSON, "deny", "too dear")
    assert await house.control.send_event("paid", "yes", AGENT) == ["event"]
    assert await house.control.send_event("kept", "by name", AGENT, "kept") == ["kept"]
    await house.resume("pause")
    await house.resume("timer", request_id=request["timer"])
    await house.resume("retriable", value="code")
    time.ahead = timedelta(days=2)
    await house.control.keep_awake()

    answers = {name: await house.finished(name, seconds=30) for name in WAITS}
    [someone] = {answers.pop("by-command-approved")[0]}
    assert someone
    assert answers == {
        "ask": ["this", 2],
        "form": ["Ada", 2],
        "approve": ["too dear", 2],
        "event": ["yes", 2],
        "kept": ["by name", 2],
        "pause": ["None", 2],
        "timer": ["None", 2],
        "short": ["None", 2],
        "default": ["tea", 2],
        "retriable": ["code", 2],
        "by-command": ["me", 2],
    }
    for name in WAITS:
        house.begin(name.replace("-", "_"))
        assert house.did() == ["before", "after"]
        assert len(await house.events(name, ev.RequestOpened)) == 1
        await house.store.verify(name)


async def test_an_event_that_is_kept_for_a_run_is_there_after_a_kill(house: House) -> None:
    house.begin("kept_before")
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow) -> str:
            await flow.pause("not yet")
            return await flow.wait_for("paid", str)
        """
    )
    await house.waiting(run_id, "paused")
    assert await house.control.send_event("paid", "early", AGENT, run_id, "k") == []
    await house.kill()
    assert await house.control.send_event("paid", "again", AGENT, run_id, "k") == []
    await house.resume(run_id)
    assert await house.finished(run_id, seconds=30) == "early"
