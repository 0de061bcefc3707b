"""What an agent may do to a page: the form of an action, checked as a whole before the first one is carried out."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from mcp_flow.errors import InvalidInput

MOST = 10
"""How many actions one call may hold."""
STATES = ("visible", "hidden", "attached", "detached")
"""What an element can be waited for to be."""

_NEEDS_TARGET = frozenset({"click", "type", "fill", "select", "check", "hover", "upload"})
_TAKES_TARGET = _NEEDS_TARGET | {"press", "wait"}
_VALUES: dict[str, tuple[tuple[type, ...], str, bool]] = {
    "type": ((str,), "the text", True),
    "fill": ((str,), "the text", True),
    "select": ((str, tuple), "the option's value or label, or a list of them", True),
    "check": ((bool,), "true or false", False),
    "press": ((str,), "a key such as Enter or Control+A", True),
    "upload": ((str, tuple), "a file's path, or a list of them", True),
    "navigate": ((str,), "a URL", True),
    "wait": ((str,), f"a text, or with ref or locator one of {', '.join(STATES)}", False),
    "dialog": ((str,), "accept, dismiss, or the text to answer a prompt with", True),
}
"""For each op that takes a value: its types, what it is, and whether it must be there."""


def _text(value: Any) -> Any:
    """A number as its text: `fill` with 42 can mean nothing else."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class Action(BaseModel):
    """One action. `ref` is one of the latest snapshot, `locator` a Playwright selector."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    op: Literal[
        "click",
        "type",
        "fill",
        "select",
        "check",
        "press",
        "hover",
        "upload",
        "navigate",
        "back",
        "wait",
        "dialog",
        "close",
    ]
    ref: Annotated[str, Field(pattern=r"^(f\d+)?e\d+$")] | None = None
    locator: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    value: Annotated[str | bool | tuple[str, ...] | None, BeforeValidator(_text)] = None

    @property
    def text(self) -> str:
        """The value of an op whose value is a text."""
        return self.value if isinstance(self.value, str) else ""

    @property
    def texts(self) -> list[str]:
        """The value of an op that takes one text or several."""
        return list(self.value) if isinstance(self.value, tuple) else [self.text]

    @property
    def target(self) -> str | None:
        """The ref or locator, as the agent gave it."""
        return self.ref or self.locator

    def __str__(self) -> str:
        target = f" {self.target}" if self.target else ""
        return f"{self.op}{target}"


_ACTIONS = TypeAdapter(tuple[Action, ...])


def checked(given: Sequence[Any], folders: Sequence[Path]) -> tuple[Action, ...]:
    """The actions, if all of them can be tried; raises `InvalidInput` with a line for each bad field.

    Files to upload must lie in one of `folders`.
    """
    if not 1 <= len(given) <= MOST:
        raise InvalidInput(f"actions takes 1 to {MOST} actions, not {len(given)}; send the rest with the next call.")
    try:
        actions = _ACTIONS.validate_python(given)
    except ValidationError as error:
        problems = [f"{_place(one['loc'])}: {one['msg']}" for one in error.errors(include_url=False)]
        raise InvalidInput("Nothing was done, for some actions are not valid:", problems) from error
    problems = [
        f"actions[{index}]{problem}"
        for index, action in enumerate(actions)
        for problem in _problems(action, folders, last=index == len(actions) - 1)
    ]
    if problems:
        raise InvalidInput("Nothing was done, for some actions are not valid:", problems)
    return actions


def absolute_url(value: str, base: str) -> str:
    """The web address that `value` means on a page at `base`; raises `ValueError` for one that is none."""
    url = value.strip()
    if re.match(r"[/?#.]", url) and re.match(r"https?:", base):
        url = urllib.parse.urljoin(base, url)
    if url == "about:blank" or re.fullmatch(r"https?://[^\s/]\S*", url, re.IGNORECASE):
        return url
    raise ValueError("only http: and https: URLs, such as https://shop.example/, or paths of the page's own site")


def allowed_file(value: str, folders: Sequence[Path]) -> Path:
    """The file at `value`, links resolved; raises `ValueError` unless it lies in one of `folders`."""
    for folder in folders:
        root = folder.resolve()
        # An absolute path replaces the folder that it is joined to.
        path = (root / value).resolve()
        if path.is_relative_to(root) and path.is_file():
            return path
    where = ", ".join(map(str, folders)) or "nowhere: none is configured"
    raise ValueError(f"no such file in a folder from which uploads are allowed ({where})")


def _place(loc: tuple[int | str, ...]) -> str:
    """Where in `actions` a bad field stands; which form of a value pydantic tried is no part of that."""
    index, *names = loc
    return f"actions[{index}]" + "".join(f".{name}" for name in names[:1])


def _problems(action: Action, folders: Sequence[Path], *, last: bool) -> list[str]:
    op, value = action.op, action.value
    problems = []
    if action.ref and action.locator:
        problems.append(": ref and locator both name the element; give one of them")
    if op in _NEEDS_TARGET and not action.target:
        problems.append(f": {op} needs the element's ref or locator")
    if op not in _TAKES_TARGET and action.target:
        problems.append(f".{'ref' if action.ref else 'locator'}: {op} takes no element")
    types, meaning, required = _VALUES.get(op, ((), "nothing", False))
    if value is None:
        if required or (op == "wait" and not action.target):
            problems.append(f".value: {op} needs {meaning}")
    elif not isinstance(value, types):
        problems.append(f".value: {op} takes {meaning}")
    elif op == "wait" and action.target and value not in STATES:
        problems.append(f".value: an element can be waited for to be {', '.join(STATES)}")
    elif not value and op in ("press", "wait"):
        problems.append(f".value: {op} needs {meaning}")
    else:
        problems += _refused(action, folders)
    if op == "dialog" and last:
        problems.append(": dialog says how the next one is answered; put it before the action that opens it")
    if op == "close" and not last:
        problems.append(": close must be the last action")
    return problems


def _refused(action: Action, folders: Sequence[Path]) -> list[str]:
    """What is wrong with the value itself: a URL that leads out of the web, a file that is not to be given away."""
    problems = []
    try:
        if action.op == "navigate":
            absolute_url(action.text, "https://any.invalid/")
        for path in action.texts if action.op == "upload" else ():
            allowed_file(path, folders)
    except (ValueError, OSError) as error:
        problems.append(f".value: {error}")
    return problems
