"""Python statements that do what was done to a page, ready to be pasted into a workflow. Pure."""

from __future__ import annotations

import ast
import json
import keyword
import re
from collections.abc import Sequence

from mcp_flow.page.guard import INVISIBLE, shortened, whole

LONGEST = 4000
"""How long a statement may be before its texts are shortened."""
OPENED = "popup = await opening.value"
"""How the statement ends that opens a popup."""
_LONGEST_TEXT = 300
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_FUNCTION = re.compile(r"\s*(?:async\b|function\b|\([^()]*\)\s*=>|[\w$]+\s*=>)")
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


def within(statement: str, limit: int = LONGEST) -> str:
    """`statement`, or where it is longer than `limit` the same with its long texts shortened, which say so."""
    if len(statement) <= limit:
        return statement
    return _TEXT.sub(lambda found: literal(shortened(ast.literal_eval(found[0]), _LONGEST_TEXT)), statement)


def variable(name: str) -> tuple[str, str | None]:
    """What a run's page of this name is called in statements, and the statement that makes it so, if one must."""
    if name == "main":
        return "page", None
    word = re.sub(r"\W", "_", name)
    if not word.isidentifier() or keyword.iskeyword(word) or word in ("page", "flow"):
        word = f"page_{word}"
    return word, f"{word} = await flow.page({literal(name)})"


def evaluation(found: str, code: str, *, bound: bool) -> str:
    """The statement that evaluates `code` where `found` is: the page, or with `bound` the element that it knows."""
    # Playwright takes an expression or a function; whatever has to be more than that becomes the body of one.
    if not _FUNCTION.match(code) and (bound or re.search(r"\b(?:return|await)\b", code)):
        code = f"async {'(element)' if bound else '()'} => {{\n{code}\n}}"
    return f"await {found}.evaluate({literal(code)})"
