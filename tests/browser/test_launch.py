"""Which browser is found, and how one gets installed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mcp_flow import config
from mcp_flow.browser import launch
from mcp_flow.config import Settings
from mcp_flow.errors import BrowserMissing, FlowError


@pytest.fixture
def plain(tmp_path: Path) -> Settings:
    return config.load(home=str(tmp_path))


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a browser, whose download site can't be reached; returns its only folder of programs."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setattr(launch, "PLACES", ())
    monkeypatch.setattr(launch, "SHELL_PLACES", ())
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "browsers"))
    # Playwright's own attempts to download take seconds to fail.
    monkeypatch.setenv("PLAYWRIGHT_NODEJS_PATH", str(program(programs / "node", "exit 1")))
    return programs


def program(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_systems_browser_is_found_with_its_version(plain: Settings) -> None:
    found = launch.find(plain)
    assert found.path
    assert any(character.isdigit() for character in found.name)


def test_a_configured_path_comes_first(plain: Settings, tmp_path: Path) -> None:
    path = program(tmp_path / "mine", "echo Mine 1.2")
    assert launch.find(dataclasses.replace(plain, browser=str(path))) == launch.FoundBrowser(str(path), "Mine 1.2")


@pytest.mark.parametrize("url", ["cdp:http://127.0.0.1:9222", "ws:ws://127.0.0.1:1/x"])
def test_a_browser_elsewhere_is_refused_as_not_supported_yet(plain: Settings, url: str) -> None:
    with pytest.raises(FlowError, match="not supported yet"):
        launch.find(dataclasses.replace(plain, browser=url))


def test_a_program_that_is_no_browser_is_passed_over(plain: Settings, bare_machine: Path) -> None:
    program(bare_machine / "chromium-browser", "echo 'install the snap first' >&2; exit 1")
    with pytest.raises(BrowserMissing):
        launch.find(plain)
    program(bare_machine / "microsoft-edge", "echo Edge 99")
    assert launch.find(plain).name == "Edge 99"


def test_a_headless_shell_is_taken_where_no_window_is_asked_for(plain: Settings, bare_machine: Path) -> None:
    program(bare_machine / "chromium", "echo Chromium 1")
    shell = program(bare_machine / "chromium-headless-shell", "echo Shell 1")
    assert launch.find(plain, headless=True) == launch.FoundBrowser(str(shell), "Shell 1")
    assert launch.find(plain, headless=False).name == "Chromium 1"


def test_playwrights_own_is_found_without_its_driver(plain: Settings, bare_machine: Path) -> None:
    for folder, name in zip(launch._own_folders(), ("chrome", "chrome-headless-shell"), strict=True):
        (folder / "chrome-linux64").mkdir(parents=True)
        program(folder / "chrome-linux64" / name, "echo Chrome for Testing 159")
        (folder / "INSTALLATION_COMPLETE").touch()
    assert launch.find(plain) == launch.FoundBrowser(None, "Chrome for Testing 159 (Playwright's)")


@pytest.mark.parametrize("offered", [["chromium"], ["chromium", "chromium-headless-shell"]])
def test_installing_falls_back_to_the_distributions_packages(bare_machine: Path, offered: list[str]) -> None:
    program(bare_machine / "env", 'export "$1"; shift; exec "$@"')
    program(bare_machine / "sudo", 'shift; exec "$@"')
    program(bare_machine / "true", "exit 0")
    program(
        bare_machine / "apt-get",
        f'[ "$DEBIAN_FRONTEND" = noninteractive ] || exit 1; [ "$1" = update ] && exit\n'
        f'case " {" ".join(offered)} " in *" $4 "*) ;; *) exit 1;; esac\n'
        f'printf "#!/bin/sh\\necho $4 1\\n" > {bare_machine}/$4; /bin/chmod 755 {bare_machine}/$4',
    )
    reports: list[str] = []
    name = offered[-1]
    assert launch.install(reports.append) == launch.FoundBrowser(str(bare_machine / name), f"{name} 1")
    assert any("apt-get" in line for line in reports)


def test_where_nothing_installs_a_browser_the_commands_are_named(bare_machine: Path) -> None:
    reports: list[str] = []
    with pytest.raises(BrowserMissing, match="playwright install chromium"):
        launch.install(reports.append)
    assert any("failed" in line for line in reports)


def test_only_root_goes_without_the_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert "--no-sandbox" in launch.arguments()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "--no-sandbox" not in launch.arguments()
