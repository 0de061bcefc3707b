"""Durable browser workflows that agents start, watch, repair, approve and resume over MCP.

`from mcp_flow import Flow, workflow` is all that a workflow file needs; it imports neither mcp nor playwright.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcp_flow.definition import Workflow, workflow
    from mcp_flow.errors import Denied, FlowError, Retriable
    from mcp_flow.flow import Decision, Flow
    from mcp_flow.library import RunResult, fork_run, run_workflow

__version__ = "0.1.0"

_HOME = {
    "Decision": "mcp_flow.flow",
    "Denied": "mcp_flow.errors",
    "Flow": "mcp_flow.flow",
    "FlowError": "mcp_flow.errors",
    "Retriable": "mcp_flow.errors",
    "RunResult": "mcp_flow.library",
    "Workflow": "mcp_flow.definition",
    "fork_run": "mcp_flow.library",
    "run_workflow": "mcp_flow.library",
    "workflow": "mcp_flow.definition",
}

__all__ = [
    "Decision", "Denied", "Flow", "FlowError", "Retriable", "RunResult", "Workflow", "fork_run", "run_workflow",
    "workflow",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
