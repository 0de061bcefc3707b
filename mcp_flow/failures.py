"""How an error that ended a step or a run is journaled: in its own words, at its place in the workflow's code."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any

from mcp_flow.errors import Denied, InvalidInput
from mcp_flow.events import Failure

LONGEST_MESSAGE = 4000
_TYPED = re.compile(r'\b(fill|type|press)\("(?:(?!\n +(?:-|\d+ \u00d7) ).)*"\)', re.DOTALL)
"""How Playwright's log of an action quotes what it was given to type, which may be anything and is not escaped."""
SourceLine = Callable[[str, int], str | None]


class Exited(Exception):
    """The author's code tried to end the process; as it is, that would end the worker with every run that it has."""

    def __init__(self, exit: BaseException) -> None:
        self.exit = exit
        super().__init__(str(exit))


def describe(error: BaseException, step: str | None, source_line: SourceLine, mask: Callable[[str], str]) -> Failure:
    """An error as the journal keeps it, pointing at the last line of the workflow's own code.

    Of several errors of a task group the first is told with its place, the others by name.
    """
    error, *others = _leaves(error)
    said = "\n".join([told(error), *getattr(error, "__notes__", ())])
    text = "".join([said, *(f"; and {_type_name(other)}: {told(other)}" for other in others)])
    message = mask(text)[:LONGEST_MESSAGE] or type(error).__name__
    step = step or getattr(error, "mcp_flow_step", None)
    return Failure(type=_type_name(error), message=message, step=step, **_place(error, source_line))


def told(error: BaseException) -> str:
    """What an error says, without what Playwright was given to type."""
    return untyped(str(error))


def untyped(text: str) -> str:
    """`text` without what a log of Playwright quotes as typed, which may have been a password."""
    return _TYPED.sub(r'\1("…")', text)


def _place(error: BaseException, source_line: SourceLine) -> dict[str, Any]:
    if isinstance(error, InvalidInput | Denied):
        return {}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        source = source_line(frame.filename, frame.lineno or 0)
        if source is not None:
            return {"file": frame.filename, "line": frame.lineno, "source": source.strip()[:300]}
    return {}


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors in a group, or the one that is none."""
    if isinstance(error, Exited):
        return [error.exit]
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]


def _type_name(error: BaseException) -> str:
    module = type(error).__module__
    return type(error).__name__ if not module.startswith("playwright") else f"playwright.{type(error).__name__}"
