"""What tools ask the person at the client: the question, when it is put, and who has decided then.

The answer to such a question is proof of a person. It never holds a secret: a client's forms are no place for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from mcp.server.mcpserver import CancelledElicitation, Context, DeclinedElicitation, Elicit
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from mcp_flow.answers import form_of
from mcp_flow.app import App
from mcp_flow.channel import Channel
from mcp_flow.errors import FlowError
from mcp_flow.run import Request, Run, asks_for_help
from mcp_flow.secrets import masked
from mcp_flow.tools import state
from mcp_flow.views import how_answered

PERSON = Channel(by="person", via="elicitation", human=True)
LONGEST_DATA = 8000
"""Characters of a request's data that a question shows."""


class Verdict(BaseModel):
    """What a person says to an approval."""

    decision: Literal["approve", "deny"]
    note: str | None = Field(default=None, max_length=2000, description="why, if you like")


class Filled(BaseModel):
    """A form as a person filled it; its schema is the question's."""

    model_config = ConfigDict(extra="allow")

    @property
    def content(self) -> dict[str, Any]:
        """The fields by name."""
        return dict(self.model_extra or {})


async def verdict(ctx: Context[Any], request_id: str) -> Elicit[Verdict] | None:
    """The question whether to approve, if only a person may say so and the client can ask one."""
    asked = await _asked(ctx, None, request_id, "approval")
    return Elicit(asked[1], Verdict) if asked else None


async def form(
    ctx: Context[Any],
    run_id: str,
    request_id: str | None,
    step: str | None,
    rerun: list[str] | None,
    rerun_from: str | None,
) -> Elicit[Filled] | None:
    """The question of a run that only a person may answer, if a form can hold the answer and the client can ask."""
    if step or rerun or rerun_from or (request_id is None and await _goes_on_anyway(ctx, run_id)):
        return None
    asked = await _asked(ctx, run_id, request_id, "input")
    fields = form_of(asked[0].opened.answer_schema) if asked else None
    return Elicit(asked[1], _filled(json.dumps(fields))) if asked and fields else None


async def undecided(
    ctx: Context[Any], app: App, request_id: str, said: DeclinedElicitation | CancelledElicitation
) -> dict[str, Any]:
    """The run after a person was asked and did not say: it waits as before."""
    run = await app.control.run(await app.control.run_of(request_id))
    view = dict(await state.watched(ctx, app, run.run_id, 0))
    what = "declined to answer" if said.action == "decline" else "closed the question without an answer"
    how = how_answered(run.requests[request_id].opened, run.run_id, app.settings.typed)
    return view | {"note": f"The person {what}: nothing is decided, and the request stays open. {how}"}


async def open_question(app: App, run_id: str, request_id: str | None) -> Request | None:
    """The request that an answer without an id would be for."""
    run = await app.control.run(run_id)
    if request_id is not None:
        return run.requests.get(request_id)
    waiting = [request for request in run.open_requests() if request.opened.kind == "input"]
    return waiting[0] if len(waiting) == 1 else None


async def _asked(
    ctx: Context[Any], run_id: str | None, request_id: str | None, kind: str
) -> tuple[Request, str] | None:
    """The request and the text of its question; None where nobody is to be asked, and the tool says why."""
    if not _can_ask(ctx):
        return None
    app = await state.app(ctx)
    try:
        run_id = run_id or await app.control.run_of(request_id or "")
        request = await open_question(app, run_id, request_id)
        run = await app.control.run(run_id)
    except FlowError:
        return None
    if request is None or request.opened.kind != kind or request.opened.by != "human":
        return None
    # One that was settled while the person thought is asked again, so that the tool learns what they said, and refuses.
    if request.status != "open" and not ctx.input_responses:
        return None
    return request, await _question(app, run, request)


async def _goes_on_anyway(ctx: Context[Any], run_id: str) -> bool:
    """Whether a plain `resume` does something already: whoever says it means that, and no question beside it."""
    try:
        run = await (await state.app(ctx)).control.run(run_id)
    except FlowError:
        return True
    held = run.hijack is not None or run.error is not None or run.on_hold
    return held or any(r.opened.kind == "pause" or asks_for_help(r.opened) for r in run.open_requests())


def _can_ask(ctx: Context[Any]) -> bool:
    """Whether the client can show a person a form; a client that names no mode can."""
    capabilities = ctx.client_capabilities
    asking = capabilities.elicitation if capabilities else None
    return asking is not None and (asking.form is not None or asking.url is None)


async def _question(app: App, run: Run, request: Request) -> str:
    """The text of a question, the same each time: from the journal only."""
    opened = request.opened
    assert run.created
    what = "for your approval" if opened.kind == "approval" else "you"
    lines = [f"Run {run.run_id} of workflow {run.created.workflow} asks {what}:", opened.prompt]
    if opened.put_aside:
        lines.append(f"The last answer was put aside: {opened.put_aside}")
    if opened.data is not None:
        data = json.dumps(opened.data, ensure_ascii=False, indent=2)
        if len(data) > LONGEST_DATA:
            data = f"{data[:LONGEST_DATA]}… (cut; all of it: {app.settings.typed(f'show {run.run_id}')})"
        lines.append(data)
    return masked("\n\n".join(lines), await app.secrets_of(run))


@cache
def _filled(schema: str) -> type[Filled]:
    fields: Mapping[str, Any] = json.loads(schema)

    class Answer(Filled):
        @classmethod
        def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
            return dict(fields)

    return Answer
