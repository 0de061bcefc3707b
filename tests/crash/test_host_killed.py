"""The browser host is killed under a run; its attempt ends, and the next one rebuilds the page by itself.

The worker lives on, so the two sides of a commit do not differ. Unless `MCP_FLOW_TEST_MATRIX=full` is set, the host is
killed at one boundary of every second kind: each case starts a browser.
"""

from __future__ import annotations

import pytest
from matrix import FULL, Matrix, one_of_each_kind

pytestmark = pytest.mark.anyio


async def test_a_run_whose_browser_host_is_killed_at_any_boundary_goes_on_in_a_rebuilt_page(matrix: Matrix) -> None:
    boundaries = await matrix.boundaries(paged=True)
    faults = [b.fault("host", "after") for b in (boundaries if FULL else one_of_each_kind(boundaries)[::2])]
    faults += [b.fault("host", "before") for b in boundaries if FULL]
    await matrix.play(faults, paged=True, side_by_side=1)
