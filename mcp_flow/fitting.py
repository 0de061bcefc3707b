"""Whether a value fits a JSON schema, as the type that pydantic wrote it for would say. Pure."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from functools import cache, partial
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from re import Pattern
from typing import Any
from uuid import UUID

import jsonschema
from pydantic import AnyUrl, IPvAnyAddress, IPvAnyInterface, IPvAnyNetwork, TypeAdapter

_FORMAT_TYPES: dict[str, Any] = {
    "date": date,
    "date-time": datetime,
    "time": time,
    "duration": timedelta,
    "uuid": UUID,
    "uri": AnyUrl,
    "ipv4": IPv4Address,
    "ipv6": IPv6Address,
    "ipvanyaddress": IPvAnyAddress,
    "ipv4network": IPv4Network,
    "ipv6network": IPv6Network,
    "ipvanynetwork": IPvAnyNetwork,
    "ipv4interface": IPv4Interface,
    "ipv6interface": IPv6Interface,
    "ipvanyinterface": IPvAnyInterface,
    "regex": Pattern[str],
} | {f"uuid{version}": UUID for version in (1, 3, 4, 5, 6, 7, 8)}
"""The type for which pydantic writes each format into a schema; email is not here, for its type needs a package."""


def problems_of(value: Any, schema: Mapping[str, Any], *, secret: bool) -> list[str]:
    """What of `value` does not fit, one text for each; without the value itself if it is `secret`."""
    validator = _Validator(schema, format_checker=_formats())
    return [
        f"{'.'.join(map(str, error.absolute_path)) or 'the answer'}: {_said(error, secret)}"
        for error in validator.iter_errors(value)
    ]


@cache
def _formats() -> jsonschema.FormatChecker:
    """What the formats of a schema admit: the texts that pydantic reads as that type."""
    checker = jsonschema.FormatChecker(formats=())
    for name, kind in _FORMAT_TYPES.items():
        checker.checks(name, raises=ValueError)(partial(_is_read_as, TypeAdapter(kind)))
    checker.checks("email")(lambda value: not isinstance(value, str) or "@" in value.strip("@"))
    return checker


def _is_read_as(kind: TypeAdapter[Any], value: Any) -> bool:
    if isinstance(value, str):
        kind.validate_json(json.dumps(value))
    return True


def _unless_foreign(check: Callable[..., Any]) -> Callable[..., Iterator[jsonschema.ValidationError]]:
    """The check of a pattern, which the type alone makes where only pydantic's kind of expression has such a one."""

    def checked(validator: Any, pattern: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
        with contextlib.suppress(re.error):
            yield from check(validator, pattern, value, schema)

    return checked


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    {
        word: _unless_foreign(jsonschema.Draft202012Validator.VALIDATORS[word])
        for word in ("pattern", "patternProperties")
    },
)


def _said(error: jsonschema.ValidationError, secret: bool) -> str:
    """What is wrong; of an answer that holds a secret without the value itself."""
    return f"it must satisfy {error.validator}: {error.validator_value}"[:300] if secret else error.message[:300]
