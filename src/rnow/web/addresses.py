"""Which addresses a browser for a model may reach: public web servers, and what the user has allowed by name.

A host is judged by the address that will be dialled, never by how it is spelled: ``Guard.addresses`` resolves a name once,
checks every address behind it, and gives back the addresses to dial. Nothing resolves the name a second time, so a name
server that changes its answer in between gains nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Name and port to textual IP addresses; raises OSError when there are none."""

WEB_PORTS = frozenset({80, 443, 8080, 8443})
MAX_URL = 4096
_RESOLVE_SECONDS = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}

# Everything the registries set aside for other uses than reaching a public server, and two addresses that clouds
# answer on inside their networks although they look public. `is_global` alone differs between versions of Python, calls
# multicast global, and lets the forms that carry an IPv4 address through.
_NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "168.63.129.16/32",
    )
)
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")  # the only part of IPv6 that public servers have
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # Teredo, ORCHID, benchmarking, ...
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",
        "3fff::/20",
    )
)
# Documentation addresses: a system that lets one bind these lets one bind any (net.ipv4.ip_nonlocal_bind).
_NOBODYS = {4: "192.0.2.1", 6: "2001:db8::1"}
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

_CONTROLS = "".join(map(chr, range(0x21)))  # what browsers strip from both ends, the space included
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(?![0-9])")
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")


class Refused(Exception):
    """This address is not visited; the message says why, in words for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebAddress:
    """A URL that passed the checks of its spelling. ``host`` is canonical: lower case, an IP address in its usual form
    (IPv6 without brackets), no trailing dot."""

    url: str
    host: str
    port: int


def parse_url(text: str) -> WebAddress:
    """Read a URL as a browser would: blanks around it, tabs and line ends inside it and ``\\`` for ``/`` included. One
    without a scheme is taken as https.

    Raises Refused: not http or https, a user name in it, no host, a host that is none, or longer than 4096 characters.
    """
    text = text.strip(_CONTROLS)
    text = re.sub(r"[\t\r\n]", "", text)
    if len(text) > MAX_URL:
        raise Refused(f"the address is longer than {MAX_URL} characters")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused("the address is not valid text")
    scheme = _SCHEME.match(text)
    if scheme is None:
        text = "https://" + text.lstrip("/\\")
        scheme = _SCHEME.match(text)
    assert scheme is not None
    name = scheme.group(1).lower()
    if name not in _DEFAULT_PORTS:
        raise Refused(f"only http and https addresses can be visited, not {name}:")
    rest = text[scheme.end() :].lstrip("/\\")
    end = re.search(r"[/\\?#]", rest)
    authority = rest[: end.start()] if end else rest
    tail = rest[end.start() :] if end else ""
    if "@" in authority:
        raise Refused("addresses with a user name in them are not visited")
    host_text, port = split_port(authority, _DEFAULT_PORTS[name])
    host = parse_host(host_text)
    shown = f"[{host}]" if ":" in host else host
    url = f"{name}://{shown}" + (f":{port}" if port != _DEFAULT_PORTS[name] else "")
    path = "/" + (tail[1:] if tail.startswith(("/", "\\")) else tail)
    return WebAddress(url=url + path, host=host, port=port)


def split_port(authority: str, default: int | None = None) -> tuple[str, int]:
    """``host:port`` into its parts; the brackets of an IPv6 address stay on. Raises Refused: no such port, or none given
    and no ``default``."""
    found = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]*))?", authority)
    if found is None:
        raise Refused("the address has no valid host")
    host, digits = found.groups()
    if not digits:
        if default is None:
            raise Refused("the address names no port")
        return host, default
    # The length first: Python takes seconds over numbers of many thousand digits, and other digits than ours.
    if len(digits.lstrip("0")) > 5 or not digits.isascii() or not 0 < int(digits) < 65536:
        raise Refused("the address has no valid port")
    return host, int(digits)


def parse_host(text: str) -> str:
    """The canonical form of a host as written in a URL.

    Percent signs are decoded, international names become their ASCII form (which also turns look-alike digits and dots
    into plain ones), and everything that ends in a number is an IPv4 address: decimal, octal, hexadecimal, with fewer
    than four parts. Raises Refused when it is no host.
    """
    refused = Refused("the address has no valid host")
    if text.startswith("["):
        try:
            address = ipaddress.IPv6Address(text[1:-1] if text.endswith("]") else "")
        except ValueError:
            raise refused from None
        if address.scope_id is not None:
            raise Refused("addresses with a zone are not visited")
        return str(address)
    try:
        host = unquote_to_bytes(text).decode("utf-8")
        host = host.encode("idna").decode("ascii").lower() if not host.isascii() else host.lower()
    except UnicodeError:
        raise refused from None
    host = host.removesuffix(".")
    if not host or len(host) > 253 or not _NAME.fullmatch(host):
        raise refused
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        return str(_parse_ipv4(host))
    return host


def _parse_ipv4(host: str) -> ipaddress.IPv4Address:
    parts = host.split(".")
    numbers = []
    for part in parts:
        if not _NUMBER.fullmatch(part) or len(part) > 40:
            raise Refused("the address has no valid host")
        try:
            if part[:2].lower() == "0x":
                numbers.append(int(part[2:] or "0", 16))
            else:
                numbers.append(int(part, 8 if len(part) > 1 and part.startswith("0") else 10))
        except ValueError:
            raise Refused("the address has no valid host") from None
    *front, last = numbers
    if len(parts) > 4 or any(number > 255 for number in front) or last >= 256 ** (5 - len(parts)):
        raise Refused("the address has no valid host")
    value = last + sum(number << 8 * (3 - index) for index, number in enumerate(front))
    return ipaddress.IPv4Address(value)


def is_public(address: IPAddress) -> bool:
    """Whether a public server can have this address. An IPv4 address inside an IPv6 one (mapped, or behind the well-known
    NAT64 prefix) is judged by itself: that is where the packets go."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        return (
            address in _UNICAST_6
            and address.is_global
            and not any(address in network for network in _NOT_PUBLIC_6)
        )
    return address.is_global and not any(address in network for network in _NOT_PUBLIC_4)


def is_own(address: IPAddress) -> bool:
    """Whether this machine has the address on one of its interfaces: services that trust the machine itself often listen
    there, behind a firewall that does not apply."""
    return _can_bind(str(address)) and not _can_bind(_NOBODYS[address.version])


def _can_bind(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def parse_allowed(text: str) -> frozenset[tuple[str, int]]:
    """``"127.0.0.1:8000, wiki.intranet:443"`` into canonical hosts and ports.

    Raises ValueError for an entry without a host or a port.
    """
    allowed = set()
    for entry in re.split(r"[\s,]+", text.strip()):
        if not entry:
            continue
        try:
            host, port = split_port(entry)
            allowed.add((parse_host(host), port))
        except Refused:
            raise ValueError(f"an allowed address is written host:port, not {entry!r}") from None
    return frozenset(allowed)


async def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name, in the system's order."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Guard:
    """Decides which hosts and ports may be dialled, and at which addresses.

    Args:
        allowed: (canonical host, port) pairs that are reachable whatever their address. A name in it does not allow the
            address it stands for, nor the reverse.
        resolver: how names become addresses.
    """

    def __init__(
        self,
        allowed: frozenset[tuple[str, int]] = frozenset(),
        *,
        resolver: Resolver = resolve,
    ) -> None:
        self._allowed = allowed
        self._resolver = resolver

    def check_port(self, host: str, port: int) -> None:
        """Raises Refused for a port that no web page needs, unless the pair is allowed."""
        if port not in WEB_PORTS and (host, port) not in self._allowed:
            raise Refused(f"port {port} is not one of the web's")

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses to dial for a canonical host, one lookup's worth. A name with one address that is not public is
        refused as a whole.

        Raises:
            Refused: it may not be reached.
            OSError: the name does not resolve, or not within ten seconds.
        """
        self.check_port(host, port)
        if _is_ip_address(host):
            found = [host]
        else:
            async with asyncio.timeout(_RESOLVE_SECONDS):
                found = list(await self._resolver(host, port))
        if not found:
            raise OSError("the name has no address")
        if (host, port) in self._allowed:
            return found
        for text in found:
            if not _is_ip_address(text):
                raise Refused("its name stands for something that is no address")
            address = ipaddress.ip_address(text)
            if not is_public(address) or is_own(address):
                raise Refused("it is not on the public web")
        return found
