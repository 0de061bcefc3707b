"""Tools for what runs wait for: the list of open requests, and decisions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from mcp.server.mcpserver import AcceptedElicitation, Context, ElicitationResult, Resolve
from mcp_types import CallToolResult
from pydantic import Field

from mcp_flow.tools import asking, state
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
    person: Annotated[ElicitationResult[asking.Verdict], Resolve(asking.verdict)],
    request_id: str,
    decision: Literal["approve", "deny"] = "approve",
    note: Annotated[str | None, Field(max_length=2000)] = None,
    wait_s: Wait = 20,
) -> CallToolResult:
    """Decide an approval; the run goes on by itself. It covers the question and data shown, nothing else."""
    app = await state.app(ctx)
    match person:
        case AcceptedElicitation(data=asking.Verdict() as said):
            run_id = await app.control.approve(request_id, asking.PERSON, said.decision, said.note)
        case AcceptedElicitation():  # there was nobody to ask
            run_id = await app.control.approve(request_id, AGENT, decision, note)
        case _:
            return answer(await asking.undecided(ctx, app, request_id, person))
    return answer(await state.watched(ctx, app, run_id, wait_s))


async def send_event(
    ctx: Context[Any],
    name: Annotated[str, Field(min_length=1, max_length=200)],
    payload: Any = None,
    run_id: Annotated[str | None, Field(description="kept there until waited for; without: to all that wait")] = None,
    key: Annotated[str | None, Field(description="the same key again is the same event")] = None,
) -> CallToolResult:
    """Send an event that runs wait for with flow.wait_for."""
    app = await state.app(ctx)
    return answer(state.sent(name, await app.control.send_event(name, payload, AGENT, run_id, key), run_id))
