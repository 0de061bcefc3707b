"""How runs and requests are shown: the same fields with the same words on every surface. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from mcp_flow.answers import Typed, form_of
from mcp_flow.run import asks_for_help, step_of

if TYPE_CHECKING:
    from mcp_flow import events as ev
    from mcp_flow.run import Request, Run
    from mcp_flow.store import RequestRow, RunRow

LONGEST_VALUE = 4000
"""Characters of a journaled value in a listing; longer ones are cut, and say so."""


class RunView(TypedDict, total=False):
    """A run as tools show it; absent fields do not apply."""

    run_id: str
    workflow: str
    status: str
    next: str
    why: str
    step: str
    output: Any
    error: dict[str, Any]
    pending: list[dict[str, Any]]
    page: dict[str, Any]
    progress: dict[str, Any]
    attempt: int
    changed_steps: list[str]
    unused_steps: list[str]
    edited: str
    held_until: str
    patch: dict[str, Any]
    events_kept: list[str]
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    last_seq: int
    folder: str
    artifacts: list[str]
    created_at: str
    updated_at: str
    note: str


def show_run(
    run: Run,
    *,
    status: str,
    folder: str,
    place: dict[str, Any] | None = None,
    browser_lives: bool = True,
    edits: str | None = None,
    typed: Typed = "mcp-flow {}".format,
) -> RunView:
    """A run without its steps and events. `status` may be `interrupted`, which no journal holds.

    `place` says where its pages were last seen, `edits` how its code on disk differs from what it was executed with,
    `typed` how a command is typed so that it finds this home folder.
    """
    assert run.created
    view = RunView(
        run_id=run.run_id,
        workflow=run.created.workflow,
        status=status,
        next=next_call(run, status, typed),
        attempt=run.attempt,
    )
    if run.status == "finished":
        view["output"] = run.output
    if run.reason:
        view["why"] = run.reason
    if error := run.error or _awaiting_help(run):
        view["error"] = error.model_dump(exclude_defaults=True)
    if not run.ended and (step := standing_at(run)):
        view["step"] = step
    if pending := [show_request(request, run, typed) for request in run.open_requests()]:
        view["pending"] = pending
        view.setdefault("why", run.open_requests()[0].opened.prompt)
    if (page := _page(run, browser_lives)) is not None:
        view["page"] = page | (place or {})
    if run.changed_steps:
        view["changed_steps"] = list(run.changed_steps)
    if run.unused_steps:
        view["unused_steps"] = list(run.unused_steps)
    if edits:
        view["edited"] = edits
    if run.progress:
        view["progress"] = run.progress.model_dump(exclude={"key"}, exclude_none=True)
    if run.hijack and not run.ended:
        spot = run.hijack.stopped.model_dump(exclude_none=True) if run.hijack.stopped else {}
        where = f"; it stands at {json.dumps(spot)}" if spot else ""
        held = "held by" if run.hijack.stopped else "stops at its next action or step for"
        if run.hijack.expired:
            held = "left unused for too long by"
        view["why"] = f"{held} the {run.hijack.requested.holder}: {run.hijack.requested.reason}{where}"
        if run.hijacked_until:
            view["held_until"] = run.hijacked_until.isoformat()
    if not run.ended and (patch := patch_of(run)):
        view["patch"] = patch
    if run.on_hold:
        view["why"] = "it is held back until resume"
    if run.inbox:
        view["events_kept"] = [received.name for received in run.inbox]
    if run.blocked and status == "running":
        line = f"{run.blocked.file}:{run.blocked.line}"
        view["why"] = f"the worker's event loop has stood still for {run.blocked.seconds:g} s at {line}"
    if run.artifacts:
        view["artifacts"] = [f"{folder}/{name}" for name in dict.fromkeys(run.artifacts)]
    view["folder"] = folder
    view["created_at"], view["updated_at"] = run.created_at, run.updated_at
    return view


def _awaiting_help(run: Run) -> ev.Failure | None:
    """The error of a step that can be tried again, and waits for the word."""
    for request in run.open_requests():
        if asks_for_help(request.opened) and (step := run.steps.get(step_of(request.opened.key))):
            return step.error
    return None


def patch_of(run: Run) -> dict[str, Any] | None:
    """What was done by hand since the page was taken, as lines for the workflow at the step that stood still."""
    if not run.by_hand:
        return None
    place: dict[str, Any] = {"step": standing_at(run)}
    if run.hijack and (stopped := run.hijack.stopped):
        place |= {"file": stopped.file, "line": stopped.line}
    if run.error:
        place = {"step": run.error.step, "file": run.error.file, "line": run.error.line}
    return {name: value for name, value in place.items() if value is not None} | {"lines": list(run.by_hand)}


def standing_at(run: Run) -> str | None:
    """The step at which a run is or stands still: where it was hijacked, what runs, or what has asked for something."""
    if run.hijack and run.hijack.stopped and run.hijack.stopped.step:
        return run.hijack.stopped.step
    if step := next(iter(run.running_steps()), None):
        return step.key
    asked = (request.opened for request in run.open_requests() if request.opened.kind != "takeover")
    return next((step_of(opened.key) for opened in asked), None)


def _page(run: Run, browser_lives: bool) -> dict[str, Any] | None:
    """How a run's page came about, or what has become of it."""
    if run.ended or run.page_state is None:
        return None
    if run.parked_since:
        return {"state": "parked", "since": run.parked_since}
    if not run.pages and not run.losses:
        return None
    shown: dict[str, Any] = {"state": run.page_state, "since": run.page_since}
    if not run.pages:
        return shown | {"gone": "it was lost; going on rebuilds it"}
    return shown if browser_lives else shown | {"gone": "its browser has ended; going on rebuilds the page"}


def show_request(request: Request, run: Run, typed: Typed) -> dict[str, Any]:
    """An open request, with the literal call that answers it."""
    return _request(request.opened, run.run_id, request.at, typed)


def show_request_row(row: RequestRow, now: datetime, typed: Typed) -> dict[str, Any]:
    """An open request in `list_pending`, with its run and its age in seconds."""
    shown = _request(row.request, row.run_id, row.opened_at, typed)
    age = (now - datetime.fromisoformat(row.opened_at)).total_seconds()
    left = (row.request.expires - now).total_seconds() if row.request.expires else None
    extra = {"run_id": row.run_id, "workflow": row.workflow, "age_s": round(age, 1), "left_s": left and round(left, 1)}
    return shown | {name: value for name, value in extra.items() if value is not None}


def show_row(row: RunRow, status: str, now: datetime) -> dict[str, Any]:
    """A run in `list_runs`."""
    shown = {
        "run_id": row.run_id,
        "workflow": row.workflow,
        "status": status,
        "step": row.step,
        "why": row.why,
        "age_s": round((now - datetime.fromisoformat(row.created_at)).total_seconds(), 1),
        "updated_at": row.updated_at,
    }
    return {name: value for name, value in shown.items() if value is not None}


def show_steps(run: Run) -> list[dict[str, Any]]:
    """The steps in the order in which they first started."""
    shown = []
    for step in run.steps.values():
        line: dict[str, Any] = {"step": step.key, "status": step.status}
        if step.status == "finished":
            line["value"] = shortened(step.value, 200)
        if step.ms:
            line["ms"] = round(step.ms, 1)
        if step.tries > 1:
            line["tries"] = step.tries
        if step.error:
            line["error"] = step.error.message[:300]
        shown.append(line)
    return shown


def show_events(recorded: Iterable[ev.Recorded]) -> list[dict[str, Any]]:
    """Events with their fields beside their sequence number, time and type."""
    shown = []
    for entry in recorded:
        fields = entry.event.model_dump(mode="json", exclude_defaults=True)
        cut = {name: shortened(value, LONGEST_VALUE) for name, value in fields.items()}
        shown.append({"seq": entry.seq, "at": entry.at, "type": entry.event.type} | cut)
    return shown


def next_call(run: Run, status: str, typed: Typed) -> str:
    """The literal call that brings a run on."""
    run_id = json.dumps(run.run_id)
    requests = run.open_requests()
    match status:
        case "queued" if run.on_hold:
            return f"resume(run_id={run_id})"
        case "paused" if not any(request.opened.kind == "pause" for request in requests):
            return f"resume(run_id={run_id})"
        case "waiting-approval" | "waiting-input" | "paused" | "in-doubt":
            kinds = {
                "waiting-approval": "approval",
                "waiting-input": "input",
                "paused": "pause",
                "in-doubt": "in-doubt",
            }
            fitting = [request for request in requests if request.opened.kind == kinds[status]]
            chosen = (fitting or requests)[0]
            return how_answered(chosen.opened, run.run_id, typed)
        case "failed":
            return f"snapshot(run_id={run_id}), mend what error names, then resume(run_id={run_id})"
        case "hijacked":
            for request in requests:
                if request.opened.kind == "takeover":
                    return how_answered(request.opened, run.run_id, typed)
            return f"resume(run_id={run_id})"
        case "interrupted":
            return f"get_run(run_id={run_id}, wait_s=20); with take_up off, resume(run_id={run_id})"
        case "finished" | "cancelled" | "continued":
            return f"none: the run is {status}"
        case _:
            return f"get_run(run_id={run_id}, wait_s=20)"


def shortened(value: Any, limit: int) -> Any:
    """`value`, or the beginning of its JSON with a note of its length where that is longer than `limit`."""
    if value is None or isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= limit):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return value if len(text) <= limit else f"{text[:limit]}… (cut: {len(text)} characters in all)"


def _request(opened: ev.RequestOpened, run_id: str, at: str, typed: Typed) -> dict[str, Any]:
    shown = {
        "request_id": opened.request_id,
        "kind": opened.kind,
        "prompt": opened.prompt,
        "put_aside": opened.put_aside,
        "step": step_of(opened.key) if opened.kind != "takeover" else None,
        "data": opened.data,
        "schema": opened.answer_schema,
        "by": opened.by,
        "opened_at": at,
        "expires": opened.expires and opened.expires.astimezone(UTC).isoformat(),
        "answer": how_answered(opened, run_id, typed),
    }
    return {name: value for name, value in shown.items() if value is not None}


def how_answered(opened: ev.RequestOpened, run_id: str, typed: Typed) -> str:
    """The literal call that answers a request."""
    run, request = json.dumps(run_id), json.dumps(opened.request_id)
    if opened.by == "human" and opened.kind == "approval":
        command = typed(f"approve {opened.request_id}")
        return f"approve(request_id={request}) asks a person if the client can; or a person types: {command}"
    if opened.by == "human":
        command = f"a person types: {typed(f'answer {opened.request_id}')}"
        if opened.kind == "input" and form_of(opened.answer_schema):
            return f"resume(run_id={run}, request_id={request}) asks a person if the client can; or {command}"
        return command
    match opened.kind:
        case "approval":
            return (
                f'approve(request_id={request}, decision="approve") or approve(request_id={request}, decision="deny")'
            )
        case "input" | "event":
            given = f"resume(run_id={run}, request_id={request}, value={_example(opened.answer_schema)})"
            if asks_for_help(opened):
                return f"{given}, or without a value"
            if opened.kind == "event":
                return f"send_event(name={json.dumps(opened.data['event'])}, payload=…, run_id={run}), or {given}"
            return given
        case "in-doubt":
            return (
                f'resume(run_id={run}, request_id={request}, step="done", value=…) or '
                f'resume(run_id={run}, request_id={request}, step="again")'
            )
        case _:
            return f"resume(run_id={run}, request_id={request})"


def _example(schema: dict[str, Any] | None) -> str:
    """A value's outline, so that the call can be typed without reading the schema."""
    match (schema or {}).get("type"):
        case "object":
            return "{" + ", ".join(f'"{name}": …' for name in (schema or {}).get("properties", {})) + "}"
        case "string":
            return '"…"'
        case "boolean":
            return "true"
        case "array":
            return "[…]"
        case _:
            return "…"
