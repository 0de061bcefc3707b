"""Holds what a connection's code asks of its pages for as long as somebody else has them.

Playwright's own debugger pauses one call, and lets every other go on beside it. Only calls of this very client are
held: whoever has the page comes over another connection, and what Playwright takes for internal is let through.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any

from playwright.async_api import Error

_HELD = frozenset({"Page", "Frame", "ElementHandle", "JSHandle", "Worker", "APIRequestContext"})
"""What is held when it is asked to do something. Routes and dialogs are answered, or the page could not go on."""
_LET_THROUGH = frozenset({"title", "__waitInfo__"})
"""A title is what a stop itself asks for; the other is never answered."""


@dataclass(frozen=True)
class HeldCall:
    """A call that stands still: what it is, what it is about, and the lines that made it, innermost first."""

    name: str
    selector: str | None
    url: str | None
    lines: tuple[tuple[str, int], ...]


OnHeld = Callable[[HeldCall], None]


@dataclass(frozen=True)
class _Held:
    """What a held call needs to go on: who waits for its answer, how it is sent, and in what context it was made."""

    call: HeldCall
    answer: asyncio.Future[Any]
    send: Callable[[], asyncio.Future[Any]]
    context: Context


class Gate:
    """The gate of one connection; open until it is closed."""

    def __init__(self, connection: Any) -> None:
        self._send = connection.send_message_to_server
        self._on_held: OnHeld | None = None
        self._held: list[_Held] = []
        self._ended = False
        connection.send_message_to_server = self._pass_or_hold

    def close(self, on_held: OnHeld) -> None:
        """Hold every call from now on; `on_held` is told of each at once, in the context in which it is made.

        Of those that are held already it is told too: where the code stands still, nothing new would come.
        """
        self._on_held = on_held
        for held in self._held:
            if not held.answer.done():
                held.context.run(on_held, held.call)

    def open(self) -> None:
        """Let the held calls go on, in the order in which they came."""
        self._on_held = None
        waiting, self._held = self._held, []
        for held in waiting:
            if not held.answer.done():
                _follow(held.send, held.answer)

    def end(self) -> None:
        """Never let them go on, nor any later one."""
        self._ended = True
        waiting, self._held = self._held, []
        for held in waiting:
            held.answer.cancel()

    def _pass_or_hold(self, target: Any, method: str, params: Any, options: dict[str, Any]) -> asyncio.Future[Any]:
        acts = target._type in _HELD and method not in _LET_THROUGH and not options.get("internal")
        if acts and self._ended:
            raise Error("The attempt is over; its pages are no longer its own.")
        if not acts or self._on_held is None:
            sent: asyncio.Future[Any] = self._send(target, method, params, options)
            return sent
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call = HeldCall(
            options.get("api_name") or f"{target._type}.{method}",
            params.get("selector"),
            params.get("url"),
            tuple((frame["file"], frame["line"]) for frame in options.get("frames") or ()),
        )
        send = partial(self._send, target, method, params, options)
        self._held.append(_Held(call, answer, send, copy_context()))
        self._on_held(call)
        return answer


def _follow(send: Callable[[], asyncio.Future[Any]], answer: asyncio.Future[Any]) -> None:
    """Send a call that was held, and give its answer to whoever waits for it."""
    try:
        sent = send()
    except Exception as error:  # whatever Playwright refuses it with is for the caller
        answer.set_exception(error)
        return

    def pass_on(sent: asyncio.Future[Any]) -> None:
        if answer.done():
            with suppress(asyncio.CancelledError):
                sent.exception()  # nobody asks any more, and asyncio would complain of that
        elif sent.cancelled():
            answer.cancel()
        elif error := sent.exception():
            answer.set_exception(error)
        else:
            answer.set_result(sent.result())

    sent.add_done_callback(pass_on)
    answer.add_done_callback(lambda answer: sent.cancel() if answer.cancelled() else None)
