"""How steps get their keys: scope path, name and occurrence, so that a key does not depend on position.

Occurrences are counted only in the task that owns a scope. In any other task the order of uses is chance, so there a
name is used once a scope.
"""

from __future__ import annotations

import asyncio
import hashlib
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar, Token
from typing import Any

from mcp_flow.errors import NestedStep, StepError, StepNameTaken

LONGEST_NAME = 200
_current: ContextVar[Scope] = ContextVar("mcp_flow_scope")
_step: ContextVar[tuple[str, str] | None] = ContextVar("mcp_flow_step", default=None)


class Scope:
    """A block of a workflow whose names are counted apart. Enter it with `with` or `async with`."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._owner = _this_task()
        self._counts: dict[str, int] = {}
        self._elsewhere: dict[str, str] = {}
        self._token: Token[Scope] | None = None

    def __enter__(self) -> Scope:
        self._owner = _this_task()
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._token is not None:
            # A coroutine that is dropped while it waits is ended by the collector, in whatever context that runs.
            with suppress(ValueError):
                _current.reset(self._token)

    async def __aenter__(self) -> Scope:
        return self.__enter__()

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()

    def key(self, name: str) -> str:
        """The next key of `name`; raises `StepNameTaken` where uses in several tasks can't be told apart."""
        return f"{self._path}{_plain(name)}#{self._count(name)}"

    def child(self, name: str) -> Scope:
        """A scope within this one; the second of the same name is another."""
        count = self._count(f"{name}/")
        return Scope(f"{self._path}{_plain(name)}{'' if count == 1 else f'~{count}'}/")

    def _count(self, name: str) -> int:
        task = asyncio.current_task()
        if task is self._owner() and name not in self._elsewhere:
            self._counts[name] = self._counts.get(name, 0) + 1
            return self._counts[name]
        if name in self._counts or name in self._elsewhere:
            raise StepNameTaken(
                f"The name {name.rstrip('/')!r} is used more than once by tasks that run side by side; a replay could "
                'not tell the uses apart. Give each task a scope of its own: with flow.scope(f"row {i}"): …'
            )
        self._elsewhere[name] = task.get_name() if task else ""
        return 1


def _this_task() -> Callable[[], asyncio.Task[Any] | None]:
    """The calling task, by a weak reference: scopes live on in the contexts of whatever was begun within them."""
    task = asyncio.current_task()
    return (lambda: None) if task is None else weakref.ref(task)


def current() -> Scope:
    """The scope that the calling task is in; raises `LookupError` outside of a run."""
    return _current.get()


def refuse_nesting(what: str) -> None:
    """Raise `NestedStep` inside a step: its effects would be journaled under two names."""
    if outer := _step.get():
        raise NestedStep(
            f"{what} was called inside the step {outer[0]!r}. Call it from the workflow itself, before or after that "
            "step."
        )


def running_key() -> str | None:
    """The key of the step in which the calling code runs."""
    step = _step.get()
    return step[1] if step else None


class inside_step:  # noqa: N801 (a context manager that reads as a verb)
    """A `with` block in which the code of step `name` runs."""

    def __init__(self, name: str, key: str) -> None:
        self._name_and_key = name, key

    def __enter__(self) -> None:
        self._token = _step.set(self._name_and_key)

    def __exit__(self, *_: object) -> None:
        _step.reset(self._token)


def _plain(name: str) -> str:
    """`name` as part of a key: what separates keys is escaped, and a long text is cut and told apart by its hash."""
    if not name or not name.strip():
        raise StepError("A step needs a name that is not empty.")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 20]}…{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:12]}"
    return name.replace("%", "%25").replace("/", "%2F").replace("#", "%23").replace("\n", " ")
