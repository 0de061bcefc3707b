"""The examples that wait: a decision, a retried sign-in, a judgement, and a parcel that comes after two days."""

import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from clients import call, refusal, stop, stopped, text
from harness import AGENT, PERSON, House, open_house
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.config import Settings
from mcp_flow.control import Sent
from mcp_flow.server import build

EXAMPLES = Path(__file__).parents[2] / "examples"


def settings_in(folder: Path) -> Settings:
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return config.load(home=folder / "home", workflows=folder / "examples")


@pytest.fixture(scope="module")
async def settings(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    made = settings_in(tmp_path_factory.mktemp("waiting"))
    yield made
    await stop(made)


@pytest.fixture(scope="module")
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with Client(build(settings)) as connected:
        yield connected


@pytest.fixture
async def house(settings: Settings, client: Client) -> AsyncIterator[House]:
    async with open_house(settings) as opened:
        opened.close = lambda: opened.stop_working()  # type: ignore[method-assign]  # the client's processes stay
        yield opened


async def test_refund_is_decided_by_a_person_and_never_by_the_agent(client: Client, house: House) -> None:
    order = {"order": "A-17", "amount": 250}
    for deny in (False, True):
        run = await stopped(client, await call(client, "start_run", workflow="refund", input=order))
        [request] = run["pending"]
        assert (request["kind"], request["by"], request["data"]) == ("approval", "human", order)
        assert "mcp-flow approve" in await refusal(client, "approve", request_id=request["request_id"])
        word = "deny" if deny else "approve"
        await house.control.approve(request["request_id"], PERSON, word, "not ours" if deny else None)
        run = await stopped(client, await call(client, "get_run", run_id=run["run_id"], wait_s=20))
        said = "not ours" if deny else "250 refunded for A-17"
        assert run["output"] == {"refunded": not deny, "said": said}


async def test_refund_asks_nobody_about_a_small_amount(client: Client) -> None:
    run = await call(client, "start_run", workflow="refund", input={"order": "A-17", "amount": 5})
    assert (await stopped(client, run))["output"] == {"refunded": True, "said": "5 refunded for A-17"}


async def test_login_asks_a_person_for_the_code_and_tries_that_step_again_in_the_same_page(
    client: Client, house: House
) -> None:
    run = await stopped(client, await call(client, "start_run", workflow="login"))
    for code, status in (("000000", "waiting-input"), ("424242", "finished")):
        assert run["status"] == "waiting-input", run
        assert "We have sent you a code" in run["error"]["message"]
        request_id = run["pending"][0]["request_id"]
        assert f"mcp-flow answer {request_id}" in await refusal(client, "resume", run_id=run["run_id"], value=code)
        await house.control.resume(run["run_id"], PERSON, value=code, has_value=True, request_id=request_id)
        run = await stopped(client, await call(client, "get_run", run_id=run["run_id"], wait_s=20))
        assert run["status"] == status
    assert run["output"] == "Welcome back"
    shown = await call(client, "get_run", run_id=run["run_id"], since=0, limit=100)
    assert [e["key"] for e in shown["events"] if e["type"] == "step.started"] == ["open site#1", *["sign in#1"] * 3]


async def test_reviews_are_judged_by_the_agent_with_the_page_open_to_it(client: Client) -> None:
    run = await stopped(client, await call(client, "start_run", workflow="reviews"))
    for name, seen, mood in (("Ada", "pours without a drip", "friendly"), ("Bob", "The lid broke", "angry")):
        [request] = run["pending"]
        assert (request["prompt"], request["by"]) == (f"How does {name} mean it?", "agent")
        shown = await text(client, "snapshot", run_id=run["run_id"], mode="full")
        assert seen in shown, shown
        value = {"mood": mood, "because": seen}
        run = await stopped(client, await call(client, "resume", run_id=run["run_id"], value=value))
    assert {name: verdict["mood"] for name, verdict in run["output"].items()} == {"Ada": "friendly", "Bob": "angry"}


async def test_parcel_is_parked_and_woken_by_its_event_after_two_days(tmp_path: Path) -> None:
    ahead = timedelta()

    def now() -> datetime:
        return datetime.now(UTC) + ahead

    async with open_house(settings_in(tmp_path), now) as house:
        await house.working()
        run_id = await house.control.start("parcel", {"parcel": "P-1"})
        await house.until(run_id, "waiting-event", seconds=30)
        await house.stop_working()
        ahead = timedelta(days=2)
        await house.working()
        await house.event(run_id, ev.RunParked)
        assert await house.control.send_event("delivered", {"parcel": "P-2", "received_by": "Bob"}, AGENT) == Sent()
        sent = await house.control.send_event("delivered", {"parcel": "P-1", "received_by": "Ada"}, AGENT)
        assert sent.took == (run_id,)
        await house.until(run_id, "waiting-timer", seconds=30)
        ahead += timedelta(seconds=60)
        await house.control.keep_awake()
        assert await house.finished(run_id, seconds=30) == "Thank you, Ada has it"
        assert "restored" in [event.state for event in await house.events(run_id, ev.PageAttached)]
