"""Calls through a real MCP client, and what they leave behind on a home folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from mcp import Client

from mcp_flow import presence
from mcp_flow.browser import host as hosts
from mcp_flow.config import Settings

MODES = ("auto", "legacy")
"""Both eras of the protocol."""


async def call(client: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """What a tool answered, which its text must say as well."""
    with anyio.fail_after(60):
        result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0].text
    assert result.structured_content is not None
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content


async def refusal(client: Client, tool: str, **arguments: Any) -> str:
    """The text with which a tool refused."""
    with anyio.fail_after(60):
        result = await client.call_tool(tool, arguments)
    assert result.is_error, result.content
    assert "Traceback" not in result.content[0].text
    return str(result.content[0].text)


async def text(client: Client, tool: str, **arguments: Any) -> str:
    """The text of a tool that answers in content only."""
    with anyio.fail_after(60):
        result = await client.call_tool(tool, arguments)
    assert not result.is_error, result.content[0].text
    assert result.structured_content is None
    return str(result.content[0].text)


async def stopped(client: Client, run: dict[str, Any]) -> dict[str, Any]:
    """The run once it neither runs nor waits to run."""
    with anyio.fail_after(60):
        while run["status"] in ("queued", "running", "interrupted"):
            run = await call(client, "get_run", run_id=run["run_id"], wait_s=10)
    return run


async def until(condition: Callable[[], Any], seconds: float = 15) -> Any:
    """The first true value of `condition`."""
    with anyio.fail_after(seconds):
        while not (value := condition()):
            await anyio.sleep(0.02)
        return value


async def stop(settings: Settings) -> None:
    """End the worker and the host of a home folder."""
    await anyio.to_thread.run_sync(presence.stop_workers, settings)
    await hosts.stop(settings)


def processes(*marks: str | Path) -> list[str]:
    """The living processes whose command or environment mentions one of `marks`."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            said = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            continue
        if folder.name.isdigit() and state != "Z" and any(str(mark).encode() in said for mark in marks):
            found.append(said.replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


def ids(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The ids of runs in a listing."""
    return [row["run_id"] for row in rows]


def ended(process: subprocess.Popen[Any], seconds: float = 5) -> int:
    """The exit status of a process that must end within `seconds`."""
    return process.wait(seconds)
