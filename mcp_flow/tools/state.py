"""How tools reach the app, wait for a run, and show what they found."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import anyio
from mcp.server.mcpserver import Context

from mcp_flow.errors import FlowError, InvalidInput
from mcp_flow.views import RunView, next_call, show_request_row, standing_at

if TYPE_CHECKING:
    from mcp_flow.app import App
    from mcp_flow.catalog import Description
    from mcp_flow.control import Sent
    from mcp_flow.run import Run
    from mcp_flow.store import RunRow

LONGEST_CALL = 180.0
"""Seconds that no call to a page takes which ends by itself, its turn behind others included."""


async def app(ctx: Context[Any]) -> App:
    """The app of this server, opened by the first call that needs it."""
    opened: App = await ctx.request_context.lifespan_context.app()
    return opened


def was_given(ctx: Context[Any], name: str) -> bool:
    """Whether the caller named this argument, be it with null."""
    params = getattr(ctx.request_context, "params", None)
    arguments = params.get("arguments") if isinstance(params, dict) else getattr(params, "arguments", None)
    return isinstance(arguments, dict) and name in arguments


@contextmanager
def carried_through() -> Iterator[None]:
    """What is done to a page in here ends, and is journaled, although its client cancels the call meanwhile."""
    with anyio.move_on_after(LONGEST_CALL, shield=True) as scope:
        yield
    if scope.cancelled_caught:
        raise FlowError(f"The page has kept the call for {LONGEST_CALL:g} s. get_run says where the run stands.")


async def watched(ctx: Context[Any], app: App, run_id: str, wait_s: float) -> RunView:
    """The run once it has stopped, or after `wait_s`, telling the caller of progress meanwhile."""

    async def tell(run: Run) -> None:
        progress = run.progress
        step = next(iter(run.running_steps()), None)
        message = progress.message if progress and progress.message else f"{run.status}: {step.key if step else ''}"
        await ctx.report_progress(run.seq, None, message)

    await app.control.run(run_id)
    return await app.view(await app.control.wait(run_id, wait_s, tell))


def following(app: App, run: Run) -> str:
    """The literal next call for a run."""
    return next_call(run, run.status, app.settings.typed)


def facts(app: App, run: Run) -> list[str]:
    """What the server itself says of a run in front of its page."""
    status = app.status(run)
    assert run.created
    lines = [f"run {run.run_id} ({run.created.workflow}): {status}"]
    if not run.ended and not run.error and (step := standing_at(run)):
        lines[0] += f" at step {step}"
    if run.error:
        at = f" at step {run.error.step}" if run.error.step else ""
        lines.append(f"failed{at} with {run.error.type}")
    lines.append(f"next: {next_call(run, status, app.settings.typed)}")
    return lines


def show_workflow(described: Description) -> dict[str, Any]:
    """A workflow as `list_workflows` shows it."""
    shown = {
        "name": described.name,
        "description": described.description,
        "input_schema": described.input_schema,
        "file": described.file,
        "line": described.line,
        "warnings": described.warnings or None,
    }
    return {name: value for name, value in shown.items() if value is not None}


async def registry(
    app: App,
    status: Sequence[str],
    workflow: str | None,
    query: str | None,
    limit: int,
    cursor: str | None,
    show: Callable[[RunRow, str, datetime], dict[str, Any]],
) -> dict[str, Any]:
    """A page of `list_runs`."""
    now = app.store.now()
    before = _cursor(cursor, 1)
    more: str | None = None
    rows = await app.control.runs(status, workflow, query, limit + 1, int(before[0]) if before else None)
    shown = [show(row, row.status, now) for row in rows[:limit]]
    if len(rows) > limit:
        more = _as_cursor([str(rows[limit - 1].no)])
    filters = {"status": list(status) or None, "workflow": workflow, "query": query, "limit": limit}
    view = {"runs": shown, "cursor": more, "next": _more("list_runs", more, filters) or 'get_run(run_id="…")'}
    return {name: value for name, value in view.items() if value is not None}


async def pending(app: App, run_id: str | None, kind: str | None, limit: int, cursor: str | None) -> dict[str, Any]:
    """A page of `list_pending`."""
    if run_id is not None:
        await app.control.run(run_id)
    after = _cursor(cursor, 2)
    kinds = [kind] if kind else ["pause", "input", "approval", "in-doubt", "takeover"]
    place = (after[0], after[1]) if after else None
    rows = await app.control.requests(run_id, kinds, limit + 1, place)
    now = app.store.now()
    shown = [show_request_row(row, now, app.settings.typed) for row in rows[:limit]]
    more = _as_cursor([rows[limit - 1].opened_at, rows[limit - 1].request.request_id]) if len(rows) > limit else None
    counts = await app.control.counts()
    filters = {"run_id": run_id, "kind": kind, "limit": limit}
    following = _more("list_pending", more, filters) or (shown[0]["answer"] if shown else "list_runs()")
    view = {
        "requests": shown,
        "failed": counts.get("failed", 0),
        "in_doubt": counts.get("in-doubt", 0),
        "cursor": more,
        "next": following,
    }
    return {name: value for name, value in view.items() if value is not None}


def sent(name: str, what: Sent, run_id: str | None) -> dict[str, Any]:
    """What became of an event that was sent."""
    note = None
    if what.before:
        note = "it was sent before under this key; nothing changed"
    elif what.kept:
        note = f"run {run_id} keeps it until it waits for it"
    elif not what.took:
        note = "no run waits for it; with a run_id it is kept"
    about = what.took[0] if what.took else run_id
    following = f"get_run(run_id={json.dumps(about)}, wait_s=20)" if about else None
    view = {
        "event": name,
        "taken_by": list(what.took),
        "note": note,
        "next": following or 'list_pending(kind="event")',
    }
    return {word: value for word, value in view.items() if value is not None}


def _more(tool: str, cursor: str | None, filters: dict[str, Any]) -> str | None:
    """The literal call for the next page; without its filters it would be the next page of something else."""
    if cursor is None:
        return None
    given = {name: value for name, value in filters.items() if value is not None} | {"cursor": cursor}
    return f"{tool}({', '.join(f'{name}={json.dumps(value)}' for name, value in given.items())})"


def _as_cursor(parts: list[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode()


def _cursor(cursor: str | None, parts: int) -> list[str] | None:
    """What `_as_cursor` packed; a single part is a number. Raises `InvalidInput` for anything else."""
    if cursor is None:
        return None
    try:
        packed = json.loads(base64.urlsafe_b64decode(cursor))
        if not isinstance(packed, list) or len(packed) != parts or not all(isinstance(part, str) for part in packed):
            raise ValueError
        if parts == 1 and not (packed[0].isascii() and packed[0].isdigit() and len(packed[0]) < 19):
            raise ValueError
    except ValueError as error:
        raise InvalidInput(f"{cursor[:80]!r} is no cursor; leave it out to begin at the start.") from error
    return packed
