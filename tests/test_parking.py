"""Parking: a run that waits longer than its hold gives up page and coroutine, and its answer brings both back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest
from browsing import Site, attachments, contexts, kill_host, look
from clients import call, refusal
from harness import AGENT, House, open_house
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.attempt import Attempt
from mcp_flow.browser import host as hosts
from mcp_flow.browser.driver import Driver
from mcp_flow.server import build

pytestmark = pytest.mark.anyio

SHOP = """
    async def sign_in(page):
        await page.evaluate("window.signed = true")

    @workflow
    async def main(flow: Flow, site: str, fail: bool = False) -> list:
        page = await flow.page()
        await flow.step("enter", page.goto, site + "/enter")
        await flow.step("to cart", page.goto, site + "/cart")
        await flow.step("sign in", sign_in, page, restore=True)
        if fail:
            await flow.step("fail", lambda: 1 / 0)
        await flow.approve("Go?")
        seen = "[location.pathname, document.cookie, window.signed]"
        return [*await flow.step("look", page.evaluate, seen), flow.attempt]
    """
AT_THE_CART = ["/cart", "who=ada", True]
AT_ONCE = {"worker_idle": 0.05, "hold": 0.05}
"""What makes a worker release a run that waits as soon as it sees it, and park it next."""


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site().served() as site:
        yield site


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("parking")
    settings = config.load(home=folder / "home", workflows=folder / "workflows", **AT_ONCE)
    async with open_house(settings) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    shared.begin(request.node.name)
    yield shared
    shared.work(hold=3600)
    await shared.tidy()
    await shared.stop_working()


@pytest.fixture(scope="module")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


def attempts(house: House) -> list[Attempt]:
    """What is left of the home folder's attempts in memory."""
    gc.collect()
    return [
        found for found in gc.get_objects() if isinstance(found, Attempt) and found.settings.home == house.settings.home
    ]


async def until_left(work: asyncio.Task[None]) -> None:
    """Return once a worker has found that there is nothing for it to do."""
    with anyio.fail_after(20):
        await work


async def parked(house: House, run_id: str) -> None:
    """Return once a run is parked, with a worker there as long as it is not, as a server sees to it."""
    with anyio.fail_after(20):
        while not await house.events(run_id, ev.RunParked):
            house.work()
            await house.bell.next_ring(0.05)


async def held(house: House, site: Site, count: int) -> list[str]:
    """So many runs that wait, each with a page, and no worker."""
    work = house.work(hold=3600)
    run_ids = [await house.start(SHOP, {"site": site.url}) for _ in range(count)]
    for run_id in run_ids:
        await house.waiting(run_id, "waiting-approval")
    await until_left(work)
    return run_ids


async def test_a_hold_that_is_shorter_than_a_worker_s_patience_is_honoured_while_the_owner_lives(
    house: House, site: Site
) -> None:
    work = house.work(worker_idle=3600)
    run_id = await house.start(SHOP, {"site": site.url})
    await house.event(run_id, ev.RunParked)
    assert not work.done()
    await house.stop_working()


async def test_runs_that_wait_or_failed_are_parked_without_a_worker_or_a_page_and_answers_wake_them(
    house: House, driver: Driver, site: Site
) -> None:
    house.work()
    waiting = [await house.start(SHOP, {"site": site.url}) for _ in range(2)]
    failed = await house.again({"site": site.url, "fail": True})
    requests = [await house.waiting(run_id, "waiting-approval") for run_id in waiting]
    await house.until(failed, "failed")
    for run_id in (*waiting, failed):
        await parked(house, run_id)
    await until_left(house.work())
    with anyio.fail_after(10):
        while len(attempts(house)) > 1:  # the last cancellation's traceback may keep its frames, and no other
            await house.bell.next_ring(0.05)
    assert await contexts(driver, house) == 0
    async with Client(build(house.settings)) as client:
        for run_id, status in zip((*waiting, failed), ["waiting-approval"] * 2 + ["failed"], strict=True):
            view = await call(client, "get_run", run_id=run_id)
            assert view["status"] == status
            assert view["page"]["state"] == "parked"
            assert view["page"]["since"]
            assert view["page"]["url"] == f"{site.url}/cart"
        said = await refusal(client, "snapshot", run_id=waiting[0])
        assert "is parked" in said
        assert "rebuilt when the run goes on: approve(" in said
    house.work()
    house.edit("lambda: 1 / 0", "lambda: 1")
    for request in requests:
        await house.approve(request)
    await house.resume(failed)
    await house.approve(await house.waiting(failed, "waiting-approval"))
    for run_id in waiting:
        assert await house.finished(run_id) == [*AT_THE_CART, 2]
        assert await attachments(house, run_id) == ["restored"]
    output = await house.finished(failed)
    assert output[:3] == AT_THE_CART


async def test_a_server_has_runs_parked_when_their_hold_is_over(
    site: Site, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("served")
    settings = config.load(home=folder / "home", workflows=folder / "workflows", worker_idle=0.05, hold=1.0)
    async with open_house(settings) as house, Client(build(settings)) as client, Driver() as driver:
        house.begin("flow")
        house.write(SHOP)
        view = await call(client, "start_run", workflow="main", input={"site": site.url})
        run_id, request_id = view["run_id"], view["pending"][0]["request_id"]
        await house.event(run_id, ev.RunParked)
        view = await call(client, "get_run", run_id=run_id)
        assert (view["status"], view["page"]["state"]) == ("waiting-approval", "parked")
        with anyio.fail_after(10):
            while await contexts(driver, house):
                await house.bell.next_ring(0.01)
        await call(client, "approve", request_id=request_id, decision="approve", wait_s=0)
        assert await house.finished(run_id) == [*AT_THE_CART, 2]


async def test_an_answer_while_a_run_is_being_parked_wins_or_wakes_it(house: House, site: Site) -> None:
    run_ids = await held(house, site, 4)
    requests = [await house.waiting(run_id, "waiting-approval") for run_id in run_ids]

    async def answer_as_soon_as_it_is_claimed(run_id: str, count: int) -> None:
        claims = await house.events(run_id, ev.RunClaimed)
        while len(claims) < 2:
            await house.bell.next_ring(0.005)
            claims = await house.events(run_id, ev.RunClaimed)
        await house.approve(requests[count])

    house.work()
    async with anyio.create_task_group() as tasks:
        for count, run_id in enumerate(run_ids):
            tasks.start_soon(answer_as_soon_as_it_is_claimed, run_id, count)
    for run_id in run_ids:
        assert await house.finished(run_id) == [*AT_THE_CART, 2]
        parked = bool(await house.events(run_id, ev.RunParked))
        assert await attachments(house, run_id) == ["restored" if parked else "reattached"]


async def test_a_hijack_while_a_run_is_being_parked_gets_the_page_or_finds_it_parked(
    house: House, driver: Driver, site: Site
) -> None:
    run_ids = await held(house, site, 3)
    requests = [await house.waiting(run_id, "waiting-approval") for run_id in run_ids]
    work = house.work()
    for run_id in run_ids:
        await house.control.hijack(run_id, AGENT, "to look")
    await until_left(work)
    for run_id, request in zip(run_ids, requests, strict=True):
        run = await house.control.run(run_id)
        assert run.status == "hijacked"
        parked = bool(await house.events(run_id, ev.RunParked))
        assert parked is not bool(run.pages)
        if not parked:
            assert await look(driver, house, run_id, "location.pathname") == "/cart"
        house.work(hold=3600)
        await house.resume(run_id)
        await house.approve(request)
        assert await house.finished(run_id) == [*AT_THE_CART, 2]


async def test_a_run_is_parked_although_its_browser_has_ended_and_none_is_started_for_that(
    house: House, site: Site
) -> None:
    [run_id] = await held(house, site, 1)
    request = await house.waiting(run_id, "waiting-approval")
    await kill_host(house)
    await parked(house, run_id)
    await until_left(house.work())
    assert hosts.living(house.settings) == []
    house.work()
    await house.approve(request)
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
