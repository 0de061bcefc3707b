"""A home folder that several connections of one process have open, while other processes come and go."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.store import Store


async def test_a_command_that_leaves_does_not_take_the_log_from_a_process_with_two_connections(tmp_path: Path) -> None:
    settings = config.load(home=tmp_path / "home", workflows=tmp_path / "workflows")
    created = ev.RunCreated(workflow="w", function="w", root="/", entry="w.py", revision="r", input={})
    log = settings.home / "flow.db-wal"
    async with Store(settings, "test") as first, Store(settings, "test") as second:
        await first.create("before", created)
        file = log.stat().st_ino
        command = [sys.executable, "-m", "mcp_flow", "runs", "--home", str(settings.home)]
        assert b"before" in (await anyio.run_process(command)).stdout
        assert log.stat().st_ino == file
        await second.create("after", created)
        assert b"after" in (await anyio.run_process(command)).stdout
        assert (await first.run("after")).created
