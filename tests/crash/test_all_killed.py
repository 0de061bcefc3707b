"""Worker, server and browser host are killed at once, as when a machine ends.

A run without a page, which has no need of the host, loses them at every boundary; one with a page before one commit of
each kind that has to do with it: what is left is the journal, so a boundary's after is the before of the next, but for
the effect in between. With `MCP_FLOW_TEST_MATRIX=full` all die on both sides of all boundaries of both.
"""

from __future__ import annotations

import pytest
from matrix import FULL, Matrix, one_of_each_kind

pytestmark = pytest.mark.anyio


async def test_after_the_death_of_all_at_any_boundary_others_go_on_where_the_journal_ends(matrix: Matrix) -> None:
    boundaries = await matrix.boundaries(paged=False)
    await matrix.play([b.fault("all", when) for b in boundaries for when in ("before", "after")], paged=False)


async def test_after_the_death_of_all_at_any_boundary_of_its_page_a_run_goes_on_in_a_rebuilt_one(
    matrix: Matrix,
) -> None:
    elsewhere = {boundary.event for boundary in await matrix.boundaries(paged=False)}
    boundaries = await matrix.boundaries(paged=True)
    chosen = boundaries if FULL else one_of_each_kind([b for b in boundaries if b.event not in elsewhere])
    faults = [b.fault("all", when) for b in chosen for when in (("before", "after") if FULL else ("before",))]
    await matrix.play(faults, paged=True, side_by_side=1)
