"""Tools that start runs, show them, and let them go on."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from mcp.server.mcpserver import AcceptedElicitation, Context, ElicitationResult, Resolve
from mcp_types import CallToolResult
from pydantic import Field

from mcp_flow.answers import from_form
from mcp_flow.channel import Channel
from mcp_flow.config import parse_viewport
from mcp_flow.tools import asking, state
from mcp_flow.tools.register import answer
from mcp_flow.views import RunView, patch_of, show_events, show_row, show_steps

Wait = Annotated[float, Field(ge=0, le=45)]
"""Seconds to wait for a stop or the end. Only `start_run` says so: every byte of a schema is read each time."""
AGENT = Channel()


async def list_workflows(ctx: Context[Any], name: str | None = None) -> CallToolResult:
    """The workflows that can be started: input schema, file and line; files that can't be read, with their error.
    With a name: that one, with its source and step names."""
    app = await state.app(ctx)
    if name is None:
        catalog = await app.reader.catalog()
        listed = [state.show_workflow(described) for described in catalog.workflows.values()]
        broken = [{"file": file.file, "error": file.error} for file in catalog.broken]
        following = 'start_run(workflow="…", input={…})' if listed else f"write a workflow in {app.settings.workflows}"
        return answer({"workflows": listed, "broken": broken, "folder": str(app.settings.workflows), "next": following})
    described, revision = await app.reader.describe(name)
    source = revision.files[revision.entry].decode("utf-8", "replace")
    shown = {"steps": described.steps, "revision": revision.hash[:12], "source": source}
    return answer(state.show_workflow(described) | shown)


async def save_workflow(
    ctx: Context[Any],
    name: Annotated[str, Field(description="like buy or shop/buy")],
    source: str,
    expected_revision: Annotated[str | None, Field(description="of list_workflows; none for a new file")] = None,
) -> CallToolResult:
    """Write a workflow file, where that is enabled and if it can be imported."""
    app = await state.app(ctx)
    file, revision = await app.control.save_workflow(name, source, expected_revision)
    following = "resume a stopped run, or start_run: both take the code as it is now"
    return answer({"file": file, "revision": revision[:12], "next": following})


async def start_run(
    ctx: Context[Any],
    workflow: str,
    input: Annotated[dict[str, Any] | None, Field(description="see list_workflows")] = None,
    run_id: Annotated[str | None, Field(description="your own id; the same again is the same run")] = None,
    wait_s: Annotated[Wait, Field(description="seconds to wait for a stop or the end")] = 20,
    headless: bool = True,
    viewport: Annotated[str | None, Field(description="like 1366x768")] = None,
    hold: Annotated[bool, Field(description="stay queued until resume")] = False,
    pause_before: Annotated[list[str] | None, Field(description="step names")] = None,
    single_step: bool = False,
) -> Annotated[CallToolResult, RunView]:
    """Start a workflow. Returns when it first stops (an approval, a question, a failure), ends, or after wait_s;
    the run goes on by itself in any case."""
    app = await state.app(ctx)
    size = parse_viewport(viewport) if viewport else None
    new_id = await app.control.start(
        workflow,
        input,
        run_id=run_id,
        headless=headless,
        viewport=size,
        hold=hold,
        pause_before=pause_before or (),
        single_step=single_step,
    )
    return answer(await state.watched(ctx, app, new_id, wait_s))


async def get_run(
    ctx: Context[Any],
    run_id: str,
    wait_s: Wait = 0,
    since: Annotated[int | None, Field(ge=0, description="also show the events after this seq")] = None,
    limit: Annotated[int, Field(ge=1, le=500)] = 50,
) -> Annotated[CallToolResult, RunView]:
    """A run: status, why it waits, what it is at, its steps, its page, where its files are."""
    app = await state.app(ctx)
    view = await state.watched(ctx, app, run_id, wait_s)
    run = await app.control.run(run_id)
    steps = show_steps(run)
    view["steps"] = steps[-limit:]
    notes = []
    if len(steps) > limit:
        notes.append(f"{len(steps) - limit} earlier steps are left out; limit={min(len(steps), 500)} shows more.")
    view["last_seq"] = run.seq
    if since is not None:
        view["events"] = show_events(await app.control.events(run_id, since, limit))
        if view["events"] and view["events"][-1]["seq"] < run.seq:
            notes.append(f"More events follow: get_run(run_id={json.dumps(run_id)}, since={view['events'][-1]['seq']})")
    if notes:
        view["note"] = " ".join(notes)
    return answer(view)


async def list_runs(
    ctx: Context[Any],
    status: Annotated[list[str] | None, Field(description="such as failed, waiting-approval, interrupted")] = None,
    workflow: str | None = None,
    query: Annotated[str | None, Field(description="text in the id or the reason")] = None,
    limit: Annotated[int, Field(ge=1, le=200)] = 20,
    cursor: str | None = None,
) -> CallToolResult:
    """The registry of runs, newest first, with step, age and why."""
    app = await state.app(ctx)
    return answer(await state.registry(app, status or [], workflow, query, limit, cursor, show_row))


async def resume(
    ctx: Context[Any],
    person: Annotated[ElicitationResult[asking.Filled], Resolve(asking.form)],
    run_id: str,
    value: Annotated[Any, Field(description="the answer to its question")] = None,
    request_id: str | None = None,
    step: Annotated[Literal["done", "again"] | None, Field(description="settles an in-doubt step")] = None,
    rerun: Annotated[list[str] | None, Field(description="finished steps to do again")] = None,
    rerun_from: Annotated[str | None, Field(description="a step to do again with all after it")] = None,
    on_change: Annotated[Literal["accept", "refuse"] | None, Field(description="if the code was edited")] = None,
    max_steps: Annotated[int | None, Field(ge=1, description="pause after so many new steps")] = None,
    wait_s: Wait = 20,
) -> CallToolResult:
    """Let a stopped run go on with the code as it is now on disk: after a failure, a pause, a hijack, or with a value
    for its question. Finished steps are not done again. An approval is given with approve."""
    app = await state.app(ctx)
    patch = patch_of(await app.control.run(run_id))
    by, has_value = AGENT, value is not None or state.was_given(ctx, "value")
    request = await asking.open_question(app, run_id, request_id)
    match person:
        case AcceptedElicitation(data=asking.Filled() as said) if request:
            by, has_value, request_id = asking.PERSON, True, request.opened.request_id
            value = from_form(request.opened.answer_schema or {}, said.content)
        case AcceptedElicitation():  # there was nobody to ask
            pass
        case _ if request:
            return answer(await asking.undecided(ctx, app, request.opened.request_id, person))
    remark = await app.control.resume(
        run_id,
        by,
        value=value,
        has_value=has_value,
        request_id=request_id,
        step=step,
        rerun=rerun or (),
        rerun_from=rerun_from,
        on_change=on_change,
        max_steps=max_steps,
    )
    view = await state.watched(ctx, app, run_id, wait_s if remark is None else 0)
    if remark:
        view["note"] = remark
    elif patch:
        view["patch"] = patch
    return answer(view)


async def cancel(ctx: Context[Any], run_id: str, reason: str) -> CallToolResult:
    """Stop a run for good: its questions are withdrawn and its page is closed."""
    app = await state.app(ctx)
    await app.control.cancel(run_id, AGENT, reason)
    return answer(await state.watched(ctx, app, run_id, 0))
