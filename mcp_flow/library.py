"""Runs as part of a program of one's own: started, executed and awaited in this very process.

The process is a worker like any other, for this one run. It is never killed for being silent; what another worker has
taken over meanwhile it neither writes nor touches any more.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.app import App, open_app
from mcp_flow.channel import Channel
from mcp_flow.config import Settings
from mcp_flow.control import Control, new_run_id
from mcp_flow.definition import Workflow
from mcp_flow.errors import Conflict, InvalidInput
from mcp_flow.revisions import Revision, capture
from mcp_flow.run import Run
from mcp_flow.store import Store
from mcp_flow.views import show_request
from mcp_flow.worker import Worker

R = TypeVar("R")
OnEvent = Callable[[ev.Recorded], None]
Move = Callable[..., Coroutine[Any, Any, Any]]
LONG = 3600.0


@dataclass(frozen=True)
class RunResult(Generic[R]):
    """Where a run stood when `run_workflow` returned: ended, or stopped where somebody is needed."""

    run_id: str
    status: str
    output: R | None = None
    error: ev.Failure | None = None
    pending: list[dict[str, Any]] = field(default_factory=list)
    """What the run waits for, each with the call that answers."""


async def run_workflow(
    workflow: Workflow[..., R] | str,
    *,
    input: Any = None,
    run_id: str | None = None,
    resume: bool = False,
    max_concurrency: int | None = None,
    on_event: OnEvent | None = None,
    headless: bool = True,
    settings: Settings | None = None,
) -> RunResult[R]:
    """Execute a workflow here until it ends or stops where somebody is needed; timers are slept through.

    `workflow` is a decorated function, or a name in the workflows folder. A `run_id` that is there already with the
    same input is that run; with `resume` it goes on from where it stopped, under the code as it is now, and an input
    is not needed: another than its own is refused. `on_event` is
    called with each event of the run once it is durable. At most `max_concurrency` of its steps run at a time. Without
    `settings` they are those of the environment (`mcp_flow.config.load`).

    Raises `InvalidInput`, `InvalidId`, `Conflict`, `UnknownWorkflow`, `UnknownRun`, and `BrokenWorkflow`.
    """
    if resume and run_id is None:
        raise InvalidInput("run_workflow(resume=True) continues a run: say which with run_id.")
    settings = settings or config.load()
    async with open_app(settings, "library") as app:
        move: Move
        if resume and run_id is not None:
            begun = run_id
            move = partial(_resume, app, workflow, input, begun)
        elif isinstance(workflow, str):
            begun = run_id or new_run_id(workflow)
            move = partial(app.control.start, workflow, input, run_id=begun, headless=headless)
        else:
            begun = run_id or new_run_id(workflow.name)
            move = partial(_begin, app, workflow, input, begun, headless)
        run = await _execute(app, begun, move, max_concurrency, on_event)
    output = run.output
    if run.status == "finished" and isinstance(workflow, Workflow):
        output = workflow.load_output(run.output)
    pending = [show_request(request, run, settings.typed) for request in run.open_requests()]
    return RunResult(run.run_id, run.status, output, run.error, pending)


async def fork_run(run_id: str, from_step: str, *, new_id: str | None = None, settings: Settings | None = None) -> str:
    """Start a run that shares what finished in `run_id` before `from_step`; returns its id, and a worker executes it.

    Raises `UnknownRun`, `UnknownStep`, `NotAllowed` for a step that never finished, and `Conflict` for an id in use.
    """
    async with open_app(settings or config.load(), "library") as app:
        return await app.control.fork(run_id, from_step, new_id)


async def _resume(app: App, workflow: Workflow[..., Any] | str, input: Any, run_id: str, owner: str) -> None:
    created = (await app.control.run(run_id)).created
    assert created
    if input is not None:
        given = await _checked(app, workflow, input)
        if given != created.input:
            raise Conflict(
                f"Run {run_id} was started with another input: {json.dumps(created.input, ensure_ascii=False):.500}. "
                "Leave the input out to resume it, or start a new run under another id."
            )
    named = workflow if isinstance(workflow, str) else workflow.name
    if named.rpartition(":")[2] != created.function:
        raise Conflict(f"Run {run_id} is one of workflow {created.workflow!r}, not of {named!r}.")
    await app.control.resume(run_id, Channel(by="library"), wake=False)


async def _checked(app: App, workflow: Workflow[..., Any] | str, input: Any) -> dict[str, Any]:
    """An input as a run of the workflow would hold it; raises `InvalidInput`."""
    if isinstance(workflow, Workflow):
        return workflow.validate_input(input)
    described, revision = await app.reader.describe(workflow)
    return await app.reader.validate(revision, described.function, input)


async def _begin(app: App, workflow: Workflow[..., Any], input: Any, run_id: str, headless: bool, owner: str) -> str:
    """Start a run of a function of this program."""
    revision = await anyio.to_thread.run_sync(_revision, app.settings, workflow)
    created = ev.RunCreated(
        workflow=workflow.name,
        function=workflow.name,
        root=revision.root,
        entry=revision.entry,
        revision=revision.hash,
        input=workflow.validate_input(input),
        headless=headless,
    )
    return await app.control.begin(created, revision, run_id, owner)


def _revision(settings: Settings, workflow: Workflow[..., Any]) -> Revision:
    """The file of a workflow with its imports; under the workflows folder, if it lies there, as servers have it."""
    file = Path(workflow.file).resolve()
    root = settings.workflows if file.is_relative_to(settings.workflows) else file.parent
    return capture(root, file.relative_to(root).as_posix())


async def _execute(app: App, run_id: str, move: Move, max_concurrency: int | None, on_event: OnEvent | None) -> Run:
    """Make the move that starts the run or lets it go on, and carry the run until it is at rest.

    Where another process has the run, it is watched only.
    """
    async with Store(app.settings, "library", at_once=True) as store:
        worker = Worker(
            app.settings, store, f"lib-{secrets.token_hex(4)}", only=run_id, max_concurrency=max_concurrency
        )
        ready = asyncio.Event()
        serving = asyncio.create_task(worker.serve(ready.set))
        try:
            await _ready(ready, serving)
            await move(owner=worker.id)
            if on_event:
                await _tell(store, run_id, on_event)
            run = await app.control.run(run_id)
            if run.owner == worker.id:
                worker.take(run_id, run.epoch)
            while not _at_rest(run) and not serving.done():
                run = await app.control.wait(run_id, LONG)
        finally:
            worker.stop()
            await asyncio.shield(serving)
        return await app.control.run(run_id)


async def _ready(ready: asyncio.Event, serving: asyncio.Task[None]) -> None:
    """Wait until the worker can be found by others; raises what it failed with before."""
    waiting = asyncio.ensure_future(ready.wait())
    await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not ready.is_set():
        await serving


async def _tell(store: Store, run_id: str, on_event: OnEvent) -> None:
    """Call `on_event` with every event of the run, those that are there and those to come."""
    told = 0

    def tell(of: str, recorded: ev.Recorded) -> None:
        nonlocal told
        if of == run_id and recorded.seq > told:
            told = recorded.seq
            on_event(recorded)

    store.on_recorded = tell
    await store.run(run_id)
    for recorded in await store.events(run_id, 0, -1):
        tell(run_id, recorded)


def _at_rest(run: Run) -> bool:
    return Control.at_rest(run) or run.status == "waiting-event"
