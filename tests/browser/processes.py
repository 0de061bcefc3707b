"""Other processes, and waiting for what they do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import anyio


async def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """The first true value of `condition`."""
    with anyio.fail_after(seconds):
        while not (value := condition()):
            await anyio.sleep(0.01)
        return value


async def never(condition: Callable[[], Any], seconds: float) -> bool:
    """Whether `condition` stayed false for so long."""
    with anyio.move_on_after(seconds):
        while not condition():
            await anyio.sleep(0.01)
    return not condition()


def processes(mark: str) -> list[str]:
    """The command lines, with their pids, of living processes that mention `mark`."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,stat,args"], capture_output=True, text=True).stdout.splitlines()
    return [line for line in listed if mark in line and line.split()[1][0] != "Z"]


def parent(line: str) -> int:
    """The pid of the parent of a process that `processes` listed."""
    return int(subprocess.run(["ps", "-o", "ppid=", line.split()[0]], capture_output=True, text=True).stdout)


def own_drivers() -> set[int]:
    """The pids of Playwright's drivers that this process has started."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=3) for line in listed.splitlines()[1:]]
    return {
        int(pid)
        for pid, ppid, stat, args in rows
        if "run-driver" in args and int(ppid) == os.getpid() and stat[0] != "Z"
    }


@contextlib.contextmanager
def losing_drivers() -> Iterator[None]:
    """Playwright keeps the error of a dead driver in futures that nobody reads, which would fail this or a later test.

    What dies in here must not be held any more at its end.
    """
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(
        lambda loop, context: (
            None if "from the driver" in str(context.get("exception")) else handler and handler(loop, context)
        )
    )
    try:
        yield
        gc.collect()
    finally:
        loop.set_exception_handler(handler)


def run_python(code: str, *args: str) -> subprocess.Popen[str]:
    """Another process that runs `code` and is talked to through its pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
