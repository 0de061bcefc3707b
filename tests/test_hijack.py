"""A run whose page is taken from its code: all of it stands still, and what was done by hand comes back as Python."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from browsing import Site, looking_at
from clients import call, refusal, text
from harness import AGENT, PERSON, House, open_house
from mcp import Client

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.browser.driver import Driver
from mcp_flow.server import build

pytestmark = pytest.mark.anyio

SECRET = "s3cr3t-token-42"
TYPED = "hunter2hunter2"
TWO = """
    SAY = "console.info('all well'); document.querySelector('input').type = 'password'"

    async def typing(page, secret):
        password = "2retnuh2retnuh"[::-1]
        while not is_open("enough"):
            await page.fill("#name", secret)
            await page.fill("#name", password)
            await page.evaluate("window.typed = (window.typed || 0) + 1")
        return "typed"

    async def clicking(page):
        while not is_open("enough"):
            await page.click("button")
        return "clicked"

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await flow.page()
        await flow.step("open", page.goto, site)
        await flow.step("say", page.evaluate, SAY)
        return list(await asyncio.gather(
            flow.step("wait", until_open, "enough"),
            flow.step("type", typing, page, flow.secret("shop")),
            flow.step("click", clicking, page),
        ))
    """
COUNTS = "[window.typed, window.count].join()"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site().served() as site:
        yield site


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("hijack")
    settings = config.load(home=folder / "home", workflows=folder / "workflows", hijack_idle=45.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCP_FLOW_SECRET_SHOP", SECRET)
        async with open_house(settings) as house:
            yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    shared.begin(request.node.name)
    await shared.working()
    yield shared
    await shared.tidy()


@pytest.fixture(scope="module")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


@pytest.fixture(scope="module")
async def client(shared: House) -> AsyncIterator[Client]:
    async with Client(build(shared.settings)) as client:
        yield client


async def held_in(house: House, client: Client, run_id: str, step: str) -> dict[str, Any]:
    """The run once it was hijacked so that it stands still in this step."""
    while True:
        await house.control.hijack(run_id, AGENT, "look")
        run = await house.until(run_id, "hijacked")
        assert run.hijack
        assert run.hijack.stopped
        if run.hijack.stopped.step == step:
            return await call(client, "get_run", run_id=run_id)
        await house.resume(run_id)


async def unchanging(house: House, driver: Driver, run_id: str) -> str:
    """What the page counts, which must not go on while other calls to it do."""
    async with looking_at(driver, house, run_id) as page:
        before = str(await page.evaluate(COUNTS))
        for _ in range(50):
            assert await page.evaluate(COUNTS) == before
        return before


def in_files(folder: Path, value: str) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and value.encode() in path.read_bytes()]


async def test_every_task_of_a_hijacked_run_stands_still_and_goes_on_when_it_is_handed_back(
    house: House, client: Client, driver: Driver, site: Site
) -> None:
    run_id = await house.start(TWO, {"site": site.url})
    for step in ("click#1", "type#1"):
        await house.event(run_id, ev.StepStarted, lambda event, step=step: event.key == step)  # type: ignore[misc]
    view = await held_in(house, client, run_id, "click#1")
    line = house.line_of('page.click("button")')
    assert f'"step": "click#1", "action": "Page.click locator(\\"button\\")", "file": "{house.file}"' in view["why"]
    assert f'"line": {line}' in view["why"]
    assert view["step"] == "click#1"
    before = await unchanging(house, driver, run_id)
    fill = {"op": "fill", "locator": "#name", "value": "x"}
    assert "at step click#1" in await text(client, "act", run_id=run_id, actions=[fill])
    assert (await call(client, "exec_js", run_id=run_id, code=COUNTS))["value"] == before
    assert await house.resume(run_id) is None
    async with looking_at(driver, house, run_id) as page:
        await page.wait_for_function(f"was => {COUNTS}.split(',').every((n, i) => +n > +was.split(',')[i])", arg=before)
    house.open("enough")
    assert await house.finished(run_id) == [None, "typed", "clicked"]
    assert (await house.control.run(run_id)).attempt == 1


async def test_a_page_that_is_taken_anew_at_once_is_taken_from_code_that_has_not_gone_on(
    house: House, client: Client, driver: Driver, site: Site
) -> None:
    run_id = await house.start(TWO, {"site": site.url})
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "click#1")
    await held_in(house, client, run_id, "click#1")
    before = await unchanging(house, driver, run_id)
    # In one turn of the journal, so that the worker hears of both at once.
    await house.store.append(run_id, ev.HijackReleased(), ev.HijackRequested(reason="again"), epoch=None)
    presence.ring(house.settings, run_id)
    run = await house.until(run_id, "hijacked")
    assert run.hijack
    assert run.hijack.requested.reason == "again"
    assert await unchanging(house, driver, run_id) == before
    house.open("enough")
    await house.resume(run_id)
    assert (await house.finished(run_id))[0] is None


async def test_the_step_that_stands_still_is_the_one_that_is_called_done(
    house: House, client: Client, driver: Driver, site: Site
) -> None:
    run_id = await house.start(TWO, {"site": site.url})
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "click#1")
    await held_in(house, client, run_id, "click#1")
    await unchanging(house, driver, run_id)
    resumed = await call(client, "resume", run_id=run_id, step="done", value="by hand", wait_s=0)
    assert resumed["status"] in ("queued", "running")
    [settled] = await house.events(run_id, ev.StepSettled)
    assert (settled.key, settled.value) == ("click#1", "by hand")
    house.open("enough")
    assert await house.finished(run_id) == [None, "typed", "by hand"]


async def test_a_step_is_called_done_only_where_the_run_stands_at_one(house: House, client: Client, site: Site) -> None:
    source = """
        @workflow
        async def main(flow: Flow, site: str) -> str:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("hold", until_open, "go")
            return await flow.step("title", page.title)
        """
    run_id = await house.start(source, {"site": site.url})
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "hold#1")
    await house.control.hijack(run_id, AGENT, "look")
    house.open("go")
    await house.until(run_id, "hijacked")
    assert "stands at no step" in await refusal(client, "resume", run_id=run_id, step="done", value="x")
    assert "at step title" in await text(client, "snapshot", run_id=run_id)
    await house.resume(run_id)
    assert await house.finished(run_id) == "/"


async def test_what_an_action_types_is_nowhere_and_the_moment_is_kept(house: House, client: Client, site: Site) -> None:
    run_id = await house.start(TWO, {"site": site.url})
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "type#1")
    view = await held_in(house, client, run_id, "type#1")
    assert '"action": "Page.' in view["why"]
    [hijacked] = [event for event in await house.events(run_id, ev.RunHijacked) if event.step == "type#1"][-1:]
    assert hijacked.action in ('Page.fill locator("#name")', "Page.evaluate")
    kept = await house.event(run_id, ev.ArtifactKept, lambda event: event.file.endswith(".txt"))
    picture = await house.event(run_id, ev.ArtifactKept, lambda event: event.file.endswith(".png"))
    folder = house.settings.run_folder(run_id)
    assert (folder / picture.file).read_bytes().startswith(b"\x89PNG")
    record = (folder / kept.file).read_text()
    assert "console info: all well" in record
    assert kept.file.startswith("hijack-")
    for value in (SECRET, TYPED):
        assert value not in str(view)
        assert not in_files(house.settings.home, value)
    house.open("enough")
    await house.resume(run_id)
    await house.finished(run_id)


async def test_what_was_done_by_hand_is_python_for_the_step_that_waits(
    house: House, client: Client, site: Site
) -> None:
    source = """
        from pydantic import SecretStr

        class Login(BaseModel):
            word: SecretStr

        @workflow
        async def main(flow: Flow, site: str) -> list:
            page, mail = await flow.page(), await flow.page("mail")
            await flow.step("open", page.goto, site)
            await flow.step("open mail", mail.goto, site + "/mail")
            await flow.ask("Which word?", Login)
            await flow.pause("look", name="look")
            return [page.url, mail.url]
        """
    run_id = await house.start(source, {"site": site.url})
    await house.until(run_id, "waiting-input")
    await house.control.resume(run_id, PERSON, value={"word": TYPED}, has_value=True)
    await house.until(run_id, "paused")
    assert "paused at step look#1" in await text(client, "snapshot", run_id=run_id)

    async def act(page: str, **action: str) -> str:
        return await text(client, "act", run_id=run_id, page=page, actions=[action])

    long = "x" * 1500
    await act("main", op="fill", locator="#name", value=long)
    await act("main", op="fill", locator="#name", value=TYPED)
    assert "at step look#1" in await act("mail", op="click", locator="button")
    opening = "document.querySelector('button').onclick = () => window.open('/popped')"
    await call(client, "exec_js", run_id=run_id, code=opening, mode="write")
    await act("main", op="click", locator="button")
    await house.event(run_id, ev.PageOpened, lambda event: event.name == "popup-1")
    await act("popup-1", op="fill", locator="#name", value="y" * 9000)
    returning = "element.dataset.seen = 1; return 1"
    await call(client, "exec_js", run_id=run_id, code=returning, locator="button", page="mail", mode="write")
    view = await call(client, "get_run", run_id=run_id)
    run = await house.control.run(run_id)
    assert run.hijack
    assert datetime.fromisoformat(view["held_until"]) == datetime.fromisoformat(run.hijack.used_at) + timedelta(
        seconds=45
    )
    patch = view["patch"]
    assert patch["step"] == "look#1"
    lines = patch["lines"]
    button = 'get_by_role("button", name="add")'
    assert lines == [
        f'await page.locator("#name").fill("{long}")',
        'await page.locator("#name").fill("[hidden]")',
        'mail = await flow.page("mail")',
        f"await mail.{button}.click()",
        f'await page.evaluate("{opening}")',
        f"async with page.expect_popup() as opening:\n    await page.{button}.click()\npopup = await opening.value",
        lines[6],
        f'await mail.locator("button").evaluate("async (element) => {{\\n{returning}\\n}}")',
    ]
    assert lines[6].startswith('await popup.locator("#name").fill("yyyyy')
    assert lines[6].endswith(' more characters]")')
    ast.parse(textwrap.indent("\n".join(lines), "    ").join(["async def pasted(page, flow):\n", "\n"]))
    resumed = await call(client, "resume", run_id=run_id)
    assert (resumed["status"], resumed["patch"]) == ("finished", patch)
