"""Every example, run by a real client on a real browser; what is asserted is what its reader is promised."""

import json
import shutil
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from test_shop_server import server

from mcp_flow import config, presence
from mcp_flow.browser import host as hosts
from mcp_flow.config import Settings
from mcp_flow.server import build

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
async def settings(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    """Settings on a copy of the examples, so that one can be repaired; their processes are ended afterwards."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    made = config.load(home=folder / "home", workflows=folder / "examples")
    yield made
    await anyio.to_thread.run_sync(presence.stop_workers, made)
    await hosts.stop(made)


@pytest.fixture(scope="module")
async def client(settings: Settings) -> AsyncIterator[Client]:
    async with Client(build(settings)) as connected:
        yield connected


@pytest.fixture(scope="module")
async def flaky(client: Client) -> list[dict[str, Any]]:
    """Two runs of `flaky` that have failed, side by side since each waits for its button in vain; a test takes one."""
    runs = [await call(client, "start_run", workflow="flaky", wait_s=0) for _ in range(2)]
    return [await ended(client, run) for run in runs]


@pytest.fixture
def shop() -> Iterator[str]:
    with server.shop() as url:
        yield url


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    with anyio.fail_after(60):
        result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


async def ended(client: Client, run: dict[str, Any]) -> dict[str, Any]:
    """The run once it neither runs nor waits to run."""
    while run["status"] in ("queued", "running"):
        run = await call(client, "get_run", run_id=run["run_id"], wait_s=20)
    return run


def orders(shop: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{shop}/orders.json", timeout=5) as answer:
        return json.loads(answer.read())


async def test_buy_pays_exactly_once_and_only_after_the_approval(client: Client, shop: str) -> None:
    order = {"item": "Teapot", "quantity": 2, "url": shop}
    run = await ended(client, await call(client, "start_run", workflow="buy", input=order))
    assert run["status"] == "waiting-approval", run
    assert orders(shop)["payments_tried"] == 0
    request = run["pending"][0]
    assert request["data"] == {"item": "Teapot", "quantity": 2, "total": "$49.80"}

    run = await ended(client, await call(client, "approve", request_id=request["request_id"]))

    assert run["status"] == "finished", run
    assert run["output"] == {"number": "A-1001", "total": "$49.80", "item": "Teapot"}
    assert orders(shop)["payments_tried"] == 1
    [receipt] = [path for path in run["artifacts"] if not path.rpartition("/")[2].startswith("stop-")]
    assert (await anyio.Path(receipt).read_bytes()).startswith(b"\x89PNG")


async def test_buy_does_not_pay_when_denied(client: Client, shop: str) -> None:
    order = {"item": "Notebook", "url": shop}
    run = await ended(client, await call(client, "start_run", workflow="buy", input=order))

    denied = {"request_id": run["pending"][0]["request_id"], "decision": "deny", "note": "too dear"}
    run = await ended(client, await call(client, "approve", **denied))

    assert run["status"] == "failed"
    assert run["error"]["type"] == "Denied"
    assert "too dear" in run["error"]["message"]
    assert orders(shop)["payments_tried"] == 0


async def test_buy_refuses_wrong_input_by_naming_every_bad_field(client: Client) -> None:
    result = await client.call_tool("start_run", {"workflow": "buy", "input": {"item": "", "quantity": 11, "url": "x"}})
    assert result.is_error
    assert all(f"- {name}:" in result.content[0].text for name in ("item", "quantity", "url"))


async def test_signup_asks_three_questions_and_fills_the_form(client: Client) -> None:
    run = await ended(client, await call(client, "start_run", workflow="signup"))
    asked = []
    for value in ("ada@example.com", "team", True):
        assert run["status"] == "waiting-input", run
        asked.append(run["pending"][0]["prompt"])
        run = await ended(client, await call(client, "resume", run_id=run["run_id"], value=value))

    assert asked == ["Which e-mail address?", "Which plan?", "Subscribe to the newsletter?"]
    assert run["output"] == {
        "email": "ada@example.com",
        "plan": "team",
        "newsletter": True,
        "confirmation": "ada@example.com: team, newsletter",
    }


async def test_signup_asks_again_for_an_answer_that_does_not_fit(client: Client) -> None:
    run = await ended(client, await call(client, "start_run", workflow="signup"))
    result = await client.call_tool("resume", {"run_id": run["run_id"], "value": "nonsense"})
    assert result.is_error
    assert (await call(client, "get_run", run_id=run["run_id"]))["status"] == "waiting-input"


async def test_flaky_goes_on_in_the_same_page_once_its_code_is_repaired(
    client: Client, settings: Settings, flaky: list[dict[str, Any]]
) -> None:
    run = flaky.pop()
    assert run["status"] == "failed", run
    assert run["error"]["step"] == "send"
    assert Path(run["error"]["file"]).name == "flaky.py"

    file = settings.workflows / "flaky.py"
    source = file.read_text()
    file.write_text(source.replace('BUTTON = "Submit"', 'BUTTON = "Send"'))
    try:
        run = await ended(client, await call(client, "resume", run_id=run["run_id"]))
    finally:
        file.write_text(source)

    assert run["output"] == {"visitor": 1, "answer": "Thank you"}


async def test_flaky_goes_on_once_its_page_is_repaired(client: Client, flaky: list[dict[str, Any]]) -> None:
    run = flaky.pop()
    assert run["status"] == "failed", run
    run_id = run["run_id"]
    code = "document.querySelector('#send').textContent = 'Submit'"
    await call(client, "exec_js", run_id=run_id, code=code, mode="write")
    counted = await call(client, "exec_js", run_id=run_id, code="document.querySelector('#n').value")
    assert counted["value"] == "1"

    run = await ended(client, await call(client, "resume", run_id=run_id))

    assert run["output"] == {"visitor": 1, "answer": "Thank you"}
