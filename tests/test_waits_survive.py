"""Every kind of wait, with a kill -9 of every process between question and answer, and the answer from another one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from clients import call, text
from harness import AGENT, PERSON, House, open_house
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.revisions import capture
from mcp_flow.run import Request
from mcp_flow.server import build

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
    "secret": 'len((await flow.ask("Code?", SecretStr)).get_secret_value())',
    "takeover": 'await flow.ask("And then?", str)',
    "in-doubt": 'await flow.step("pay", pay, once=True)',
    "held": '"held back"',
    "pause-before": '"stopped at"',
    "single-step": '"each"',
    "max-steps": '"one more"',
    "denied": '(await flow.approve("Pay?", expires=90_000, on_deny="return")).note',
    "failed": 'await flow.ask("Which?", str, expires=90_000)',
    "judged": 'await judge(flow)',
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "takeover": {"headless": False},
    "held": {"hold": True},
    "pause-before": {"pause_before": ["after"]},
    "single-step": {"single_step": True},
    "max-steps": {"hold": True},
}
SOURCE = """
    from pydantic import SecretStr

    def pay() -> str:
        raise ConnectionError("gone")

    async def judge(flow) -> str:
        page = await flow.page()
        await flow.step("show", page.set_content, "<h1>Two offers</h1><button>first</button>")
        choice = await flow.ask("Which is better?", str, by="agent")
        return f"{choice} on {await page.inner_text('h1')}"

    def sign_in(flow) -> str:
        if flow.retry_input is None:
            raise Retriable("refused", ask=str)
        return flow.retry_input

    @workflow
    async def main(flow: Flow, wait: str) -> list:
        await flow.step("before", did, f"{wait}: before")
        match wait:
"""
SOURCE += "".join(f"            case {name!r}:\n                answer = {wait}\n" for name, wait in WAITS.items())
SOURCE += """
        await flow.step("after", did, f"{wait}: after")
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
async def waiting(house: House) -> dict[str, list[Request]]:
    """What each of the runs waits for, once the one process that executed them is killed."""
    first, *others = WAITS
    await house.start(SOURCE, {"wait": first}, run_id=first)
    created = (await house.control.run(first)).created
    assert created
    revision = capture(house.settings.workflows, created.entry)
    for name in others:  # begun, and not started: to check the same code once more costs a process each time
        given = created.model_copy(update={"input": {"wait": name}} | OPTIONS.get(name, {}))
        await house.control.begin(given, revision, name)
    await house.resume("max-steps", max_steps=1)
    for name in WAITS.keys() - {"held"}:
        await house.event(name, ev.AttemptIdled)
    await house.control.hijack("takeover", AGENT, "a puzzle", "human")
    requests = {name: (await house.control.run(name)).open_requests() for name in WAITS}
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
    house: House, waiting: dict[str, list[Request]]
) -> None:
    rows = [(row.run_id, row.request) for row in await house.store.open_requests(limit=50)]
    assert sorted(rows, key=str) == sorted(
        [(name, request.opened) for name, requests in waiting.items() for request in requests], key=str
    )
    assert {name: len(requests) for name, requests in waiting.items() if len(requests) != 1} == {
        "held": 0, "takeover": 2,
    }  # fmt: skip
    assert house.detached() == []


async def test_after_that_the_page_of_a_run_that_asks_for_judgement_can_still_be_seen(
    house: House, waiting: dict[str, list[Request]]
) -> None:
    async with Client(build(house.settings)) as client:
        seen = await text(client, "snapshot", run_id="judged")
        [row] = (await call(client, "list_pending", run_id="judged"))["requests"]
    assert "Two offers" in seen
    assert row["by"] == "agent"
    assert house.detached() == []


async def test_after_that_every_answer_reaches_its_run_whichever_process_gives_it_and_time_passes(
    house: House, waiting: dict[str, list[Request]], time: Ahead
) -> None:
    request = {name: each[-1].opened.request_id for name, each in waiting.items() if each}
    assert "goes on" in await command(house, "answer", request["by-command"], "me")
    assert "goes on" in await command(house, "approve", request["by-command-approved"])
    await house.resume("ask", value="this")
    await house.resume("form", request_id=request["form"], value={"name": "Ada"})
    await house.control.approve(request["approve"], PERSON, "deny", "too dear")
    assert (await house.control.send_event("paid", "yes", AGENT)).took == ("event",)
    assert (await house.control.send_event("kept", "by name", AGENT, "kept")).took == ("kept",)
    await house.resume("pause")
    await house.resume("timer", request_id=request["timer"])
    await house.resume("retriable", value="code")
    await house.control.resume("secret", PERSON, value="correct-horse", has_value=True, request_id=request["secret"])
    await house.control.resume("takeover", PERSON, request_id=request["takeover"])
    await house.resume("takeover", value="went on")
    await house.resume("in-doubt", step="done", value="paid by hand")
    await house.resume("judged", value="the first")
    for name in ("held", "pause-before", "max-steps", "single-step"):
        await house.resume(name)
    await house.event("single-step", ev.RequestOpened, lambda event: event.key == "after#1|")
    await house.resume("single-step")
    time.ahead = timedelta(days=2)
    await house.control.keep_awake()

    error = (await house.until("failed", "failed", seconds=30)).error
    assert error
    assert error.type == "RequestExpired"
    answers = {name: await house.finished(name, seconds=30) for name in WAITS if name != "failed"}
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
        "secret": [len("correct-horse"), 2],
        "takeover": ["went on", 2],
        "in-doubt": ["paid by hand", 2],
        "held": ["held back", 1],
        "pause-before": ["stopped at", 2],
        "single-step": ["each", 2],
        "max-steps": ["one more", 2],
        "denied": ["nobody decided in time", 2],
        "judged": ["the first on Two offers", 2],
    }
    opened = {"held": 0, "takeover": 2, "single-step": 2}
    effects = [f"{name}: before" for name in WAITS] + [f"{name}: after" for name in WAITS if name != "failed"]
    assert sorted(house.did()) == sorted(effects)
    for name in WAITS:
        assert len(await house.events(name, ev.RequestOpened)) == opened.get(name, 1)
        await house.store.verify(name)
    assert "correct-horse" not in await house.story("secret")
    assert set(await house.store.secret_answers("secret")) <= {""}


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
    assert (await house.control.send_event("paid", "early", AGENT, run_id, "k")).took == ()
    await house.kill()
    assert (await house.control.send_event("paid", "again", AGENT, run_id, "k")).before
    await house.resume(run_id)
    assert await house.finished(run_id, seconds=30) == "early"
