"""What a client waits for: the server's start, and a one-page run on warm processes, beside the bare libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from journal import WORKFLOWS, Row

from mcp_flow import config
from mcp_flow.config import Settings

PAGE = "data:text/html,<title>one</title><h1>One page</h1>"
BARE = """
from mcp.server import MCPServer

server = MCPServer("bare")


@server.tool()
async def add(a: int, b: int) -> int:
    return a + b


server.run("stdio")
"""
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "1"},
    },
}


def _command() -> list[str]:
    """`mcp-flow`, the one beside this Python."""
    script = Path(sys.executable).with_name("mcp-flow")
    return [str(script)] if script.exists() else [sys.executable, "-m", "mcp_flow"]


def _until_reply(command: list[str], environment: dict[str, str]) -> float:
    """Seconds from the start of a process to its reply to `initialize`."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(INITIALIZE).encode() + b"\n")
        process.stdin.flush()
        reply = json.loads(process.stdout.readline())
        seconds = time.perf_counter() - began
        if "serverInfo" not in reply.get("result", {}):
            raise RuntimeError(f"{command} replied {reply}")
        process.stdin.close()
        return seconds


async def bench_initialize(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """From process start to the `initialize` reply."""
    rounds = 1 if quick else 9
    settings = config.load(home=folder / "initialize", workflows=WORKFLOWS)
    script = folder / "bare.py"
    script.write_text(BARE)
    ours, bare = [*_command(), "serve"], [sys.executable, str(script)]
    environment = os.environ | settings.environment()
    if not quick:  # what is in the file cache, and compiled, is so for both
        _until_reply(bare, environment)
        _until_reply(ours, environment)
    pairs = [(_until_reply(bare, environment), _until_reply(ours, environment)) for _ in range(rounds)]
    floor, measured = (median(column) for column in zip(*pairs, strict=True))
    ratio = median(mine / floor_ for floor_, mine in pairs)
    if profile:
        command = [sys.executable, "-X", "importtime", "-c", "import mcp_flow.cli, mcp_flow.server"]
        timed = (await anyio.run_process(command)).stderr.decode()
        lines = [line for line in timed.splitlines() if line[12:22].strip().isdigit()]
        print("\n--- slowest imports of the server (own µs | with what they import) ---")
        print("\n".join(sorted(lines, key=lambda line: int(line.split("|")[1]))[-40:]))
    return [
        Row(
            "process start to initialize reply",
            f"{measured * 1000:.0f} ms",
            f"{floor * 1000:.0f} ms: bare MCPServer",
            f"{ratio:.2f}x",
            "< 1.15x",
            ratio < 1.15,
        )
    ], {}


async def bench_page(folder: Path, quick: bool, profile: bool) -> tuple[list[Row], dict[str, Any]]:
    """A one-page run through a client, on a host and a worker that are there already."""
    settings = config.load(home=folder / "page", workflows=WORKFLOWS)
    try:
        return await _page_rounds(settings, 1 if quick else 7, profile), {}
    finally:
        await anyio.run_process([*_command(), "stop"], env=os.environ | settings.environment(), check=False)


async def _page_rounds(settings: Settings, rounds: int, profile: bool) -> list[Row]:
    from mcp import Client, StdioServerParameters
    from playwright.async_api import async_playwright

    from mcp_flow.browser import host as hosts

    command, *arguments = [*_command(), "serve"]
    server = StdioServerParameters(command=command, args=arguments, env=os.environ | settings.environment())
    ours, raw = [], []
    async with Client(server) as client, async_playwright() as playwright:

        async def run() -> tuple[float, str]:
            began = time.perf_counter()
            result = await client.call_tool("start_run", {"workflow": "one_page", "input": {"url": PAGE}})
            seconds = time.perf_counter() - began
            answer = result.structured_content or {}
            if answer.get("status") != "finished":
                raise RuntimeError(str(answer or result.content)[:2000])
            return seconds, answer["run_id"]

        _, run_id = await run()  # this one starts the worker and the host
        browser = await playwright.chromium.connect(hosts.living(settings)[0].endpoint)
        for _ in range(rounds):
            began = time.perf_counter()
            context = await browser.new_context()
            page = await context.new_page()
            await page.goto(PAGE)
            await context.close()
            raw.append(time.perf_counter() - began)
            seconds, run_id = await run()
            ours.append(seconds)
        await browser.close()
        if profile:
            await _print_timeline(settings, run_id, ours[-1])
    measured, floor = median(ours), median(raw)
    ratio = median(mine / bare for mine, bare in zip(ours, raw, strict=True))
    return [
        Row(
            "one-page run, start_run to finished",
            f"{measured * 1000:.0f} ms ({min(ours) * 1000:.0f} to {max(ours) * 1000:.0f})",
            f"{floor * 1000:.0f} ms: raw Playwright",
            f"{ratio:.2f}x",
            "< 500 ms",
            measured < 0.5,
        )
    ]


async def _print_timeline(settings: Settings, run_id: str, seconds: float) -> None:
    """The run's events with the milliseconds between them."""
    from mcp_flow.store import Store

    async with Store(settings, "command") as store:
        events = await store.events(run_id)
    print(f"\n--- the last one-page run, {seconds * 1000:.0f} ms seen by its client ---")
    last = first = datetime.fromisoformat(events[0].at)
    for recorded in events:
        at = datetime.fromisoformat(recorded.at)
        total, since = (at - first).total_seconds() * 1000, (at - last).total_seconds() * 1000
        print(f"{total:8.1f} ms  +{since:7.1f}  {recorded.event.type}")
        last = at
