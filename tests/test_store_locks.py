"""Locks say who lives and who writes: no store, no sweep and no forked process takes them from whom they belong to."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from mcp_flow import commits, presence
from mcp_flow import events as ev
from mcp_flow.commits import WriteLock
from mcp_flow.config import Settings
from mcp_flow.errors import StoreError
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


def child(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process that runs a program of this test's own."""
    command, env = [sys.executable, "-c", *arguments], os.environ | (environment or {})
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def times_open(path: Path) -> int:
    """How often this process has a file open."""
    return sum(os.path.realpath(number) == str(path) for number in Path("/proc/self/fd").iterdir())


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


FORKS_AND_DIES = """
import os, signal, sys
from pathlib import Path
from mcp_flow import config, presence
from mcp_flow.browser import host
from mcp_flow.commits import WriteLock

home = Path(sys.argv[1])
life = presence.LifeLock(config.load(home=home), "w-1")
use = host.use(str(home / "endpoint"))
with WriteLock(home / "write.lock", "worker"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        sys.stdin.readline()
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


async def test_a_process_that_was_forked_keeps_no_lock_of_its_dead_parent(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "clients").touch()
    process = child([FORKS_AND_DIES, str(settings.home)])
    assert process.stdout
    with anyio.fail_after(30):
        forked = int(await asyncio.to_thread(process.stdout.readline))
        assert await asyncio.to_thread(process.wait) == -signal.SIGKILL
    os.kill(forked, 0)
    assert not presence.is_alive(settings, "w-1")
    lock = WriteLock(settings.home / "write.lock", "test")
    assert lock.acquire_now()
    lock.close()
    with (settings.home / "clients").open() as clients:
        fcntl.flock(clients, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await asyncio.to_thread(process.communicate, "end\n")


async def test_a_worker_whose_lock_is_swept_away_while_it_takes_it_takes_another(settings: Settings) -> None:
    path = settings.home / "workers" / "w-1.lock"
    path.parent.mkdir(parents=True)
    with path.open("w") as sweeper, anyio.fail_after(10):
        fcntl.flock(sweeper, fcntl.LOCK_EX)
        starting = asyncio.create_task(asyncio.to_thread(presence.LifeLock, settings, "w-1"))
        while times_open(path) < 2:
            await asyncio.sleep(0)
        path.unlink()
        fcntl.flock(sweeper, fcntl.LOCK_UN)
        lock = await starting
    assert presence.is_alive(settings, "w-1")
    presence.sweep(settings)
    assert presence.living(settings) == {"w-1"}
    lock.release()
    assert not list(path.parent.iterdir())


STOPS_IN_A_COMMIT = """
import asyncio, sys
from faults import Fault, plant
from mcp_flow import config, run_workflow

settings = config.load()
fault = Fault.named("worker before step.finished only#1")
plant(settings, "r1", fault, (), "stop", lambda **said: "struck" in said and print("stopped", flush=True))
print(asyncio.run(run_workflow("main", run_id="r1", settings=settings)).status, flush=True)
"""


async def test_a_library_process_that_stands_still_inside_a_commit_is_named_and_not_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.workflows.mkdir()
    (settings.workflows / "only.py").write_text(
        "from mcp_flow import Flow, workflow\n\n@workflow\nasync def main(flow: Flow) -> None:\n"
        '    await flow.step("only", lambda: None)\n'
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = child([STOPS_IN_A_COMMIT], settings.environment() | {"PYTHONPATH": path})
    assert process.stdout
    try:
        async with Store(settings, "server") as store:
            with anyio.fail_after(30):
                assert await asyncio.to_thread(process.stdout.readline) == "stopped\n"
            monkeypatch.setattr(commits, "HELD_TOO_LONG", 0.1)
            with pytest.raises(StoreError, match=rf"Process {process.pid} \(library\)"):
                await store.append("r1", ev.PageEvaluated(code="1", mode="read", outcome="ok"))
            process.send_signal(signal.SIGCONT)
            with anyio.fail_after(30):
                assert await asyncio.to_thread(process.stdout.readline) == "finished\n"
            monkeypatch.undo()
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)
