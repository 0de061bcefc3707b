"""The server as a client starts it: a process of its own that speaks over its pipes and is ended from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from clients import MODES, call, ended, refusal, stop, stopped, text, until
from mcp import Client, StdioServerParameters

from mcp_flow import config, presence
from mcp_flow.app import open_app
from mcp_flow.browser import host as hosts
from mcp_flow.config import Settings
from mcp_flow.server import AWAKE_SECONDS, Opening, build

SOURCE = '''
import asyncio
import sys
from pathlib import Path

from mcp_flow import Flow, workflow

print("at import")


@workflow
async def talks(flow: Flow) -> int:
    """Print while it runs."""
    print("from the workflow")
    sys.stdout.flush()
    await flow.approve("Go on?", data={"n": 1})
    return await flow.step("print", lambda: print("from a step") or 3)


@workflow
async def gate(flow: Flow, path: str) -> str:
    """Run until a file is there."""
    await flow.step("begin", Path(path + ".begun").touch)
    await flow.step("wait", wait_for, path)
    return "open"


async def wait_for(path: str) -> None:
    while not Path(path).exists():
        await asyncio.sleep(0.02)


@workflow
async def shows(flow: Flow) -> str:
    """Show a page, and stop."""
    page = await flow.page()
    await flow.step("open", page.set_content, "<title>Here</title><input id=q>")
    await flow.pause("look")
    return await page.title()


@workflow
async def nap(flow: Flow, seconds: float) -> None:
    """Sleep for a while."""
    await flow.sleep(seconds)
'''


@pytest.fixture(scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "workflows").mkdir()
    (folder / "workflows" / "flows.py").write_text(SOURCE)
    settings = config.load(home=folder / "home", workflows=folder / "workflows")
    yield settings
    await stop(settings)


def parameters(settings: Settings) -> StdioServerParameters:
    arguments = ["-m", "mcp_flow", "serve", "--home", str(settings.home), "--workflows", str(settings.workflows)]
    return StdioServerParameters(command=sys.executable, args=arguments, env=dict(os.environ))


async def test_a_server_that_nobody_calls_keeps_timers(home: Settings) -> None:
    async with open_app(home, "test") as app:
        await app.control.start("nap", {"seconds": 1.5}, run_id="nap")
        await app.control.wait("nap", 0)
        with anyio.fail_after(20):
            while (await app.control.run("nap")).status != "waiting-timer":
                await app.control.wait("nap", 0.05)
        presence.stop_workers(home)
        async with Client(build(home)):
            with anyio.fail_after(20):
                while not (run := await app.store.run("nap")).ended:
                    await anyio.sleep(0.05)
    assert run.status == "finished"


async def test_a_server_that_nobody_calls_makes_no_files_where_there_are_no_runs(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")
    opening = Opening(settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opening.serve)
        with anyio.move_on_after(2 * AWAKE_SECONDS):
            await opening._opened.wait()
        assert not settings.home.exists()
        assert (await opening.app()).settings is settings
        tasks.cancel_scope.cancel()


class Pipes:
    """A server spoken to line by line, so that everything it says is seen."""

    def __init__(self, settings: Settings) -> None:
        server = parameters(settings)
        self.process = subprocess.Popen(
            [server.command, *server.args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.said: list[dict[str, Any]] = []
        about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
        self.initialized = self.request("initialize", about)["result"]
        self.send({"method": "notifications/initialized"})

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0"} | message).encode() + b"\n")
        self.process.stdin.flush()

    def request(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request; every line until then must be a JSON-RPC message."""
        number = len(self.said) + 1
        self.send({"id": number, "method": method, "params": params})
        assert self.process.stdout
        while line := self.process.stdout.readline():
            message = json.loads(line)
            assert message["jsonrpc"] == "2.0"
            self.said.append(message)
            if message.get("id") == number:
                return dict(message)
        raise AssertionError("the server ended")

    def tool(self, name: str, **arguments: Any) -> dict[str, Any]:
        return dict(self.request("tools/call", {"name": name, "arguments": arguments})["result"]["structuredContent"])

    def rest(self) -> bytes:
        """What it said after its last answer, once it has ended."""
        assert self.process.stdout
        return self.process.stdout.read()

    def __enter__(self) -> Pipes:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe
            pipe.close()


@pytest.mark.parametrize("mode", MODES)
async def test_a_client_of_either_era_connects_and_brings_a_run_to_its_end(home: Settings, mode: str) -> None:
    async with Client(parameters(home), mode=mode) as client:
        assert client.server_info is None or client.server_info.name == "mcp-flow"
        assert len((await client.list_tools()).tools) == 14
        run = await call(client, "start_run", workflow="talks")
        assert run["status"] == "waiting-approval"
        run = await call(client, "approve", request_id=run["pending"][0]["request_id"])
        assert (run["status"], run["output"]) == ("finished", 3)
        run = await call(client, "start_run", workflow="shows")
        assert run["status"] == "paused"
        assert "title: Here" in await text(client, "snapshot", run_id=run["run_id"])
        run = await call(client, "resume", run_id=run["run_id"])
        assert run["output"] == "Here"
        assert "There is no workflow" in await refusal(client, "start_run", workflow="nothing")


async def test_nothing_but_protocol_goes_to_stdout(home: Settings) -> None:
    def talk() -> tuple[list[dict[str, Any]], bytes]:
        with Pipes(home) as server:
            assert server.initialized["serverInfo"]["name"] == "mcp-flow"
            assert server.tool("list_workflows")["workflows"]
            run = server.tool("start_run", workflow="talks")
            run = server.tool("approve", request_id=run["pending"][0]["request_id"])
            assert run["status"] == "finished"
            assert server.process.stdin
            server.process.stdin.close()
            assert ended(server.process) == 0
            return server.said, server.rest()

    said, rest = await anyio.to_thread.run_sync(talk)
    assert len(said) >= 4
    assert rest == b""


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.close()


ENDS: dict[str, Callable[[subprocess.Popen[bytes]], None]] = {
    "the end of input": _close_input,
    "SIGTERM": lambda process: process.send_signal(signal.SIGTERM),
    "SIGINT": lambda process: process.send_signal(signal.SIGINT),
}


@pytest.mark.parametrize(
    ("how", "busy"), [("the end of input", True), ("SIGTERM", True), ("SIGINT", True), ("SIGTERM", False)]
)
async def test_a_server_ends_quickly_and_its_run_goes_on(home: Settings, tmp_path: Path, how: str, busy: bool) -> None:
    gate = tmp_path / "gate"

    def begin() -> str:
        with Pipes(home) as server:
            run = server.tool("start_run", workflow="gate", input={"path": str(gate)}, wait_s=0)
            if busy:
                arguments = {"run_id": run["run_id"], "wait_s": 40}
                server.send({"id": 99, "method": "tools/call", "params": {"name": "get_run", "arguments": arguments}})
            ENDS[how](server.process)
            assert ended(server.process) == 0
            assert server.process.stderr
            assert b"Traceback" not in server.process.stderr.read()
            return str(run["run_id"])

    run_id = await anyio.to_thread.run_sync(begin)
    await until(Path(f"{gate}.begun").exists)
    gate.touch()
    async with Client(build(home)) as client:
        run = await call(client, "get_run", run_id=run_id, wait_s=20)
        assert (run["status"], run["output"], run["attempt"]) == ("finished", "open", 1)


async def test_servers_on_one_home_share_worker_and_browser(home: Settings) -> None:
    async with Client(parameters(home)) as one, Client(parameters(home)) as other:
        runs: dict[int, dict[str, Any]] = {}

        async def start(number: int, client: Client) -> None:
            runs[number] = await call(client, "start_run", workflow="shows")

        async with anyio.create_task_group() as tasks:
            for number, client in enumerate((one, other)):
                tasks.start_soon(start, number, client)
        assert [run["status"] for run in runs.values()] == ["paused", "paused"]
        assert len(presence.living(home)) == 1
        assert len(hosts.living(home)) == 1

        assert await text(other, "snapshot", run_id=runs[0]["run_id"])
        run = await call(other, "resume", run_id=runs[0]["run_id"])
        assert (await stopped(one, run))["status"] == "finished"
        assert (await call(one, "resume", run_id=runs[1]["run_id"]))["output"] == "Here"


async def test_a_run_that_nobody_owns_any_more_is_taken_up_by_a_new_server(home: Settings, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with Client(parameters(home)) as client:
        run = await call(client, "start_run", workflow="gate", input={"path": str(gate)}, wait_s=0)
        await until(Path(f"{gate}.begun").exists)
    for worker in presence.living(home):
        os.kill(int((home.home / "workers" / f"{worker}.lock").read_text()), signal.SIGKILL)
    gate.touch()
    async with Client(build(home)) as client:
        run = await stopped(client, await call(client, "get_run", run_id=run["run_id"], wait_s=20))
        assert (run["status"], run["attempt"]) == ("finished", 2)
