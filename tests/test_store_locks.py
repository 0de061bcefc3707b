"""Several stores of one process on one folder, as a library process has: none takes the locks of another away."""

from __future__ import annotations

import subprocess
import sys

import anyio
import anyio.to_thread
import pytest

from mcp_flow import events as ev
from mcp_flow.config import Settings
from mcp_flow.store import Store

pytestmark = pytest.mark.anyio

COME_AND_GO = """
import asyncio, sys
from pathlib import Path
from mcp_flow import config
from mcp_flow.store import Store
async def main():
    async with Store(config.load(home=Path(sys.argv[1])), "test") as store:
        print(*[row.run_id for row in await store.list_runs([], None, None, 10, None)])
asyncio.run(main())
"""


async def runs_seen_by_another(settings: Settings) -> list[str]:
    command = [sys.executable, "-c", COME_AND_GO, str(settings.home)]
    with anyio.fail_after(30):
        done = await anyio.to_thread.run_sync(lambda: subprocess.run(command, capture_output=True, text=True))
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.split())


async def test_what_one_store_writes_is_there_after_a_second_has_opened_and_another_process_has_come_and_gone(
    settings: Settings,
) -> None:
    created = ev.RunCreated(workflow="w", function="w", root="/", entry="w.py", revision="r")
    async with Store(settings, "one") as one:
        await one.create("first", created)
        async with Store(settings, "two") as two:
            assert await runs_seen_by_another(settings) == ["first"]
            await one.create("second", created)
            await two.create("third", created)
            assert await runs_seen_by_another(settings) == ["first", "second", "third"]
        async with Store(settings, "three") as three:
            assert (await three.run("third")).seq == 1
    assert await runs_seen_by_another(settings) == ["first", "second", "third"]
