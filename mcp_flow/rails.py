"""Which origins the pages of a run may reach. Guard rails for pages and agents that go astray, no sandbox. Pure.

A pattern is `[scheme://]host[:port]`: `https://shop.example`, `*.shop.example`, `http://127.0.0.1:*`, or `*` for every
public host. Without a port it means the scheme's own, and without a scheme any port.
"""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from mcp_flow.errors import InvalidInput

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
WAY_OUT = (
    "Name it in allow_origins if the run is to reach it: in settings.toml, MCP_FLOW_ALLOW_ORIGINS, or "
    '@workflow(allow_origins=["{origin}"]).'
)

_PATTERN = re.compile(
    r"(?:(?P<scheme>[a-z]+)://)?(?P<host>\[[0-9a-f:.]+\]|[^\s/:\[\]]+)(?::(?P<port>\*|\d{1,5}))?/?", re.I
)
_HOST = re.compile(r"\*|(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")
_PLATFORMS = frozenset({ipaddress.ip_address("168.63.129.16")})
"""Addresses at which a cloud tells its machines of themselves although they count as public: Azure's."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True, slots=True)
class Origins:
    """One pattern, taken apart; `port` None is any, and `host` `*` every public one."""

    host: str
    port: int | None

    @classmethod
    def of(cls, pattern: str, source: str = "allow_origins") -> Origins:
        """The origins that `pattern` stands for; raises `InvalidInput` naming its `source`."""
        found = _PATTERN.fullmatch(pattern.strip())
        scheme = (found["scheme"] or "").lower() if found else ""
        host = _plain(found["host"]) if found else ""
        port = found["port"] if found else None
        known = bool(found) and (not scheme or scheme in PORTS) and (_address(host) or _HOST.fullmatch(host))
        if not known or (port not in (None, "*") and int(port) > 65535):
            raise InvalidInput(
                f"{source}: {pattern[:100]!r} is no origin. Write it like https://shop.example, *.shop.example, "
                "http://127.0.0.1:*, or * for every public host."
            )
        if port is None:
            return cls(host, PORTS.get(scheme))
        return cls(host, None if port == "*" else int(port))

    def match(self, host: str, port: int) -> bool:
        """Whether this stands for the host at this port."""
        if self.port not in (None, port):
            return False
        return self.host in ("*", host) or (self.host.startswith("*.") and host.endswith(self.host[1:]))


@dataclass(frozen=True, slots=True)
class Rails:
    """What may be reached: matched by no pattern of `block`, by one of each list in `allow` that has any, and public,
    unless a pattern other than `*` names it."""

    allow: tuple[tuple[str, ...], ...] = ()
    block: tuple[str, ...] = ()

    @classmethod
    def of(cls, allow: Iterable[str], block: Iterable[str]) -> Rails:
        """The rails of one pair of lists; raises `InvalidInput` naming the pattern that is none."""
        return cls((checked(allow, "allow_origins"),), checked(block, "block_origins"))

    def __and__(self, other: Rails) -> Rails:
        """What both let through; what either names is named."""
        return Rails((*self.allow, *other.allow), (*self.block, *other.block))

    def dump(self) -> dict[str, Any]:
        """What `load` reads again, as JSON."""
        return asdict(self)

    @classmethod
    def load(cls, value: dict[str, Any]) -> Rails:
        """What `dump` gave."""
        return cls(tuple(map(tuple, value["allow"])), tuple(value["block"]))

    def refusal(self, host: str, port: int, addresses: Iterable[str] = ()) -> str | None:
        """Why the host, which has these IP addresses, may not be reached at this port; None if it may.

        Asked without addresses, it answers for the name alone.
        """
        name = _plain(host)
        origin = f"{f'[{name}]' if ':' in name else name}:{port}"
        allowed = [[Origins.of(pattern) for pattern in patterns] for patterns in self.allow if patterns]
        if blocked := next((one for one in self.block if Origins.of(one).match(name, port)), None):
            return f"{origin} is refused by block_origins ({blocked})."
        if not all(any(one.match(name, port) for one in patterns) for patterns in allowed):
            return f"{origin} is not among allow_origins. {WAY_OUT.format(origin=origin)}"
        if any(one.host != "*" and one.match(name, port) for patterns in allowed for one in patterns):
            return None
        literal = _address(name)
        if name == "localhost" or name.endswith(".localhost") or (literal and not _is_public(literal)):
            return f"{origin} is a private address. {WAY_OUT.format(origin=origin)}"
        for address in addresses:
            if (found := _address(address)) is None or not _is_public(found):
                return f"{origin} leads to the private address {address}. {WAY_OUT.format(origin=origin)}"
        return None


def checked(patterns: Iterable[str], source: str) -> tuple[str, ...]:
    """`patterns`, if all of them are; raises `InvalidInput` naming the first that is none and its `source`."""
    if isinstance(patterns, str):
        raise InvalidInput(f"{source} takes a list of origins, not the text {patterns[:100]!r}.")
    given = tuple(patterns)
    for pattern in given:
        if not isinstance(pattern, str):
            raise InvalidInput(f"{source} takes origins as text, not {type(pattern).__name__}.")
        Origins.of(pattern, source)
    return given


def place(url: str) -> tuple[str, int] | None:
    """Host and port that a URL leads to; None for one that leads to no host."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def _plain(host: str) -> str:
    """A host as it is compared: lower case, no brackets, no last dot, other alphabets in their ASCII form."""
    name = host.strip("[]").rstrip(".").lower()
    if not name.isascii():
        try:
            return name.encode("idna").decode()
        except UnicodeError:
            return ""
    address = _address(name)
    return str(address) if address else name


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_public(address: Address) -> bool:
    """Whether an address belongs to the public net, also where an IPv4 address is wrapped in it."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())[1:]]
        if address in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(inner and not _is_public(inner) for inner in wrapped):
            return False
        if address.ipv4_mapped:
            return True
    return address.is_global and not address.is_multicast and address not in _PLATFORMS
