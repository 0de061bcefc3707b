"""What can be read from a workflow's source without running it: imports, steps, and actions outside steps. Pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

ACTIONS = frozenset(
    {
        *("check", "clear", "click", "dblclick", "dispatch_event", "drag_and_drop", "drag_to", "fill", "press"),
        *("press_sequentially", "select_option", "set_checked", "set_input_files", "tap", "type", "uncheck"),
        *("go_back", "go_forward", "goto", "reload", "set_content"),
        *("down", "insert_text", "up", "wheel"),
    }
)
"""The methods of pages, locators, keyboards and mice that change something."""


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement: `names` are what `from` takes, and `level` counts its leading dots."""

    module: str
    names: tuple[str, ...] = ()
    level: int = 0


@dataclass(frozen=True, slots=True)
class Notes:
    """The literal step names of one function, in order, and warnings, each with its line."""

    steps: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@lru_cache(maxsize=1024)
def imports(source: bytes) -> tuple[Import, ...]:
    """Every import in a source, those inside functions too; none from a source that does not parse."""
    tree = _parse(source)
    found: dict[Import, None] = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                found |= {Import(alias.name): None for alias in aliases}
            case ast.ImportFrom(module=module, names=aliases, level=level):
                found[Import(module or "", tuple(alias.name for alias in aliases), level)] = None
    return tuple(found)


def notes(source: bytes, line: int) -> Notes:
    """What can be said about the function that starts at `line`, its first decorator's line if it has one."""
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.AsyncFunctionDef) and line in _first_lines(node):
            calls = sorted(_calls(node.body), key=lambda call: (call.lineno, call.col_offset))
            return Notes(tuple(_steps(calls)), tuple(_warnings(node, calls)))
    return Notes()


def _parse(source: bytes) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _first_lines(node: ast.AsyncFunctionDef) -> set[int]:
    return {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}


def _own_nodes(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The nodes of a function's own body; functions defined in it are usually steps."""
    stack: list[ast.AST] = list(reversed(body))
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            stack += reversed(list(ast.iter_child_nodes(node)))


def _calls(body: list[ast.stmt]) -> list[ast.Call]:
    return [node for node in _own_nodes(body) if isinstance(node, ast.Call)]


def _steps(calls: list[ast.Call]) -> Iterator[str]:
    for call in calls:
        match call:
            case ast.Call(func=ast.Attribute(attr="step"), args=[ast.Constant(value=str(name)), *_]):
                yield name


def _warnings(function: ast.AsyncFunctionDef, calls: list[ast.Call]) -> Iterator[str]:
    pages = _pages(function)
    for call in calls:
        match call.func:
            case ast.Attribute(attr=attr) if attr in ACTIONS and _root(call.func) in pages:
                action = ast.unparse(call.func)
                action = action if len(action) <= 80 else f"{_root(call.func)}….{attr}"
                yield (
                    f"line {call.lineno}: {action} outside a step is not durable and repeats in every attempt; "
                    f'wrap it: await flow.step("…", {action}, …)'
                )


def _pages(function: ast.AsyncFunctionDef) -> set[str]:
    """The names that hold a page of the flow, or something that was made from one, like a locator."""
    parameters = [*function.args.posonlyargs, *function.args.args]
    flow = parameters[0].arg if parameters else ""
    pages: set[str] = set()
    for node in _own_nodes(function.body):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        match value:
            case ast.Await(value=ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr="page"))) if owner == flow:
                pages.add(name)
            case ast.Call() | ast.Attribute() if _root(value) in pages:
                pages.add(name)
    return pages


def _root(node: ast.expr) -> str | None:
    """The name that a chain of attributes and calls starts from: `page` in `page.locator("a").click`."""
    while True:
        match node:
            case ast.Attribute(value=node) | ast.Call(func=node) | ast.Subscript(value=node):
                continue
            case ast.Name(id=name):
                return name
            case _:
                return None
