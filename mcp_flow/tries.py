"""One try of a step: how its function is called, when its start is written, and when the next try comes."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
from collections.abc import Awaitable, Callable
from typing import Any

from mcp_flow import scope
from mcp_flow.errors import StepTimeout, StoreError
from mcp_flow.events import StepStarted
from mcp_flow.failures import Exited

_LONGEST_BACKOFF = 30.0
Append = Callable[[StepStarted], Awaitable[None]]


class TryFailed(Exception):
    """A try of a step failed and that is journaled; `retry_in` is None when no try follows."""

    def __init__(self, error: Exception, retry_in: float | None) -> None:
        self.error = error
        self.retry_in = retry_in
        super().__init__(str(error))


class Start:
    """The start of a try: written at once, after a moment, or together with the end, whichever comes first."""

    def __init__(
        self, event: StepStarted, append: Append, append_soon: Callable[[StepStarted], asyncio.Future[Any]]
    ) -> None:
        self._event = event
        self._append = append
        self._append_soon = append_soon
        self._written = False
        self._queued: asyncio.Future[Any] | None = None

    async def write(self) -> None:
        """Write it now, and return once it is durable."""
        self._written = True
        await self._append(self._event)

    async def unwritten(self) -> tuple[StepStarted, ...]:
        """The event, if it is still to be written, or the journal could not be when it was queued."""
        if self._queued is not None:
            await asyncio.wait([self._queued])
            return (self._event,) if isinstance(self._queued.exception(), StoreError) else ()
        written, self._written = self._written, True
        return () if written else (self._event,)

    def write_soon(self) -> None:
        """Queue it at this very moment, so that it can't come after the end; what refuses it refuses the end too."""
        if not self._written:
            self._written, self._queued = True, self._append_soon(self._event)


async def invoke(name: str, fn: Callable[..., Any], args: tuple[Any, ...], limit: float | None, key: str) -> Any:
    """Call a step's function, as step `name` of this key and for at most `limit` seconds; raises `StepTimeout`."""
    with scope.inside_step(name, key):
        if limit is None:
            return await _call(fn, args)
        try:
            async with asyncio.timeout(limit) as bound:
                return await _call(fn, args)
        except TimeoutError as error:
            if bound.expired():
                raise StepTimeout(f"Step {name!r} did not end within its {limit:g} s.") from error
            raise


def seconds_before_next(backoff: float | Callable[[int], float], number: int) -> float:
    """Seconds before the next try. Full jitter, after Brooker, "Exponential Backoff And Jitter" (AWS, 2015)."""
    if callable(backoff):
        return max(0.0, float(backoff(number)))
    return random.uniform(0, min(_LONGEST_BACKOFF, backoff * 2 ** (number - 1)))


async def _call(fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Await a coroutine function on the loop; call any other in a thread, and await on the loop what it returns."""
    try:
        if _is_async(fn):
            return await fn(*args)
        result = await asyncio.to_thread(fn, *args)
        return await result if hasattr(result, "__await__") else result
    except (SystemExit, KeyboardInterrupt) as error:
        raise Exited(error) from error


def _is_async(fn: Callable[..., Any]) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    call = getattr(fn, "__call__", None)  # noqa: B004 (a callable object's own method)
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(call)
