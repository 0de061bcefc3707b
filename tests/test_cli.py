"""The commands as a person types them."""

from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from typing import Any

import anyio
import anyio.to_thread
import pytest
from click.testing import CliRunner
from clients import call, processes, stop, until
from mcp import Client

from mcp_flow import config, presence
from mcp_flow.app import open_app
from mcp_flow.cli import main
from mcp_flow.config import Settings
from mcp_flow.server import build

SOURCE = '''
from mcp_flow import Flow, workflow


@workflow
async def order(flow: Flow) -> str:
    """Ask anyone."""
    await flow.step("first", lambda: 1)
    await flow.approve("Pay 7?", data={"total": 7})
    return "paid"


@workflow
async def guarded(flow: Flow) -> str:
    """Ask a person."""
    decision = await flow.approve("Really?", by="human", on_deny="return")
    return "yes" if decision else f"no: {decision.note}"


@workflow
async def named(flow: Flow) -> str:
    """Ask a person for a name."""
    return await flow.ask("Your name?", str, by="human")


@workflow
async def word(flow: Flow) -> str:
    """Ask anyone for a word."""
    return await flow.ask("Which word?", str)


@workflow
async def counted(flow: Flow) -> int:
    """Ask anyone for a number."""
    return await flow.ask("How many?", int)


@workflow
async def shows(flow: Flow) -> str:
    """Show a page, and stop."""
    page = await flow.page()
    await flow.step("open", page.set_content, "<title>Here</title>", restore=True)
    await flow.pause("look")
    return await page.title()


@workflow
async def nap(flow: Flow) -> None:
    """Sleep for a moment."""
    await flow.sleep(0.5)
'''

# Processes are told by their command and their environment here.
OWN_IMPORTS = True


@pytest.fixture(scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(SOURCE)
    settings = config.load(home=folder / "home", workflows=folder / "workflows")
    yield settings
    await stop(settings)


@pytest.fixture(scope="module")
async def client(home: Settings) -> AsyncIterator[Client]:
    async with Client(build(home)) as connected:
        yield connected


async def typed(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command without a terminal, in a process of its own."""
    command = [sys.executable, "-m", "mcp_flow", *arguments]
    environment = settings.environment() | dict(os.environ) | {"COLUMNS": "200"}
    return await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment, stdin=subprocess.DEVNULL
        )
    )


async def invoked(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command without a terminal, in a thread of this process: what it says and how it ends, without its start."""
    environment = settings.environment() | {"COLUMNS": "200"}
    result = await anyio.to_thread.run_sync(lambda: CliRunner().invoke(main, arguments, env=environment))
    # A process would show a traceback for any other exception.
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


async def at_terminal(settings: Settings, *arguments: str) -> tuple[int, str]:
    """A command at a terminal of its own."""

    def run() -> tuple[int, str]:
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.update(settings.environment())
            os.execv(sys.executable, [sys.executable, "-m", "mcp_flow", *arguments])
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # the terminal is closed with its process
            pass
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown.decode()

    return await anyio.to_thread.run_sync(run)


async def test_whoever_lists_the_runs_has_those_go_on_that_nobody_has(home: Settings) -> None:
    async with open_app(home, "test") as app:
        run_id = await app.control.start("nap", {})
        with anyio.fail_after(30):
            while (await app.store.run(run_id)).status != "waiting-timer":
                await app.control.wait(run_id, 0.05)
            await anyio.to_thread.run_sync(presence.stop_workers, home)
            while not (run := await app.store.run(run_id)).ended:
                assert run_id in (await invoked(home, "runs")).stdout
    assert run.status == "finished"


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr


async def test_runs_and_show_tell_what_the_tools_tell(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="order", run_id="told")
    listed = await typed(home, "runs")
    line = next(line for line in listed.stdout.splitlines() if "told" in line)
    assert "waiting-approval" in line
    assert "Pay 7?" in line
    assert "told" not in (await invoked(home, "runs", "--status", "failed")).stdout

    shown = json.loads((await typed(home, "show", "told", "--events")).stdout)
    assert {name: shown[name] for name in ("status", "next", "pending", "folder")} == {
        name: run[name] for name in ("status", "next", "pending", "folder")
    }
    assert [step["step"] for step in shown["steps"]] == ["first#1"]
    assert shown["events"][0]["type"] == "run.created"

    done = await typed(home, "approve", run["pending"][0]["request_id"])
    assert done.stdout == "Approved; run told goes on.\n"
    assert (await call(client, "get_run", run_id="told", wait_s=20))["output"] == "paid"


async def test_a_person_decides_at_a_terminal_and_nobody_without_one(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="guarded")
    request = run["pending"][0]["request_id"]
    refused(await invoked(home, "approve", request), "Only a person", request)
    assert (await call(client, "get_run", run_id=run["run_id"]))["status"] == "waiting-approval"

    status, shown = await at_terminal(home, "approve", request)
    assert (status, "Approved" in shown) == (0, True), shown
    run = await call(client, "get_run", run_id=run["run_id"], wait_s=20, since=0)
    assert run["output"] == "yes"
    [decided] = [event for event in run["events"] if event["type"] == "request.answered"]
    assert decided["via"] == "terminal"


async def test_a_person_denies_with_a_note(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="guarded")
    request = run["pending"][0]["request_id"]
    status, shown = await at_terminal(home, "approve", request, "--deny", "--note", "not today")
    assert (status, "Denied" in shown) == (0, True), shown
    assert (await call(client, "get_run", run_id=run["run_id"], wait_s=20))["output"] == "no: not today"


async def test_a_person_answers_with_plain_text(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="named")
    request = run["pending"][0]["request_id"]
    refused(await invoked(home, "answer", request, "Eve"), "Only a person")
    status, shown = await at_terminal(home, "answer", request, "Ada")
    assert (status, "Answered" in shown) == (0, True), shown
    assert (await call(client, "get_run", run_id=run["run_id"], wait_s=20))["output"] == "Ada"


@pytest.mark.parametrize(
    ("workflow", "given", "taken"), [("word", "42", "42"), ("word", '"Ada"', "Ada"), ("counted", "42", 42)]
)
async def test_an_answer_is_read_as_its_question_wants_it(
    home: Settings, client: Client, workflow: str, given: str, taken: str | int
) -> None:
    run = await call(client, "start_run", workflow=workflow)
    done = await invoked(home, "answer", run["pending"][0]["request_id"], given)
    assert done.returncode == 0, done
    assert (await call(client, "get_run", run_id=run["run_id"], wait_s=20))["output"] == taken


async def test_cancel_stops_a_run_for_good(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="order")
    done = await typed(home, "cancel", run["run_id"], "--reason", "no money")
    assert done.stdout == f"Run {run['run_id']} is cancelled.\n"
    after = await call(client, "get_run", run_id=run["run_id"])
    assert (after["status"], after["why"]) == ("cancelled", "no money")


@pytest.mark.parametrize(
    "wrong",
    [
        ("show nobody", "Error: There is no run 'nobody'"),
        ("show ../x", "can't be a run id"),
        ("verify nobody", "There is no run 'nobody'"),
        ("approve nothing", "There is no request 'nothing'"),
        ("answer nothing 1", "There is no request 'nothing'"),
        ("cancel nobody", "There is no run 'nobody'"),
        ("runs --colour", "--colour"),
        ("runs --status stuck", "There is no status 'stuck'"),
        ("runs --viewport huge", "1366x768"),
        ("runs --home /proc/nowhere", "--home"),
        ("browser find --browser /nonexistent", "/nonexistent"),
    ],
    ids=lambda wrong: wrong[0],
)
async def test_what_is_wrong_is_told_in_one_line(home: Settings, wrong: tuple[str, str]) -> None:
    command, said = wrong
    refused(await invoked(home, *command.split()), said)


@pytest.mark.parametrize(
    ("command", "said"), [("show nobody", "Error: There is no run 'nobody'"), ("runs --colour", "--colour")]
)
async def test_a_process_that_is_asked_for_what_is_wrong_fails_without_a_traceback(
    home: Settings, command: str, said: str
) -> None:
    refused(await typed(home, *command.split()), said)


async def test_browser_find_names_the_browser(home: Settings) -> None:
    done = await typed(home, "browser", "find")
    assert done.returncode == 0
    assert done.stdout.startswith("Browser: ")


async def test_help_imports_neither_mcp_nor_playwright(home: Settings) -> None:
    code = (
        "import sys\nfrom mcp_flow.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'mcp', 'playwright', 'sqlite_utils', 'pydantic'} & set(sys.modules)))"
    )
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    )
    assert "serve" in done.stdout
    assert "approve" in done.stdout
    assert not {"'mcp'", "'playwright'"} & set(done.stdout.splitlines()[-1].strip("[]").split(", "))


async def views(client: Client) -> list[dict[str, Any]]:
    """What clients see of everything, ages aside."""
    seen = [
        await call(client, "list_runs", limit=200),
        await call(client, "list_pending"),
        *[
            await call(client, "get_run", run_id=row["run_id"], since=0)
            for row in (await call(client, "list_runs", limit=200))["runs"]
        ],
    ]
    for row in [*seen[0]["runs"], *seen[1]["requests"]]:
        del row["age_s"]
    return seen


async def test_every_projection_can_be_lost_and_made_anew(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="order")
    before = await views(client)
    with closing(sqlite3.connect(home.database)) as database, database:
        for view in ("runs", "steps", "requests"):
            database.execute(f"DROP VIEW IF EXISTS {view}")
        for table in ("run_rows", "request_rows"):
            database.execute(f"DROP TABLE {table}")
    done = await typed(home, "rebuild")
    assert (done.returncode, "Rebuilt the projections" in done.stdout) == (0, True), done
    assert await views(client) == before
    run = await call(client, "approve", request_id=run["pending"][0]["request_id"])
    assert (run["status"], run["output"]) == ("finished", "paid")


async def test_projections_that_lie_are_made_true_again(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="order")
    before = await views(client)
    with closing(sqlite3.connect(home.database)) as database, database:
        database.execute("UPDATE run_rows SET status = 'finished', workflow = 'other'")
        database.execute("DELETE FROM request_rows")
    assert (await invoked(home, "rebuild")).returncode == 0
    assert await views(client) == before
    await call(client, "cancel", run_id=run["run_id"], reason="seen")


async def test_verify_names_the_first_event_that_was_changed(home: Settings, client: Client) -> None:
    run = await call(client, "start_run", workflow="order", run_id="tampered")
    await call(client, "cancel", run_id="tampered", reason="seen")
    done = await typed(home, "verify", run["run_id"])
    assert (done.returncode, "the chain holds" in done.stdout) == (0, True)
    with closing(sqlite3.connect(home.database)) as database, database:
        changed = database.execute(
            "UPDATE events SET data = replace(data, 'Pay 7?', 'Pay 1?') WHERE type = 'request.opened' AND run ="
            " (SELECT no FROM journals WHERE run_id = 'tampered') RETURNING seq"
        ).fetchall()
    refused(await invoked(home, "verify", "tampered"), f"event {changed[0][0]} (request.opened) was changed")


async def test_stop_leaves_nothing_behind_and_runs_go_on_when_asked(
    home: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stop")
    settings = config.load(home=folder / "home", workflows=home.workflows)
    async with Client(build(settings)) as client:
        run = await call(client, "start_run", workflow="shows")
        assert run["status"] == "paused"
    scratch = {line for line in processes(settings.home) if "chrom" in line}
    assert scratch, "the browser runs"
    done = await typed(settings, "stop")
    assert done.stdout == "Ended 1 worker(s) and 1 browser host(s). Runs go on when something asks for them.\n"
    await until(lambda: not processes(settings.home), 5)
    assert (await invoked(settings, "stop")).stdout.startswith("Ended 0 worker(s) and 0 browser host(s).")
    async with Client(build(settings)) as client:
        assert (await call(client, "get_run", run_id=run["run_id"]))["status"] == "paused"
        run = await call(client, "resume", run_id=run["run_id"])
        assert (run["status"], run["output"]) == ("finished", "Here")
    await stop(settings)
    await until(lambda: not processes(settings.home), 5)
