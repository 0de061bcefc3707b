"""The guard rails at work: a SOCKS5 proxy for each run, in the host, through which its pages reach the net.

Every connection passes here, whichever client, redirect, frame, popup or worker of the page asks for it, also while
no client lives. A name is resolved here and the address checked is the one connected to, so that a name which
changes its address meanwhile leads nowhere else. The protocol is RFC 1928 without authentication.

Others speak to the proxies through a socket in the host's scratch folder: a line of JSON each way.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import urllib.parse
import urllib.request
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcp_flow.errors import BrowserUnavailable
from mcp_flow.rails import Rails, place

CONNECT_SECONDS = 30.0
NEXT_ADDRESS_SECONDS = 3.0
"""How long one of several addresses of a host may take before the next is tried."""
GREETING_SECONDS = 10.0
ANSWER_SECONDS = 5.0
FATES_KEPT = 200
"""How many hosts are remembered a run that could not be reached, with the reason."""
CHUNK = 65_536
FAILED = "net::ERR_SOCKS_CONNECTION_FAILED"
"""What Chromium says of whatever a proxy does not connect; `explain` says why it did not."""

_OK, _FAILED, _REFUSED, _UNSUPPORTED = 0, 1, 2, 7
_FILE = re.compile(r"net::ERR_BLOCKED_BY_CLIENT at (?:view-source:)?file:", re.I)


async def admit(endpoint: str, run_id: str, rails: Rails) -> str:
    """The address of the run's proxy, which keeps to these rails from now on. Raises `BrowserUnavailable`."""
    answer = await _ask(endpoint, {"admit": run_id, "rails": rails.dump()})
    return f"socks5://127.0.0.1:{answer['port']}"


async def dismiss(endpoint: str, run_id: str) -> None:
    """End the run's proxy, if its host still lives."""
    with contextlib.suppress(BrowserUnavailable):
        await _ask(endpoint, {"dismiss": run_id})


async def explain(endpoint: str, run_id: str, message: str) -> str | None:
    """Why the net was not reached, where Playwright's `message` says no more than that; None for another failure."""
    if _FILE.search(message):
        return "file: URLs are refused to pages. Read the file in the workflow instead, or serve it over http."
    if FAILED not in message:
        return None
    at = re.search(r" at (\S+)", message)
    with contextlib.suppress(BrowserUnavailable):
        why: str | None = (await _ask(endpoint, {"why": run_id, "url": at[1] if at else ""}))["why"]
        return why
    return None


@contextlib.asynccontextmanager
async def serving(scratch: Path) -> AsyncIterator[None]:
    """The proxies of a host with this scratch folder, for as long as this is open."""
    proxies = _Proxies()
    server = await asyncio.start_unix_server(proxies.answer, scratch / "proxies")
    try:
        yield
    finally:
        server.close()
        proxies.end()


def _socket(endpoint: str) -> Path:
    return Path(endpoint).parent / "proxies"


async def _ask(endpoint: str, question: dict[str, Any]) -> dict[str, Any]:
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_unix_connection(_socket(endpoint))
            try:
                writer.write(json.dumps(question).encode() + b"\n")
                answer: dict[str, Any] = json.loads(await reader.readline())
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise BrowserUnavailable("The browser host has ended; ask for another.") from error
    return answer


class _Proxies:
    """The proxies of all runs."""

    def __init__(self) -> None:
        self._proxies: dict[str, _Proxy] = {}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            question = json.loads(await reader.readline())
            writer.write(json.dumps(await self._answer(question)).encode() + b"\n")
            await writer.drain()
        writer.close()

    def end(self) -> None:
        for proxy in self._proxies.values():
            proxy.end()

    async def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        match question:
            case {"admit": str(run_id), "rails": dict(rails)}:
                proxy = self._proxies.get(run_id)
                if proxy is None:
                    proxy = self._proxies[run_id] = _Proxy(Rails.load(rails))
                proxy.keep_to(Rails.load(rails))
                return {"port": await proxy.port()}
            case {"dismiss": str(run_id)}:
                if proxy := self._proxies.pop(run_id, None):
                    proxy.end()
                return {}
            case {"why": str(run_id), "url": str(url)}:
                found = self._proxies.get(run_id)
                return {"why": found.fate(url) if found else None}
        return {}


@dataclass(eq=False)
class _Proxy:
    """One run's proxy: it listens on a loopback port of its own, which is how a connection is told to be the run's."""

    rails: Rails
    _listening: asyncio.Task[asyncio.Server] | None = None
    _fates: OrderedDict[tuple[str, int], str] = field(default_factory=OrderedDict)
    _open: dict[asyncio.Task[Any], tuple[str, int, tuple[str, ...]]] = field(default_factory=dict)

    async def port(self) -> int:
        if self._listening is None:
            self._listening = asyncio.create_task(asyncio.start_server(self._serve, "127.0.0.1", 0))
        server = await asyncio.shield(self._listening)
        number: int = server.sockets[0].getsockname()[1]
        return number

    def keep_to(self, rails: Rails) -> None:
        """Keep to these rails; what they refuse is cut off, also where it was let through before."""
        if rails == self.rails:
            return
        self.rails = rails
        for task, (host, number, addresses) in list(self._open.items()):
            if rails.refusal(host, number, addresses):
                task.cancel()

    def end(self) -> None:
        if self._listening and self._listening.done():
            self._listening.result().close()
        for task in list(self._open):
            task.cancel()

    def fate(self, url: str) -> str | None:
        """Why the URL was not reached, or, for one that led on, the last thing that was not."""
        known = place(url)
        return (known and self._fates.get(known)) or next(reversed(self._fates.values()), None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        onward: asyncio.StreamWriter | None = None
        self._open[task] = ("", 0, ())
        try:
            async with asyncio.timeout(GREETING_SECONDS):
                asked = await _greeted(reader, writer)
            if asked is None:
                writer.write(_reply(_UNSUPPORTED))
                return
            host, number = asked
            try:
                beyond, onward, addresses = await self._connect(host, number)
            except _NotReached as error:
                self._note(host, number, str(error))
                writer.write(_reply(error.code))
                return
            self._fates.pop((host, number), None)
            self._open[task] = (host, number, addresses)
            writer.write(_reply(_OK))
            pumps = [asyncio.create_task(_pump(reader, onward)), asyncio.create_task(_pump(beyond, writer))]
            try:
                # A browser never closes one half of a connection only.
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
        except (OSError, EOFError, TimeoutError, ValueError):
            pass  # either end is gone, which is how connections end
        except asyncio.CancelledError:
            pass  # the rails refuse it by now, or the run has ended
        finally:
            self._open.pop(task, None)
            for end in (writer, onward):
                if end:
                    end.close()

    def _note(self, host: str, number: int, fate: str) -> None:
        self._fates[host, number] = fate
        self._fates.move_to_end((host, number))
        while len(self._fates) > FATES_KEPT:
            self._fates.popitem(last=False)

    async def _connect(
        self, host: str, number: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, tuple[str, ...]]:
        if why := self.rails.refusal(host, number):
            raise _NotReached(why, _REFUSED)
        upstream = _upstream(host, number)
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, number, type=socket.SOCK_STREAM)
            addresses = tuple(dict.fromkeys(str(info[4][0]) for info in found))
        except OSError as error:
            if upstream is None:
                raise _NotReached(f"{host} could not be reached: its name could not be resolved.") from error
            addresses = ()
        if why := self.rails.refusal(host, number, addresses):
            raise _NotReached(why, _REFUSED)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if upstream:
                    return *await _through(upstream, host, number), addresses
                return *await _first(addresses, number), addresses
        except (OSError, TimeoutError, EOFError) as error:
            why = "it did not answer in time" if isinstance(error, TimeoutError) else _said(error)
            raise _NotReached(f"{host}:{number} could not be reached: {why}.") from error


class _NotReached(Exception):
    def __init__(self, why: str, code: int = _FAILED) -> None:
        self.code = code
        super().__init__(why)


async def _greeted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[str, int] | None:
    """Where a client wants to go; None if it wants anything but a connection."""
    version, count = await reader.readexactly(2)
    await reader.readexactly(count)
    writer.write(b"\x05\x00")
    version, command, _, kind = await reader.readexactly(4)
    match kind:
        case 1:
            host = socket.inet_ntop(socket.AF_INET, await reader.readexactly(4))
        case 3:
            host = (await reader.readexactly((await reader.readexactly(1))[0])).decode("ascii")
        case 4:
            host = socket.inet_ntop(socket.AF_INET6, await reader.readexactly(16))
        case _:
            return None
    number = int.from_bytes(await reader.readexactly(2), "big")
    return (host, number) if (version, command) == (5, 1) else None


def _reply(code: int) -> bytes:
    return bytes((5, code, 0, 1, 0, 0, 0, 0, 0, 0))


async def _first(addresses: Sequence[str], number: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first address that takes one."""
    for address in addresses[:-1]:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(NEXT_ADDRESS_SECONDS):
                return await asyncio.open_connection(address, number)
    return await asyncio.open_connection(addresses[-1], number)


def _upstream(host: str, number: int) -> urllib.parse.SplitResult | None:
    """The proxy by which this machine reaches the host, as the environment says (`HTTPS_PROXY`, `NO_PROXY`, …)."""
    known = urllib.request.getproxies()
    url = known.get("https" if number == 443 else "http") or known.get("all")
    if not url or host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(host):
        return None
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    return parts if parts.hostname and parts.scheme == "http" else None


async def _through(
    upstream: urllib.parse.SplitResult, host: str, number: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A tunnel through an HTTP proxy (RFC 9110, CONNECT)."""
    reader, writer = await asyncio.open_connection(upstream.hostname, upstream.port or 80)
    try:
        target = f"[{host}]:{number}" if ":" in host else f"{host}:{number}"
        head = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if upstream.username is not None:
            who = f"{urllib.parse.unquote(upstream.username)}:{urllib.parse.unquote(upstream.password or '')}"
            head.append(f"Proxy-Authorization: Basic {base64.b64encode(who.encode()).decode()}")
        writer.write("\r\n".join([*head, "", ""]).encode())
        status = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0].decode("latin-1")
        if status.split(" ")[1:2] != ["200"]:
            raise OSError(f"the proxy {upstream.hostname} says {status!r}")
    except BaseException:
        writer.close()
        raise
    return reader, writer


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Carry bytes one way until they end."""
    with contextlib.suppress(OSError):
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()


def _said(error: BaseException) -> str:
    """An error in plain words: asyncio's own repeat the address."""
    if isinstance(error, ConnectionRefusedError):
        return "it refused the connection"
    return getattr(error, "strerror", None) or str(error) or "the connection ended"
