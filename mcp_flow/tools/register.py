"""What all tools share: strict arguments, small schemas, and our conditions as errors that a model can read."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp_types import CallToolResult, TextContent, ToolAnnotations
from pydantic import create_model

from mcp_flow.errors import FlowError


def make(fn: Callable[..., Awaitable[CallToolResult]], *, read_only: bool = False, destructive: bool = False) -> Tool:
    """A tool that refuses unknown arguments by name and shows its schema without what says nothing."""
    hints = ToolAnnotations(read_only_hint=True) if read_only else ToolAnnotations(destructive_hint=destructive)
    tool = Tool.from_function(_reporting(fn), description=inspect.cleandoc(fn.__doc__ or ""), annotations=hints)
    arguments = tool.fn_metadata.arg_model
    strict = create_model(arguments.__name__, __base__=arguments, __cls_kwargs__={"extra": "forbid"})
    metadata = tool.fn_metadata.model_copy(update={"arg_model": strict, "output_schema": _output(tool)})
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


def _output(tool: Tool) -> dict[str, Any] | None:
    schema = tool.fn_metadata.output_schema
    return _small(schema) if schema else None


def _small(schema: Any) -> Any:
    """A schema without titles, nullable alternatives and defaults of null: half the bytes, the same meaning."""
    if isinstance(schema, list):
        return [_small(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    small = {
        name: _small(value)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str)) and not (name == "default" and value is None)
    }
    options = small.get("anyOf")
    if isinstance(options, list):
        real = [option for option in options if option != {"type": "null"}]
        if len(real) == 1 and len(real) < len(options):
            small.pop("anyOf")
            small = real[0] | small
    return small
