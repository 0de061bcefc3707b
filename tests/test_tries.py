"""When the next try of a step comes."""

from __future__ import annotations

import pytest

from mcp_flow.tries import seconds_before_next


@pytest.mark.parametrize(("number", "most"), [(1, 0.5), (2, 1.0), (3, 2.0), (20, 30.0)])
def test_the_wait_before_a_try_is_drawn_up_to_a_limit_that_doubles_and_is_capped(number: int, most: float) -> None:
    drawn = [seconds_before_next(0.5, number) for _ in range(200)]
    assert 0 <= min(drawn) < most / 2 < max(drawn) <= most


def test_a_backoff_of_ones_own_is_asked_with_the_number_of_the_try() -> None:
    assert [seconds_before_next(lambda n: n - 2, number) for number in (1, 2, 5)] == [0, 0, 3]
