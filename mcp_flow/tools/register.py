"""What all tools share: strict arguments, small schemas, and our conditions as errors that a model can read."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import ValidationError, create_model

from mcp_flow.errors import FlowError


class _Arguments(FuncMetadata):
    """Arguments as they were given: only lists and objects are also taken as JSON in a string, as some clients send.

    The SDK parses every argument that is not plainly a string, and so makes null of the answer "null".
    """

    def pre_parse_json(self, data: dict[str, Any]) -> dict[str, Any]:
        schemas = _small(self.arg_model.model_json_schema())["properties"]
        structured = {name for name, schema in schemas.items() if schema.get("type") in ("array", "object")}
        return data | super().pre_parse_json({name: data[name] for name in data.keys() & structured})


class _Tool(Tool):
    """A tool whose errors are made for a model to read: the text alone, one line for each argument refused."""

    async def run(self, arguments: dict[str, Any], context: Context[Any, Any], convert_result: bool = False) -> Any:
        try:
            return await super().run(arguments, context, convert_result)
        except ToolError as error:
            # pydantic's own text names its documentation's address and not the arguments that there are.
            if isinstance(cause := error.__cause__, ValidationError):
                raise ToolError(_refusal(self, cause)) from cause
            if isinstance(cause, ToolError):  # ours, behind a prefix of the SDK
                raise cause from cause.__cause__
            raise


def make(fn: Callable[..., Awaitable[CallToolResult]], *, read_only: bool = False, harmless: bool = False) -> Tool:
    """A tool that refuses unknown arguments by name and shows its schema without what says nothing.

    One that is neither `read_only` nor `harmless` may do what can't be undone, which is what clients take for granted.
    """
    hints = ToolAnnotations(read_only_hint=True) if read_only else None
    if harmless:
        hints = ToolAnnotations(destructive_hint=False)
    tool = _Tool.from_function(_reporting(fn), description=inspect.cleandoc(fn.__doc__ or ""), annotations=hints)
    found = tool.fn_metadata
    strict = create_model(found.arg_model.__name__, __base__=found.arg_model, __cls_kwargs__={"extra": "forbid"})
    metadata = _Arguments(
        arg_model=strict,
        output_schema=_outline(found.output_schema),
        output_model=found.output_model,
        wrap_output=found.wrap_output,
    )
    return tool.model_copy(update={"parameters": _small(strict.model_json_schema()), "fn_metadata": metadata})


def answer(view: Mapping[str, Any]) -> CallToolResult:
    """A result as structured content, and the same object as compact JSON for clients that show only text."""
    text = json.dumps(view, ensure_ascii=False, separators=(",", ":"), default=str)
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=json.loads(text))


def _reporting(fn: Callable[..., Awaitable[CallToolResult]]) -> Callable[..., Awaitable[CallToolResult]]:
    @functools.wraps(fn)
    async def call(*args: Any, **kwargs: Any) -> CallToolResult:
        try:
            return await fn(*args, **kwargs)
        except FlowError as error:
            raise ToolError(str(error)) from error

    return call


def _refusal(tool: Tool, error: ValidationError) -> str:
    known = ", ".join(tool.parameters["properties"])
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "extra_forbidden":
                lines.append(f"- {name}: there is no such argument; the arguments: {known}")
            case "missing":
                lines.append(f"- {name}: it is required")
            case _:
                given = json.dumps(problem["input"], ensure_ascii=False, default=str)
                lines.append(f"- {name}: {problem['msg']}, not {given if len(given) <= 80 else given[:77] + '...'}")
    return f"{tool.name} can't take these arguments; nothing was done.\n" + "\n".join(lines)


_SAID_BY_A_REFUSAL = frozenset({"minimum", "maximum", "minLength", "maxLength"})
"""What a schema need not say: who goes beyond it is told so by the answer, in as many words."""


def _small(schema: Any) -> Any:
    """A schema without titles, bounds, nullable alternatives and defaults that say nothing: half the bytes."""
    if isinstance(schema, list):
        return [_small(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    small = {
        name: _small(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str))
        and not (name == "default" and (value is None or value is False))
        and not (name in _SAID_BY_A_REFUSAL and not isinstance(value, dict))
        and not (name == "additionalProperties" and value is True)
    }
    options = small.get("anyOf")
    if isinstance(options, list):
        real = [option for option in options if option != {"type": "null"}]
        if len(real) == 1 and len(real) < len(options):
            small.pop("anyOf")
            small = real[0] | small
    return small


def _outline(schema: Any) -> Any:
    """A result's schema as far as it tells one field from another: texts, unless it says otherwise."""
    if not isinstance(schema, dict):
        return schema
    kinds = {name: field.get("type", "string") for name, field in schema["properties"].items()}
    fields = {name: {} if kind == "string" else {"type": kind} for name, kind in kinds.items()}
    return {"type": "object", "properties": fields}
