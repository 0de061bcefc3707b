"""Looking at a page as an agent does: what stands where in an answer, and following the calls in it."""

from __future__ import annotations

import json
import re
from typing import Any

from hypothesis import strategies as st
from playwright.async_api import Page

from mcp_flow.page.looks import Looks
from mcp_flow.page.snapshot import Look, look

CALL = 'snapshot(run_id="r1"'
FACTS = ["run r1 (shop): paused at step pay", 'next: resume(run_id="r1")']
KEY = ("r1", "main")

HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=60),
        st.text(st.sampled_from("<>[]()\"'\\\n\r\t\x00\x1b\u2028\u202e\u200b\ud800: #-=.refnd0"), max_size=60),
        st.sampled_from(["<<end>>", '- button "Pay" [ref=e1]', "\n- link [ref=e9]", "[ref=e2] [cursor=pointer]:"]),
    ),
    min_size=4,
    max_size=4,
)
"""Four texts of a page that would be taken for the server's."""

_LITERAL = re.compile(r"snapshot\(run_id=\"r1\"((?:, \w+=(?:\d+|\"(?:[^\"\\]|\\.)*\"))*)\)")
_ARGUMENT = re.compile(r"(\w+)=(\d+|\"(?:[^\"\\]|\\.)*\")")


class Eyes:
    """An agent's looks at one page of one server."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.looks = Looks()

    async def __call__(self, html: str | None = None, **options: Any) -> Look:
        if html is not None:
            await self.page.set_content(html)
        given: dict[str, Any] = {"looks": self.looks, "key": KEY, "facts": FACTS, "call": CALL, "pages": ["main"]}
        return await look(self.page, **(given | options))

    async def follow(self, **options: Any) -> tuple[list[Look], set[str]]:
        """The looks that come of following every literal call from the first on, and the refs that they show.

        None of them may be longer than its own call allows.
        """
        asked: set[str] = set()
        waiting = [options]
        seen = []
        refs: set[str] = set()
        while waiting:
            given = waiting.pop()
            answer = await self(**given)
            assert len(answer.text) <= given.get("max_chars", 8000), given
            seen.append(answer)
            refs |= refs_in(answer.text)
            for arguments in calls_in(answer.text):
                if str(arguments) not in asked:
                    asked.add(str(arguments))
                    waiting.append(arguments)
            assert len(seen) < 300, "the calls never come to an end"
        return seen, refs


def inside(text: str) -> str:
    """What stands between the markers."""
    found = re.search(r"<<page text (\w+): [^\n]*>>\n(.*)\n<<end \1>>", text, re.DOTALL)
    assert found
    return found[2]


def outside(text: str) -> str:
    """What the server says itself."""
    return text.replace(inside(text), "")


def body(text: str) -> list[str]:
    """The lines of the page, without its title and errors."""
    return [line for line in inside(text).split("\n") if re.match(r"[+~ -]? *- ", line)]


def refs_in(text: str) -> set[str]:
    return set(re.findall(r"\[ref=(\w+)\]", inside(text)))


def calls_in(text: str) -> list[dict[str, Any]]:
    """The arguments of the literal calls that the server gives."""
    found = [
        {name: json.loads(value) for name, value in _ARGUMENT.findall(call)} for call in _LITERAL.findall(outside(text))
    ]
    return [arguments for arguments in found if arguments]
