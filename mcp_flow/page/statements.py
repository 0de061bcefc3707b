"""Python statements that do what was done to a page, ready to be pasted into a workflow. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from mcp_flow.page.guard import INVISIBLE, whole

_UNSEEN = re.compile(f"{INVISIBLE.pattern}|[\u2028\u2029]")


def literal(text: str) -> str:
    """`text` as Python."""
    return escaped(json.dumps(whole(text), ensure_ascii=False))


def literals(texts: Sequence[str]) -> str:
    """One text as itself, several as a list."""
    return literal(texts[0]) if len(texts) == 1 else f"[{', '.join(map(literal, texts))}]"


def escaped(code: str) -> str:
    """`code` with nothing in its strings that an editor would not show."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], whole(code))


def opening(statement: str, expected: str, variable: str) -> str:
    """A statement together with the wait for what it opens: `popup`, found by `page.expect_popup()`."""
    body = "\n".join(f"    {line}" for line in statement.split("\n"))
    return f"async with {expected} as opening:\n{body}\n{variable} = await opening.value"
