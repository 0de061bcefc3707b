"""Which browser is launched, with what arguments, and how one is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import playwright

from mcp_flow.config import Settings
from mcp_flow.errors import BrowserMissing, FlowError

SHELL_NAMES = ("chromium-headless-shell", "chrome-headless-shell")
"""Chromium without all that has to do with windows. It starts and opens a page in less than half of the time, and
Playwright too prefers it where no window is asked for."""
# Before the names: Debian's command is a script that stays between us and the browser.
SHELL_PLACES = ("/usr/lib/chromium/chromium-headless-shell",)
NAMES = (
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chromium",
    "chromium-browser",
    "microsoft-edge",
    "microsoft-edge-stable",
)
PLACES = (
    "/opt/google/chrome/chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/usr/bin/chromium",
    "/usr/lib/chromium/chromium",
    "/snap/bin/chromium",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/opt/microsoft/msedge/msedge",
    "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
)
COMMANDS = (
    f"{sys.executable} -m playwright install chromium",
    "sudo apt-get update && sudo apt-get install -y --no-install-recommends chromium chromium-headless-shell",
)
DOWNLOAD_SECONDS = 300
APT_SECONDS = 600


@dataclass(frozen=True)
class FoundBrowser:
    """A browser that answered when it was asked for its version; `path` None is Playwright's own."""

    path: str | None
    name: str


def find(settings: Settings, headless: bool = True) -> FoundBrowser:
    """The configured browser, else a headless shell if no window is asked for, else Chrome, Chromium or Edge on this
    system, else Playwright's own.

    Raises `BrowserMissing` naming the commands that install one.
    """
    if settings.browser is None:
        if found := _search(headless):
            return found
        raise BrowserMissing(_advice("No Chrome, Chromium or Edge was found."))
    scheme = settings.browser.partition(":")[0]
    if scheme in ("cdp", "ws", "wss", "http", "https"):
        raise FlowError(
            f"Connecting to a browser elsewhere ({settings.browser}) is not supported yet: set MCP_FLOW_BROWSER "
            "to the path of a Chrome or Chromium on this machine, or leave it unset."
        )
    path = shutil.which(settings.browser)
    name = path and _version(path)
    if not path or not name:
        why = "does not run" if path else "is not an executable file"
        raise BrowserMissing(_advice(f"The configured browser {settings.browser!r} {why}; unset MCP_FLOW_BROWSER."))
    return FoundBrowser(path, name)


def install(report: Callable[[str], None]) -> FoundBrowser:
    """Install Chromium where no browser is found: Playwright's own, else the distribution's package.

    Asks nothing, so that it also works where nobody could answer. Raises `BrowserMissing` naming the
    commands when neither way works.
    """
    if found := _search():
        return found
    report("Installing Chromium with Playwright…")
    _run([sys.executable, "-m", "playwright", "install", "chromium"], DOWNLOAD_SECONDS, report)
    if found := _search():
        return found
    if (prefix := _as_root()) is not None and shutil.which("apt-get"):
        report("Playwright's browser can't be had here. Installing Chromium with apt-get…")
        _run([*prefix, "apt-get", "update"], APT_SECONDS, report)
        install = [*prefix, "apt-get", "install", "-y", "--no-install-recommends"]
        _run([*install, "chromium"], APT_SECONDS, report)
        if _search():
            # Not every distribution has it, and all works without it.
            _run([*install, SHELL_NAMES[0]], APT_SECONDS, report)
        if found := _search():
            return found
    raise BrowserMissing(_advice("No browser could be installed."))


def arguments() -> list[str]:
    """The command line arguments that the browser gets from us."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
    # Chromium refuses to start as root in its sandbox.
    return ["--no-sandbox", *quiet] if os.geteuid() == 0 else quiet


def _search(headless: bool = True) -> FoundBrowser | None:
    shells = (*SHELL_PLACES, *SHELL_NAMES) if headless else ()
    named = (path for name in (*shells, *NAMES) if (path := shutil.which(name)))
    for path in (*named, *PLACES):
        if name := _version(path):
            return FoundBrowser(path, name)
    # A headless host launches Playwright's headless shell and a headed one its Chromium, so both must be there.
    names = [name for folder in _own_folders() if (name := _own_version(folder))]
    return FoundBrowser(None, f"{names[0]} (Playwright's)") if len(names) == 2 else None


def _own_folders() -> list[Path]:
    """Where this version of Playwright has its Chromium and its headless shell, if they are installed."""
    package = Path(playwright.__file__).parent / "driver" / "package"
    if (folder := os.environ.get("PLAYWRIGHT_BROWSERS_PATH")) == "0":
        root = package / ".local-browsers"
    elif folder:
        root = Path(folder)
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches" / "ms-playwright"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ms-playwright"
    revisions = {b["name"]: b["revision"] for b in json.loads((package / "browsers.json").read_text())["browsers"]}
    names = ("chromium", "chromium-headless-shell")
    return [root / f"{name.replace('-', '_')}-{revisions[name]}" for name in names]


def _own_version(folder: Path) -> str | None:
    if not (folder / "INSTALLATION_COMPLETE").exists():
        return None
    patterns = ("chrome-*/chrome", "chrome-*/chrome-headless-shell", "chrome-*/*.app/Contents/MacOS/*")
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return next((name for path in paths if (name := _version(str(path)))), None)


def _version(path: str) -> str | None:
    """What the browser calls itself; None when it is no browser, a stub, or lacks a library."""
    if not os.access(path, os.X_OK):
        return None
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip()[:80] or None if done.returncode == 0 else None


def _as_root() -> list[str] | None:
    """What to put before a command to run it as root without being asked for a password; None if nothing does."""
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive"]
    if os.geteuid() == 0:
        return quiet
    if shutil.which("sudo"):
        allowed = subprocess.run(["sudo", "-n", "true"], stdin=subprocess.DEVNULL, capture_output=True)
        return ["sudo", "-n", *quiet] if allowed.returncode == 0 else None
    return None


def _run(command: list[str], seconds: float, report: Callable[[str], None]) -> None:
    # Playwright tries each of its mirrors several times, and waits half a minute for each unless told otherwise.
    env = {"PLAYWRIGHT_DOWNLOAD_CONNECTION_TIMEOUT": "10000", **os.environ}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
            env=env,
        )
    except subprocess.TimeoutExpired:
        report(f"`{' '.join(command)}` took longer than {seconds:.0f} s and was stopped.")
    except OSError as error:
        report(f"`{' '.join(command)}` can't be run: {error.strerror}.")
    else:
        if done.returncode:
            tail = "\n".join(done.stdout.strip().splitlines()[-5:])
            report(f"`{' '.join(command)}` failed ({done.returncode}):\n{tail}")


def _advice(what: str) -> str:
    return f"{what} Install one with:\n  {COMMANDS[0]}\nor, on Debian:\n  {COMMANDS[1]}"
