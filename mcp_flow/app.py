"""The composition root: opens everything that a server or a command needs, once, in one task group."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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
from mcp_flow.views import RunView, show_run

if TYPE_CHECKING:
    from playwright.async_api import Page

    from mcp_flow.browser.session import Driver

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
        self._driver: Driver | None = None

    @asynccontextmanager
    async def page(self, run: Run, name: str = "main") -> AsyncIterator[Page]:
        """The run's page of this name, attached from this very process; raises `PageGone` with what is left."""
        # Playwright takes a third of a second to import, which a server that never looks need not spend.
        from mcp_flow.browser import host as hosts
        from mcp_flow.browser.session import Driver, attach

        target_id = run.pages.get(name)
        again = f'get_run(run_id="{run.run_id}") says where the run stands.'
        if run.ended:
            raise PageGone(f"Run {run.run_id} is {run.status}, and its pages are closed with it. {again}")
        gone = PageGone(
            f"The page {name!r} of run {run.run_id} is gone: it was closed, or its browser has ended. "
            f'resume(run_id="{run.run_id}") rebuilds it from its checkpoint, once the run has stopped.'
        )
        if target_id is None:
            if name == "main" and run.page_state:
                raise gone
            names = ", ".join(run.pages) or "none yet"
            raise PageGone(f"Run {run.run_id} has no page {name!r}; its pages: {names}. {again}")
        assert run.created
        self._driver = self._driver or Driver()
        for host in hosts.living(self.settings):
            if host.headless is not run.created.headless:
                continue
            try:
                page = await attach(self._driver, host, target_id)
            except PageGone:
                continue
            try:
                yield page
            finally:
                browser = page.context.browser
                if browser:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(5):
                        await browser.close()
            return
        raise gone

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
        if self._driver:
            await self._driver.stop()


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
