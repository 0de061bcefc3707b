"""Secrets by name, and keeping their values out of everything that is written or shown."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

from mcp_flow.errors import StepError

SECRET_FIELDS = ", ".join(
    ["input[type=password]"]
    + [
        f'{tag}[autocomplete~="{word}" i]'
        for word in ("cc-number", "cc-csc", "one-time-code", "current-password", "new-password")
        for tag in ("input", "textarea")
    ]
)
"""The fields of a page whose values nobody is shown, as a CSS selector."""
HIDDEN = "[hidden]"
_DEEPEST = 12
_SHORTEST_MASKED = 4
"""Shorter values occur within words and numbers by chance; they count where they stand alone in a text."""
_SHORTEST = 2
"""A single character stands alone everywhere; masking it would only tell what it is."""


Place = tuple[str, ...]
REFERENCE = "$secret"


def secret_places(schema: Any) -> list[Place]:
    """Where in a value of this JSON Schema a secret stands: the paths of what pydantic types `SecretStr`.

    Through objects, references and choices; `*` stands for every item of a list and every value of a dict.
    """
    return list(dict.fromkeys(_places(schema, schema, (), 0)))


def _places(whole: Any, schema: Any, path: Place, depth: int) -> Iterator[Place]:
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return
    if schema.get("writeOnly") and schema.get("format") == "password":
        yield path
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#/$defs/"):
        yield from _places(whole, whole.get("$defs", {}).get(reference.removeprefix("#/$defs/")), path, depth + 1)
    for word in ("anyOf", "allOf", "oneOf"):
        for choice in schema.get(word, ()):
            yield from _places(whole, choice, path, depth + 1)
    for name, part in schema.get("properties", {}).items():
        yield from _places(whole, part, (*path, name), depth + 1)
    patterns = schema.get("patternProperties", {}).values()
    for part in (schema.get("items"), schema.get("additionalProperties"), *schema.get("prefixItems", ()), *patterns):
        yield from _places(whole, part, (*path, "*"), depth + 1)


def set_apart(value: Any, places: Sequence[Place], new_reference: Callable[[], str]) -> tuple[Any, dict[str, str]]:
    """`value` with a reference in the place of each secret, and the secrets by reference."""
    kept: dict[str, str] = {}

    def apart(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        reference = new_reference()
        kept[reference] = value
        return {REFERENCE: reference}

    return _changed(value, places, apart), kept


def reveal(value: Any, places: Sequence[Place], kept: Mapping[str, str]) -> Any:
    """`value` with the secrets in the places of their references; raises `StepError` for one that is erased.

    Elsewhere a reference is an answer like any other: who knows one must not get at its secret by giving it.
    """

    def found(value: Any) -> Any:
        if not isinstance(value, Mapping) or value.keys() != {REFERENCE}:
            return value
        if (reference := value[REFERENCE]) not in kept:
            raise StepError("A secret that was given as an answer is erased; its question must be asked again.")
        return kept[reference]

    return _changed(value, places, found)


def _changed(value: Any, places: Sequence[Place], change: Callable[[Any], Any]) -> Any:
    """`value` with what stands in these places changed."""
    if () in places:
        return change(value)
    match value:
        case Mapping() if places:
            return {
                name: _changed(item, [p[1:] for p in places if p[0] in (name, "*")], change)
                for name, item in value.items()
            }
        case list() if places:
            return [_changed(item, [p[1:] for p in places if p[0] == "*"], change) for item in value]
        case _:
            return value


def masked(text: str, known: Mapping[str, str]) -> str:
    """`text` with the value of every secret in it, by name, replaced by that name."""
    for name, value in known.items():
        for form in _forms(value):
            text = text.replace(form, f"[secret {name}]")
        if alone := _alone(value):
            text = alone.sub(lambda _, name=name: f"[secret {name}]", text)  # type: ignore[misc]
    return text


def masked_in(value: Any, known: Mapping[str, str]) -> Any:
    """A JSON value with all its texts `masked`."""
    match value:
        case str():
            return masked(value, known)
        case dict():
            return {masked(name, known): masked_in(item, known) for name, item in value.items()}
        case list():
            return [masked_in(item, known) for item in value]
        case _:
            return value


def names_in(value: Any, known: Mapping[str, str]) -> list[str]:
    """The names of the secrets that stand in a JSON value, however they are written; a short one alone in a text."""
    texts = "\n".join(_texts(value))
    everything = f"{json.dumps(value)}\n{texts}"
    return [
        name
        for name, secret in known.items()
        if any(form in everything for form in _forms(secret)) or ((alone := _alone(secret)) and alone.search(texts))
    ]


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for name, item in value.items():
                yield name
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


@cache
def _alone(value: str) -> re.Pattern[str] | None:
    """Where a short secret stands alone; None for one that is long, or too short to be one."""
    return re.compile(rf"(?<!\w){re.escape(value)}(?!\w)") if _SHORTEST <= len(value) < _SHORTEST_MASKED else None


@cache
def _forms(value: str) -> tuple[str, ...]:
    """How a secret may be written: as it is, in JSON, in an address. Those of a short one are none."""
    if len(value) < _SHORTEST_MASKED:
        return ()
    text = value.encode("utf-8", "replace")
    return tuple(dict.fromkeys((value, json.dumps(value)[1:-1], quote(text, safe=""), quote_plus(text))))


class Secrets:
    """The secrets of a home folder; what was asked for is masked from then on."""

    def __init__(self, home: Path) -> None:
        self._file = home / "secrets.toml"
        self._known: dict[str, str] = {}

    def get(self, name: str) -> str:
        """The value of a secret; raises `StepError` when there is none or its file is open to others."""
        variable = "MCP_FLOW_SECRET_" + re.sub(r"\W", "_", name).upper()
        value = os.environ.get(variable) or self._read().get(name)
        if not isinstance(value, str) or not value:
            raise StepError(f"There is no secret {name!r}: set {variable}, or put it into {self._file} (mode 0600).")
        self._known[name] = value
        return value

    def values(self) -> dict[str, str]:
        """All secrets of this process and home folder by name, asked for or not: whoever shows a page hides them."""
        stem = "MCP_FLOW_SECRET_"
        environment = {name.removeprefix(stem): value for name, value in os.environ.items() if name.startswith(stem)}
        kept = self._read() if os.access(self._file, os.R_OK) else {}
        everything = environment | kept | self._known
        return {name: value for name, value in everything.items() if isinstance(value, str) and value}

    @property
    def known(self) -> dict[str, str]:
        """Those that were asked for or learned, by name."""
        return dict(self._known)

    def know(self, name: str, value: str) -> None:
        """Mask this value from now on, as that of the secret `name`."""
        self._known[name] = value

    def mask(self, text: str) -> str:
        """`text` with every known secret's value replaced by its name."""
        return masked(text, self._known)

    def held_in(self, content: bytes) -> list[str]:
        """The names of the known secrets whose value stands in `content`, however it is written; no short ones."""
        return [
            name
            for name, value in self._known.items()
            if any(form.encode("utf-8", "replace") in content for form in _forms(value))
        ]

    def held_in_json(self, text: str) -> list[str]:
        """The names of the known secrets whose value stands in a text of JSON."""
        return names_in(json.loads(text), self._known) if self._known else []

    def _read(self) -> dict[str, object]:
        try:
            mode = self._file.stat().st_mode & 0o077
        except FileNotFoundError:
            return {}
        if mode:
            raise StepError(f"{self._file} can be read by others. Run: chmod 600 {self._file}")
        try:
            return tomllib.loads(self._file.read_text())
        except tomllib.TOMLDecodeError as error:
            raise StepError(f"{self._file} is not TOML: {error}.") from error
