"""Waits through the tools: what is listed, the literal calls that answer, and what bad input gets."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from clients import call, ids, refusal, stop, stopped
from mcp import Client

from mcp_flow import config, presence
from mcp_flow.server import build

WORKFLOWS = '''
from mcp_flow import Flow, Retriable, workflow


@workflow
async def ask(flow: Flow) -> str:
    """Ask for a word."""
    return await flow.ask("Which word?", str, expires=3600)


@workflow
async def judge(flow: Flow) -> bool:
    """Ask the agent."""
    return await flow.ask("Is it good?", bool, by="agent")


@workflow
async def pay(flow: Flow) -> str:
    """Ask for an approval."""
    return str((await flow.approve("Pay 7?", data={"total": 7})).by)


@workflow
async def look(flow: Flow) -> str:
    """Stop at a breakpoint."""
    await flow.pause("look")
    return "seen"


@workflow
async def paid(flow: Flow, order: int = 1) -> int:
    """Wait for an event."""
    return (await flow.wait_for("paid", {"order": int, "amount": int}, match={"order": order})).amount


@workflow
async def nap(flow: Flow) -> str:
    """Sleep for a day."""
    await flow.sleep(86_400)
    return "awake"


@workflow
async def sign_in(flow: Flow) -> str:
    """A step that needs help."""

    def attempt() -> str:
        if flow.retry_input is None:
            raise Retriable("the site wants a code", ask={"code": int})
        return f"code {flow.retry_input['code']}"

    return await flow.step("sign in", attempt)


@workflow
async def send(flow: Flow) -> str:
    """A step that runs once, and fails."""
    return await flow.step("send letter", lambda: 1 // 0, once=True)


@workflow
async def three(flow: Flow) -> str:
    """Three steps."""
    return "".join([await flow.step(name, str, name) for name in "abc"])


@workflow
async def refuse(flow: Flow, why: str) -> None:
    """Fail."""
    raise ValueError(why)
'''


@pytest.fixture(scope="module")
async def client(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Client]:
    folder = tmp_path_factory.mktemp("waits")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(WORKFLOWS)
    settings = config.load(home=folder / "home", workflows=folder / "workflows")
    async with Client(build(settings)) as connected:
        connected.home = settings  # type: ignore[attr-defined]
        yield connected
    await stop(settings)


async def start(client: Client, workflow: str, **options: Any) -> dict[str, Any]:
    """A run of `workflow` that has got as far as it gets by itself."""
    run = await call(client, "start_run", workflow=workflow, wait_s=0, **options)
    while run["status"] in ("queued", "running") and "it is held" not in run.get("why", ""):
        run = await call(client, "get_run", run_id=run["run_id"], wait_s=0.2)
    return run


async def said(client: Client, literal: str) -> dict[str, Any]:
    """What the call answered that a row names, once its gaps are filled in."""
    text = literal.split(", or ")[0].split(") or ")[0].rstrip(")")
    name, _, arguments = text.partition("(")
    given = {
        word: json.loads(value) for word, value in re.findall(r'(\w+)=("[^"]*"|\{[^}]*\}|\S+?)(?:, |$)', arguments)
    }
    return await call(client, name, **given)


async def test_every_open_request_is_listed_oldest_first_with_the_call_that_answers_it(client: Client) -> None:
    names = ("ask", "judge", "pay", "look", "sign_in", "send")
    runs = {name: await start(client, name) for name in names}
    rows = (await call(client, "list_pending"))["requests"]
    assert [row["run_id"] for row in rows] == ids(runs.values())
    assert [row["kind"] for row in rows] == ["input", "input", "approval", "pause", "input", "in-doubt"]
    assert [row["opened_at"] for row in rows] == sorted(row["opened_at"] for row in rows)
    ask, judge, pay, _, sign_in, send = rows
    assert {"request_id", "kind", "prompt", "step", "schema", "by", "opened_at", "expires", "answer", "run_id",
            "workflow", "age_s", "left_s"} == set(ask)  # fmt: skip
    assert (ask["step"], ask["prompt"], ask["by"], ask["workflow"]) == ("Which word?#1", "Which word?", "anyone", "ask")
    assert 0 <= ask["age_s"] < 60
    assert 3500 < ask["left_s"] <= 3600
    assert judge["by"] == "agent"
    assert pay["data"] == {"total": 7}
    assert (sign_in["step"], sign_in["schema"]["required"]) == ("sign in#1", ["code"])
    assert re.match(r"it started at 2\S+Z and raised ZeroDivisionError", send["data"])

    # Each literal call answers its own row, with its gaps filled in.
    filled = {"ask": ('"…"', '"tea"'), "judge": ("true", "true"), "sign_in": ('"code": …', '"code": 7'),
              "send": ('value=…', 'value="sent"'), "pay": ("", ""), "look": ("", "")}  # fmt: skip
    outputs = {}
    for row, name in zip(rows, names, strict=True):
        run = await stopped(client, await said(client, row["answer"].replace(*filled[name])))
        outputs[name] = run.get("output", run)
    assert outputs == {
        "ask": "tea", "judge": True, "pay": "agent", "look": "seen", "sign_in": "code 7", "send": "sent",
    }  # fmt: skip


async def test_timers_and_events_are_listed_only_when_asked_for_and_answered_by_their_calls(client: Client) -> None:
    nap, paid = await start(client, "nap"), await start(client, "paid")
    assert (await call(client, "list_pending"))["requests"] == []
    [timer] = (await call(client, "list_pending", kind="timer"))["requests"]
    [event] = (await call(client, "list_pending", kind="event", run_id=paid["run_id"]))["requests"]
    assert timer["prompt"] == "sleep for 86400 s"
    assert timer["left_s"] > 86_000
    assert (await call(client, "list_pending", kind="event", run_id=nap["run_id"]))["requests"] == []
    assert (await stopped(client, await said(client, timer["answer"])))["output"] == "awake"
    filled = event["answer"].replace("payload=…", 'payload={"order": 1, "amount": 5}')
    assert (await said(client, filled))["taken_by"] == [paid["run_id"]]
    assert (await stopped(client, await call(client, "get_run", run_id=paid["run_id"])))["output"] == 5


async def test_a_step_that_needs_help_shows_its_error_and_goes_on_with_or_without_a_value(client: Client) -> None:
    run = await start(client, "sign_in")
    assert run["status"] == "waiting-input"
    assert (run["error"]["type"], run["error"]["step"]) == ("Retriable", "sign in")
    assert run["next"].endswith('value={"code": …}), or without a value')
    assert "- code: " in await refusal(client, "resume", run_id=run["run_id"], value={"code": "x"})
    again = await stopped(client, await call(client, "resume", run_id=run["run_id"]))
    assert again["pending"][0]["request_id"] != run["pending"][0]["request_id"]
    done = await stopped(client, await call(client, "resume", run_id=run["run_id"], value={"code": 8}))
    assert done["output"] == "code 8"


async def test_a_run_is_held_stepped_through_and_given_a_number_of_steps(client: Client) -> None:
    run = await start(client, "three", hold=True, run_id="three-1")
    assert (run["status"], run["next"]) == ("queued", 'resume(run_id="three-1")')
    assert (await start(client, "three", hold=True, run_id="three-1"))["attempt"] == 0
    run = await stopped(client, await call(client, "resume", run_id="three-1", max_steps=2))
    assert run["status"] == "paused"
    shown = await call(client, "get_run", run_id="three-1")
    assert [(step["step"], step["status"]) for step in shown["steps"]] == [("a#1", "finished"), ("b#1", "finished")]
    assert (await stopped(client, await call(client, "resume", run_id="three-1")))["output"] == "abc"

    run = await start(client, "three", pause_before=["b"])
    assert run["pending"][0]["prompt"] == "before step 'b'"
    assert (await stopped(client, await call(client, "resume", run_id=run["run_id"])))["output"] == "abc"

    run = await start(client, "three", single_step=True)
    for name in "abc":
        assert run["pending"][0]["step"] == f"{name}#1"
        run = await stopped(client, await call(client, "resume", run_id=run["run_id"]))
    assert run["output"] == "abc"


async def test_an_event_is_sent_once_and_kept_for_a_run_that_does_not_wait_yet(client: Client) -> None:
    nobody = await call(client, "send_event", name="paid", payload={"order": 2, "amount": 5})
    assert nobody == {"event": "paid", "taken_by": [], "note": "no run waits for it; with a run_id it is kept",
                      "next": 'list_pending(kind="event")'}  # fmt: skip
    await start(client, "paid", input={"order": 2}, hold=True, run_id="paid-2")
    for note in ("keeps it until it waits for it", "sent before under this key"):
        kept = await call(
            client, "send_event", name="paid", payload={"order": 2, "amount": 5}, run_id="paid-2", key="k"
        )
        assert note in kept["note"]
    assert (await call(client, "get_run", run_id="paid-2"))["events_kept"] == ["paid"]
    assert (await stopped(client, await call(client, "resume", run_id="paid-2")))["output"] == 5
    assert "is finished" in await refusal(client, "send_event", name="paid", run_id="paid-2")
    assert "- name: " in await refusal(client, "send_event", name="x" * 201)
    assert "65536" in await refusal(client, "send_event", name="paid", payload="x" * 70_000)


async def test_the_runs_that_failed_or_are_in_doubt_are_found_by_their_reason(client: Client) -> None:
    for number in range(3):
        await start(client, "refuse", input={"why": f"auth token expired {number}"}, run_id=f"f-{number}")
        await start(client, "refuse", input={"why": "the shop is closed"})
        await start(client, "send", run_id=f"auth-doubt-{number}")
    found, cursor = [], None
    while not found or cursor:
        more = {"cursor": cursor} if cursor else {}
        page = await call(client, "list_runs", status=["failed", "in-doubt"], query="auth", limit=4, **more)
        assert len(page["runs"]) == (4 if not cursor else 2)
        found += page["runs"]
        cursor = page.get("cursor")
    assert ids(found) == [f"{name}-{number}" for number in (2, 1, 0) for name in ("auth-doubt", "f")]
    assert {row["status"] for row in found} == {"failed", "in-doubt"}
    counts = await call(client, "list_pending", kind="in-doubt", limit=2)
    assert (counts["in_doubt"], len(counts["requests"]), "cursor" in counts) == (3, 2, True)
    for row in found:
        await call(client, "cancel", run_id=row["run_id"], reason="seen")


async def test_pages_of_running_or_interrupted_runs_are_full(tmp_path: Path) -> None:
    from mcp_flow import events as ev
    from mcp_flow.store import Store

    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows", take_up=False)
    created = ev.RunCreated(workflow="w", function="w", root="/", entry="w.py", revision="r")
    lock = presence.LifeLock(settings, "w-alive")
    async with Store(settings, "test") as store:
        for number in range(6):
            await store.create(f"r-{number}", created, owner="w-alive" if number % 2 else "w-dead")
    async with Client(build(settings)) as client:
        for word, numbers in (("running", (5, 3, 1)), ("interrupted", (4, 2, 0))):
            first = await call(client, "list_runs", status=[word], limit=2)
            rest = await call(client, "list_runs", status=[word], limit=2, cursor=first["cursor"])
            assert ids(first["runs"] + rest["runs"]) == [f"r-{number}" for number in numbers]
            assert {row["status"] for row in first["runs"] + rest["runs"]} == {word}
            assert "cursor" not in rest
        both = await call(client, "list_runs", status=["running", "interrupted"])
        assert [row["status"] for row in both["runs"]] == ["running", "interrupted"] * 3
    lock.release()
