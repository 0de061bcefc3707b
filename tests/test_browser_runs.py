"""Runs on a real browser: the page outlives workers and failures, is rebuilt when it must be, and can be taken over."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from harness import AGENT, House, open_house

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.browser.attach import attach
from mcp_flow.browser.driver import Driver

pytestmark = pytest.mark.anyio

PAGE = """<!doctype html><title>{path}</title><input id=name><button onclick="window.count = (window.count || 0) + 1">
add</button><p id=cookie>{cookie}</p>"""


class Site(BaseHTTPRequestHandler):
    """A page at every path, which shows its cookie; `/enter` sets one."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        if self.path == "/enter":
            self.send_header("set-cookie", "who=ada; path=/")
        self.end_headers()
        self.wfile.write(PAGE.format(path=self.path, cookie=self.headers.get("cookie", "nobody")).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("browser")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    shared.begin(request.node.name)
    yield shared
    await shared.tidy()


@pytest.fixture(scope="module")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


async def look(driver: Driver, house: House, run_id: str, script: str) -> object:
    """What a script finds in the run's page, looked at from outside."""
    run = await house.control.run(run_id)
    [host] = hosts.living(house.settings)
    page = await attach(driver, host, run.pages["main"])
    try:
        return await page.evaluate(script)
    finally:
        await page.context.browser.close()  # the connection alone


async def contexts(driver: Driver, house: House) -> int:
    """How many contexts the browser holds."""
    [host] = hosts.living(house.settings)
    browser = await driver.connect(host.endpoint)
    try:
        return len(browser.contexts)
    finally:
        await browser.close()


async def stop(house: House) -> None:
    """`mcp-flow stop`."""
    await house.stop_working()
    await anyio.to_thread.run_sync(presence.stop_workers, house.settings)
    await hosts.stop(house.settings)


async def test_text_in_a_page_survives_the_death_of_its_worker(house: House, driver: Driver, site: str) -> None:
    run_id = await house.start(
        """
        async def fill(page):
            did("fill")
            await page.fill("#name", "Ada")
            await page.evaluate("window.kept = 42")

        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            gone = await flow.step("open", page.goto, site + "/form")
            await flow.step("fill", fill, page)
            await flow.step("hold", until_open, "followed")
            return [gone, page.url, await page.input_value("#name"), await page.evaluate("window.kept"), flow.attempt]
        """,
        {"site": site},
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "hold#1")
    await house.kill()
    house.open("followed")
    await house.control.keep_awake()
    assert await house.finished(run_id) == [None, f"{site}/form", "Ada", 42, 2]
    assert house.did() == ["fill"]
    [opened] = await house.events(run_id, ev.PageOpened)
    assert opened.name == "main"
    assert [event.state for event in await house.events(run_id, ev.PageAttached)] == ["reattached"]
    await house.event(run_id, ev.PageClosed)
    assert await contexts(driver, house) == 0


async def test_a_failed_run_keeps_its_page_and_a_picture_and_goes_on_in_it(
    house: House, driver: Driver, site: str
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow, site: str) -> str:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("fill", page.fill, "#name", "Ada")
            await flow.step("click", lambda: page.click("#missing", timeout=100))
            return await page.input_value("#name")
        """,
        {"site": site},
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert (run.error.type, run.error.step) == ("playwright.TimeoutError", "click")
    assert run.error.line == house.line_of('"#missing"')
    picture, record = run.error.artifacts
    assert (await anyio.Path(record).read_text()).startswith("url: ")
    assert (await anyio.Path(picture).read_bytes()).startswith(b"\x89PNG\r\n\x1a\n")
    assert await look(driver, house, run_id, "document.querySelector('#name').value") == "Ada"
    house.edit('"#missing", timeout=100', '"button"')
    await house.resume(run_id)
    assert await house.finished(run_id) == "Ada"
    await house.event(run_id, ev.PageClosed)
    assert await contexts(driver, house) == 0


async def unused(house: House) -> None:
    """Return once no process has a connection to the browser host."""
    [host] = hosts.living(house.settings)
    with anyio.fail_after(5), (Path(host.endpoint).parent / "clients").open() as clients:
        while True:
            with suppress(BlockingIOError):
                return fcntl.flock(clients, fcntl.LOCK_EX | fcntl.LOCK_NB)
            await house.bell.next_ring(0.02)


async def test_a_cancelled_run_closes_its_page_whether_it_runs_or_waits_without_a_worker(
    house: House, driver: Driver, site: str
) -> None:
    source = """
        @workflow
        async def main(flow: Flow, site: str, hold: bool):
            page = await flow.page()
            await flow.step("open", page.goto, site)
            if hold:
                await flow.step("hold", until_open, "never")
            await flow.pause()
        """
    running = await house.start(source, {"site": site, "hold": True})
    waiting = await house.again({"site": site, "hold": False})
    await house.event(running, ev.StepStarted, lambda event: event.key == "hold#1")
    await house.waiting(waiting, "paused")
    assert await contexts(driver, house) == 2
    await house.control.cancel(running, AGENT, "enough")
    await house.event(running, ev.PageClosed)
    assert await contexts(driver, house) == 1
    await house.kill()
    await house.control.cancel(waiting, AGENT, "enough")
    await house.event(waiting, ev.PageClosed)
    assert await contexts(driver, house) == 0
    assert house.detached()
    await unused(house)


async def test_after_a_stop_the_page_is_rebuilt_with_its_cookies_and_restore_steps_run_again(
    house: House, site: str
) -> None:
    source = """
        async def sign_in(page, who):
            did(f"{who} signs in at " + page.url.rpartition("/")[2])
            await page.evaluate("window.signed = true")

        @workflow
        async def main(flow: Flow, site: str, who: str, further: bool) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site + "/enter")
            await flow.step("sign in", sign_in, page, who, restore=True)
            if further:
                await flow.step("further", page.goto, site + "/cart")
            await flow.approve("Go?")
            seen = await flow.step("look", page.evaluate, "[location.href, document.cookie, window.signed || false]")
            return [*seen, flow.attempt]
        """
    stayed = await house.start(source, {"site": site, "who": "one", "further": False})
    went_on = await house.again({"site": site, "who": "other", "further": True})
    requests = [await house.waiting(run_id, "waiting-approval") for run_id in (stayed, went_on)]
    await stop(house)
    for run_id, request in zip((stayed, went_on), requests, strict=True):
        assert (await house.control.run(run_id)).status == "waiting-approval"
        await house.approve(request)
    assert await house.finished(stayed) == [f"{site}/enter", "who=ada", True, 2]
    assert await house.finished(went_on) == [f"{site}/cart", "who=ada", False, 2]
    assert sorted(house.did()) == ["one signs in at enter"] * 2 + ["other signs in at enter"] * 2
    for run_id in (stayed, went_on):
        assert [event.state for event in await house.events(run_id, ev.PageAttached)] == ["restored"]


async def test_a_page_whose_rebuilding_failed_is_rebuilt_by_the_next_attempt(house: House, site: str) -> None:
    run_id = await house.start(
        """
        async def sign_in(page):
            if is_open("down") and not is_open("up"):
                raise ConnectionError("down")
            did("sign in")

        @workflow
        async def main(flow: Flow, site: str) -> str:
            page = await flow.page()
            await flow.step("open", page.goto, site + "/enter")
            await flow.step("sign in", sign_in, page, restore=True)
            await flow.step("further", page.goto, site + "/cart")
            await flow.approve("Go?")
            return await flow.step("look", page.evaluate, "location.href")
        """,
        {"site": site},
    )
    request = await house.waiting(run_id, "waiting-approval")
    await stop(house)
    house.open("down")
    await house.approve(request)
    await house.until(run_id, "failed")
    house.open("up")
    await house.resume(run_id)
    assert await house.finished(run_id) == f"{site}/cart"
    assert house.did() == ["sign in"] * 2


async def test_a_hijack_stops_a_run_at_its_next_action_and_resume_lets_it_go_on(
    house: House, driver: Driver, site: str
) -> None:
    run_id = await house.start(
        """
        async def add(page):
            for _ in range(400):
                await page.click("button")
                if is_open("enough"):
                    return

        @workflow
        async def main(flow: Flow, site: str) -> str:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("add", add, page)
            return "done"
        """,
        {"site": site},
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "add#1")
    await house.control.hijack(run_id, AGENT, "to look")
    run = await house.until(run_id, "hijacked")
    assert run.hijack
    assert run.hijack.stopped
    assert run.hijack.stopped.step == "add#1"
    assert (run.hijack.stopped.file, run.hijack.stopped.line) == (
        str(house.file),
        house.line_of('page.click("button")'),
    )
    count = await look(driver, house, run_id, "window.count || 0")
    assert await look(driver, house, run_id, "window.count || 0") == count
    await house.resume(run_id)
    await house.event(run_id, ev.HijackReleased)
    house.open("enough")
    assert await house.finished(run_id) == "done"
    assert (await house.control.run(run_id)).attempt == 1


async def test_a_hijacked_action_gives_way_to_repaired_code_at_once(house: House, site: str) -> None:
    run_id = await house.start(
        """
        async def add(page):
            while not is_open("enough"):
                await page.click("button")

        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("add", add, page)
            return [page.url, flow.attempt]
        """,
        {"site": site},
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "add#1")
    await house.control.hijack(run_id, AGENT, "to mend")
    await house.until(run_id, "hijacked")
    house.edit('while not is_open("enough")', "for _ in range(2)")
    await house.resume(run_id)
    assert await house.finished(run_id, seconds=6) == [f"{site}/", 2]


async def test_a_hijack_stops_a_run_between_its_steps(house: House, driver: Driver, site: str) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow, site: str) -> str:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("hold", until_open, "go")
            await flow.step("next", did, "next")
            return "done"
        """,
        {"site": site},
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "hold#1")
    await house.control.hijack(run_id, AGENT, "to look")
    assert (await house.control.run(run_id)).status == "running"
    house.open("go")
    run = await house.until(run_id, "hijacked")
    assert run.hijack
    assert run.hijack.stopped
    assert run.steps["hold#1"].status == "finished"
    assert house.did() == []
    await look(driver, house, run_id, "document.querySelector('button').click()")
    await house.resume(run_id)
    assert await house.finished(run_id) == "done"


async def test_a_hijack_of_a_waiting_run_is_immediate_and_its_question_stays(house: House, site: str) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow, site: str) -> str:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            return await flow.ask("What?")
        """,
        {"site": site},
    )
    request = await house.waiting(run_id, "waiting-input")
    await house.control.hijack(run_id, AGENT, "to look")
    assert (await house.control.run(run_id)).status == "hijacked"
    await house.resume(run_id)
    assert (await house.waiting(run_id, "waiting-input")).opened.request_id == request.opened.request_id
    await house.resume(run_id, value="this")
    assert await house.finished(run_id) == "this"
