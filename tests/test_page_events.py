"""What a page does by itself (dialogs, downloads, popups) is settled, journaled, and there after a worker has died."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from browsing import Site, attachments, kill_host, look, looking_at
from clients import call, refusal, text
from harness import House, open_house
from mcp import Client

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.browser.driver import Driver
from mcp_flow.pages import DOWNLOAD_LOST
from mcp_flow.server import build

pytestmark = pytest.mark.anyio

DISMISSED = "dismissed at a stop"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site().served() as site:
        yield site


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("events")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows", grace=0.5)) as house:
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


@pytest.fixture(scope="module")
async def client(shared: House) -> AsyncIterator[Client]:
    async with Client(build(shared.settings)) as client:
        yield client


async def observed(house: House, run_id: str, what: str) -> list[dict[str, Any]]:
    """What the journal says of what the browser did by itself."""
    return [event.details for event in await house.events(run_id, ev.PageObserved) if event.what == what]


async def test_a_dialog_is_dismissed_unless_the_workflow_answers_it_and_either_is_journaled(
    house: House, site: Site
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            dismissed = await flow.step("ask", page.evaluate, "confirm('sure?')")
            page.on("dialog", lambda dialog: dialog.accept("Ada"))
            accepted = await flow.step("ask again", page.evaluate, "prompt('name?')")
            return [dismissed, accepted]
        """,
        {"site": site.url},
    )
    assert await house.finished(run_id) == [False, "Ada"]
    assert await observed(house, run_id, "dialog") == [
        {"type": "confirm", "message": "sure?", "url": f"{site.url}/"},
        {"type": "prompt", "message": "name?", "url": f"{site.url}/"},
    ]


async def test_a_dialog_that_the_workflow_leaves_open_does_not_stay_open_over_a_wait_or_a_failure(
    house: House, client: Client, driver: Driver, site: Site
) -> None:
    source = """
        async def ask(page):
            asked = asyncio.Event()
            page.on("dialog", lambda _: asked.set())
            asking = asyncio.create_task(page.evaluate("window.said = confirm('stay?')"))
            await asked.wait()
            return asking

        async def leave_open(page):
            await ask(page)

        async def fail(page):
            await ask(page)
            raise ValueError("enough")

        @workflow
        async def main(flow: Flow, site: str, failing: bool) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            if failing and not is_open("mended"):
                await flow.step("fail", fail, page)
            elif not failing:
                await flow.step("leave open", leave_open, page)
            await flow.pause()
            return await flow.step("look", page.evaluate, "[location.pathname, window.said]")
        """
    failing = await house.start(source, {"site": site.url, "failing": True})
    waiting = await house.again({"site": site.url, "failing": False})
    await house.until(failing, "failed")
    await house.waiting(waiting, "paused")
    for run_id in (failing, waiting):
        (said,) = await observed(house, run_id, "dialog")
        assert (said["type"], said["message"], said["answered"]) == ("confirm", "stay?", DISMISSED)
        assert "add" in await text(client, "snapshot", run_id=run_id)
    async with looking_at(driver, house, waiting) as page, page.expect_event("dialogclosed"):
        # Opened while nobody but the workflow's deaf listener is there.
        await page.evaluate("void setTimeout(() => alert('late'), 50)")
    await house.event(waiting, ev.PageObserved, lambda event: event.details.get("message") == "late")
    assert (await observed(house, waiting, "dialog"))[1]["answered"] == DISMISSED
    await house.kill()
    house.open("mended")
    for run_id in (failing, waiting):
        await house.resume(run_id)
    await house.waiting(failing, "paused")
    await house.resume(failing)
    assert await house.finished(failing) == ["/", False]
    assert await house.finished(waiting) == ["/", False]
    for run_id in (failing, waiting):
        assert set(await attachments(house, run_id)) == {"reattached"}


async def test_a_dialog_over_which_a_worker_is_stopped_leaves_a_page_that_the_next_one_can_use(
    house: House, site: Site
) -> None:
    run_id = await house.start(
        """
        async def ask(page):
            did("ask")
            if is_open("on"):
                return await page.evaluate("[location.pathname, window.kept]")
            page.on("dialog", lambda _: did("asked"))
            await page.evaluate("window.kept = 42; alert('stay?')")

        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            return await flow.step("ask", ask, page)
        """,
        {"site": site.url},
    )
    with anyio.fail_after(15):
        while house.did() != ["ask", "asked"]:
            await house.bell.next_ring(0.01)
    house.open("on")
    await anyio.to_thread.run_sync(presence.stop_workers, house.settings)
    await house.control.keep_awake()
    assert await house.finished(run_id) == ["/", 42]
    assert [said["answered"] for said in await observed(house, run_id, "dialog")] == [DISMISSED]
    assert await attachments(house, run_id) == ["reattached"]


HOSTILE = ["../../escape.txt", "/etc/passwd", "...", "a b;rm -rf.csv", "same.csv", "same.csv", "x" * 300 + ".csv"]


async def test_downloads_are_kept_under_safe_names_and_are_artifacts_when_the_run_has_ended(
    house: House, client: Client, site: Site
) -> None:
    run_id = await house.start(
        """
        async def fetch(page, path):
            async with page.expect_download():
                await page.evaluate("path => { location.href = path }", path)

        @workflow
        async def main(flow: Flow, site: str, names: list[str]) -> None:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            for number, name in enumerate(names):
                await flow.step(f"fetch {number}", fetch, page, "/file/" + name.replace("/", "%2F"))
        """,
        {"site": site.url, "names": HOSTILE},
    )
    await house.finished(run_id)
    view = await call(client, "get_run", run_id=run_id)
    folder = Path(view["folder"]) / "downloads"
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(kept) == len(HOSTILE)
    assert {"same.csv", "same (2).csv"} < set(kept)
    assert all(len(name) <= 130 and not name.startswith(".") for name in kept)
    assert sorted(view["artifacts"]) == sorted(str(folder / name) for name in kept)
    for artifact in await house.events(run_id, ev.ArtifactKept):
        content = kept[artifact.file.removeprefix("downloads/")]
        assert artifact.sha256 == hashlib.sha256(content).hexdigest()
        assert artifact.size == len(content) > 0
    assert len(await observed(house, run_id, "download")) == len(HOSTILE)


async def test_a_download_whose_worker_is_killed_is_named_as_lost_to_whoever_reads_the_run(
    house: House, client: Client, site: Site
) -> None:
    run_id = await house.start(
        """
        async def fetch(page):
            async with page.expect_download():
                await page.evaluate("location.href = '/held/tea.csv'")

        @workflow
        async def main(flow: Flow, site: str) -> int:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("fetch", fetch, page)
            await flow.step("hold", until_open, "go")
            return flow.attempt
        """,
        {"site": site.url},
    )
    await house.event(run_id, ev.StepStarted, lambda event: event.key == "hold#1")
    await house.event(run_id, ev.PageObserved, lambda event: event.what == "download-started")
    await house.kill()
    house.open("go")
    await house.control.keep_awake()
    assert await house.finished(run_id) == 2
    begun = {"url": f"{site.url}/held/tea.csv", "suggested": "tea.csv"}
    assert await observed(house, run_id, "download") == [begun | {"error": DOWNLOAD_LOST}]
    seen = (await call(client, "get_run", run_id=run_id, since=0))["events"]
    assert DOWNLOAD_LOST in str(seen)


async def test_a_popup_is_listed_can_be_looked_at_and_is_the_workflows_after_its_worker_was_killed(
    house: House, client: Client, driver: Driver, site: Site
) -> None:
    run_id = await house.start(
        """
        async def open_popup(page):
            async with page.expect_popup() as opening:
                await page.evaluate("void window.open('/offer')")
            await (await opening.value).wait_for_load_state()

        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("open popup", open_popup, page)
            popup = await flow.page("popup-1")
            await flow.step("fill", popup.fill, "#name", "Ada")
            await flow.pause()
            second = await flow.page("popup-2")
            return [popup.url, await flow.step("look", popup.input_value, "#name"), second.url]
        """,
        {"site": site.url},
    )
    await house.waiting(run_id, "paused")
    view = await call(client, "get_run", run_id=run_id)
    assert view["page"]["url"] == f"{site.url}/"
    assert view["page"]["pages"] == {"main": f"{site.url}/", "popup-1": f"{site.url}/offer"}
    assert f"url: {site.url}/offer" in await text(client, "snapshot", run_id=run_id, page="popup-1")
    assert "main, popup-1" in await refusal(client, "snapshot", run_id=run_id, page="popup-2")
    (seen,) = await observed(house, run_id, "popup")
    assert seen["name"] == "popup-1"
    await house.kill()
    async with looking_at(driver, house, run_id) as page:
        async with page.expect_popup() as opening:
            await page.evaluate("void window.open('/second')")
        await (await opening.value).wait_for_url(f"{site.url}/second")
    await house.resume(run_id)
    assert await house.finished(run_id) == [f"{site.url}/offer", "Ada", f"{site.url}/second"]
    assert await attachments(house, run_id) == ["reattached"]
    opened = [event.name for event in await house.events(run_id, ev.PageOpened)]
    assert list(dict.fromkeys(opened)) == ["main", "popup-1", "popup-2"]


async def test_a_popup_that_closes_while_the_run_waits_takes_nothing_with_it(
    house: House, driver: Driver, site: Site
) -> None:
    run_id = await house.start(
        """
        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("remember", page.evaluate, "void (window.kept = 42)")
            await flow.step("popup", page.evaluate, "void (window.other = window.open('/offer'))")
            await flow.pause()
            return [await flow.step("look", page.evaluate, "window.kept"), flow.attempt]
        """,
        {"site": site.url},
    )
    await house.waiting(run_id, "paused")
    await house.event(run_id, ev.PageOpened, lambda event: event.name == "popup-1")
    await look(driver, house, run_id, "window.other.close()")
    await house.event(run_id, ev.PageClosed, lambda event: event.name == "popup-1")
    await house.resume(run_id)
    assert await house.finished(run_id) == [42, 1]


async def test_a_popup_is_rebuilt_where_it_was(house: House, site: Site) -> None:
    run_id = await house.start(
        """
        async def open_popup(page):
            async with page.expect_popup() as opening:
                await page.evaluate("void window.open('/offer')")
            await (await opening.value).wait_for_load_state()

        @workflow
        async def main(flow: Flow, site: str) -> list:
            page = await flow.page()
            await flow.step("open", page.goto, site)
            await flow.step("open popup", open_popup, page)
            popup = await flow.page("popup-1")
            await flow.pause()
            return await flow.step("look", lambda: [page.url, popup.url])
        """,
        {"site": site.url},
    )
    await house.waiting(run_id, "paused")
    await anyio.to_thread.run_sync(presence.stop_workers, house.settings)
    await kill_host(house)
    await house.resume(run_id)
    assert await house.finished(run_id) == [f"{site.url}/", f"{site.url}/offer"]
    assert await attachments(house, run_id) == ["restored"]
