"""The commands. Each imports what it needs when it runs, so that `mcp-flow --help` needs neither mcp nor playwright."""

from __future__ import annotations

import contextlib
import getpass
import json
import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from mcp_flow import __version__, config
from mcp_flow.errors import FlowError

if TYPE_CHECKING:
    from mcp_flow.app import App
    from mcp_flow.channel import Channel
    from mcp_flow.config import Settings
    from mcp_flow.control import Sent
    from mcp_flow.events import RequestOpened
    from mcp_flow.library import RunResult

P = ParamSpec("P")
T = TypeVar("T")


class _Commands(click.Group):
    """Shows a condition as its message: no traceback reaches a user."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FlowError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mcp-flow")
def main() -> None:
    """Durable browser workflows for agents, over MCP."""


def _with_settings(fn: Callable[..., T]) -> Callable[..., T]:
    """Adds the options that every command has, and gives the command its settings."""

    @click.option("--home", help="The folder of the journal (default ./.mcp-flow, MCP_FLOW_HOME).")
    @click.option("--workflows", help="The folder of workflow files (default ./workflows, MCP_FLOW_WORKFLOWS).")
    @click.option("--browser", help="The browser's path (MCP_FLOW_BROWSER).")
    @click.option("--viewport", help="The size of new pages, like 1366x768 (MCP_FLOW_VIEWPORT).")
    @click.option("--log", help="debug, info or warning (MCP_FLOW_LOG).")
    @wraps(fn)
    def command(
        home: str | None,
        workflows: str | None,
        browser: str | None,
        viewport: str | None,
        log: str | None,
        **rest: Any,
    ) -> T:
        settings = config.load(home=home, workflows=workflows, browser=browser, viewport=viewport, log=log)
        return fn(settings, **rest)

    return command


def _run(settings: Settings, body: Callable[[App], Awaitable[T]]) -> T:
    import anyio

    from mcp_flow.app import open_app

    async def work() -> T:
        async with open_app(settings, "command") as app:
            result = await body(app)
            # Whoever looks at a home folder sees to it that what should run there does; it has its answer by then.
            with contextlib.suppress(FlowError):
                await app.control.keep_awake()
            return result

    return anyio.run(work)


# --- processes ---


@main.command()
@_with_settings
def serve(settings: Settings) -> None:
    """Speak MCP over stdio."""
    import anyio

    from mcp_flow.server import serve_stdio

    anyio.run(serve_stdio, settings)


@main.command()
@click.option("--id", "worker_id", hidden=True)
@click.option("--ready-fd", type=int, hidden=True)
@_with_settings
def worker(settings: Settings, worker_id: str | None, ready_fd: int | None) -> None:
    """Execute runs; started by itself whenever there is work."""
    import anyio

    from mcp_flow.worker import serve as serve_worker

    anyio.run(serve_worker, settings, worker_id, ready_fd)


@main.command()
@click.option("--headed", is_flag=True, help="With a window.")
@_with_settings
def host(settings: Settings, headed: bool) -> None:
    """Own the browser; started by itself whenever a run needs a page."""
    import anyio

    from mcp_flow.browser import host as hosts

    async def work() -> None:
        await hosts.serve(settings, headless=not headed)

    anyio.run(work)


@main.command()
@_with_settings
def stop(settings: Settings) -> None:
    """End worker and browser host; runs stay resumable."""
    import anyio

    from mcp_flow import presence
    from mcp_flow.browser import host as hosts

    async def work() -> tuple[int, int]:
        workers = await anyio.to_thread.run_sync(presence.stop_workers, settings)
        return workers, await hosts.stop(settings)

    workers, ended = anyio.run(work)
    click.echo(f"Ended {workers} worker(s) and {ended} browser host(s). Runs go on when something asks for them.")


@main.group()
def browser() -> None:
    """Which browser is used, and how it is installed."""


@browser.command("find")
@_with_settings
def browser_find(settings: Settings) -> None:
    """Say which browser is used."""
    from mcp_flow.browser import launch

    found = launch.find(settings)
    click.echo(f"Browser: {found.name} ({found.path or 'from Playwright'})")


@browser.command("install")
@_with_settings
def browser_install(settings: Settings) -> None:
    """Take the browser that is there, or install one."""
    from mcp_flow.browser import launch
    from mcp_flow.errors import BrowserMissing

    try:
        found = launch.find(settings)
    except BrowserMissing:
        if settings.browser:
            raise
        found = launch.install(click.echo)
    click.echo(f"Browser: {found.name} ({found.path or 'from Playwright'})")


# --- runs ---


@main.command()
@click.option("--status", multiple=True, help="Only these; may be given more than once.")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1, 1000))
@_with_settings
def runs(settings: Settings, status: tuple[str, ...], limit: int) -> None:
    """List runs, newest first."""
    from rich.console import Console
    from rich.table import Table

    async def work(app: App) -> list[Any]:
        return await app.control.runs(status, None, None, limit, None)

    table = Table("run", "workflow", "status", "step", "why", box=None, header_style="bold")
    for row in _run(settings, work):
        table.add_row(row.run_id, row.workflow, row.status, row.step or "", (row.why or "")[:80])
    Console().print(table)


@main.command()
@click.argument("run_id")
@click.option("--events", "with_events", is_flag=True, help="With the journal.")
@_with_settings
def show(settings: Settings, run_id: str, with_events: bool) -> None:
    """Show a run as JSON."""
    from mcp_flow.views import show_events, show_steps

    async def work(app: App) -> dict[str, Any]:
        run = await app.control.run(run_id)
        view: dict[str, Any] = dict(await app.view(run))
        view["steps"] = show_steps(run)
        if with_events:
            view["events"] = show_events(await app.control.events(run_id, 0, -1))
        return view

    click.echo(json.dumps(_run(settings, work), indent=2, ensure_ascii=False, default=str))


@main.command()
@click.argument("request_id")
@click.option("--deny", is_flag=True, help="Deny instead.")
@click.option("--note", help="Why.")
@_with_settings
def approve(settings: Settings, request_id: str, deny: bool, note: str | None) -> None:
    """Decide an approval, as the person at this terminal."""

    async def work(app: App) -> str:
        return await app.control.approve(request_id, _person(), "deny" if deny else "approve", note)

    click.echo(f"{'Denied' if deny else 'Approved'}; run {_run(settings, work)} goes on.")


@main.command()
@click.argument("request_id")
@click.argument("value", required=False)
@_with_settings
def answer(settings: Settings, request_id: str, value: str | None) -> None:
    """Answer a request with JSON, or plain text, as the person at this terminal; a secret is asked for unseen."""
    from mcp_flow.answers import check_open, check_who
    from mcp_flow.errors import InvalidInput
    from mcp_flow.secrets import secret_places

    async def work(app: App) -> str:
        run_id, person = await app.control.run_of(request_id), _person()
        run = await app.control.run(run_id)
        opened = run.requests[request_id].opened
        given = _value(value)
        if secret_places(opened.answer_schema):
            if value is not None:
                raise InvalidInput(
                    f"Request {request_id} asks for a secret, which a command line would show to others: leave it out, "
                    "and it is asked for unseen."
                )
            check_open(run, run.requests[request_id])
            check_who(run.requests[request_id], person, settings.typed)
            given = _typed_unseen(opened)
        await app.control.resume(run_id, person, value=given, has_value=given is not None, request_id=request_id)
        return run_id

    click.echo(f"Answered; run {_run(settings, work)} goes on.")


@main.command("resume")
@click.argument("run_id")
@_with_settings
def resume_run(settings: Settings, run_id: str) -> None:
    """Let a stopped run go on, as the person at this terminal; what is hijacked is handed back."""

    async def work(app: App) -> str | None:
        return await app.control.resume(run_id, _person())

    click.echo(_run(settings, work) or f"Run {run_id} goes on.")


@main.command()
@click.argument("name")
@click.argument("payload", default="null")
@click.option("--run", "run_id", help="To this run, which keeps it until it waits for it.")
@click.option("--key", help="The same key again is the same event.")
@_with_settings
def send(settings: Settings, name: str, payload: str, run_id: str | None, key: str | None) -> None:
    """Send the event NAME, with PAYLOAD as JSON, to one run or to all that wait for it."""

    async def work(app: App) -> Sent:
        return await app.control.send_event(name, _json(payload, "PAYLOAD"), _person(), run_id, key)

    sent = _run(settings, work)
    if sent.took:
        click.echo(f"Taken by {', '.join(sent.took)}.")
    elif sent.before:
        click.echo("It was sent before under this key; nothing changed.")
    else:
        click.echo(f"Run {run_id} keeps it until it waits for it." if sent.kept else "No run waits for it.")


@main.command()
@click.argument("run_id")
@click.option("--reason", default="cancelled at the command line", show_default=True)
@_with_settings
def cancel(settings: Settings, run_id: str, reason: str) -> None:
    """Stop a run for good."""

    async def work(app: App) -> None:
        await app.control.cancel(run_id, _person(), reason)

    _run(settings, work)
    click.echo(f"Run {run_id} is cancelled.")


@main.command()
@click.argument("workflow")
@click.option("--input", "input_json", help="The input as JSON.")
@click.option("--id", "run_id", help="The run's id; one that is there already goes on with --resume.")
@click.option("--resume", is_flag=True, help="Let the run of this id go on.")
@click.option("--headed", is_flag=True, help="With a window.")
@_with_settings
def run(
    settings: Settings, workflow: str, input_json: str | None, run_id: str | None, resume: bool, headed: bool
) -> None:
    """Execute WORKFLOW in this process, until it ends or somebody is needed."""
    import anyio

    from mcp_flow.library import run_workflow

    async def work() -> None:
        result: RunResult[Any] = await run_workflow(
            workflow,
            input=None if input_json is None else _json(input_json, "--input"),
            run_id=run_id,
            resume=resume,
            headless=not headed,
            settings=settings,
        )
        view = {
            "run_id": result.run_id,
            "status": result.status,
            "output": result.output,
            "error": result.error and result.error.model_dump(exclude_defaults=True),
            "pending": result.pending or None,
        }
        shown = {name: value for name, value in view.items() if value is not None}
        click.echo(json.dumps(shown, indent=2, ensure_ascii=False, default=str))
        if result.status == "failed":
            sys.exit(1)

    anyio.run(work)


@main.command()
@click.argument("run_id")
@click.argument("from_step")
@click.option("--id", "new_id", help="The id of the new run.")
@_with_settings
def fork(settings: Settings, run_id: str, from_step: str, new_id: str | None) -> None:
    """Start a run that shares what finished in RUN_ID before FROM_STEP."""

    async def work(app: App) -> str:
        return await app.control.fork(run_id, from_step, new_id)

    click.echo(f"Started run {_run(settings, work)}.")


# --- the journal ---


@main.command()
@click.argument("run_id")
@_with_settings
def verify(settings: Settings, run_id: str) -> None:
    """Check a run's hash chain and that its events can follow each other."""

    async def work(app: App) -> int:
        return await app.store.verify(run_id)

    click.echo(f"Run {run_id}: {_run(settings, work)} events, the chain holds.")


@main.command()
@_with_settings
def rebuild(settings: Settings) -> None:
    """Make every projection anew from the journal."""

    async def work(app: App) -> list[str]:
        return await app.store.rebuild()

    unreadable = _run(settings, work)
    for run_id in unreadable:
        click.echo(
            f"The journal of run {run_id} can't be read; mcp-flow verify {run_id} says where it breaks.", err=True
        )
    click.echo("Rebuilt the projections from the journal.")
    if unreadable:
        sys.exit(1)


def _person() -> Channel:
    """The person at the terminal; without one the command speaks for anyone, which no request by=human accepts."""
    from mcp_flow.channel import Channel

    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return Channel(by=getpass.getuser(), via="terminal" if at_terminal else "command", human=at_terminal)


def _typed_unseen(opened: RequestOpened) -> Any:
    """What the person types for a request that holds a secret, field by field; a field left empty is left out."""
    from mcp_flow.secrets import secret_places

    schema = opened.answer_schema or {}
    properties = schema.get("properties")
    unseen = {place[0] for place in secret_places(schema) if place}
    if opened.put_aside:
        click.echo(f"The last answer was put aside: {opened.put_aside}")
    if not properties:
        return _field(schema, getpass.getpass(f"{opened.prompt} (not shown) "))
    click.echo(opened.prompt)
    typed = {
        name: getpass.getpass(f"  {name} (not shown) ") if name in unseen else input(f"  {name} ")
        for name in properties
    }
    return {name: _field(properties[name], text) for name, text in typed.items() if text}


def _field(schema: dict[str, Any], text: str) -> Any:
    """What was typed for a field: text where it takes text, and JSON otherwise."""
    options = schema.get("anyOf", [schema])
    if any(option.get("type") == "string" for option in options):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(text: str, what: str) -> Any:
    from mcp_flow.errors import InvalidInput

    try:
        return json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{what} is no JSON: {error}.") from error


def _value(text: str | None) -> Any:
    """The text, without the quotes of a JSON string; a question that wants anything but text reads it as JSON."""
    if text is None:
        return None
    try:
        parsed = json.loads(text)
    except ValueError:
        return text
    return parsed if isinstance(parsed, str) else text
