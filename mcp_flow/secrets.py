"""Secrets by name, and keeping their values out of everything that is written or shown."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

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
_SHORTEST_MASKED = 4
"""Shorter values occur everywhere by chance; masking them would only tell what they are."""


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

    def mask(self, text: str) -> str:
        """`text` with every known secret's value replaced by its name."""
        for name, value in self._known.items():
            if len(value) >= _SHORTEST_MASKED:
                text = text.replace(value, f"[secret {name}]").replace(json.dumps(value)[1:-1], f"[secret {name}]")
        return text

    def held_in(self, content: bytes) -> list[str]:
        """The names of the known secrets whose value stands in `content`, as it is or as JSON writes it."""
        return [
            name
            for name, value in self._known.items()
            if len(value) >= _SHORTEST_MASKED
            and any(form.encode("utf-8", "replace") in content for form in {value, json.dumps(value)[1:-1]})
        ]

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
