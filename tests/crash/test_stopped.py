"""Two workers never have one run: real workers are stopped, continued and killed, and nothing of theirs comes late.

Where a worker is to stand still is a fault by name as well, whose deed is SIGSTOP.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from faults import Fault
from harness import House, open_house
from nursery import Child, Nursery

from mcp_flow import config, presence
from mcp_flow import events as ev
from mcp_flow.browser import host as hosts
from mcp_flow.browser.attach import attach
from mcp_flow.browser.driver import Driver

pytestmark = pytest.mark.anyio

HOLD = """
async def hold():
    did("hold")
    await until_open("go")
    return did("held")

@workflow
async def main(flow: Flow) -> int:
    try:
        await flow.step("hold", hold)
    except BaseException as error:
        did(type(error).__name__)
        raise
    await flow.step("after", did, "after")
    return flow.attempt
"""

CLICKS = """
async def click(page, attempt):
    while not is_open("go"):
        await page.evaluate("attempt => { (window.by ??= []).push(attempt) }", attempt)
        did(attempt)

@workflow
async def main(flow: Flow) -> list:
    page = await flow.page()
    await flow.step("click", click, page, flow.attempt)
    return await page.evaluate("window.by")
"""


@pytest.fixture
async def house(tmp_path: Path, nursery: Nursery) -> AsyncIterator[House]:
    folders = {"home": tmp_path / "home", "workflows": tmp_path / "workflows"}
    async with open_house(config.load(**folders, lease=1, worker_idle=60)) as house:
        # While it lives nobody starts a worker but the test; it takes no run itself.
        sentry = await nursery.worker(replace(house.settings, lease=600), "nobody")
        yield house
        await house.tidy()
        await sentry.kill()


async def until(condition: Callable[[], Any], seconds: float = 15) -> None:
    with anyio.fail_after(seconds):
        while not condition():
            await anyio.sleep(0.01)


def is_stopped(child: Child) -> bool:
    """Whether the process stands still."""
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def clicks(driver: Driver, house: House, run_id: str) -> list[int]:
    """Which attempts have acted on the run's page, looked at from outside."""
    [host] = hosts.living(house.settings)
    page = await attach(driver, host, (await house.control.run(run_id)).pages["main"])
    try:
        found: list[int] = await page.evaluate("window.by")
        return found
    finally:
        await page.context.browser.close()


async def test_a_worker_stopped_past_its_lease_is_dead_before_anyone_claims_its_runs(
    house: House, nursery: Nursery
) -> None:
    run_id = "stopped"
    first = await nursery.worker(house.settings, run_id)
    await house.start(HOLD, run_id=run_id)
    await until(house.did)
    first.signal(signal.SIGSTOP)
    await until(lambda: is_stopped(first))
    # The other stands still just before it commits its claim, which is the moment to look.
    second = await nursery.worker(house.settings, run_id, Fault.named("worker before run.claimed"), deed="stop")
    with anyio.fail_after(15):
        await second.until_struck()
    await until(lambda: is_stopped(second))
    assert first.dead.is_set()
    assert (await house.store.run(run_id)).epoch == 1
    second.signal(signal.SIGCONT)
    house.open("go")
    assert await house.finished(run_id) == 2
    assert house.did() == ["hold", "hold", "held", "after"]


async def test_a_worker_stopped_before_its_heart_could_beat_is_taken_over_like_any_other(
    house: House, nursery: Nursery
) -> None:
    run_id = "unborn"
    await house.start(HOLD, run_id=run_id)
    house.open("go")
    # Its heart would beat for the first time half a second after its start, long after it has claimed the run.
    first = await nursery.worker(
        replace(house.settings, lease=600), run_id, Fault.named("worker after attempt.started"), deed="stop"
    )
    with anyio.fail_after(15):
        await first.until_struck()
    await until(lambda: is_stopped(first))
    await nursery.worker(house.settings, run_id)
    assert await house.finished(run_id) == 2
    assert first.dead.is_set()


async def test_a_worker_stopped_for_less_than_its_lease_keeps_its_runs(house: House, nursery: Nursery) -> None:
    run_id = "short"
    patient = replace(house.settings, lease=600)
    first = await nursery.worker(patient, run_id)
    await house.start(HOLD, run_id=run_id)
    await until(house.did)
    first.signal(signal.SIGSTOP)
    await until(lambda: is_stopped(first))
    second = await nursery.worker(patient, run_id)
    house.open("go")
    first.signal(signal.SIGCONT)
    assert await house.finished(run_id) == 1
    assert house.did() == ["hold", "held", "after"]
    assert not second.commits


async def test_what_a_worker_writes_after_another_has_claimed_its_run_is_refused(
    house: House, nursery: Nursery
) -> None:
    run_id = "late"
    first = await nursery.worker(replace(house.settings, lease=600), run_id, worker_id="w-first")
    await house.start(HOLD, run_id=run_id)
    await until(house.did)
    first.signal(signal.SIGSTOP)
    await until(lambda: is_stopped(first))
    # Taken from it although it lives, as no worker would: the epoch alone has to hold it off.
    taker = presence.LifeLock(house.settings, "lib-taker")
    assert await house.store.claim("lib-taker", ["w-first"], 1) == [(run_id, 2)]
    house.open("go")
    first.signal(signal.SIGCONT)
    await until(lambda: len(house.did()) == 3)
    first.signal(signal.SIGTERM)
    with anyio.fail_after(15):
        await first.dead.wait()
    assert house.did() == ["hold", "held", "LeaseLost"]
    last = (await house.control.events(run_id, 0, 100))[-1]
    assert (last.event, last.epoch) == (ev.RunClaimed(worker="lib-taker"), 2), await house.story(run_id)
    taker.release()
    await nursery.worker(house.settings, run_id)
    assert await house.finished(run_id) == 2
    assert house.did()[3:] == ["hold", "held", "after"]


async def test_a_worker_stopped_in_a_page_that_another_has_taken_over_does_not_touch_it_again(
    house: House, nursery: Nursery
) -> None:
    run_id = "page"
    first = await nursery.worker(house.settings, run_id)
    await house.start(CLICKS, run_id=run_id)
    await until(house.did)
    first.signal(signal.SIGSTOP)
    await until(lambda: is_stopped(first))
    async with Driver() as driver:
        before = await clicks(driver, house, run_id)
    await nursery.worker(house.settings, run_id)
    await until(lambda: "2" in house.did())
    first.signal(signal.SIGCONT)
    house.open("go")
    by = await house.finished(run_id)
    assert first.dead.is_set()
    assert set(before) == {1}
    assert by == before + [2] * (len(by) - len(before))


async def test_a_worker_stopped_inside_a_commit_is_killed_by_the_next_writer(house: House, nursery: Nursery) -> None:
    run_id = "commit"
    first = await nursery.worker(
        replace(house.settings, lease=600), run_id, Fault.named("worker before step.finished hold#1"), deed="stop"
    )
    house.write(HOLD)
    house.open("go")
    await house.again(run_id=run_id)
    await first.until_struck()
    await nursery.worker(replace(house.settings, lease=600), run_id)
    with anyio.fail_after(20):
        await first.dead.wait()
    assert await house.finished(run_id) == 2
    assert house.did() == ["hold", "held", "hold", "held", "after"]
