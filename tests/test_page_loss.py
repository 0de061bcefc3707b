"""A lost page is rebuilt: its storage and place, the restore steps, then the first step that is not done."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from browsing import Site, attachments, contexts, crash, did, kept, kill_host, looking_at, losses
from clients import call
from harness import AGENT, House, open_house, visit
from mcp import Client

from mcp_flow import config
from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.browser.driver import Driver
from mcp_flow.browser.session import BROWSER_ENDED
from mcp_flow.server import build

pytestmark = pytest.mark.anyio

SHOP = """
    async def sign_in(page):
        did("sign in")
        await page.evaluate("window.signed = true")

    async def enter(flow, site):
        page = await flow.page()
        await flow.step("enter", page.goto, site + "/enter")
        await flow.step("fill cart", page.evaluate, "localStorage.setItem('cart', 'tea')")
        await flow.step("sign in", sign_in, page, restore=True)
        await flow.step("to cart", page.goto, site + "/cart")
        return page

    async def look(page):
        return await page.evaluate("[location.pathname, document.cookie, localStorage.getItem('cart')]")
    """
"""A shop whose cart is at the place, with the cookie and the storage, that `AT_THE_CART` says."""

AT_THE_CART = ["/cart", "who=ada", "tea"]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site().served() as site:
        yield site


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("loss")
    async with open_house(config.load(home=folder / "home", workflows=folder / "workflows")) as house:
        yield house


@pytest.fixture
async def house(shared: House, request: pytest.FixtureRequest) -> AsyncIterator[House]:
    async with visit(shared, request.node.name) as house:
        yield house


@pytest.fixture(scope="module")
async def driver() -> AsyncIterator[Driver]:
    async with Driver() as driver:
        yield driver


@pytest.fixture(scope="module")
async def client(shared: House) -> AsyncIterator[Client]:
    async with Client(build(shared.settings)) as client:
        yield client


async def start(house: House, site: Site, body: str) -> str:
    lines = [line.strip(" ") and line for line in body.splitlines()]
    return await house.start(SHOP + "\n".join(lines), {"site": site.url})


async def test_a_step_that_acts_on_the_page_is_done_again_on_the_rebuilt_one(
    house: House, client: Client, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    async def add(page):
        await page.click("button")
        did("add")
        while not is_open("enough"):
            await page.click("button")
        return await look(page)

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        return [*await flow.step("add", add, page), flow.attempt]
    """,
    )
    await did(house, "sign in", "add")
    await kept(house, run_id, "tea")
    before = await call(client, "get_run", run_id=run_id)
    assert (before["page"]["state"], "gone" in before["page"]) == ("live", False)
    await kill_host(house)
    await did(house, "sign in", "add", "sign in", "add")
    after = await call(client, "get_run", run_id=run_id)
    assert after["page"]["state"] == "restored"
    assert after["page"]["since"] > before["page"]["since"]
    assert after["page"]["url"] == f"{site.url}/cart"
    house.open("enough")
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
    assert await losses(house, run_id) == [BROWSER_ENDED]
    assert await attachments(house, run_id) == ["restored"]
    assert await house.events(run_id, ev.StepFailed) == []
    starts = [event.key for event in await house.events(run_id, ev.StepStarted)]
    assert starts == ["enter#1", "fill cart#1", "sign in#1", "to cart#1", "add#1", "add#1"]


async def test_a_step_that_needs_no_page_ends_well_and_the_page_is_where_the_last_one_left_it(
    house: House, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    async def compute():
        did("compute")
        await until_open("computed")

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await flow.step("compute", compute)
        return [*await flow.step("look", look, page), flow.attempt]
    """,
    )
    await did(house, "sign in", "compute")
    await kept(house, run_id, "tea")
    await kill_host(house)
    await house.event(run_id, ev.PageObserved, lambda event: event.what == "browser-gone")
    house.open("computed")
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
    assert house.did() == ["sign in", "compute", "sign in"]


async def test_a_step_that_hangs_is_given_up_and_done_again(house: House, site: Site) -> None:
    await house.stop_working()
    await house.working(grace=0.2)
    run_id = await start(
        house,
        site,
        """
    async def hang():
        did("hang")
        await until_open("on")

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await flow.step("further", page.goto, site + "/further")
        await flow.step("back", page.goto, site + "/cart")
        await flow.step("hang", hang)
        return [*await flow.step("look", look, page), flow.attempt]
    """,
    )
    await did(house, "sign in", "hang")
    await kept(house, run_id, "tea")
    await kill_host(house)
    await did(house, "sign in", "hang", "sign in", "hang")
    house.open("on")
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
    await house.stop_working()


async def test_a_step_that_runs_only_once_is_in_doubt_and_the_rebuilt_page_is_there_to_look_at(
    house: House, driver: Driver, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    async def pay(page):
        did("pay")
        while True:
            await page.click("button")

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        number = await flow.step("pay", pay, page, once=True)
        return [number, *await flow.step("look", look, page)]
    """,
    )
    await did(house, "sign in", "pay")
    await kept(house, run_id, "tea")
    await kill_host(house)
    request = await house.waiting(run_id, "in-doubt")
    assert "'pay'" in request.opened.prompt
    async with looking_at(driver, house, run_id) as page:
        assert page.url == f"{site.url}/cart"
    await house.resume(run_id, step="done", value=7)
    assert await house.finished(run_id) == [7, *AT_THE_CART]
    assert house.did().count("pay") == 1


async def test_a_run_that_waits_goes_on_waiting_and_its_page_is_rebuilt_once_it_is_answered(
    house: House, client: Client, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await flow.approve("Go?")
        return [*await flow.step("look", look, page), flow.attempt]
    """,
    )
    request = await house.waiting(run_id, "waiting-approval")
    await kill_host(house)
    await house.event(run_id, ev.RunReleased)
    view = await call(client, "get_run", run_id=run_id)
    assert view["status"] == "waiting-approval"
    assert view["page"]["gone"]
    assert view["page"]["url"] == f"{site.url}/cart"
    assert await losses(house, run_id) == [BROWSER_ENDED]
    assert hosts.living(house.settings) == [], "nobody needs a browser yet"
    await house.approve(request)
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
    assert house.did() == ["sign in"] * 2


async def test_a_run_that_nobody_executes_is_rebuilt_once_it_is_answered(
    house: House, client: Client, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await flow.approve("Go?")
        return [*await flow.step("look", look, page), flow.attempt]
    """,
    )
    request = await house.waiting(run_id, "waiting-approval")
    await house.stop_working()
    await kill_host(house)
    view = await call(client, "get_run", run_id=run_id)
    assert (view["status"], view["page"]["url"]) == ("waiting-approval", f"{site.url}/cart")
    assert view["page"]["gone"]
    await house.working()
    other = await house.again({"site": site.url})
    await house.waiting(other, "waiting-approval")
    pages = [(await call(client, "get_run", run_id=each))["page"] for each in (run_id, other)]
    assert ["gone" in page for page in pages] == [True, False]  # another browser does not have it
    await house.approve(request)
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
    assert await attachments(house, run_id) == ["restored"]


async def test_a_page_that_is_lost_three_times_at_one_place_fails_the_run_which_can_be_mended(
    house: House, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    async def crash(page):
        did("crash")
        try:
            await page.goto("chrome://crash")
        except Exception:
            await page.click("button")

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await flow.step("crash", crash, page)
        return [*await flow.step("look", look, page), flow.attempt]
    """,
    )
    run = await house.until(run_id, "failed")
    assert run.error
    assert run.error.type == "PageGone"
    assert "lost 3 times in a row at step crash#1" in run.error.message
    assert "resume" in run.error.message
    assert house.did() == ["sign in", "crash"] * 3
    assert await losses(house, run_id) == ["the page 'main' crashed"] * 3
    house.edit('"chrome://crash"', "page.url")
    await house.resume(run_id)
    assert await house.finished(run_id) == [*AT_THE_CART, 5]


async def test_a_page_that_crashes_under_a_step_is_rebuilt_and_the_old_one_closed(
    house: House, driver: Driver, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    async def add(page):
        await page.click("button")
        did("add")
        while not is_open("enough"):
            await page.click("button")
        return await look(page)

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        return [*await flow.step("add", add, page), flow.attempt]
    """,
    )
    await did(house, "sign in", "add")
    await kept(house, run_id, "tea")
    async with looking_at(driver, house, run_id) as page:
        await crash(page)
    await did(house, "sign in", "add", "sign in", "add")
    assert await contexts(driver, house) == 1
    house.open("enough")
    assert await house.finished(run_id) == [*AT_THE_CART, 2]
    assert await losses(house, run_id) == ["the page 'main' crashed"]


@pytest.mark.parametrize("executed", [True, False], ids=["executed", "released"])
async def test_a_page_that_somebody_closes_while_the_run_waits_is_rebuilt(
    house: House, driver: Driver, site: Site, executed: bool
) -> None:
    run_id = await start(
        house,
        site,
        """
    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        mail = await flow.page("mail")
        await flow.step("open mail", mail.goto, site + "/mail")
        await flow.approve("Go?")
        return [*await flow.step("look", look, page), mail.url]
    """,
    )
    request = await house.waiting(run_id, "waiting-approval")
    if not executed:
        await house.stop_working()
    async with looking_at(driver, house, run_id) as page:
        await page.close()
    if executed:
        await house.event(run_id, ev.RunReleased)
        assert await losses(house, run_id) == ["the page 'main' was closed while the run waited"]
    await house.working()
    assert (await house.control.run(run_id)).status == "waiting-approval"
    await house.approve(request)
    assert await house.finished(run_id) == [*AT_THE_CART, f"{site.url}/mail"]
    assert await attachments(house, run_id) == ["restored"]


async def test_a_checkpoint_amid_a_step_keeps_no_place_that_only_this_step_has_reached(
    house: House, site: Site
) -> None:
    await house.stop_working()
    await house.working(grace=0.2)
    run_id = await start(
        house,
        site,
        """
    async def wander(flow, page):
        async def wandering():
            did("wander at " + page.url.rpartition("/")[2])
            if not is_open("on"):
                await page.goto(page.url.rpartition("/")[0] + "/enter")
                did("wandered")
                await until_open("on")

        with flow.scope("wander"):
            await flow.step("wander", wandering)

    async def ask(flow):
        with flow.scope("ask"):
            await until_open("ask")
            await flow.approve("Go?")

    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await asyncio.gather(wander(flow, page), ask(flow))
        return await flow.step("look", look, page)
    """,
    )
    await did(house, "sign in", "wander at cart", "wandered")
    house.open("ask")
    opened = await house.event(run_id, ev.RequestOpened)
    await house.stop_working()
    house.open("on")
    await kill_host(house)
    await house.working()
    await house.approve((await house.control.run(run_id)).requests[opened.request_id])
    assert await house.finished(run_id) == AT_THE_CART
    assert house.did() == ["sign in", "wander at cart", "wandered", "sign in", "wander at cart"]


async def test_a_branch_that_rebuilds_its_page_does_not_wait_and_its_question_stays(house: House, site: Site) -> None:
    run_id = await start(
        house,
        site,
        """
    async def sign_in():
        did("sign in")
        if len((HERE / "did").read_text().splitlines()) in (2, 3):
            await asyncio.Event().wait()

    @workflow
    async def main(flow: Flow, site: str) -> list:
        async def approve():
            return bool(await flow.approve("Go?"))

        async def buy():
            page = await flow.page()
            await flow.step("open", page.goto, site + "/shop")
            await flow.step("sign in", sign_in, restore=True, timeout=0.3, retries=1, backoff=0.01)
            return await flow.ask("What?", str)

        async def wait():
            await flow.pause("not yet")

        return await asyncio.gather(approve(), buy(), wait())
    """,
    )
    await house.event(run_id, ev.AttemptIdled)
    opened = [request.opened for request in (await house.until(run_id, "waiting-approval")).open_requests()]
    ids = {request.prompt: request.request_id for request in opened}
    await kill_host(house)
    await house.event(run_id, ev.RunReleased)
    await house.resume(run_id, request_id=ids["not yet"])
    error = (await house.until(run_id, "failed")).error
    assert error
    assert (error.type, error.step) == ("StepTimeout", "sign in")
    assert await house.events(run_id, ev.RequestWithdrawn) == []

    await house.resume(run_id)
    await did(house, *["sign in"] * 4)
    await house.approve((await house.control.run(run_id)).requests[ids["Go?"]])
    await house.resume(run_id, request_id=ids["What?"], value="tea")
    assert await house.finished(run_id) == [True, "tea", None]
    assert house.did() == ["sign in"] * 4
    assert len(await house.events(run_id, ev.RequestOpened)) == 3


async def test_a_page_that_can_not_be_rebuilt_fails_the_run_and_keeps_what_rebuilds_it(
    house: House, site: Site
) -> None:
    run_id = await start(
        house,
        site,
        """
    @workflow
    async def main(flow: Flow, site: str) -> list:
        page = await enter(flow, site)
        await flow.approve("Go?")
        return await flow.step("look", look, page)
    """,
    )
    request = await house.waiting(run_id, "waiting-approval")
    await kill_host(house)
    await house.event(run_id, ev.RunReleased)
    site.down.add("/cart")
    await house.approve(request)
    try:
        run = await house.until(run_id, "failed")
    finally:
        site.down.clear()
    assert run.error
    assert "/cart" in run.error.message
    await kept(house, run_id, '"main": "' + site.url + '/cart"')
    await kept(house, run_id, '"rebuilding": true')
    await house.resume(run_id)
    assert await house.finished(run_id) == AT_THE_CART
    assert house.did() == ["sign in"] * 3


async def test_what_rebuilds_a_page_is_forgotten_with_the_run(house: House, site: Site) -> None:
    source = """
    @workflow
    async def main(flow: Flow, site: str) -> None:
        page = await enter(flow, site)
        await flow.approve("Go?")
    """
    approved = await start(house, site, source)
    cancelled = await house.again({"site": site.url})
    requests = [await house.waiting(run_id, "waiting-approval") for run_id in (approved, cancelled)]
    for run_id in (approved, cancelled):
        assert "who" in str(await house.store.load_checkpoint(run_id))
    await house.approve(requests[0])
    await house.control.cancel(cancelled, AGENT, "enough")
    for run_id in (approved, cancelled):
        await kept(house, run_id, "None")
