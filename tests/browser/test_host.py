"""The detached host: found, shared, ended, and never left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
from processes import never, parent, processes, run_python, until

from mcp_flow import config
from mcp_flow.browser import host
from mcp_flow.browser.driver import Driver
from mcp_flow.browser.host import HostInfo
from mcp_flow.config import Settings
from mcp_flow.errors import BrowserMissing, BrowserUnavailable

# Processes are told by their command here.
OWN_IMPORTS = True
pytestmark = pytest.mark.anyio

ENSURE = """
import anyio, sys
from mcp_flow import config
from mcp_flow.browser import host
print(anyio.run(host.ensure, config.load(home=sys.argv[1])).endpoint)
"""


@pytest.fixture(scope="module")
async def lasting(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Settings]:
    """A home folder whose host one test leaves for the next: it is found there, or started."""
    settings = config.load(home=tmp_path_factory.mktemp("lasting"))
    yield settings
    await host.stop(settings)


def scratch(info: HostInfo) -> Path:
    return Path(info.endpoint).parents[1]


def files(settings: Settings) -> set[str]:
    return {path.suffix for path in (settings.home / "host").iterdir()}


async def test_starters_that_race_from_several_processes_share_one_host(settings: Settings) -> None:
    others = [run_python(ENSURE, str(settings.home)) for _ in range(2)]
    info = await host.ensure(settings)
    endpoints = {await anyio.to_thread.run_sync(lambda p=p: p.communicate(timeout=30)[0].strip()) for p in others}
    assert endpoints == {info.endpoint}
    assert host.living(settings) == [info]
    assert await host.ensure(settings) == info
    await until(lambda: len([p for p in processes(host.__name__) if str(info.pid) in p]) == 1)
    assert stat.S_IMODE((settings.home / "host" / f"{host_name(settings)}.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((settings.home / "logs" / "host.log").stat().st_mode) == 0o600
    assert await host.stop(settings) == 1


def host_name(settings: Settings) -> str:
    (info,) = (settings.home / "host").glob("*.json")
    return info.stem


async def test_a_killed_host_takes_its_browser_with_it_and_the_next_one_cleans_up(lasting: Settings) -> None:
    info = await host.ensure(lasting)
    os.kill(info.pid, signal.SIGKILL)
    await until(lambda: not processes(str(scratch(info))))
    assert host.living(lasting) == []
    again = await host.ensure(lasting)
    assert again.pid != info.pid
    assert not scratch(info).exists()


async def test_no_browser_is_left_when_host_and_driver_are_killed_together(lasting: Settings) -> None:
    info = await host.ensure(lasting)
    drivers = [int(line.split()[0]) for line in processes("run-driver") if parent(line) == info.pid]
    assert len(drivers) == 1
    for pid in (info.pid, *drivers):
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not processes(str(scratch(info))))
    assert scratch(info).exists()
    await host.ensure(lasting)
    assert not scratch(info).exists()


async def test_a_host_whose_browser_dies_ends_and_another_starts(lasting: Settings) -> None:
    info = await host.ensure(lasting)
    browser = next(line for line in processes(f"--user-data-dir={scratch(info)}") if "--type=" not in line)
    os.kill(int(browser.split()[0]), signal.SIGKILL)
    await until(lambda: files(lasting) == {".lock"} and not host.living(lasting))
    assert (await host.ensure(lasting)).pid != info.pid


async def test_stop_ends_the_host_with_its_browser_and_leaves_only_the_lock(lasting: Settings) -> None:
    info = await host.ensure(lasting)
    assert processes(str(scratch(info)))
    assert await host.stop(lasting) == 1
    assert processes(str(scratch(info))) == []
    assert not scratch(info).exists()
    assert files(lasting) == {".lock"}
    assert host.living(lasting) == []
    assert await host.stop(lasting) == 0


async def test_a_host_ends_when_it_is_not_used_and_not_before(settings: Settings, driver: Driver) -> None:
    settings = dataclasses.replace(settings, host_idle=0.3)
    info = await host.ensure(settings)

    def gone() -> bool:
        return not host.living(settings)

    browser = await driver.connect(info.endpoint)
    await (await browser.new_context()).new_page()
    await browser.close()
    assert await never(gone, 0.7), "a waiting run's page keeps it"
    browser = await driver.connect(info.endpoint)
    await browser.contexts[0].close()
    assert await never(gone, 0.7), "a client without a page keeps it"
    await browser.close()
    await until(gone)
    await until(lambda: not processes(str(scratch(info))))
    with pytest.raises(BrowserUnavailable):
        await driver.connect(info.endpoint)


async def test_a_missing_browser_is_reported_with_the_commands_that_install_one(settings: Settings) -> None:
    with pytest.raises(BrowserMissing, match="playwright install chromium") as error:
        await host.ensure(dataclasses.replace(settings, browser="/nonexistent"))
    assert "/nonexistent" in str(error.value)
    assert "apt-get install" in str(error.value)


async def test_a_headed_host_without_a_display_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(BrowserUnavailable, match="DISPLAY"):
        await host.ensure(settings, headless=False)


async def test_a_browser_that_does_not_start_is_reported_with_its_reason(settings: Settings, tmp_path: Path) -> None:
    fake = tmp_path / "chromium"
    fake.write_text('#!/bin/sh\ncase "$*" in *--version*) echo Fake 1;; *) echo no luck >&2; exit 7;; esac\n')
    fake.chmod(0o755)
    with pytest.raises(BrowserUnavailable, match="no luck"):
        await host.ensure(dataclasses.replace(settings, browser=str(fake)))
