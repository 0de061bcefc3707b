"""What an agent looks for is found, and no expression holds up whoever else is served."""

from __future__ import annotations

import asyncio
import time

import pytest

from mcp_flow.errors import InvalidInput
from mcp_flow.page.matching import SECONDS, matching

pytestmark = pytest.mark.anyio

LINES = ['- button "Pay (now)" [ref=e1]', "- paragraph [ref=e2]: apple", '- link "APPLE pie" [ref=e3]']


@pytest.mark.parametrize(
    ("find", "found"),
    [
        ("apple", {1, 2}),
        ("Pay (now)", {0}),
        ("pay .now.", {0}),
        ("^- paragraph", {1}),
        ("pie|pay", {0, 2}),
        (r"\bp\w+e\b", {2}),
        ("(?i)APPLE$", {1}),
        ("(pay|pie) ", {0}),
        ("a{3}", set()),
        ("plum", set()),
        ("plum+", set()),
    ],
)
async def test_plain_text_and_expressions_are_found_whatever_their_case(find: str, found: set[int]) -> None:
    assert await matching(find, LINES) == found


async def test_text_of_any_script_is_found() -> None:
    assert await matching("שָׁלוֹם+|😀", ["- text: שָׁלוֹם", "- text: hi 😀", "- text: hi"]) == {0, 1}


@pytest.mark.parametrize("find", ["[", "(", "*a", "a{99999999999}", "(?P<1>a)", "", "  ", "a" * 201])
async def test_what_is_no_expression_is_refused(find: str) -> None:
    with pytest.raises(InvalidInput, match=r"no regular expression|1 to 200 characters"):
        await matching(find, LINES)


@pytest.mark.parametrize("find", ["(a+)+$", "(a|a)" * 30 + "b", "((a)|a)" * 25 + "b"])
async def test_an_expression_without_end_is_an_error_while_everything_else_goes_on(find: str) -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0.005)
            turns += 1

    beside = asyncio.ensure_future(others())
    began = time.monotonic()
    with pytest.raises(InvalidInput, match="too long"):
        await matching(find, ["a" * 200 + "!"])
    took = time.monotonic() - began
    beside.cancel()
    assert took < SECONDS + 1
    assert turns > 20
