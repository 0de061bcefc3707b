"""A run's context and pages: found again, rebuilt, watched, detached and closed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from playwright.async_api import Error
from processes import losing_drivers, own_drivers, processes, run_python, until

from mcp_flow.browser import driver as driver_module
from mcp_flow.browser import host
from mcp_flow.browser import session as session_module
from mcp_flow.browser.attach import attach, sweep
from mcp_flow.browser.driver import Driver
from mcp_flow.browser.gate import HeldCall
from mcp_flow.browser.host import HostInfo
from mcp_flow.browser.session import Checkpoint, PageRecord, Session
from mcp_flow.config import Settings
from mcp_flow.errors import BrowserUnavailable, PageGone
from mcp_flow.rails import Rails

pytestmark = pytest.mark.anyio

Opener = Callable[..., Awaitable[Session]]
Events = list[tuple[str, dict[str, Any]]]

TYPE_AND_HANG = """
import asyncio, json, sys
from pathlib import Path
from mcp_flow.browser.host import HostInfo
from mcp_flow.browser.driver import Driver
from mcp_flow.browser.session import Session
from mcp_flow.rails import Rails
async def main():
    host = HostInfo(**json.loads(sys.argv[1]))
    session = await Session.open(
        Driver(), host, viewport=(800, 600), folder=Path(sys.argv[3]), on_event=print, run_id="r1",
        rails=Rails.of(["http://127.0.0.1:*"], []),
    )
    page = await session.page()
    await page.goto(sys.argv[2])
    await page.fill("#q", "half a sentence")
    if sys.argv[4] == "about to pause":
        session.hold_actions(print)
    if sys.argv[4] == "paused":
        session.hold_actions(lambda call: print(records, flush=True))
        records = json.dumps([[r.name, r.target_id] for r in await session.records()])
        await page.click("button")
    if sys.argv[4] == "dialog":
        page.on("dialog", lambda dialog: print(records, flush=True))
        records = json.dumps([[r.name, r.target_id] for r in await session.records()])
        await page.evaluate("confirm('still there?')")
    print(json.dumps([[r.name, r.target_id] for r in await session.records()]), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def killed_client(host: HostInfo, site: str, folder: Path, mode: str = "typed") -> list[PageRecord]:
    """What a client process had recorded when it was killed with -9."""
    client = run_python(TYPE_AND_HANG, json.dumps(vars(host)), site, str(folder), mode)
    assert client.stdout
    with anyio.fail_after(20):
        line = await anyio.to_thread.run_sync(client.stdout.readline)
    os.kill(client.pid, signal.SIGKILL)
    client.wait()
    client.stdout.close()
    return [PageRecord(*record) for record in json.loads(line)]


async def test_a_killed_clients_typed_text_is_found_by_target_id(
    open_session: Opener, shared_host: HostInfo, site: str, tmp_path: Path
) -> None:
    known = await killed_client(shared_host, site, tmp_path)
    session = await open_session(known=known)
    assert session.state == "reattached"
    assert await (await session.page()).input_value("#q") == "half a sentence"
    assert await session.records() == known


@pytest.mark.parametrize("mode", ["paused", "about to pause"])
async def test_a_pause_that_a_dead_client_asked_for_is_lifted(
    open_session: Opener, shared_host: HostInfo, site: str, tmp_path: Path, mode: str
) -> None:
    known = await killed_client(shared_host, site, tmp_path, mode)
    page = await (await open_session(known=known)).page()
    with anyio.fail_after(5):
        await page.click("button")
    assert await page.evaluate("window.hits") == 1


async def test_a_page_that_hangs_in_a_dead_clients_dialog_is_rebuilt(
    open_session: Opener,
    shared_host: HostInfo,
    site: str,
    tmp_path: Path,
    events: Events,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "RESPOND_SECONDS", 0.5)
    known = await killed_client(shared_host, site, tmp_path, "dialog")
    session = await open_session(known=known, checkpoint=Checkpoint({"main": site + "/"}))
    assert session.state == "restored"
    assert events[0] == ("page-unresponsive", {"name": "main"})
    await session.restore_url("main")
    assert await (await session.page()).title() == "site"
    assert len(session.pages["main"].context.browser.contexts) == 1  # type: ignore[union-attr]


async def test_contexts_that_nobody_has_recorded_are_swept_away(
    open_session: Opener, driver: Driver, shared_host: HostInfo
) -> None:
    kept, orphan = await open_session(), await open_session()
    page, lost = await kept.page(), await orphan.page()
    assert await sweep(driver, shared_host, [record.target_id for record in await kept.records()]) == 1
    await until(lost.is_closed)
    assert await page.evaluate("1 + 1") == 2


async def test_a_new_session_makes_nothing_until_it_is_asked(open_session: Opener) -> None:
    session = await open_session()
    assert (session.state, session.pages) == ("live", {})
    assert await session.checkpoint() == Checkpoint()
    first, again, mail = [await session.page(name) for name in ("main", "main", "mail")]
    assert first is again
    assert mail is not first
    assert first.viewport_size == {"width": 800, "height": 600}
    assert {record.name for record in await session.records()} == {"main", "mail"}


async def test_a_cancelled_page_is_there_for_whoever_asks_next(open_session: Opener) -> None:
    session = await open_session()
    with anyio.move_on_after(0.005) as scope:
        await session.page()
    assert scope.cancelled_caught
    page = await session.page()
    assert page.context.pages == [page]
    await page.close()
    assert not (await session.page()).is_closed()


async def test_a_restored_session_has_the_cookies_and_goes_where_it_was(open_session: Opener, site: str) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(f"{site}/set")
    await page.evaluate("localStorage.setItem('cart', '3 apples')")
    known, checkpoint = await session.records(), await session.checkpoint()
    assert checkpoint.urls == {"main": f"{site}/set"}
    checkpoint = Checkpoint(checkpoint.urls | {"late": site + "/"}, json.loads(json.dumps(checkpoint.storage)))
    await session.close()

    session = await open_session(known=known, checkpoint=checkpoint)
    assert (session.state, session.pages) == ("restored", {})
    page = await session.page()
    assert page.url == "about:blank"
    await session.restore_url("main")
    assert page.url == f"{site}/set"
    assert "who=ada" in await page.evaluate("document.cookie")
    assert await page.evaluate("localStorage.getItem('cart')") == "3 apples"
    assert (await session.checkpoint()).urls == checkpoint.urls


async def test_a_dialog_is_dismissed_and_reported(open_session: Opener, events: Events, site: str) -> None:
    page = await (await open_session()).page()
    await page.goto(site)
    with anyio.fail_after(5):
        assert await page.evaluate("confirm('sure?')") is False
    await until(lambda: events)
    assert events == [("dialog", {"type": "confirm", "message": "sure?", "url": f"{site}/"})]


async def test_a_workflow_may_answer_its_dialogs_itself(open_session: Opener, events: Events) -> None:
    page = await (await open_session()).page()
    page.on("dialog", lambda dialog: dialog.accept("Ada"))
    assert await page.evaluate("prompt('name?')") == "Ada"
    await until(lambda: events)
    assert [kind for kind, _ in events] == ["dialog"]


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("alert('stay')", "alert"),
        ("confirm('stay')", "confirm"),
        ("prompt('stay', 'here')", "prompt"),
        ("location.href = '/next'", "beforeunload"),
        ("alert(1), alert(2), confirm(3)", "alert"),
    ],
)
async def test_a_dialog_that_the_workflow_leaves_open_is_dismissed_at_a_stop(
    open_session: Opener, events: Events, site: str, monkeypatch: pytest.MonkeyPatch, script: str, kind: str
) -> None:
    monkeypatch.setattr(session_module, "ANSWER_SECONDS", 0.05)
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    await page.evaluate("localStorage.setItem('cart', 'tea')")
    await page.click("button")
    await page.evaluate("addEventListener('beforeunload', event => event.preventDefault())")
    left: list[Any] = []
    page.on("dialog", lambda dialog: left.append(dialog))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(page.evaluate, f"void ({script})")
        await until(lambda: left)
        with anyio.fail_after(5):
            kept = await session.checkpoint()
            assert kept.urls == {"main": f"{site}/"}
            assert "tea" in str(kept.storage)
            await session.settle_dialogs()
    assert await page.evaluate("1 + 1") == 2
    assert page.url == f"{site}/"
    assert {about["answered"] for _, about in events} == {"dismissed at a stop"}
    assert events[0][1]["type"] == kind
    assert len(events) == len(left) == (3 if "2" in script else 1)
    with anyio.fail_after(1):
        await session.settle_dialogs()


async def test_a_dialog_that_the_workflow_is_about_to_answer_is_its_own_at_a_stop(
    open_session: Opener, events: Events
) -> None:
    session = await open_session()
    page = await session.page()
    asked = asyncio.Event()
    going_on = asyncio.Event()

    async def accept(dialog: Any) -> None:
        asked.set()
        await going_on.wait()
        await dialog.accept("Ada")

    page.on("dialog", accept)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(page.evaluate, "window.said = prompt('name?')")
        await asked.wait()
        tasks.start_soon(session.settle_dialogs)
        await anyio.wait_all_tasks_blocked()
        going_on.set()
    assert await page.evaluate("window.said") == "Ada"
    assert [about.get("answered") for _, about in events] == [None]


async def test_leaving_a_page_that_asks_to_stay_is_allowed(open_session: Opener, site: str) -> None:
    page = await (await open_session()).page()
    await page.goto(site)
    await page.evaluate("addEventListener('beforeunload', event => event.preventDefault())")
    await page.click("button")
    await page.goto(f"{site}/next")
    assert page.url == f"{site}/next"


async def test_someone_who_looks_in_leaves_dialogs_to_the_run(
    open_session: Opener, driver: Driver, shared_host: HostInfo
) -> None:
    session = await open_session()
    page = await session.page()
    page.on("dialog", lambda dialog: dialog.accept())
    (record,) = await session.records()
    seen = await attach(driver, shared_host, record.target_id)
    assert await page.evaluate("confirm('sure?')") is True
    assert await seen.evaluate("document.title = 'seen'") == await page.title()
    await seen.context.browser.close()  # type: ignore[union-attr]
    assert not page.is_closed()
    with pytest.raises(PageGone):
        await attach(driver, shared_host, "0" * 32)


async def test_a_download_is_saved_under_a_safe_name(
    open_session: Opener, events: Events, site: str, tmp_path: Path
) -> None:
    page = await (await open_session()).page()
    await page.goto(site)
    saved: set[str] = set()
    for _ in range(2):
        await page.evaluate("location.href = '/file'")
        await until(lambda: len(events) == 2)
        assert events[0] == ("download-started", {"url": f"{site}/file", "suggested": events[0][1]["suggested"]})
        kind, about = events.pop()
        events.clear()
        path = anyio.Path(about["path"])
        assert kind == "download"
        assert Path(path.parent) == tmp_path / "run" / "downloads"
        assert "<input" in await path.read_text()
        assert stat.S_IMODE((await path.stat()).st_mode) == 0o600
        saved.add(path.name)
    assert saved == {"_re port_.csv", "_re port_ (2).csv"}


async def test_a_popup_is_reported_and_pages_that_close_are_too(
    open_session: Opener, events: Events, site: str
) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    await page.evaluate("void window.open('/popup')")
    await until(lambda: events)
    popup = session.pages["popup-1"]
    main, recorded = await session.records()
    assert events == [("popup", {"name": "popup-1", "url": f"{site}/popup", "target_id": recorded.target_id})]
    assert (main.name, recorded.name, popup.url) == ("main", "popup-1", f"{site}/popup")
    events.clear()
    await popup.close()
    await page.close()
    assert events == [("page-closed", {"name": "popup-1"}), ("page-closed", {"name": "main"})]
    assert session.places() == {"main": f"{site}/", "popup-1": f"{site}/popup"}
    assert await session.page() is not page


async def test_a_popup_has_its_name_as_soon_as_its_opener_returns_it(open_session: Opener, site: str) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    for number in (1, 2):
        async with page.expect_popup() as opening:
            await page.evaluate(f"void window.open('/popup{number}')")
        popup = await opening.value
        assert await session.page(f"popup-{number}") is popup
    assert len(page.context.pages) == 3


async def test_a_popup_that_opened_while_nobody_was_there_is_found_and_one_that_closed_is_missed(
    open_session: Opener, driver: Driver, shared_host: HostInfo, events: Events, site: str
) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    async with page.expect_popup():
        await page.evaluate("void window.open('/first')")
    await session.page("popup-1")
    known = await session.records()
    await session.detach()
    seen = await attach(driver, shared_host, known[0].target_id)
    (first,) = [other for other in seen.context.pages if other is not seen]
    await first.close()
    async with seen.expect_popup() as opening:
        await seen.evaluate("void window.open('/second')")
    await (await opening.value).wait_for_url(f"{site}/second")
    await seen.context.browser.close()  # type: ignore[union-attr]
    events.clear()
    session = await open_session(known=known)
    assert session.state == "reattached"
    assert events[0] == ("page-closed", {"name": "popup-1"})
    assert (await session.page("popup-1")).url == f"{site}/second"
    assert [kind for kind, _ in events] == ["page-closed", "popup"]


async def test_a_run_that_has_lost_one_of_its_own_pages_has_all_of_them_rebuilt(
    open_session: Opener, driver: Driver, shared_host: HostInfo, site: str
) -> None:
    session = await open_session()
    await (await session.page()).goto(f"{site}/set")
    await (await session.page("mail")).goto(f"{site}/mail")
    known, checkpoint = await session.records(), await session.checkpoint()
    await session.detach()
    seen = await attach(driver, shared_host, known[0].target_id)
    await seen.close()
    session = await open_session(known=known, checkpoint=Checkpoint(checkpoint.urls))
    assert (session.state, session.pages) == ("restored", {})
    await session.restore_url("main")
    assert "who=ada" in await session.pages["main"].evaluate("document.cookie")
    assert len(session.pages["main"].context.browser.contexts) == 1  # type: ignore[union-attr]
    await seen.context.browser.close()  # type: ignore[union-attr]


async def test_a_crashed_page_is_reported(open_session: Opener, events: Events) -> None:
    session = await open_session()
    page = await session.page()
    cdp = await page.context.new_cdp_session(page)
    with anyio.move_on_after(0.2):
        await cdp.send("Page.crash")
    await until(lambda: ("page-crashed", {"name": "main"}) in events)
    assert session.pages == {}


async def test_actions_are_held_until_released_each_of_them_and_say_what_they_are(
    open_session: Opener, site: str
) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    held: list[HeldCall] = []

    async def click() -> None:
        await page.click("button")

    session.hold_actions(held.append)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(click)
        tasks.start_soon(page.locator("#q").fill, "a secret")
        tasks.start_soon(page.evaluate, "window.seen = 1")
        await until(lambda: len(held) == 3)
        assert await page.title() == "site"
        told = [await session.describe(call) for call in held]
        assert told == ['Page.click locator("button")', 'Locator.fill locator("#q")', "Page.evaluate"]
        assert held[0].lines[0] == (__file__, click.__code__.co_firstlineno + 1)
        session.release_actions()
    assert await page.evaluate("[window.hits, window.seen, document.querySelector('#q').value]") == [1, 1, "a secret"]


async def test_a_held_action_may_be_given_up_and_none_outlives_its_session(open_session: Opener, site: str) -> None:
    session = await open_session()
    page = await session.page()
    await page.goto(site)
    held: list[HeldCall] = []
    session.hold_actions(held.append)
    with anyio.move_on_after(0.05):
        await page.click("button")
    session.release_actions()
    assert await page.evaluate("window.hits") != 1
    session.hold_actions(held.append)
    clicking = asyncio.ensure_future(page.click("button"))
    await until(lambda: len(held) == 2)
    await session.detach()
    await asyncio.wait([clicking], timeout=5)
    assert clicking.cancelled()
    with pytest.raises(Error, match="no longer its own"):
        await page.click("button")


async def test_detaching_leaves_the_context_and_closing_ends_it(open_session: Opener, site: str) -> None:
    session = await open_session()
    await (await session.page()).goto(site)
    known = await session.records()
    await session.detach()
    session = await open_session(known=known)
    assert (session.state, (await session.page()).url) == ("reattached", f"{site}/")
    await session.close()
    assert (await open_session(known=known)).state == "restored"


async def test_a_dead_driver_fails_the_calls_in_flight_and_is_replaced(
    shared_host: HostInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "WATCH_SECONDS", 0.1)
    with losing_drivers():
        await lose_a_driver_and_get_another(shared_host)


async def lose_a_driver_and_get_another(shared_host: HostInfo) -> None:
    async with Driver() as driver:
        before = own_drivers()
        browser = await driver.connect(shared_host.endpoint)
        page = await (await browser.new_context()).new_page()
        (pid,) = own_drivers() - before
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(expect_error, page.wait_for_event("popup", timeout=0))
            tasks.start_soon(expect_error, page.evaluate("new Promise(() => {})"))
            await anyio.wait_all_tasks_blocked()
            os.kill(pid, signal.SIGKILL)
        again = await driver.connect(shared_host.endpoint)
        for context in again.contexts:
            await context.close()


async def expect_error(work: Awaitable[Any]) -> None:
    with pytest.raises(Error), anyio.fail_after(10):
        await work


async def test_events_of_a_host_that_dies_say_so(settings: Settings, driver: Driver, tmp_path: Path) -> None:
    events: list[str] = []
    info = await host.ensure(settings)
    session = await Session.open(
        driver,
        info,
        viewport=(800, 600),
        folder=tmp_path,
        on_event=lambda kind, _: events.append(kind),
        run_id="r1",
        rails=Rails(),
    )
    page = await session.page()
    os.kill(info.pid, signal.SIGKILL)
    await until(lambda: "browser-gone" in events)
    with pytest.raises(Error):
        await page.title()
    with pytest.raises(BrowserUnavailable):
        await session.page("other")
    await session.close()
    await until(lambda: not processes(str(Path(info.endpoint).parents[1])))


async def test_a_host_that_is_gone_is_unavailable(driver: Driver, tmp_path: Path) -> None:
    with pytest.raises(BrowserUnavailable):
        await driver.connect(str(tmp_path / "nothing.sock"))
