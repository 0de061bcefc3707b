"""Runs through a client: started, watched, listed, repaired and cancelled."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from clients import MODES, call, ids, refusal, stopped, until
from mcp import Client

from mcp_flow import app, presence
from mcp_flow.browser import host as hosts
from mcp_flow.catalog import Reader
from mcp_flow.config import Settings
from mcp_flow.server import build

GOOD = '''
from mcp_flow import Flow, workflow

print("a workflow that talks at import")

@workflow
async def good(flow: Flow) -> int:
    """Return one."""
    print("and when it runs")
    return await flow.step("one", lambda: 1)
'''
BROKEN = {
    "good.py": GOOD,
    "syntax.py": "from mcp_flow import workflow\n\n@workflow\nasync def syntax(flow:\n",
    "hangs.py": "import time\nfrom mcp_flow import workflow\ntime.sleep(60)\n",
    "exits.py": "import os\nfrom mcp_flow import workflow\nos._exit(3)\n",
    "raises.py": "from mcp_flow import workflow\nimport nowhere_to_be_found\n",
}


# --- workflows ---


async def test_broken_files_are_named_and_the_others_run(
    make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(app, "Reader", functools.partial(Reader, limit=1.0))
    settings = make(BROKEN)
    modern, legacy = (Client(build(settings), mode=mode) for mode in MODES)
    async with modern, legacy:
        # Each has a reader of its own, which waits for the file that hangs: both at once.
        async with anyio.create_task_group() as tasks:
            for client in (modern, legacy):
                tasks.start_soon(call, client, "list_workflows")
        for client in (modern, legacy):
            await see_broken_files_and_run_the_other(client)
    assert "talks" not in capfd.readouterr().out


async def see_broken_files_and_run_the_other(client: Client) -> None:
    listed = await call(client, "list_workflows")
    assert [workflow["name"] for workflow in listed["workflows"]] == ["good"]
    errors = {Path(broken["file"]).name: broken["error"] for broken in listed["broken"]}
    assert "SyntaxError" in errors["syntax.py"]
    assert "syntax.py:4" in errors["syntax.py"]
    assert "did not import within 1 s" in errors["hangs.py"]
    assert "hangs.py:3" in errors["hangs.py"]
    assert "status 3" in errors["exits.py"]
    assert "nowhere_to_be_found" in errors["raises.py"]

    run = await call(client, "start_run", workflow="good")
    assert (run["status"], run["output"]) == ("finished", 1)

    said = await refusal(client, "start_run", workflow="syntax")
    assert "Mend its file" in said
    assert "syntax.py:4" in said


async def test_a_listed_workflow_has_its_schema_file_and_line_and_alone_its_source(
    client: Client, home: Settings
) -> None:
    listed = (await call(client, "list_workflows"))["workflows"]
    order = next(workflow for workflow in listed if workflow["name"] == "order")
    assert order["input_schema"]["required"] == ["item"]
    assert order["description"] == "Order something once it is approved."
    lines = (home.workflows / "flows.py").read_text().splitlines()
    assert order["file"] == str(home.workflows / "flows.py")
    assert "async def order" in lines[order["line"] - 1] + lines[order["line"]]
    assert "warnings" not in order

    one = await call(client, "list_workflows", name="order")
    assert one["source"] == (home.workflows / "flows.py").read_text()
    assert one["steps"] == ["price"]


async def test_an_empty_folder_says_where_to_write_a_workflow(make: Callable[..., Settings]) -> None:
    settings = make({})
    async with Client(build(settings)) as client:
        listed = await call(client, "list_workflows")
        assert listed["workflows"] == []
        assert str(settings.workflows) in listed["next"]
        assert str(settings.workflows) in await refusal(client, "start_run", workflow="x")


# --- start and result ---


async def test_a_run_waits_for_its_approval_and_ends_with_its_typed_output(either: Client) -> None:
    run = await call(either, "start_run", workflow="order", input={"item": "pen", "quantity": 3})
    assert run["status"] == "waiting-approval"
    assert run["pending"][0]["data"] == {"total": 21}
    assert "output" not in run
    assert "error" not in run
    assert "page" not in run

    [request] = (await call(either, "list_pending", run_id=run["run_id"]))["requests"]
    assert request["prompt"] == "Pay 21?"
    assert request["request_id"] in run["next"]
    assert request["answer"] == run["next"]

    run = await call(either, "approve", request_id=request["request_id"])
    assert run["status"] == "finished"
    assert run["output"] == {"total": 21, "item": "pen"}
    assert run["next"] == "none: the run is finished"
    assert "pending" not in run


async def test_start_without_waiting_returns_at_once_and_the_run_goes_on(client: Client) -> None:
    run = await call(client, "start_run", workflow="many", wait_s=0)
    assert run["status"] in ("queued", "running")
    assert run["next"] == f'get_run(run_id="{run["run_id"]}", wait_s=20)'
    run = await stopped(client, run)
    assert run["output"] == 30


async def test_the_same_start_again_is_the_same_run(either: Client) -> None:
    given = {"workflow": "order", "input": {"item": "pen"}, "run_id": f"same-{either.protocol_version}"}
    first = await call(either, "start_run", **given)
    again = await call(either, "start_run", **given | {"input": {"item": "pen", "quantity": 1}})
    assert again["run_id"] == first["run_id"] == given["run_id"]
    assert again["pending"][0]["request_id"] == first["pending"][0]["request_id"]

    said = await refusal(either, "start_run", **given | {"input": {"item": "ink"}})
    assert given["run_id"] in said
    assert given["run_id"] in await refusal(either, "start_run", workflow="many", run_id=given["run_id"])
    await call(either, "cancel", run_id=given["run_id"], reason="seen")


async def test_the_same_start_again_finds_its_run_also_when_the_file_is_broken_by_then(
    client: Client, write: Callable[[str, str], Path]
) -> None:
    file = write("good.py", GOOD)
    assert (await call(client, "start_run", workflow="good", run_id="mine"))["output"] == 1
    file.write_text("@workflow\nasync def good(")
    assert (await call(client, "start_run", workflow="good", run_id="mine"))["output"] == 1
    assert "can't be read" in await refusal(client, "start_run", workflow="good", run_id="other")


async def test_wrong_input_names_every_field_before_anything_is_started(make: Callable[..., Settings]) -> None:
    settings = make({"buy.py": (Path(__file__).parents[2] / "examples" / "shop" / "buy.py").read_text()})
    async with Client(build(settings)) as client:
        bad = {"item": "", "quantity": 11, "url": "shop", "colour": "red"}
        said = await refusal(client, "start_run", workflow="buy", input=bad)
        assert all(f"- {name}: " in said for name in ("item", "quantity", "url")), said
        assert "- url: " in await refusal(client, "start_run", workflow="buy", input={"item": "x"})
        assert (await call(client, "list_runs"))["runs"] == []
    assert presence.living(settings) == set()
    assert hosts.living(settings) == []


@pytest.mark.parametrize("viewport", ["huge", "1x1", "100x100x100"])
async def test_a_viewport_is_two_sensible_sides(client: Client, viewport: str) -> None:
    assert "viewport" in await refusal(client, "start_run", workflow="many", viewport=viewport)


# --- watch ---


async def test_events_are_read_in_pages_and_nothing_is_left_out_in_silence(client: Client) -> None:
    run = await stopped(client, await call(client, "start_run", workflow="many"))
    run_id = run["run_id"]
    view = await call(client, "get_run", run_id=run_id, limit=5)
    assert [step["step"] for step in view["steps"]] == [f"step {number}#1" for number in range(25, 30)]
    assert "25 earlier steps are left out" in view["note"]

    seen: list[int] = []
    while not seen or seen[-1] < view["last_seq"]:
        page = await call(client, "get_run", run_id=run_id, since=seen[-1] if seen else 0, limit=40)
        assert 0 < len(page["events"]) <= 40
        assert len(page["steps"]) == 30
        seen += [event["seq"] for event in page["events"]]
        if seen[-1] < view["last_seq"]:
            assert f"since={seen[-1]}" in page["note"]
    assert seen == list(range(1, view["last_seq"] + 1))
    assert (await call(client, "get_run", run_id=run_id, since=view["last_seq"]))["events"] == []


async def test_progress_is_told_while_a_call_waits(either: Client, tmp_path: Path) -> None:
    told: list[str | None] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        told.append(message)
        (tmp_path / "open").touch()

    with anyio.fail_after(30):
        result = await either.call_tool(
            "start_run", {"workflow": "gate", "input": {"path": str(tmp_path / "open")}}, progress_callback=progress
        )
    assert result.structured_content["output"] == "open"
    assert told


async def test_a_client_that_gives_up_does_not_touch_the_run(either: Client, tmp_path: Path) -> None:
    run_id = f"giving-up-{either.protocol_version}"
    given = {"workflow": "gate", "input": {"path": str(tmp_path / "open")}, "run_id": run_id, "wait_s": 40}
    with anyio.fail_after(30):
        async with anyio.create_task_group() as waiting:
            waiting.start_soon(either.call_tool, "start_run", given)
            while not (await call(either, "list_runs", query=run_id, status=["running"]))["runs"]:
                await anyio.sleep(0.02)
            waiting.cancel_scope.cancel()
    assert waiting.cancel_scope.cancelled_caught
    run = await call(either, "get_run", run_id=run_id)
    assert run["status"] in ("queued", "running")
    (tmp_path / "open").touch()
    run = await call(either, "get_run", run_id=run_id, wait_s=30)
    assert (run["status"], run["attempt"]) == ("finished", 1)


async def test_the_registry_is_filtered_and_paged(client: Client) -> None:
    for number in range(5):
        await call(client, "start_run", workflow="boom" if number % 2 else "many", run_id=f"paged-{number}")
    every = await call(client, "list_runs", query="paged-")
    assert ids(every["runs"]) == [f"paged-{number}" for number in (4, 3, 2, 1, 0)]
    assert "cursor" not in every

    failed = await call(client, "list_runs", status=["failed"], query="paged-", workflow="boom")
    assert ids(failed["runs"]) == ["paged-3", "paged-1"]
    assert failed["runs"][0]["step"] == "second#1"
    assert failed["runs"][0]["why"].startswith("ZeroDivisionError at step second: ")
    found = await call(client, "list_runs", status=["failed", "in-doubt"], query="step SECOND")
    assert set(ids(failed["runs"])) <= set(ids(found["runs"]))

    first = await call(client, "list_runs", query="paged-", limit=2)
    assert 'query="paged-"' in first["next"]
    assert first["cursor"] in first["next"]
    second = await call(client, "list_runs", query="paged-", limit=2, cursor=first["cursor"])
    third = await call(client, "list_runs", query="paged-", limit=2, cursor=second["cursor"])
    assert ids(first["runs"] + second["runs"] + third["runs"]) == ids(every["runs"])
    assert "cursor" not in third

    assert "waiting-approval" in await refusal(client, "list_runs", status=["stuck"])
    for cursor in ("nonsense", "WyJhIiwgImIiXQ==", "e30=", "WyIxIiwgIjIiXQ=="):
        assert "is no cursor" in await refusal(client, "list_runs", cursor=cursor)


# --- go on, or not ---


async def test_a_failed_run_says_where_and_goes_on_with_the_mended_file(
    client: Client, write: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = """
from pathlib import Path
from mcp_flow import Flow, workflow

@workflow
async def mend(flow: Flow, path: str) -> int:
    count = await flow.step("count", lambda: Path(path).open("a").write("x"))
    return count + await flow.step("divide", lambda: 1 // 0)
"""
    file = write("mend.py", source)
    run = await call(client, "start_run", workflow="mend", input={"path": str(tmp_path / "count")})
    assert run["status"] == "failed"
    error = run["error"]
    assert (error["type"], error["step"], error["line"]) == ("ZeroDivisionError", "divide", 8)
    assert Path(error["file"]) == file
    assert "1 // 0" in error["source"]
    assert f'resume(run_id="{run["run_id"]}")' in run["next"]

    file.write_text(source.replace("1 //", "syntax error here"))
    said = await refusal(client, "resume", run_id=run["run_id"])
    assert "mend.py:8" in said
    assert (await call(client, "get_run", run_id=run["run_id"]))["status"] == "failed"

    file.write_text(source.replace("1 // 0", "41"))
    run = await call(client, "resume", run_id=run["run_id"])
    assert (run["status"], run["output"], run["attempt"]) == ("finished", 42, 2)
    assert (tmp_path / "count").read_text() == "x"


async def test_an_ended_run_is_not_changed_by_resume_and_says_so(either: Client) -> None:
    run = await stopped(either, await call(either, "start_run", workflow="many"))
    before = await call(either, "get_run", run_id=run["run_id"])
    again = await call(either, "resume", run_id=run["run_id"])
    assert again["note"] == f"Run {run['run_id']} is finished; there is nothing to resume."
    assert again["output"] == 30
    assert (await call(either, "get_run", run_id=run["run_id"]))["last_seq"] == before["last_seq"]
    assert "finished" in await refusal(either, "cancel", run_id=run["run_id"], reason="late")
    assert "finished" in await refusal(either, "hijack", run_id=run["run_id"], reason="late")
    assert "finished" in await refusal(either, "snapshot", run_id=run["run_id"])


async def test_cancel_withdraws_the_question_and_is_final(either: Client) -> None:
    run = await call(either, "start_run", workflow="order", input={"item": "pen"})
    request = run["pending"][0]["request_id"]
    run = await call(either, "cancel", run_id=run["run_id"], reason="changed my mind")
    assert run["status"] == "cancelled"
    assert run["why"] == "changed my mind"
    assert "pending" not in run
    assert "withdrawn" in await refusal(either, "approve", request_id=request)
    assert (await call(either, "cancel", run_id=run["run_id"], reason="again"))["status"] == "cancelled"
    assert "there is nothing to resume" in (await call(either, "resume", run_id=run["run_id"]))["note"]


async def test_cancel_ends_a_running_run(client: Client, tmp_path: Path) -> None:
    given = {"path": str(tmp_path / "never")}
    run = await call(client, "start_run", workflow="gate", input=given, wait_s=0)
    await call(client, "cancel", run_id=run["run_id"], reason="enough")
    assert (await call(client, "get_run", run_id=run["run_id"], wait_s=5))["status"] == "cancelled"


async def test_a_run_that_was_to_be_taken_says_so_until_it_ends(client: Client, tmp_path: Path) -> None:
    run = await call(client, "start_run", workflow="gate", input={"path": str(tmp_path / "never")}, wait_s=0)
    run_id = run["run_id"]
    with anyio.fail_after(20):
        while "progress" not in await call(client, "get_run", run_id=run_id):
            await anyio.sleep(0.02)
    run = await call(client, "hijack", run_id=run_id, reason="look", wait_s=0)
    assert (run["status"], run["why"]) == ("running", "stops at its next action or step for the agent: look")
    run = await call(client, "cancel", run_id=run_id, reason="enough")
    assert (run["status"], run["why"]) == ("cancelled", "enough")
    assert "step" not in run


async def test_a_step_is_done_again_on_request(client: Client) -> None:
    run = await call(client, "start_run", workflow="boom")
    assert "no step 'third'" in await refusal(client, "resume", run_id=run["run_id"], rerun=["third"])
    run = await call(client, "resume", run_id=run["run_id"], rerun=["first"])
    view = await call(client, "get_run", run_id=run["run_id"], since=0)
    starts = [e["key"] for e in view["events"] if e["type"] == "step.started"]
    assert starts == ["first#1", "second#1", "first#1", "second#1"]


async def test_a_missing_browser_is_named_with_the_commands_and_the_run_goes_on_once_it_is_there(
    make: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, home: Settings
) -> None:
    monkeypatch.delenv("MCP_FLOW_BROWSER", raising=False)
    settings = make({}, browser="/nonexistent/chromium")
    shutil.copy(home.workflows / "flows.py", settings.workflows)
    async with Client(build(settings)) as client:
        run = await call(client, "start_run", workflow="form")
        assert run["status"] == "failed"
        assert run["error"]["type"] == "BrowserMissing"
        assert "/nonexistent/chromium" in run["error"]["message"]
        assert "mcp-flow browser" in run["error"]["message"] or "MCP_FLOW_BROWSER" in run["error"]["message"]
        assert "no page" in await refusal(client, "snapshot", run_id=run["run_id"])
    await anyio.to_thread.run_sync(presence.stop_workers, settings)

    async with Client(build(dataclasses.replace(settings, browser=None))) as client:
        run = await call(client, "resume", run_id=run["run_id"])
        assert run["status"] == "paused", run
        run = await call(client, "resume", run_id=run["run_id"])
        assert (run["status"], run["output"]) == ("finished", "Welcome")


async def test_a_run_with_a_window_says_what_it_lacks_where_there_is_no_display(client: Client) -> None:
    run = await call(client, "start_run", workflow="form", headless=False)
    assert (run["status"], run["error"]["type"]) == ("failed", "BrowserUnavailable")
    assert "headless=true" in run["error"]["message"]


async def test_a_home_that_can_not_be_used_is_an_answer_and_not_the_end(tmp_path: Path, home: Settings) -> None:
    (tmp_path / "file").write_text("not a folder")
    async with Client(build(dataclasses.replace(home, home=tmp_path / "file" / "home"))) as client:
        for _ in range(2):
            assert "--home" in await refusal(client, "list_runs")


async def test_a_workflow_that_blocks_its_loop_leaves_every_tool_answering(
    make: Callable[..., Settings], tmp_path: Path
) -> None:
    source = """
import time
from pathlib import Path
from mcp_flow import Flow, workflow

@workflow
async def blocks(flow: Flow, path: str) -> str:
    Path(path + ".begun").touch()
    end = time.monotonic() + 20
    while time.monotonic() < end and not Path(path).exists():
        time.sleep(0.02)
    return "done"
"""
    settings = make({"blocks.py": source})
    gate = tmp_path / "gate"
    async with Client(build(settings)) as client:
        run = await call(client, "start_run", workflow="blocks", input={"path": str(gate)}, wait_s=0)
        run_id = run["run_id"]
        await until(Path(f"{gate}.begun").exists)
        try:
            with anyio.fail_after(4):
                assert (await call(client, "get_run", run_id=run_id))["status"] == "running"
                assert ids((await call(client, "list_runs"))["runs"]) == [run_id]
                assert (await call(client, "list_workflows"))["workflows"]
                assert (await call(client, "list_pending"))["requests"] == []
                assert "no page" in await refusal(client, "snapshot", run_id=run_id)
                assert "no page" in await refusal(client, "exec_js", run_id=run_id, code="1")
                assert "Nothing changed" in (await call(client, "resume", run_id=run_id))["note"]
                other = await call(client, "start_run", workflow="blocks", input={"path": "x"}, wait_s=0)
                assert (await call(client, "cancel", run_id=other["run_id"], reason="r"))["status"] == "cancelled"
                await call(client, "hijack", run_id=run_id, reason="stop", wait_s=0)
        finally:
            gate.touch()
        run = await stopped(client, await call(client, "get_run", run_id=run_id, wait_s=10))
        if run["status"] == "hijacked":
            run = await call(client, "resume", run_id=run_id)
        assert run["output"] == "done"


async def test_results_are_compact_and_hold_no_empty_fields(client: Client) -> None:
    result = await client.call_tool("start_run", {"workflow": "many"})
    said = result.content[0].text
    assert said == json.dumps(json.loads(said), separators=(",", ":"), ensure_ascii=False)
    assert not [name for name, value in result.structured_content.items() if value in (None, [], {})]
    assert os.path.isabs(result.structured_content["folder"])
