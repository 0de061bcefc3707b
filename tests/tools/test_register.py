"""What a client learns when it connects, and how arguments are refused."""

from __future__ import annotations

import pytest
from clients import call, refusal
from mcp import Client

TOOLS = [
    "act", "approve", "cancel", "exec_js", "get_run", "hijack", "list_pending", "list_runs", "list_workflows", "resume",
    "save_workflow", "send_event", "snapshot", "start_run",
]  # fmt: skip


async def test_there_are_fourteen_tools_in_less_than_nine_thousand_bytes(either: Client) -> None:
    listed = await either.list_tools()
    assert sorted(tool.name for tool in listed.tools) == TOOLS
    assert len(listed.model_dump_json(by_alias=True, exclude_none=True).encode()) < 9000
    assert all(tool.description and tool.input_schema["additionalProperties"] is False for tool in listed.tools)


async def test_only_start_run_and_get_run_have_an_output_schema(either: Client) -> None:
    listed = await either.list_tools()
    schemas = {tool.name: tool.output_schema for tool in listed.tools if tool.output_schema}
    assert sorted(schemas) == ["get_run", "start_run"]
    assert {"run_id", "status", "next", "output", "error", "pending"} <= schemas["get_run"]["properties"].keys()


async def test_the_instructions_explain_every_status_in_less_than_two_kilobytes(either: Client) -> None:
    assert either.instructions
    assert len(either.instructions.encode()) < 2048
    for status in ("queued", "waiting-approval", "waiting-input", "in-doubt", "failed", "hijacked", "interrupted"):
        assert status in either.instructions


async def test_prompts_have_descriptions_and_arguments_and_are_filled_in(either: Client) -> None:
    listed = (await either.list_prompts()).prompts
    assert [prompt.name for prompt in listed] == ["repair-run", "resume-run", "write-workflow"]
    assert all(prompt.description and prompt.arguments for prompt in listed)
    assert [(a.name, a.required) for a in listed[0].arguments or []] == [("run_id", True)]

    rendered = await either.get_prompt("repair-run", {"run_id": "r-77"})
    shown = rendered.messages[0].content.text
    assert 'resume(run_id="r-77")' in shown
    assert "{run_id}" not in shown


async def test_unknown_arguments_are_refused_by_name(either: Client) -> None:
    said = await refusal(either, "get_run", run_id="x", run="y", wait=3)
    assert "- run: there is no such argument; the arguments: run_id, wait_s, since, limit" in said
    assert "- wait: there is no such argument" in said


async def test_a_refusal_has_one_line_for_each_bad_argument_and_no_address(client: Client) -> None:
    said = await refusal(client, "exec_js", code="1", mode="rw", timeout_ms=0)
    assert said.splitlines() == [
        "exec_js can't take these arguments; nothing was done.",
        "- run_id: it is required",
        "- mode: Input should be 'read' or 'write', not \"rw\"",
        "- timeout_ms: Input should be greater than or equal to 1, not 0",
    ]


async def test_a_condition_is_told_in_its_own_words_alone(either: Client) -> None:
    said = await refusal(either, "get_run", run_id="nobody")
    assert said.startswith("There is no run 'nobody'")


@pytest.mark.parametrize("id", ["../x", "a/b", "", ".hidden", "a\nb", "x" * 65])
async def test_an_id_is_never_a_path(client: Client, id: str) -> None:
    assert "can't be a run id" in await refusal(client, "get_run", run_id=id)
    assert "can't be a run id" in await refusal(client, "start_run", workflow="many", run_id=id)
    for tool, more in {"snapshot": {}, "resume": {}, "cancel": {"reason": "r"}, "hijack": {"reason": "r"}}.items():
        assert "run" in await refusal(client, tool, run_id=id, **more)


@pytest.mark.parametrize("name", ["../flows:many", "/etc/passwd", "a/../flows", "manny"])
async def test_a_workflow_name_is_never_a_path(client: Client, name: str) -> None:
    said = await refusal(client, "start_run", workflow=name)
    assert "There is no workflow" in said
    assert "many" in said


async def test_unknown_ids_say_where_to_look(either: Client) -> None:
    assert "list_runs()" in await refusal(either, "get_run", run_id="nobody")
    assert "list_pending()" in await refusal(either, "approve", request_id="nothing")
    assert "Known: " in await refusal(either, "list_workflows", name="nothing")


async def test_an_object_sent_as_text_is_understood(client: Client) -> None:
    run = await call(client, "start_run", workflow="order", input='{"item": "pen"}')
    assert run["status"] == "waiting-approval"
    await call(client, "cancel", run_id=run["run_id"], reason="seen")


async def test_a_text_answer_that_looks_like_json_stays_text(client: Client) -> None:
    for word in ("null", "[1]", "true"):
        run = await call(client, "start_run", workflow="word")
        assert (await call(client, "resume", run_id=run["run_id"], value=word))["output"] == word
