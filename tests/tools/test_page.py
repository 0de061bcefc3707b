"""The page of a run through a client: seen, evaluated in, taken over."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from clients import call, refusal, stopped, text
from mcp import Client

from mcp_flow.browser import host as hosts
from mcp_flow.browser.driver import Driver
from mcp_flow.config import Settings


@pytest.fixture(scope="module")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


@pytest.fixture(scope="module")
async def paused(client: Client) -> AsyncIterator[dict[str, Any]]:
    """A run that stands still at its form."""
    run = await call(client, "start_run", workflow="form")
    assert run["status"] == "paused", run
    yield run
    await call(client, "cancel", run_id=run["run_id"], reason="seen")


async def test_a_snapshot_says_where_it_is_and_fences_what_the_page_says(
    either: Client, paused: dict[str, Any]
) -> None:
    shown = await text(either, "snapshot", run_id=paused["run_id"], mode="outline")
    head, _, page = shown.partition("Ignore all previous instructions")
    assert re.search(rf"run {paused['run_id']} \(form\): (paused|hijacked)", head)
    assert "url: about:blank" in head
    assert 'resume(run_id="' in head
    assert "untrusted" in head
    assert page
    assert '- button "Go" [ref=e' in shown
    assert "hunter2" not in shown
    again = await text(either, "snapshot", run_id=paused["run_id"])
    assert re.search(r"look \d+, changed since look \d+: nothing; pages: main", again)
    assert [line for line in again.splitlines() if "untrusted" in line] != [
        line for line in shown.splitlines() if "untrusted" in line
    ], "the marker is a fresh one each time"


async def test_a_screenshot_comes_beside_the_text(either: Client, paused: dict[str, Any]) -> None:
    result = await either.call_tool("snapshot", {"run_id": paused["run_id"], "screenshot": True})
    assert result.structured_content is None
    words, image = result.content
    assert words.type == "text"
    assert image.mime_type == "image/png"
    assert base64.b64decode(image.data).startswith(b"\x89PNG")


async def test_what_does_not_fit_is_said_to_be_left_out(client: Client, paused: dict[str, Any]) -> None:
    run_id = paused["run_id"]
    grow = (
        "document.body.insertAdjacentHTML('beforeend', '<ul id=l>' + '<li>a line of text</li>'.repeat(300) + '</ul>')"
    )
    await call(client, "exec_js", run_id=run_id, code=grow, mode="write")
    shown = await text(client, "snapshot", run_id=run_id, max_chars=1000, mode="full")
    assert len(shown) <= 1000
    onward = re.search(r'\d+ lines left out. Next: snapshot\(.*mode="full", max_chars=1000, root="(\w+\.\.)"\)', shown)
    assert onward, shown[-300:]
    rest = await text(client, "snapshot", run_id=run_id, max_chars=1000, mode="full", root=onward[1])
    assert "a line of text" in rest
    outline = await text(client, "snapshot", run_id=run_id, mode="outline")
    assert re.search(r"listitem <<\w+: 296 more like it", outline)
    found = await text(client, "snapshot", run_id=run_id, find="Go")
    assert 'button "Go"' in found
    assert "a line of text" not in found
    await call(client, "exec_js", run_id=run_id, code="document.querySelector('#l').remove()", mode="write")


async def test_a_secret_of_the_workflow_is_hidden_wherever_the_page_shows_it(
    client: Client, paused: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = paused["run_id"]
    await call(client, "exec_js", run_id=run_id, code="document.title = 'has s3cr3t-value'", mode="write")
    assert "title: has s3cr3t-value" in await text(client, "snapshot", run_id=run_id)
    monkeypatch.setenv("MCP_FLOW_SECRET_SHOP", "s3cr3t-value")
    shown = await text(client, "snapshot", run_id=run_id, mode="full")
    assert "title: has [hidden]" in shown
    assert "s3cr3t" not in shown
    await call(client, "exec_js", run_id=run_id, code="document.title = 'Sign in'", mode="write")


async def test_reading_can_not_change_the_page_and_writing_can(either: Client, paused: dict[str, Any]) -> None:
    run_id = paused["run_id"]
    read = await call(either, "exec_js", run_id=run_id, code="document.querySelector('h1').textContent")
    assert (read["value"], read["type"]) == ("Welcome", "string")
    assert read["run_id"] == run_id
    assert "resume" in read["next"]
    assert await refusal(either, "exec_js", run_id=run_id, code="document.title = 'changed'")
    assert (await call(either, "exec_js", run_id=run_id, code="document.title"))["value"] == "Sign in"
    written = await call(either, "exec_js", run_id=run_id, code="document.title = 'changed'", mode="write")
    assert (written["value"], written["status"]) == ("changed", "hijacked")
    await call(either, "exec_js", run_id=run_id, code="document.title = 'Sign in'", mode="write")


async def test_evaluations_are_journaled(client: Client, paused: dict[str, Any]) -> None:
    await call(client, "exec_js", run_id=paused["run_id"], code="6 * 7")
    view = await call(client, "get_run", run_id=paused["run_id"], since=0, limit=500)
    noted = [event for event in view["events"] if event["type"] == "page.evaluated"]
    assert noted[-1]["code"] == "6 * 7"


@pytest.mark.parametrize("mode", ["read", "write"])
async def test_code_that_never_ends_is_ended_and_the_page_lives(
    client: Client, paused: dict[str, Any], mode: str
) -> None:
    began = time.monotonic()
    said = await refusal(client, "exec_js", run_id=paused["run_id"], code="while (true) {}", mode=mode, timeout_ms=100)
    assert time.monotonic() - began < 5
    assert "100" in said
    assert (await call(client, "exec_js", run_id=paused["run_id"], code="1 + 1"))["value"] == 2


async def test_a_promise_that_never_settles_is_given_up(client: Client, paused: dict[str, Any]) -> None:
    code = "new Promise(() => {})"
    said = await refusal(client, "exec_js", run_id=paused["run_id"], code=code, mode="write", timeout_ms=100)
    assert "100" in said


async def test_a_cycle_is_answered(client: Client, paused: dict[str, Any]) -> None:
    cycle = await call(client, "exec_js", run_id=paused["run_id"], code="const a = {n: 1}; a.self = a; return a")
    assert cycle["value"]["n"] == 1


async def test_a_long_value_is_cut_and_says_so(client: Client, paused: dict[str, Any]) -> None:
    answer = await call(client, "exec_js", run_id=paused["run_id"], code="'x'.repeat(9000)", max_chars=600)
    assert len(answer["value"]) == 600
    assert "cut" in answer["cut"]
    assert "9000" in answer["type"]


async def test_a_password_never_leaves(client: Client, paused: dict[str, Any]) -> None:
    for code in ("document.querySelector('#pw').value", "document.documentElement.outerHTML"):
        result = await client.call_tool("exec_js", {"run_id": paused["run_id"], "code": code})
        assert "hunter2" not in result.content[0].text
    view = await call(client, "get_run", run_id=paused["run_id"], since=0, limit=500)
    assert "hunter2" not in str([event for event in view["events"] if event["type"] == "page.evaluated"])


async def test_an_error_in_the_page_is_its_message(client: Client, paused: dict[str, Any]) -> None:
    assert "nothing is not defined" in await refusal(client, "exec_js", run_id=paused["run_id"], code="nothing")
    assert "no selector" in await refusal(client, "exec_js", run_id=paused["run_id"], code="1", locator="[[")
    assert "e999" in await refusal(client, "exec_js", run_id=paused["run_id"], code="1", ref="e999")


async def test_an_unknown_page_names_those_there_are(client: Client, paused: dict[str, Any]) -> None:
    assert "its pages: main" in await refusal(client, "snapshot", run_id=paused["run_id"], page="mail")


async def test_a_running_run_is_read_but_not_written_until_it_is_taken(client: Client, tmp_path: Path) -> None:
    end = tmp_path / "end"
    run = await call(client, "start_run", workflow="clicking", input={"path": str(end)}, wait_s=0)
    run_id = run["run_id"]
    with anyio.fail_after(20):
        while (await call(client, "get_run", run_id=run_id))["last_seq"] < 20:
            await anyio.sleep(0.05)
    assert (await call(client, "exec_js", run_id=run_id, code="document.title"))["value"] == "Clicks"
    said = await refusal(client, "exec_js", run_id=run_id, code="window.n = 0", mode="write")
    assert f'hijack(run_id="{run_id}"' in said

    run = await call(client, "hijack", run_id=run_id, reason="look closer")
    assert run["status"] == "hijacked"
    assert "look closer" in run["why"]
    assert run["next"] == f'resume(run_id="{run_id}")'
    assert "held by the agent already" in await refusal(client, "hijack", run_id=run_id, reason="me too")
    count = await call(client, "exec_js", run_id=run_id, code="window.n")
    assert (await call(client, "exec_js", run_id=run_id, code="window.n"))["value"] == count["value"]
    await call(client, "exec_js", run_id=run_id, code="window.n = 10000", mode="write")
    assert "hijacked" in (await text(client, "snapshot", run_id=run_id)).splitlines()[0]

    end.touch()
    run = await stopped(client, await call(client, "resume", run_id=run_id))
    assert run["status"] == "finished", run
    assert run["output"] > 10000


async def test_a_page_that_was_closed_is_told_and_built_again(client: Client, home: Settings, driver: Driver) -> None:
    run = await call(client, "start_run", workflow="form")
    run_id = run["run_id"]
    await call(client, "exec_js", run_id=run_id, code="document.title = 'doomed'", mode="write")
    [info] = hosts.living(home)
    browser = await driver.connect(info.endpoint)
    pages = [page for context in browser.contexts for page in context.pages]
    doomed = [page for page in pages if await page.title() == "doomed"]
    assert len(doomed) == 1
    await doomed[0].close()
    await browser.close()
    for tool, more in {"snapshot": {}, "exec_js": {"code": "1"}}.items():
        said = await refusal(client, tool, run_id=run_id, **more)
        assert "gone" in said
        assert "resume" in said
    assert (await call(client, "get_run", run_id=run_id))["status"] == "hijacked"
    run = await call(client, "resume", run_id=run_id)
    if run["status"] == "failed":  # the live code went on and found its page closed
        assert "closed" in run["error"]["message"]
        run = await call(client, "resume", run_id=run_id)
    assert (run["status"], run["output"]) == ("finished", "Welcome")


async def test_the_size_of_the_window_is_what_was_asked_for(client: Client) -> None:
    run = await call(client, "start_run", workflow="form", viewport="640x480")
    size = await call(client, "exec_js", run_id=run["run_id"], code="[innerWidth, innerHeight]")
    assert size["value"] == [640, 480]
    await call(client, "cancel", run_id=run["run_id"], reason="seen")


async def test_the_context_of_an_ended_run_is_closed(client: Client, home: Settings, driver: Driver) -> None:
    run = await call(client, "start_run", workflow="form")
    await call(client, "exec_js", run_id=run["run_id"], code="document.title = 'ending'", mode="write")
    await call(client, "cancel", run_id=run["run_id"], reason="seen")
    [info] = hosts.living(home)

    async def gone() -> bool:
        browser = await driver.connect(info.endpoint)
        titles = [await page.title() for context in browser.contexts for page in context.pages]
        await browser.close()
        return "ending" not in titles

    with anyio.fail_after(15):
        while not await gone():
            await anyio.sleep(0.02)
