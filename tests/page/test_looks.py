"""What a server remembers of the pages it has seen, and what it forgets."""

from __future__ import annotations

import pytest

from mcp_flow.errors import InvalidInput
from mcp_flow.page.looks import LOOKS_KEPT, Looks
from mcp_flow.page.tree import Line, parse

KEY = ("r1", "main")


def lines(count: int, name: str = "Pay") -> list[Line]:
    return parse("\n".join(f'- button "{name}" [ref=e{number}]' for number in range(count)))


def test_looks_are_numbered_for_each_page_and_the_last_ones_are_kept() -> None:
    looks = Looks()
    for number in range(1, LOOKS_KEPT + 3):
        assert looks.add(KEY, "d", lines(1), whole=True).number == number
    assert looks.add(("r1", "mail"), "d", lines(1), whole=True).number == 1
    assert looks.numbered(KEY, 3).number == 3
    with pytest.raises(InvalidInput, match=r"Look 2 .* remembered are: 3, .*, 10\. .*mode=\"outline\""):
        looks.numbered(KEY, 2)
    with pytest.raises(InvalidInput, match="are: none"):
        looks.numbered(("r2", "main"), 1)


def test_a_look_that_is_compared_with_again_and_again_is_kept() -> None:
    looks = Looks()
    first = looks.add(KEY, "d", lines(1), whole=True)
    for _ in range(2 * LOOKS_KEPT):
        assert looks.numbered(KEY, 1) is first
        latest = looks.add(KEY, "d", lines(2), whole=True)
        assert looks.last(KEY) is latest


def test_a_look_that_showed_a_part_is_not_taken_for_one_that_showed_the_whole() -> None:
    looks = Looks()
    assert looks.last(KEY) is None
    whole = looks.add(KEY, "d", lines(1), whole=True)
    part = looks.add(KEY, "d", lines(2), whole=False)
    assert looks.last(KEY) is part
    assert looks.last(KEY, whole=True) is whole


def test_the_pages_least_looked_at_go_first_and_the_present_one_stays() -> None:
    looks = Looks(lines_kept=10)
    for run in ("a", "b", "a"):
        looks.add((run, "main"), "d", lines(3), whole=True)
    looks.add(("c", "main"), "d", lines(3), whole=True)
    assert looks.last(("b", "main")) is None
    assert looks.last(("a", "main"))
    big = looks.add(("d", "main"), "d", lines(50), whole=True)
    assert looks.last(("d", "main")) is big
    assert looks.last(("a", "main")) is None
    assert looks.add(("a", "main"), "d", lines(1), whole=True).number == 3, "a number never means two looks"


def test_a_stale_ref_is_known_by_the_line_that_last_showed_it() -> None:
    looks = Looks()
    looks.add(KEY, "d", lines(2, "Pay"), whole=True)
    looks.add(KEY, "d", lines(1, "Buy"), whole=False)
    assert looks.line(KEY, "e1") == lines(2, "Pay")[1]
    assert looks.line(KEY, "e0") == lines(1, "Buy")[0]
    assert looks.line(KEY, "e9") is None


def test_only_what_a_log_has_gained_is_news() -> None:
    looks = Looks()
    assert looks.news(KEY, "error", "ab") == 2
    assert looks.news(KEY, "error", "ab") == 0
    assert looks.news(KEY, "error", "abb") == 1
    assert looks.news(KEY, "error", "bbc") == 1, "the log holds so many and lost its oldest"
    assert looks.news(KEY, "other", "x") == 1
    assert looks.news(KEY, "error", "") == 0
    assert looks.news(KEY, "error", "b") == 1
