"""Workers and browser hosts within 30 ms: forked from a process that has imported everything.

They are processes of their own, with a session, an environment and a log like any that `subprocess` starts; only their
imports, which take longer than most tests, are done once.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self

PRELOADED = ("mcp_flow.cli", "mcp_flow.worker", "mcp_flow.browser.host", "mcp_flow.browser.session")
_HIGH = 100
"""Above all numbers that a process is told to have its files under."""


class Forked:
    """What `subprocess.Popen` is to the product, of a process that the forge has forked."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid = int(connection.recv(32))
        self.returncode: int | None = None

    def __del__(self) -> None:
        self._connection.close()

    def poll(self) -> int | None:
        """How it ended, None while it lives."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """How it ended, once it has; raises `subprocess.TimeoutExpired`."""
        readable, _, _ = select.select([self._connection], [], [], timeout)
        if not readable:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        # Left there for whoever waits in another thread. Nothing is said when the forge itself has ended.
        self.returncode = int(self._connection.recv(32, socket.MSG_PEEK) or -signal.SIGKILL)
        return self.returncode

    def kill(self) -> None:
        """Kill it, if it lives."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class Forking:
    """A process that forks others: it runs `serve(path)` of a module here, its stdin a socket with whose end it ends.

    The `path` is that from which it would have imported by itself.
    """

    def __init__(self, module: str) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = f"import sys; own = sys.path[:]; sys.path[:] = {sys.path!r}; import {module}; {module}.serve(own)"
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-P", "-c", code], stdin=theirs.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._process.wait(20)


class Forge(Forking):
    """Where processes of the product are forked; a context manager, which those that are left outlive."""

    def __init__(self) -> None:
        super().__init__("forks")

    def start(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[Any],
        stderr: IO[Any],
        env: Mapping[str, str],
        start_new_session: bool,
        pass_fds: Sequence[int] = (),
    ) -> Forked:
        """What `subprocess.Popen` does for a command that begins with this Python and `-P -m`."""
        asked = (list(command[:3]), stdin, start_new_session)
        assert asked == ([sys.executable, "-P", "-m"], subprocess.DEVNULL, True), asked
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"command": command[3:], "environment": dict(env), "folder": os.getcwd(), "files": [1, 2, *pass_fds]}
        with theirs:
            files = [theirs.fileno(), stdout.fileno(), stderr.fileno(), *pass_fds]
            socket.send_fds(self._control, [json.dumps(request).encode()], files)
        return Forked(ours)


def serve(path: list[str]) -> None:
    """Fork for every request until stdin ends, and say how each child has ended; they import from `path`."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    control = socket.socket(fileno=os.dup(0))
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([control, *children], [], [])
        for watched in set(ready) & children.keys():
            pid, connection = children.pop(watched)
            _, status = os.waitpid(pid, 0)
            os.close(watched)
            with connection:
                _say(connection, os.waitstatus_to_exitcode(status))
        if control not in ready:
            continue
        message, files, _, _ = socket.recv_fds(control, 1 << 20, 16)
        if not message:
            return
        connection = socket.socket(fileno=files.pop(0))
        if (pid := os.fork()) == 0:
            for opened in (control, connection, *(connection for _, connection in children.values())):
                opened.close()
            for watched in children:
                os.close(watched)
            sys.path[:] = path
            _become(json.loads(message), files)
            return
        for file in files:
            os.close(file)
        _say(connection, pid)
        children[os.pidfd_open(pid)] = pid, connection


def _say(connection: socket.socket, number: int) -> None:
    try:
        connection.send(str(number).encode())
    except OSError:  # nobody wants to know any more
        return


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    """Be the process that was asked for, from here to its end."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    # Out of the way first: one may have the number that another is to have.
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, _HIGH) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip([os.open(os.devnull, os.O_RDONLY), *kept], [0, *request["files"]], strict=True):
        if file == number:
            os.set_inheritable(file, True)
        else:
            os.dup2(file, number)
            os.close(file)
    module, *arguments = request["command"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
