"""The child that reads workflow files: `python -m mcp_flow.reader`, started by `catalog`.

It imports what every workflow needs once, never a workflow, and forks for each request. The fork imports the
revision and answers, so a file that blocks, exits, crashes or prints at import hurts nothing else.

Its stdin is a socket. Each message on it is a time limit with one end of a socket pair, on which the fork gets a
request and writes its answer, both JSON; when the fork is gone, its verdict follows in a line of its own.
"""

from __future__ import annotations

import base64
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from mcp_flow import definition
from mcp_flow.catalog import HEADER, VERDICT
from mcp_flow.errors import BrokenWorkflow, InvalidInput
from mcp_flow.revisions import Revision, load
from mcp_flow.scan import notes

# Imported while nobody waits, because most workflow files do and every fork would pay for it again.
_LIKELY = ["mcp_flow.flow", "playwright.async_api"]


@dataclass(slots=True)
class _Fork:
    connection: socket.socket
    deadline: float
    late: bool = False


def main() -> None:
    """Serves until stdin ends."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    wake, waker = socket.socketpair()
    wake.setblocking(False)
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    # A Ctrl-C in the server's terminal is the server's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    forks: dict[int, _Fork] = {}
    likely = list(_LIKELY)
    while True:
        ready, _, _ = select.select([control, wake], [], [], 0 if likely else _until_next(forks))
        if control in ready and not _accept(control, forks):
            for pid in forks:
                _kill(pid)
            return
        if wake in ready:
            wake.recv(4096)
        _reap(forks)
        if likely and not ready:
            with suppress(Exception):  # boundary: it is only a head start
                importlib.import_module(likely.pop(0))


def _until_next(forks: dict[int, _Fork]) -> float | None:
    now = time.monotonic()
    return min((max(0.0, fork.deadline - now) for fork in forks.values() if not fork.late), default=None)


def _accept(control: socket.socket, forks: dict[int, _Fork]) -> bool:
    """Forks for one request; False when there will be no more."""
    header, handles, _, _ = socket.recv_fds(control, HEADER.size, 1)
    if not header:
        return False
    connection = socket.socket(fileno=handles[0])
    (limit,) = HEADER.unpack(header)
    pid = os.fork()
    if pid == 0:
        control.close()
        for fork in forks.values():
            fork.connection.close()
        _serve(connection, limit)
    # A little later than the fork itself reports where it stands.
    forks[pid] = _Fork(connection, time.monotonic() + limit + 0.2)
    return True


def _reap(forks: dict[int, _Fork]) -> None:
    now = time.monotonic()
    for pid, fork in list(forks.items()):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            if now >= fork.deadline and not fork.late:
                fork.late = True
                _kill(pid)
            continue
        _kill_group(pid)
        verdict = {"late": fork.late, "status": os.waitstatus_to_exitcode(status)}
        with suppress(OSError):
            fork.connection.send(VERDICT + json.dumps(verdict).encode() + b"\n", socket.MSG_DONTWAIT)
        fork.connection.close()
        del forks[pid]


def _kill(pid: int) -> None:
    _kill_group(pid)
    os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    """Kills what a fork has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


# --- in the fork ---


def _serve(connection: socket.socket, limit: float) -> NoReturn:
    status, leave = 1, os._exit
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(0, 2)
        # Should the parent be killed, nobody else ends a file that hangs.
        signal.setitimer(signal.ITIMER_REAL, limit + 2)
        with connection.makefile("rb") as stream:
            request = json.load(stream)
        faulthandler.enable(connection.fileno())
        faulthandler.dump_traceback_later(limit, file=connection.fileno())
        os._exit = partial(_report_exit, connection, leave)
        answer = _answer(request)
        faulthandler.cancel_dump_traceback_later()
        connection.sendall(json.dumps(answer).encode())
        status = 0
    finally:
        leave(status)


def _report_exit(connection: socket.socket, leave: Callable[[int], NoReturn], status: int) -> NoReturn:
    faulthandler.dump_traceback(connection.fileno())
    leave(status)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    files = {name: base64.b64decode(content) for name, content in request["files"].items()}
    revision = Revision(request["root"], request["entry"], files, request["hash"])
    try:
        workflows = definition.workflows_in(load(revision))
        if "function" not in request:
            return _descriptions(revision, workflows)
        if request["function"] not in workflows:
            raise BrokenWorkflow(f"{revision.path}:1: the file has no workflow {request['function']!r} any more.")
        return {"input": workflows[request["function"]].validate_input(request["input"])}
    except BrokenWorkflow as error:
        return {"broken": [str(error)]}
    except InvalidInput as error:
        return {"invalid": str(error).partition("\n")[0], "problems": error.problems}
    except Exception as error:  # boundary: validators are the author's code
        return {"broken": [f"{revision.path}:1: {type(error).__name__}: {error}"]}


def _descriptions(revision: Revision, workflows: dict[str, Any]) -> dict[str, Any]:
    found, broken = [], []
    for workflow in workflows.values():
        try:
            schemas = {"input_schema": workflow.input_schema, "output_schema": workflow.output_schema}
        except BrokenWorkflow as error:
            broken.append(str(error))
            continue
        except Exception as error:  # boundary: schemas are the author's code too
            broken.append(f"{workflow.file}:{workflow.line}: {type(error).__name__}: {error}")
            continue
        noted = notes(revision.files[revision.entry], workflow.line)
        found.append(
            {
                "function": workflow.name,
                "description": workflow.description,
                "line": workflow.line,
                **schemas,
                "steps": noted.steps,
                "warnings": noted.warnings,
            }
        )
    return {"workflows": found, "broken": broken}


if __name__ == "__main__":
    main()
