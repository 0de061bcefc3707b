"""The composition root: opens everything that a server or a command needs, once, in one task group."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio

from mcp_flow import presence
from mcp_flow.catalog import Reader
from mcp_flow.config import Settings
from mcp_flow.control import Control
from mcp_flow.errors import FlowError, PageGone
from mcp_flow.page.looks import Looks
from mcp_flow.run import Run
from mcp_flow.secrets import Secrets, masked_in
from mcp_flow.store import Store
from mcp_flow.views import RunView, next_call, show_run

if TYPE_CHECKING:
    from playwright.async_api import Page

    from mcp_flow.browser.attach import Visits

AWAKE_EVERY = 1.0
"""Seconds between two looks for work that no worker has."""
SOONEST = 0.01


class App:
    """What the tools and commands work with."""

    def __init__(self, settings: Settings, store: Store, reader: Reader, bell: presence.Doorbell) -> None:
        self.settings = settings
        self.store = store
        self.reader = reader
        self.control = Control(settings, store, reader, bell)
        self.looks = Looks()
        self.secrets = Secrets(settings.home)
        self._visits: Visits | None = None

    @asynccontextmanager
    async def page(self, run: Run, name: str = "main") -> AsyncIterator[Page]:
        """The run's page of this name, attached from this very process; raises `PageGone` with what is left.

        So does what is done with the page when it goes meanwhile.
        """
        if run.ended:
            raise PageGone(
                f"Run {run.run_id} is {run.status}, and its pages are closed with it. "
                f"get_run(run_id={json.dumps(run.run_id)}) says where the run stands."
            )
        if name not in run.pages and not (name == "main" and run.page_state):
            unknown = f"Run {run.run_id} has no page {name!r}"
            if run.page_state and not run.pages:
                raise PageGone(f"{unknown} any more. {await self.left(run, 'main')}")
            names, run_id = ", ".join(run.pages) or "none yet", json.dumps(run.run_id)
            following = f"get_run(run_id={run_id}) says where the run stands."
            if other := next(iter(run.pages), None):
                following = f"snapshot(run_id={run_id}, page={json.dumps(other)}) shows {other!r}."
            raise PageGone(f"{unknown}; its pages: {names}. {following}")
        try:
            async with self._visit(run, run.pages.get(name, "")) as page:
                yield page
        except PageGone as error:
            raise await self._gone(run, name) from error

    async def left(self, run: Run, name: str) -> str:
        """Which pages of a run are left without this one, and the calls that show one and that get this one back."""
        from mcp_flow.browser.session import is_popup

        run = await self.store.run(run.run_id)
        run_id, status = json.dumps(run.run_id), self.status(run)
        living = []
        for other, target_id in list(run.pages.items()):  # the journal grows meanwhile
            if other != name:
                with suppress(PageGone):
                    async with self._visit(run, target_id):
                        living.append(other)
        shown = f"snapshot(run_id={run_id}, page={json.dumps(living[0])}) shows {living[0]!r}. " if living else ""
        back = f"{name!r} was a popup, which only what opened it opens again."
        if not is_popup(name):
            onward = f"resume(run_id={run_id})" if status == "failed" else next_call(run, status, self.settings.typed)
            back = f"{name!r} is rebuilt when the run goes on: {onward}"
        return f"Pages left: {', '.join(living) or 'none'}. {shown}{back}"

    async def _gone(self, run: Run, name: str) -> PageGone:
        what = "gone: it was closed or has crashed, or its browser has ended"
        if run.parked_since:
            what = "parked: its run waited for longer than its hold and gave it up"
        return PageGone(f"The page {name!r} of run {run.run_id} is {what}. {await self.left(run, name)}")

    @asynccontextmanager
    async def _visit(self, run: Run, target_id: str) -> AsyncIterator[Page]:
        # Playwright takes a third of a second to import, which a server that never looks need not spend.
        from mcp_flow.browser import host as hosts
        from mcp_flow.browser.attach import Visits

        assert run.created
        self._visits = self._visits or Visits()
        for host in hosts.living(self.settings):
            if target_id and host.headless is run.created.headless and run.page_host in ("", host.identity):
                async with self._visits.page(host, target_id) as page:
                    yield page
                return
        raise PageGone("Its browser has ended.")

    async def explain(self, run: Run, message: str) -> str | None:
        """Why a page of the run did not reach the net, where Playwright's message says no more than that."""
        from mcp_flow.browser import host as hosts
        from mcp_flow.browser import proxy

        for host in hosts.living(self.settings):
            if why := await proxy.explain(host.endpoint, run.run_id, message):
                return why
        return None

    async def secrets_of(self, run: Run) -> dict[str, str]:
        """What nobody is shown of a run, by name: the home folder's secrets, and those that the run was answered."""
        return self.secrets.values() | await self.store.secret_answers(run.run_id)

    async def view(self, run: Run) -> RunView:
        """A run as every surface shows it, without its steps and events."""
        place = masked_in(await self.control.last_place(run), await self.secrets_of(run))
        return show_run(
            run,
            status=self.status(run),
            folder=str(self.settings.run_folder(run.run_id)),
            place=place,
            browser_lives=not run.pages or self.control.browser_lives(run),
            edits=await self.control.edits(run),
            typed=self.settings.typed,
        )

    def status(self, run: Run) -> str:
        """The run's status, or `interrupted`."""
        return "interrupted" if self.control.interrupted(run.status, run.owner) else run.status

    async def close(self) -> None:
        """End the Playwright driver, if one was needed."""
        if self._visits:
            await self._visits.close()


@asynccontextmanager
async def open_app(settings: Settings, role: str, *, keep_awake: bool = False) -> AsyncIterator[App]:
    """Everything on one home folder; with `keep_awake` runs that want a worker get one as long as this is open."""
    async with Store(settings, role) as store, Reader(settings) as reader:
        bell = presence.Doorbell(settings)
        app = App(settings, store, reader, bell)
        try:
            if keep_awake:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_keep_awake, app, bell)
                    yield app
                    tasks.cancel_scope.cancel()
            else:  # a condition raised in a task group would reach a command wrapped in another exception
                yield app
        finally:
            with anyio.CancelScope(shield=True):
                bell.close()
                await app.close()


async def _keep_awake(app: App, bell: presence.Doorbell) -> None:
    while True:
        due: float | None = None
        bell.watch(app.settings)
        deaths = bell.deaths
        try:
            due = await app.control.keep_awake()
        except FlowError:
            # The next call of a tool meets the same condition and reports it to somebody who can act on it.
            await anyio.sleep(AWAKE_EVERY)
        # Other rings may be missed meanwhile: they are for the runs of somebody who lives.
        if bell.deaths == deaths:
            await bell.next_ring(AWAKE_EVERY if due is None else min(AWAKE_EVERY, max(due, SOONEST)))
