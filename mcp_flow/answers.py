"""What answers the requests of a run: who may, whether it fits, and what is journaled of it. Pure."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mcp_flow import events as ev
from mcp_flow.channel import Channel
from mcp_flow.errors import Conflict, InvalidInput, NotAllowed
from mcp_flow.run import Request, Run, asks_for_help, step_of
from mcp_flow.secrets import names_in, secret_places, set_apart

Typed = Callable[[str], str]
"""Makes of a command what a person types to give it."""
WHOLE = "answer"
"""The name under which a form holds the answer to a question for a plain value."""
_SHOWN = {
    "string": ("minLength", "maxLength"),
    "integer": ("minimum", "maximum"),
    "number": ("minimum", "maximum"),
    "boolean": (),
}
"""What a client's form can hold, and what it can be told about it."""
_FORMATS = ("email", "uri", "date", "date-time")


@dataclass(frozen=True)
class Given:
    """What a caller of `resume` gave."""

    value: Any = None
    has_value: bool = False
    request_id: str | None = None
    step: Literal["done", "again"] | None = None


@dataclass
class Vault:
    """The secrets among the answers, by the reference that is journaled in their place."""

    kept: dict[str, str] = field(default_factory=dict)


def answers_to(run: Run, channel: Channel, given: Given, vault: Vault, typed: Typed) -> list[ev.RequestAnswered]:
    """The answers that a `resume` gives: to the request named, to the one that fits, or to everything that only waits
    for a word to go on. The same answer again is none.

    Raises `Conflict`, `NotAllowed`, `InvalidInput`.
    """
    open_requests = run.open_requests()
    if given.request_id is not None:
        request = run.requests[given.request_id]
        return [] if _is_the_same(request, given) else [_answer(run, request, channel, given, vault, typed)]
    if given.step is not None:
        chosen = [request for request in open_requests if request.opened.kind == "in-doubt"]
    elif given.has_value:
        chosen = [request for request in open_requests if request.opened.kind == "input"]
    else:
        chosen = [r for r in open_requests if r.opened.kind == "pause" or asks_for_help(r.opened)]
        return [_answer(run, request, channel, given, vault, typed) for request in chosen]
    if len(chosen) != 1:
        what = "is in doubt" if given.step else "waits for a value"
        count = "Nothing" if not chosen else f"More than one thing ({len(chosen)})"
        raise NotAllowed(f"{count} in run {run.run_id} {what}. {open_ones(run)}")
    return [_answer(run, chosen[0], channel, given, vault, typed)]


def settle_step(run: Run, given: Given, channel: Channel) -> list[ev.Event]:
    """What `resume(step="done", value=…)` says of the step at which a hijacked run stands still: nothing, where it
    stands at none or something is in doubt, which is meant then."""
    stopped = run.hijack.stopped if run.hijack else None
    doubts = [request for request in run.open_requests() if request.opened.kind == "in-doubt"]
    if given.step is None or stopped is None or doubts or given.request_id is not None:
        return []
    step = next((step for step in run.running_steps() if step.key == stopped.step), None)
    if step is None:
        raise NotAllowed(
            f"Run {run.run_id} stands at no step that could be called done. resume(run_id={run.run_id!r}) goes on."
        )
    if given.step == "again":
        again = run.generation(step.key) + 1
        return [ev.StepReset(key=step.key, generation=again, reason=f"again, said {channel.by}")]
    return [ev.StepSettled(key=step.key, generation=step.generation, value=given.value, by=channel.by)]


def end_takeover(run: Run, answers: Sequence[ev.RequestAnswered], channel: Channel) -> list[ev.Event]:
    """The answers to requests that a person take the page, which handing it back is."""
    given = {answer.request_id for answer in answers}
    return [
        ev.RequestAnswered(request_id=request.opened.request_id, by=channel.by, via=channel.via)
        for request in run.open_requests()
        if request.opened.kind == "takeover" and request.opened.request_id not in given
    ]


def check_holder(run: Run, channel: Channel, typed: Typed) -> None:
    """Raise `NotAllowed` where a person holds the page and the caller is none."""
    if run.hijack and run.hijack.held and run.hijack.requested.holder == "human" and not channel.human:
        raise NotAllowed(f"A person holds the page of run {run.run_id} since {run.hijack.at}. {hand_back(run, typed)}")


def hand_back(run: Run, typed: Typed) -> str:
    """How the page of a hijacked run is handed back by who holds it."""
    if run.hijack is None or run.hijack.requested.holder == "agent":
        return f"resume(run_id={run.run_id!r}) hands it back."
    asked = next((r.opened.request_id for r in run.open_requests() if r.opened.kind == "takeover"), None)
    command = typed(f"answer {asked}" if asked else f"resume {run.run_id}")
    return f"They hand it back in a terminal: {command}. get_run(run_id={run.run_id!r}, wait_s=45) waits for that."


def check_open(run: Run, request: Request) -> None:
    """Raise `Conflict`, naming the first answer, for a request that is settled already."""
    opened = request.opened
    match request.status:
        case "answered":
            who = f"by {request.by} via {request.via}"
            given = json.dumps(request.value, ensure_ascii=False)
            if opened.kind == "approval":
                given = "approved" if request.value["approved"] else "denied"
            raise Conflict(f"Request {opened.request_id} was answered already {who}: {given:.200}. {open_ones(run)}")
        case "expired":
            raise Conflict(f"Request {opened.request_id} expired at {opened.expires}. {open_ones(run)}")
        case "withdrawn":
            raise Conflict(f"Request {opened.request_id} was withdrawn; the run no longer asks. {open_ones(run)}")


def check_who(request: Request, channel: Channel, typed: Typed) -> None:
    """Raise `NotAllowed` where only a person may answer and the caller is none."""
    opened = request.opened
    if opened.by == "human" and not channel.human:
        why = ", and types the secret unseen" if secret_places(opened.answer_schema) else ""
        raise NotAllowed(
            f"Only a person may answer request {opened.request_id} ({opened.prompt!r:.200}){why}. In a terminal: "
            + typed(f"{'approve' if opened.kind == 'approval' else 'answer'} {opened.request_id}")
        )


def form_of(schema: Any) -> dict[str, Any] | None:
    """The form in which a client can ask a person for what fits this schema: an object of plain fields.

    A plain value is a form of one field, `WHOLE`. None for what is nested, and for secrets, which no client may see.
    """
    if not isinstance(schema, Mapping) or secret_places(schema):
        return None
    if schema.get("type") != "object":
        field = _field(schema, schema)
        return field and {"type": "object", "properties": {WHOLE: field[0]}, "required": [] if field[1] else [WHOLE]}
    if not (properties := schema.get("properties")):
        return None
    fields = {name: _field(schema, part) for name, part in properties.items()}
    shown = {name: field[0] for name, field in fields.items() if field}
    if len(shown) < len(fields):
        return None
    required = [name for name in schema.get("required", ()) if not (fields[name] or ({}, False))[1]]
    return {"type": "object", "properties": shown, "required": required}


def from_form(schema: Mapping[str, Any], content: Mapping[str, Any]) -> Any:
    """The answer that a filled form is; a field that was left out is null where the answer needs it."""
    if schema.get("type") != "object":
        return content.get(WHOLE)
    return dict.fromkeys(schema.get("required", ())) | dict(content)


def _field(whole: Mapping[str, Any], part: Any) -> tuple[dict[str, Any], bool] | None:
    """A field of a form, and whether it may be null; None for what no form can hold."""
    nullable = False
    if isinstance(part, Mapping) and isinstance(options := part.get("anyOf"), list):
        real = [option for option in options if option != {"type": "null"}]
        if len(real) != 1:
            return None
        nullable = len(real) < len(options)
        part = {name: value for name, value in part.items() if name != "anyOf"} | real[0]
    if isinstance(part, Mapping) and isinstance(reference := part.get("$ref"), str):
        part = whole.get("$defs", {}).get(reference.removeprefix("#/$defs/")) | {
            name: value for name, value in part.items() if name != "$ref"
        }
    if not isinstance(part, Mapping) or part.get("type") not in _SHOWN:
        return None
    shown = {name: part[name] for name in ("type", "title", "description", *_SHOWN[part["type"]]) if name in part}
    options = [part["const"]] if "const" in part else part.get("enum")
    if options and all(isinstance(option, str) for option in options):
        shown["enum"] = options
    if part.get("format") in _FORMATS:
        shown["format"] = part["format"]
    if part.get("default") is not None:
        shown["default"] = part["default"]
    return shown, nullable


def fitting(opened: ev.RequestOpened, value: Any) -> Any:
    """`value`, or what it says as JSON where only that fits: some clients send everything as text.

    Raises `InvalidInput` with one problem for each bad field; the request stays open.
    """
    problems = _problems(opened, value)
    if problems and isinstance(value, str):
        with contextlib.suppress(ValueError):
            parsed = json.loads(value)
            if not _problems(opened, parsed):
                return parsed
    if problems:
        raise InvalidInput(
            f"The answer does not fit request {opened.request_id} ({opened.prompt!r:.200}), which stays open:", problems
        )
    return value


def refuse_secrets(run: Run, value: Any, known: Mapping[str, str]) -> None:
    """Raise `InvalidInput` for a value to be journaled that holds a secret, by reference, that the run was answered."""
    for reference in names_in(value, known):
        asked = next((r.opened for r in run.requests.values() if reference in json.dumps(r.value)), None)
        where = f"step {step_of(asked.key)!r}" if asked else "another step"
        raise InvalidInput(
            f"The value holds the secret that was given to {where} of run {run.run_id}, and would stand in the "
            f"journal; nothing was written. Call again with a value that does not hold it. {open_ones(run)}"
        )


def open_ones(run: Run) -> str:
    """The open requests of a run, for an error to say what can be answered."""
    ids = [f"{r.opened.request_id} ({r.opened.kind}: {r.opened.prompt[:80]!r})" for r in run.open_requests()[:5]]
    if not ids:
        return f"It has no open request; get_run(run_id={run.run_id!r}) says where it stands."
    return f"Open requests: {', '.join(ids)}; list_pending(run_id={run.run_id!r}) has the call that answers each."


def _is_the_same(request: Request, given: Given) -> bool:
    """Whether the request was answered just so: who asks again because no reply came is not to get an error."""
    opened, before = request.opened, request.value
    if request.status != "answered" or opened.kind == "approval" or secret_places(opened.answer_schema):
        return False
    if opened.kind == "in-doubt":
        said = given.value if given.has_value or not opened.has_default else opened.default
        return bool(before["step"] == given.step and (given.step == "again" or before["value"] == said))
    if opened.kind in ("input", "event"):
        return before in (given.value, _parsed(given.value)) if given.has_value else before is None
    return True


def _parsed(value: Any) -> Any:
    """What a text says as JSON; anything else as it is."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def _answer(
    run: Run, request: Request, channel: Channel, given: Given, vault: Vault, typed: Typed
) -> ev.RequestAnswered:
    opened, value = request.opened, given.value
    check_open(run, request)
    check_who(request, channel, typed)
    answer: Any = None
    match opened.kind:
        case "approval":
            raise NotAllowed(
                f"Request {opened.request_id} is an approval, which resume does not give: "
                f"approve(request_id={opened.request_id!r})."
            )
        case "in-doubt":
            if given.step is None:
                raise NotAllowed(
                    f"{opened.prompt} The call: resume(run_id={run.run_id!r}, step='done', value=…) or "
                    f"resume(run_id={run.run_id!r}, step='again')."
                )
            if given.step == "done" and not given.has_value and opened.has_default:
                value = opened.default
            answer = {"step": given.step} | ({"value": fitting(opened, value)} if given.step == "done" else {})
        case "input" | "event" if given.has_value or not asks_for_help(opened):
            if not given.has_value:
                raise NotAllowed(f"Request {opened.request_id} waits for a value: {opened.prompt}")
            fitted = fitting(opened, value)
            answer, kept = set_apart(fitted, secret_places(opened.answer_schema), lambda: f"a-{secrets.token_hex(6)}")
            vault.kept.update(kept)
    return ev.RequestAnswered(request_id=opened.request_id, value=answer, by=channel.by, via=channel.via)


def _problems(opened: ev.RequestOpened, value: Any) -> list[str]:
    # Its import takes as long as that of all the rest of ours but the events, and most processes check no answer.
    from mcp_flow.fitting import problems_of

    schema = opened.answer_schema or {}
    return problems_of(value, schema, secret=bool(secret_places(schema)))
