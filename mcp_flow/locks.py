"""The files of locks that say which process lives or writes: this process's own, and not those of what it forks.

A lock belongs to the open file, which a fork shares: a process that a step forks would keep its worker's locks after
the worker's death.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any, TypeVar
from weakref import WeakSet

F = TypeVar("F", bound=IO[Any])

_own: WeakSet[IO[Any]] = WeakSet()


def own(file: F) -> F:
    """Keep an open file, and with it the lock on it, from the processes that this one forks."""
    _own.add(file)
    return file


def open_lock(path: Path) -> IO[bytes]:
    """The file of a lock, made if need be, 0600."""
    return own(os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0))


def acquire(file: IO[Any], mode: int = fcntl.LOCK_EX) -> bool:
    """Lock the file if nobody stands against it."""
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether `path` still is this file: one that was locked after it had been removed is a lock on nothing."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _leave_to_parent() -> None:
    """Let go of the parent's locks, which stay the parent's."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for file in _own:
        if not file.closed:
            # Replaced, not closed: whoever closes the file later would close whatever has its number by then.
            os.dup2(null, file.fileno(), inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=_leave_to_parent)
