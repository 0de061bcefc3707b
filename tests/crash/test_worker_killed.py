"""The worker is killed at every boundary of its run, on either side of the commit; another carries on.

Of the boundaries that have to do with a page only the side before the commit is played, between effect and record,
unless `MCP_FLOW_TEST_MATRIX=full` is set.
"""

from __future__ import annotations

import pytest
from matrix import FULL, Matrix

pytestmark = pytest.mark.anyio


async def test_a_worker_killed_at_any_boundary_is_followed_by_one_that_repeats_nothing_finished(matrix: Matrix) -> None:
    boundaries = await matrix.boundaries(paged=False)
    await matrix.play([b.fault("worker", when) for b in boundaries for when in ("before", "after")], paged=False)


async def test_a_worker_killed_at_any_boundary_that_has_to_do_with_its_page_leaves_the_page_to_the_next(
    matrix: Matrix,
) -> None:
    elsewhere = {boundary.event for boundary in await matrix.boundaries(paged=False)}
    boundaries = [b for b in await matrix.boundaries(paged=True) if b.event not in elsewhere]
    sides = ("before", "after") if FULL else ("before",)
    await matrix.play([b.fault("worker", when) for b in boundaries for when in sides], paged=True)
