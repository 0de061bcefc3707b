"""The server is killed at every boundary of the moves that it makes; its client makes the last one again."""

from __future__ import annotations

import pytest
from matrix import Matrix

pytestmark = pytest.mark.anyio


async def test_a_server_killed_at_any_boundary_of_its_moves_is_followed_by_one_that_takes_the_move_again(
    matrix: Matrix,
) -> None:
    boundaries = await matrix.moves()
    await matrix.play([b.fault("server", when) for b in boundaries for when in ("before", "after")], paged=False)
