"""How processes of one home folder know of each other: life locks, doorbells, and the start of a worker.

A worker holds a file lock for life, so a free lock means that it is dead, whatever its process id says. A doorbell is
a Unix datagram socket; ringing it says "look at this run", and a ring that is lost costs a poll, never an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mcp_flow import locks
from mcp_flow.config import Settings, private_folder
from mcp_flow.errors import FlowError

START_SECONDS = 30.0
"""What a worker may take to start."""
STOP_SECONDS = 15.0
"""Beyond its grace, what a worker may take to end."""


class LifeLock:
    """A worker's sign of life: `workers/<id>.lock`, held until its process ends."""

    def __init__(self, settings: Settings, worker: str) -> None:
        self._path = private_folder(settings.home / "workers") / f"{worker}.lock"
        while True:
            self._file = locks.open_lock(self._path)
            fcntl.flock(self._file, fcntl.LOCK_EX)
            if locks.is_at(self._file, self._path):  # and was not swept away before it was locked
                break
            self._file.close()
        os.pwrite(self._file.fileno(), str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Say that the worker is gone."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def is_alive(settings: Settings, worker: str) -> bool:
    """Whether a worker's process still holds its lock."""
    try:
        file = locks.own((settings.home / "workers" / f"{worker}.lock").open("rb"))
    except FileNotFoundError:
        return False
    with file:
        return not locks.acquire(file, fcntl.LOCK_SH)


def pid_of(settings: Settings, worker: str) -> int:
    """The process id of a living worker; raises `OSError` or `ValueError` for one that is just coming or going."""
    return int((settings.home / "workers" / f"{worker}.lock").read_text())


def stack_path(settings: Settings, worker: str) -> Path:
    """Where a worker writes its stack when it is asked for it (SIGUSR1), for whoever ends it to read."""
    return settings.home / "workers" / f"{worker}.stack"


def is_library(worker: str) -> bool:
    """Whether this is the id of a process that executes runs for its own program, and is not to be killed."""
    return worker.startswith("lib-")


def living(settings: Settings) -> set[str]:
    """The workers whose processes live; library processes, whose ids begin with `lib-`, included."""
    names = {path.stem for path in (settings.home / "workers").glob("*.lock")}
    return {name for name in names if is_alive(settings, name)}


def sweep(settings: Settings) -> None:
    """Remove the lock files of dead workers."""
    for path in (settings.home / "workers").glob("*.lock"):
        with contextlib.suppress(FileNotFoundError), locks.own(path.open("rb")) as file:
            # Removed under its lock: one that is free may be about to be a worker's that is just starting.
            if locks.acquire(file) and locks.is_at(file, path):
                stack_path(settings, path.stem).unlink(missing_ok=True)
                path.unlink()


@contextlib.contextmanager
def changing_of_the_guard(settings: Settings) -> Iterator[None]:
    """Held while a worker is started, and by a worker between its last look for work and its end."""
    private_folder(settings.home)
    with locks.open_lock(settings.home / "start.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def ensure_worker(settings: Settings) -> None:
    """Start a worker unless one lives; blocks for as long as another process is doing the same (call in a thread).

    Raises `FlowError` when the worker dies at its start, with the end of its log.
    """
    with changing_of_the_guard(settings):
        if any(not is_library(worker) for worker in living(settings)):
            return
        log = private_folder(settings.home / "logs") / "worker.log"
        before = log.stat().st_size if log.exists() else 0
        worker = f"w-{secrets.token_hex(4)}"
        ready, done = os.pipe()
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mcp_flow", "worker", "--id", worker, "--ready-fd", str(done)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=[done],
                env=os.environ | settings.environment(),
            )
        os.close(done)
        with open(ready, "rb") as pipe:
            answered, _, _ = select.select([pipe], [], [], START_SECONDS)
            if answered and pipe.read(1):
                _reap(process)
                return
        if not answered:
            process.kill()
        process.wait()
        tail = log.read_bytes()[before:][-2000:].decode(errors="replace").strip()
        raise FlowError(f"The worker ended at its start (status {process.returncode}); see {log}.\n{tail}".strip())


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Leave the worker to itself, without a warning of ours and without a zombie while we live."""
    threading.Thread(target=process.wait, daemon=True).start()


def stop_workers(settings: Settings) -> int:
    """End the detached workers, giving each time to release its runs (call in a thread); returns how many."""
    stopped = {worker for worker in living(settings) if not is_library(worker)}
    deadline = time.monotonic() + settings.grace + STOP_SECONDS
    told: set[str] = set()
    while alive := {worker for worker in stopped if is_alive(settings, worker)}:
        late = time.monotonic() > deadline
        for worker in alive if late else alive - told:
            with contextlib.suppress(OSError, ValueError):
                os.kill(pid_of(settings, worker), signal.SIGKILL if late else signal.SIGTERM)
                told.add(worker)
        time.sleep(0.02)
    sweep(settings)
    return len(stopped)


class Doorbell:
    """This process's bell: `wait` returns the runs that it was rung for; `rings` counts the rings."""

    def __init__(self, settings: Settings) -> None:
        folder = private_folder(settings.runtime)
        self._path = folder / f"{os.getpid()}-{secrets.token_hex(3)}.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self.rings = 0
        self.deaths = 0
        """How many of the workers that are watched have died."""
        self._watched: dict[str, int] = {}
        self._rung: set[str] = set()
        self._waiters: set[asyncio.Future[None]] = set()
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._read)

    async def wait(self, seconds: float) -> set[str]:
        """Wait for a ring, at most so long; returns the ids it was rung for, for one waiter at a time."""
        if not self._rung:
            await self.next_ring(seconds)
        rung, self._rung = self._rung, set()
        return rung

    async def next_ring(self, seconds: float, since: int | None = None) -> None:
        """Wait for the next ring, at most so long; any number may wait. Not at all if `rings` is no longer `since`."""
        if since is not None and self.rings != since:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await waiter
        finally:
            self._waiters.discard(waiter)

    def ring(self, run_id: str) -> None:
        """Ring in this very process."""
        self.rings += 1
        self._rung.add(run_id)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def watch(self, settings: Settings) -> None:
        """Ring when one of the workers that live now dies, as far as the system tells of that; polls see the rest."""
        if sys.platform != "linux":
            return
        for path in (settings.home / "workers").glob("*.lock"):
            worker = path.stem
            if worker in self._watched:
                continue
            with contextlib.suppress(OSError, ValueError):  # it is just coming or going
                watched = os.pidfd_open(pid_of(settings, worker))
                # Asked afterwards: as long as the lock is held, the number is that of its holder.
                if not is_alive(settings, worker):
                    os.close(watched)
                    continue
                self._watched[worker] = watched
                asyncio.get_running_loop().add_reader(watched, self._note_death, worker)

    def close(self) -> None:
        """Take the bell down."""
        for worker in list(self._watched):
            self._forget(worker)
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def _note_death(self, worker: str) -> None:
        self._forget(worker)
        self.deaths += 1
        self.ring("")

    def _forget(self, worker: str) -> None:
        watched = self._watched.pop(worker)
        asyncio.get_running_loop().remove_reader(watched)
        os.close(watched)

    def _read(self) -> None:
        while True:
            try:
                run_id = self._socket.recv(128).decode(errors="replace")
            except (BlockingIOError, InterruptedError):
                return
            self.ring(run_id)


def ring(settings: Settings, run_id: str) -> None:
    """Ring every bell of the home folder; a bell whose process is dead is taken down."""
    folder = settings.runtime
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as out:
        for path in _bells(folder):
            try:
                out.sendto(run_id.encode(), str(path))
            except ConnectionRefusedError:
                with contextlib.suppress(OSError):
                    path.unlink()
            except OSError:  # full: it is ringing already; or gone between the listing and the ring
                continue


def _bells(folder: Path) -> list[Path]:
    try:
        return list(folder.glob("*.sock"))
    except OSError:
        return []
