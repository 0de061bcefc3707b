"""The browser host: the detached process that owns the browser, and how others find, start and stop it.

One host a home folder, Playwright version and mode. It holds `home/host/<name>.lock` for life, so a free lock is
a dead host, whatever pid the file names. `<name>.json` says where a living one is reached. Everything temporary
(the socket, the profile) lies in one scratch folder outside the home, because a socket's path is limited to 107
bytes; the next host removes the scratch folders of those that could not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

import anyio

from mcp_flow import config, locks
from mcp_flow.browser import launch, proxy
from mcp_flow.config import Settings
from mcp_flow.errors import BrowserMissing, BrowserUnavailable, FlowError

if TYPE_CHECKING:
    from playwright.async_api import Browser

START_SECONDS = 30
STOP_SECONDS = 10


@dataclass(frozen=True)
class HostInfo:
    """A living host: where it answers, and what it runs."""

    endpoint: str
    pid: int
    headless: bool
    browser: str
    version: str
    """Playwright's version; clients must have the same major and minor."""

    @property
    def identity(self) -> str:
        """What tells this host from all others, without its place on this machine."""
        return identity(self.endpoint)


@dataclass(frozen=True)
class _Place:
    """The files of one host."""

    folder: Path
    name: str

    @classmethod
    def of(cls, settings: Settings, headless: bool) -> _Place:
        version = ".".join(_playwright_version().split(".")[:2])
        return cls(settings.home / "host", f"{version}-{'headless' if headless else 'headed'}")

    @property
    def lock(self) -> Path:
        return self.folder / f"{self.name}.lock"

    @property
    def info(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def error(self) -> Path:
        return self.folder / f"{self.name}.error"

    def held(self) -> bool:
        """Whether a process holds the lock."""
        try:
            with _open_private(self.lock) as file:
                return not locks.acquire(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def living(self) -> HostInfo | None:
        """What the host says of itself, if it lives and is ready."""
        if not self.held():
            return None
        try:
            return HostInfo(**json.loads(self.info.read_text()))
        except FileNotFoundError:
            return None


def identity(endpoint: str) -> str:
    """`HostInfo.identity` of the host at `endpoint`, whose name no other host ever has."""
    return hashlib.sha256(endpoint.encode()).hexdigest()[:12]


async def ensure(settings: Settings, *, headless: bool = True) -> HostInfo:
    """A host whose endpoint answers, started if none lives; it counts as used from now.

    Raises `BrowserMissing` or `BrowserUnavailable` with the reason that the host gave.
    """
    place = _Place.of(settings, headless)
    config.private_folder(place.folder)
    started: subprocess.Popen[bytes] | None = None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        info = place.living()
        if info and _touch(info.endpoint) and await _answers(info.endpoint):
            return info
        if started and (code := started.poll()) is not None:
            if code:
                raise _why(place, settings, code)
            started = None
        if not started and not place.held():
            place.error.unlink(missing_ok=True)
            started = _start(settings, headless)
        await anyio.sleep(0.02)
    if started:
        started.kill()
    raise BrowserUnavailable(
        f"The browser host did not answer within {START_SECONDS} s; its log is {_log(settings)}. "
        "`mcp-flow stop` ends it, and the next call starts another."
    )


async def serve(settings: Settings, *, headless: bool) -> None:
    """Own a browser until nobody uses it, it dies, or SIGTERM; returns at once where a host lives already."""
    place = _Place.of(settings, headless)
    config.private_folder(place.folder)
    with _open_private(place.lock, create=True) as lock:
        if not await _acquire(lock):
            return
        place.info.unlink(missing_ok=True)
        try:
            with _scratch(lock) as scratch:
                await _serve(settings, headless, place, scratch)
        except FlowError as error:
            _write(place.error, json.dumps({"type": type(error).__name__, "message": str(error)}))
            raise
        finally:
            place.info.unlink(missing_ok=True)


async def stop(settings: Settings) -> int:
    """End every host of this home, and say how many there were. Their pages are gone then, their runs are not."""
    places = [place for place in _places(settings) if place.held()]
    started = time.monotonic()
    while alive := [place for place in places if place.held()]:
        waited = time.monotonic() - started
        if waited > 2 * STOP_SECONDS:
            raise BrowserUnavailable(f"The browser host {_pid(alive[0])} can't be ended; see {_log(settings)}.")
        for place in alive:
            # Sent again and again: one that has just started may not have noted its pid yet.
            if pid := _pid(place):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM if waited < STOP_SECONDS else signal.SIGKILL)
        await anyio.sleep(0.02)
    for place in _places(settings):
        with _open_private(place.lock) as lock:
            if locks.acquire(lock, fcntl.LOCK_EX):
                _note(lock, None, _undead(lock))
    return len(places)


def living(settings: Settings) -> list[HostInfo]:
    """The hosts of this home that live and are ready."""
    return [info for place in _places(settings) if (info := place.living())]


def use(endpoint: str) -> IO[str]:
    """An open file that keeps the host from ending as unused until it is closed, or this process ends.

    Raises `BrowserUnavailable` where the host has ended or is about to.
    """
    try:
        file = locks.own(_clients(endpoint).open())
    except OSError as error:
        raise BrowserUnavailable("The browser host has ended; ask for another.") from error
    if locks.acquire(file, fcntl.LOCK_SH):
        return file
    file.close()
    raise BrowserUnavailable("The browser host is just ending because nobody used it; ask for another.")


async def _serve(settings: Settings, headless: bool, place: _Place, scratch: Path) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with _browser(settings, headless, scratch) as (browser, name):
        browser.on("disconnected", lambda _: ended.set())
        endpoint = (await browser.bind(f"mcp-flow {settings.home}"))["endpoint"]
        async with proxy.serving(Path(endpoint).parent):
            with _clients(endpoint).open("w") as clients:
                info = HostInfo(endpoint, os.getpid(), headless, name, _playwright_version())
                _write(place.info, json.dumps(asdict(info)))
                last_page = time.monotonic()
                while not ended.is_set() and _reachable(endpoint):
                    with anyio.move_on_after(min(settings.host_idle / 4, 5)):
                        await ended.wait()
                    if any(context.pages for context in browser.contexts):
                        # A waiting run's page has no client, and is in use all the same.
                        last_page = time.monotonic()
                    elif time.monotonic() - last_page >= settings.host_idle and _unused(clients, settings.host_idle):
                        break
                place.info.unlink(missing_ok=True)


def _unused(clients: IO[str], idle: float) -> bool:
    """Whether no client is connected or about to; if so, no other can connect from here on."""
    if not locks.acquire(clients, fcntl.LOCK_EX):
        return False
    if time.time() - os.fstat(clients.fileno()).st_mtime >= idle:
        return True
    fcntl.flock(clients, fcntl.LOCK_UN)
    return False


@contextlib.asynccontextmanager
async def _browser(settings: Settings, headless: bool, scratch: Path) -> AsyncIterator[tuple[Browser, str]]:
    # Imported here, because most hosts that start lose the race for the lock and never need it.
    from playwright.async_api import Error, async_playwright

    found = await anyio.to_thread.run_sync(launch.find, settings, headless)
    if not headless and sys.platform != "darwin" and not (os.environ.keys() & {"DISPLAY", "WAYLAND_DISPLAY"}):
        raise BrowserUnavailable(
            "A browser with a window needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set: "
            "start the run with headless=true, or start mcp-flow under `xvfb-run`."
        )
    # The driver takes these from the environment alone; by default it leaves files in the user's cache folder.
    os.environ |= {"TMPDIR": str(scratch), "PWTEST_SOCKETS_DIR": str(scratch)}
    os.environ["PWTEST_SERVER_REGISTRY"] = str(scratch / "registry")
    config.keep_compiled(settings)
    async with async_playwright() as playwright:
        try:
            browser = await playwright.chromium.launch(
                executable_path=found.path,
                headless=headless,
                args=launch.arguments(),
                handle_sigint=False,
                handle_sigterm=False,
                handle_sighup=False,
                timeout=(START_SECONDS - 5) * 1000,
            )
        except Error as error:
            raise BrowserUnavailable(f"{found.name} ({found.path}) did not start: {error.message}") from error
        try:
            yield browser, found.name
        finally:
            # A browser that does not close in time dies with the driver's pipe.
            with anyio.move_on_after(STOP_SECONDS - 5, shield=True), contextlib.suppress(Error):
                await browser.close()


def _touch(endpoint: str) -> bool:
    """Mark the host as used now; False if it is ending."""
    try:
        with use(endpoint):
            os.utime(_clients(endpoint))
    except (FileNotFoundError, BrowserUnavailable):
        return False
    return True


def _clients(endpoint: str) -> Path:
    """The file that clients hold a shared lock on; its time is when the host was last asked for."""
    return Path(endpoint).parent / "clients"


def _reachable(endpoint: str) -> bool:
    """Whether the socket is still there: a cleaner of temporary files may have taken it."""
    return Path(endpoint).exists()


async def _answers(endpoint: str) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(endpoint)
    except OSError:
        return False
    writer.close()
    return True


def _start(settings: Settings, headless: bool) -> subprocess.Popen[bytes]:
    config.private_folder(_log(settings).parent)
    with _open_private(_log(settings), create=True) as log:
        process = subprocess.Popen(
            # The settings travel in its environment; nothing is imported from the folder that we are in.
            [sys.executable, "-P", "-m", "mcp_flow.browser.host", "headless" if headless else "headed"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | settings.environment(),
            start_new_session=True,
        )
    # Without someone who waits for it, it would stay a zombie for as long as we live.
    threading.Thread(target=process.wait, name="browser host", daemon=True).start()
    return process


def _why(place: _Place, settings: Settings, code: int) -> FlowError:
    """What the host that did not start has left behind."""
    try:
        error = json.loads(place.error.read_text())
    except FileNotFoundError:
        return BrowserUnavailable(f"The browser host ended with {code}; its log is {_log(settings)}.")
    kinds = {kind.__name__: kind for kind in (BrowserMissing, BrowserUnavailable)}
    return kinds.get(error["type"], FlowError)(error["message"])


def _places(settings: Settings) -> list[_Place]:
    folder = settings.home / "host"
    return [_Place(folder, path.name.removesuffix(".lock")) for path in sorted(folder.glob("*.lock"))]


def _pid(place: _Place) -> int | None:
    try:
        pid: int | None = json.loads(place.lock.read_text())["pid"]
    except json.JSONDecodeError:
        return None
    return pid


async def _acquire(lock: IO[str]) -> bool:
    # Who looks whether the lock is held holds it for an instant: only a lock that stays held is another host's.
    for _ in range(10):
        if locks.acquire(lock, fcntl.LOCK_EX):
            return True
        await anyio.sleep(0.02)
    return False


@contextlib.contextmanager
def _scratch(lock: IO[str]) -> Iterator[Path]:
    """A new scratch folder; the lock file notes it, so that whoever comes after us can remove it."""
    undead = _undead(lock)
    scratch = Path(tempfile.mkdtemp(prefix="mcp-flow-"))
    _note(lock, os.getpid(), [str(scratch), *undead])
    try:
        yield scratch
    finally:
        _note(lock, None, undead if _removed(scratch) else [str(scratch), *undead])


def _undead(lock: IO[str]) -> list[str]:
    """The scratch folders that dead hosts have left and that can't be removed yet."""
    lock.seek(0)
    try:
        return [folder for folder in json.loads(lock.read())["scratch"] if not _removed(folder)]
    except json.JSONDecodeError:
        return []


def _note(lock: IO[str], pid: int | None, scratch: list[str]) -> None:
    lock.seek(0)
    lock.truncate()
    lock.write(json.dumps({"pid": pid, "scratch": scratch}))
    lock.flush()


def _removed(folder: str | Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not Path(folder).exists()


def _log(settings: Settings) -> Path:
    return settings.home / "logs" / "host.log"


def _playwright_version() -> str:
    return importlib.metadata.version("playwright")


def _open_private(path: Path, *, create: bool = False) -> IO[str]:
    flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
    return locks.own(os.fdopen(os.open(path, flags, 0o600), "r+"))


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole, so that nobody reads half of it."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


def main() -> None:
    """The process' entry."""
    try:
        anyio.run(partial(serve, config.load(), headless=sys.argv[1] != "headed"))
    except FlowError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
