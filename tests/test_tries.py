"""When the next try of a step comes, and when its start is written."""

from __future__ import annotations

import asyncio

import pytest

from mcp_flow.errors import FlowError, LeaseLost, StoreError
from mcp_flow.events import StepStarted
from mcp_flow.tries import Start, seconds_before_next

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("number", "most"), [(1, 0.5), (2, 1.0), (3, 2.0), (20, 30.0)])
def test_the_wait_before_a_try_is_drawn_up_to_a_limit_that_doubles_and_is_capped(number: int, most: float) -> None:
    drawn = [seconds_before_next(0.5, number) for _ in range(200)]
    assert 0 <= min(drawn) < most / 2 < max(drawn) <= most


def test_a_backoff_of_ones_own_is_asked_with_the_number_of_the_try() -> None:
    assert [seconds_before_next(lambda n: n - 2, number) for number in (1, 2, 5)] == [0, 0, 3]


@pytest.mark.parametrize(("refusal", "with_the_end"), [(StoreError("locked"), True), (LeaseLost("late"), False)])
async def test_a_start_that_the_journal_could_not_take_is_written_with_the_end(
    refusal: FlowError, with_the_end: bool
) -> None:
    event = StepStarted(key="a#1", fingerprint="f")
    queued: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def append(event: StepStarted) -> None:
        raise AssertionError("it was queued already")

    start = Start(event, append, lambda _: queued)
    start.write_soon()
    queued.set_exception(refusal)
    assert await start.unwritten() == ((event,) if with_the_end else ())
