"""Tools for what runs wait for: the list of open requests, and decisions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mcp.server.mcpserver import Context
from mcp_types import CallToolResult
from pydantic import Field

from mcp_flow.tools import state
from mcp_flow.tools.register import answer
from mcp_flow.tools.runs import AGENT, Wait

Kind = Literal["pause", "input", "approval", "event", "timer", "in-doubt", "takeover"]


async def list_pending(
    ctx: Context[Any],
    run_id: str | None = None,
    kind: Kind | None = None,
    limit: Annotated[int, Field(ge=1, le=200)] = 20,
    cursor: str | None = None,
) -> CallToolResult:
    """What runs wait for, oldest first: question, who may answer, age, and the literal call that answers.
    Timers and events only when asked for by kind."""
    app = await state.app(ctx)
    return answer(await state.pending(app, run_id, kind, limit, cursor))


async def approve(
    ctx: Context[Any],
    request_id: str,
    decision: Literal["approve", "deny"] = "approve",
    note: Annotated[str | None, Field(max_length=2000)] = None,
    wait_s: Wait = 20,
) -> CallToolResult:
    """Decide an approval; the run goes on by itself. It covers the question and data shown, nothing else."""
    app = await state.app(ctx)
    run_id = await app.control.approve(request_id, AGENT, decision, note)
    return answer(await state.watched(ctx, app, run_id, wait_s))
