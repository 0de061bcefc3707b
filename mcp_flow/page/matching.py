"""Which texts match what an agent looks for, also when its regular expression would never come to an end."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Sequence

import anyio

from mcp_flow.errors import InvalidInput

LONGEST = 200
CPU_SECONDS = 0.5
"""How long an expression may be matched: processor time, so that a busy machine refuses no more than an idle one."""
SECONDS = 3.0
"""How long it may be waited for in any case."""

# Python matches with its lock held: no thread could go on meanwhile, and none could end it.
_MATCHER = """
import re, signal, sys
signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
find, *texts = sys.stdin.buffer.read().decode().split("\\n")
search = re.compile(bytes.fromhex(find).decode(), re.IGNORECASE).search
print(*(number for number, text in enumerate(texts) if search(text)))
"""


async def matching(find: str, texts: Sequence[str]) -> frozenset[int]:
    """The numbers of the `texts` that hold `find` as plain text or match it as a regular expression.

    Case makes no difference. Raises `InvalidInput` for what is no expression, or takes too long.
    """
    expression = _compiled(find)
    plain = find.casefold()
    held = frozenset(number for number, text in enumerate(texts) if plain in text.casefold())
    if find.isalnum():
        return held
    if _quick(find):
        return held | {number for number, text in enumerate(texts) if expression.search(text)}
    return held | await _matched_aside(find, texts)


def _compiled(find: str) -> re.Pattern[str]:
    if not find.strip() or len(find) > LONGEST:
        raise InvalidInput(f"find takes a text or regular expression of 1 to {LONGEST} characters.")
    try:
        return re.compile(find, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidInput(
            f"find={find!r} is no regular expression: {error}. Write a backslash before each of "
            "the characters . ^ $ * + ? { } [ ] ( ) | \\ that stands for itself."
        ) from error


def _quick(find: str) -> bool:
    """Whether matching takes no more steps than there are characters: nothing repeats, no alternatives multiply."""
    return not re.search(r"[*+?{]", find) and not ("(" in find and "|" in find)


async def _matched_aside(find: str, texts: Sequence[str]) -> frozenset[int]:
    """Like `matching`, in a process that its own timer ends."""
    lines = [find.encode("utf-8", "replace").hex(), *(text.replace("\n", " ") for text in texts)]
    command = [sys.executable, "-I", "-S", "-c", _MATCHER, str(CPU_SECONDS)]
    try:
        with anyio.fail_after(SECONDS):
            done = await anyio.run_process(command, input="\n".join(lines).encode("utf-8", "replace"), check=False)
    except TimeoutError:
        raise _endless(find) from None
    if done.returncode == -signal.SIGPROF:
        raise _endless(find)
    if done.returncode:
        raise RuntimeError(f"matching ended with {done.returncode}: {done.stderr.decode(errors='replace')}")
    return frozenset(map(int, done.stdout.split()))


def _endless(find: str) -> InvalidInput:
    return InvalidInput(
        f"find={find!r} takes too long on this page's text: repeats within repeats, such as (a+)+, have too many "
        "ways to match. Look for plain text, or repeat single characters only."
    )
