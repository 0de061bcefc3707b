"""Canonical values and their hashes: whether a step was reached with the arguments that it finished with. Pure.

What is compared is data; anything else (pages, functions, iterators) counts as its type alone and is never iterated,
because looking into it could consume it or differ between processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from types import CodeType, FunctionType
from typing import Any
from uuid import UUID

from pydantic import BaseModel, SecretBytes, SecretStr

_TEXTUAL = (datetime, date, time, timedelta, Decimal, UUID, PurePath)
_DEPTH = 64
_PLAIN = frozenset({type(None), bool, int, str})
_ENCODER = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


def of_call(fn: Callable[..., Any], args: tuple[Any, ...], mask: Callable[[str], str] | None = None) -> str:
    """The fingerprint of calling `fn(*args)`: arguments, closure cells, and a local function's defaults.

    `mask` puts names in the place of secrets: a hash of a short code tells the code to whoever tries them all.
    """
    if mask is None and type(fn) is FunctionType and not (fn.__closure__ or fn.__defaults__ or fn.__kwdefaults__):
        # A module's own function called with plain values is the most usual case, and has the same result as below.
        module_level = "<" not in fn.__qualname__
        if module_level and _PLAIN.issuperset(map(type, args)):
            return _digest(["list", ["list", *args]])
    parts: list[Any] = [args]
    while isinstance(fn, functools.partial):
        parts.append([fn.args, fn.keywords])
        fn = fn.func
    code = getattr(fn, "__code__", None)
    if cells := getattr(fn, "__closure__", None):
        parts.append([_cell(cell) for cell in cells])
    if code is not None and (code.co_name == "<lambda>" or "<locals>" in getattr(fn, "__qualname__", "")):
        parts.append([getattr(fn, "__defaults__", None), getattr(fn, "__kwdefaults__", None)])
    return of(parts) if mask is None else _digest(_masked(canonical(parts), mask))


def _masked(value: Any, mask: Callable[[str], str]) -> Any:
    """A canonical value with all its texts masked, and those of bytes and whole numbers where a secret is in them."""
    match value:
        case str():
            return mask(value)
        case int() if type(value) is int:
            text = str(value)
            return value if (shown := mask(text)) == text else shown
        case ["bytes", str() as digits]:
            with contextlib.suppress(ValueError):  # a pair of texts in a dict looks the same
                text = bytes.fromhex(digits).decode("utf-8", "replace")
                if (shown := mask(text)) != text:
                    return ["bytes", shown]
            return ["bytes", mask(digits)]
        case list():
            return [_masked(item, mask) for item in value]
        case dict():
            return {mask(name): _masked(item, mask) for name, item in value.items()}
        case _:
            return value


def of_code(fn: Callable[..., Any]) -> str:
    """The hash of a function's own code, whatever file and line it stands in; empty where it is not the author's."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(fn, "__code__", None)
    if code is None or (getattr(fn, "__module__", None) or "").startswith("playwright."):
        return ""
    return _of_code(code)


@functools.lru_cache(maxsize=4096)
def _of_code(code: CodeType) -> str:
    return hashlib.sha256(repr(_code(code)).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _code(value: Any) -> Any:
    """What a function is made of, without the places where it stands."""
    match value:
        case CodeType():
            return (value.co_code, value.co_names, value.co_varnames, [_code(const) for const in value.co_consts])
        case frozenset():  # in an order that does not depend on the process
            return sorted(repr(_code(item)) for item in value)
        case tuple():
            return [_code(item) for item in value]
        case _:
            return value


def of(value: Any) -> str:
    """The sha256 of `value`'s canonical JSON, in hex, cut to 32 digits: 128 bits tell any two arguments apart."""
    return _digest(canonical(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(_ENCODER.encode(value).encode()).hexdigest()[:32]


def canonical(value: Any, _above: tuple[int, ...] = ()) -> Any:
    """`value` as JSON that is the same in every process; tagged where two kinds could look alike."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return ["float", repr(value)]
    # What holds itself is told from its own path: two such references a level would double the work at each level.
    if len(_above) > _DEPTH or id(value) in _above:
        return ["deep"]
    within = (*_above, id(value))
    if isinstance(value, list | tuple):
        return ["list", *(canonical(item, within) for item in value)]
    if isinstance(value, Enum):
        return ["text", kind.__qualname__, value.name]
    if isinstance(value, SecretStr | SecretBytes):
        return ["type", kind.__qualname__]
    if isinstance(value, dict):
        return [
            "dict",
            *_sorted([[canonical(k, within), canonical(v, within)] for k, v in value.items()]),
        ]
    if isinstance(value, set | frozenset):
        return ["set", *_sorted([canonical(item, within) for item in value])]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, _TEXTUAL):
        return ["text", kind.__qualname__, str(value)]
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name, None) for name in kind.model_fields} | (value.model_extra or {})
        return ["model", kind.__qualname__, _fields(fields, within)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        return ["model", kind.__qualname__, _fields(fields, within)]
    if isinstance(value, bool | int | float | str):  # a subclass of one of them: by value all the same
        return ["text", kind.__qualname__, str(value)]
    return ["type", f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"]


def _fields(fields: Mapping[str, Any], above: tuple[int, ...]) -> dict[str, Any]:
    return {name: canonical(value, above) for name, value in fields.items()}


def _sorted(items: list[Any]) -> list[Any]:
    return sorted(items, key=lambda item: json.dumps(item, sort_keys=True))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
