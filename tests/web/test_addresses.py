"""Which addresses may be visited: spellings, address ranges, ports, allowed pairs."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnow.web import addresses
from rnow.web.addresses import (
    Guard,
    Refused,
    is_own,
    is_public,
    parse_allowed,
    parse_host,
    parse_url,
    resolve,
)

PUBLIC = [
    "8.8.8.8",
    "93.184.216.34",
    "1.1.1.1",
    "172.15.255.255",
    "172.32.0.1",
    "100.63.255.255",
    "100.128.0.1",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2a00:1450:4001:830::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]

NOT_PUBLIC = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",  # behind a carrier's NAT
    "100.100.100.200",  # a cloud's metadata
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # another's, although it looks public
    "169.254.0.1",
    "169.254.169.254",  # most clouds' metadata
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "224.0.1.1",  # is_global calls it global
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",  # IPv4-compatible
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",  # IPv4-translated
    "64:ff9b::7f00:1",  # NAT64
    "64:ff9b::a9fe:a9fe",
    "64:ff9b::a00:1",
    "64:ff9b:1::7f00:1",
    "64:ff9b:1::808:808",
    "100::1",
    "2001::1",  # Teredo
    "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::",  # 6to4
    "2002:808:808::1",
    "3fff::1",
    "5f00::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",  # a cloud's metadata
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


@given(st.ip_addresses(v=4))
def test_ipv4_inside_ipv6_is_judged_as_itself(address: ipaddress.IPv4Address) -> None:
    for prefix in ("::ffff:", "64:ff9b::"):
        assert is_public(ipaddress.ip_address(f"{prefix}{address}")) == is_public(address)
    assert not is_public(ipaddress.ip_address(f"::{address}"))
    assert not is_public(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80)))


@given(st.ip_addresses())
def test_public_is_never_more_than_global_unicast(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public(address):
        plain = address
        if isinstance(plain, ipaddress.IPv6Address):
            plain = plain.ipv4_mapped or plain
        assert not (
            plain.is_private
            or plain.is_loopback
            or plain.is_link_local
            or plain.is_multicast
            or plain.is_unspecified
            or plain.is_reserved
        ) or plain in ipaddress.ip_network("64:ff9b::/96")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0X7F.0x0.0.1", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("0x", "0.0.0.0"),
        ("00000000000000000000177.1", "127.0.0.1"),
        ("169.254.43518", "169.254.169.254"),
        ("0xa9fea9fe", "169.254.169.254"),
        ("%31%32%37.0.0.1", "127.0.0.1"),
        ("①②⑦.⓪.⓪.①", "127.0.0.1"),
        ("127。0。0。1", "127.0.0.1"),
        ("１２７.0.0.1", "127.0.0.1"),
        ("[::1]", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("[::ffff:127.0.0.1]", "::ffff:7f00:1"),
        ("[::FFFF:7F00:1]", "::ffff:7f00:1"),
        ("LOCALHOST", "localhost"),
        ("localhost.", "localhost"),
        ("ⓛocalhost", "localhost"),
        ("Example.ORG", "example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("1.example.org", "1.example.org"),
        ("a_b.example.org", "a_b.example.org"),
    ],
)
def test_hosts_as_browsers_read_them(text: str, host: str) -> None:
    found = parse_host(text)
    assert (
        ipaddress.ip_address(found) == ipaddress.ip_address(host) if ":" in host else found == host
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a..b",
        "256.0.0.1",
        "1.2.3.4.5",
        "127.0.0.256",
        "0x100000000",
        "4294967296",
        "1.2.3.09",
        "example.1x",
        "foo.0x1g",
        "a b",
        "a%00b",
        "a%20b",
        "a/b",
        "a%2fb",
        "[::1",
        "[::1]x",
        "[fe80::1%25eth0]",
        "[1.2.3.4]",
        "[]",
        "ex<ample.org",
        "a" * 64 + ".org",
        ".".join(["a" * 60] * 5),
        "\ud800.org",
        "9" * 5000,
    ],
)
def test_no_host_at_all(text: str) -> None:
    if text in ("example.1x", "foo.0x1g"):
        assert parse_host(text) == text  # names, if odd ones: they do not end in a number
        return
    with pytest.raises(Refused):
        parse_host(text)


@pytest.mark.parametrize(
    ("text", "url", "port"),
    [
        ("https://example.org", "https://example.org/", 443),
        ("HTTP://Example.org/A?b=c#d", "http://example.org/A?b=c#d", 80),
        ("https://example.org:443/", "https://example.org/", 443),
        ("http://example.org:8080?q", "http://example.org:8080/?q", 8080),
        ("  https://example.org/a b ", "https://example.org/a b", 443),
        ("ht\ntps://exam\tple.org/", "https://example.org/", 443),
        ("https:example.org", "https://example.org/", 443),
        ("https:/\\/example.org\\x", "https://example.org/x", 443),
        ("example.org/page", "https://example.org/page", 443),
        ("//example.org/page", "https://example.org/page", 443),
        ("localhost:8000/x", "https://localhost:8000/x", 8000),
        ("http://[::1]:80/", "http://[::1]/", 80),
        ("http://0x7f.1:8080/", "http://127.0.0.1:8080/", 8080),
        ("http://example.org\\@127.0.0.1/", "http://example.org/@127.0.0.1/", 80),
        ("http://example.org#@127.0.0.1/", "http://example.org/#@127.0.0.1/", 80),
        ("http://example.org?@127.0.0.1/", "http://example.org/?@127.0.0.1/", 80),
    ],
)
def test_urls(text: str, url: str, port: int) -> None:
    found = parse_url(text)
    assert (found.url, found.port) == (url, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "https://",
        "file:///etc/passwd",
        "file:/etc/passwd",
        "FILE:///etc/passwd",
        "fi\nle:///etc/passwd",
        "\x01file:///etc/passwd",
        "view-source:http://example.org/",
        "chrome://version",
        "chrome-extension://abc/",
        "devtools://devtools/",
        "about:blank",
        "data:text/html,hi",
        "javascript:alert(1)",
        "blob:https://example.org/x",
        "filesystem:https://example.org/x",
        "ftp://example.org/",
        "ws://example.org/",
        "gopher://example.org/",
        "mailto:a@example.org",
        "jar:http://example.org!/x",
        "http://user@example.org/",
        "http://user:password@example.org/",
        "http://example.org@127.0.0.1/",
        "http://@127.0.0.1/",
        "http://127.0.0.1:80@example.org/",
        "http://example.org:0/",
        "http://example.org:65536/",
        "http://example.org:80:90/",
        "http://example.org:+80/",
        "http://example.org:٨٠/",
        "http://example.org:" + "9" * 3000 + "/",
        "http://exa mple.org/",
        "http:///",
        "https://example.org/" + "a" * 5000,
        "https://example.org/\ud800",
    ],
)
def test_urls_that_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_url(text)


@given(st.text(max_size=60))
def test_any_text_is_a_web_address_or_refused(text: str) -> None:
    try:
        found = parse_url(text)
    except Refused:
        return
    assert found.url.startswith(("http://", "https://"))
    assert 0 < found.port < 65536
    assert parse_url(found.url) == found
    assert parse_host(f"[{found.host}]" if ":" in found.host else found.host) == found.host


@given(st.ip_addresses(v=4), st.sampled_from(["{}", "{:#x}", "0{:o}"]), st.integers(1, 4))
def test_every_number_form_is_the_address(
    address: ipaddress.IPv4Address, form: str, parts: int
) -> None:
    packed = address.packed
    front = [form.format(byte) for byte in packed[: parts - 1]]
    last = form.format(int.from_bytes(packed[parts - 1 :], "big"))
    assert parse_host(".".join([*front, last])) == str(address)


def test_allowed_pairs() -> None:
    assert parse_allowed("") == frozenset()
    assert parse_allowed(" 127.0.0.1:8000,Wiki.Intranet:443\n[::1]:80 0x7f.1:9 ") == {
        ("127.0.0.1", 8000),
        ("wiki.intranet", 443),
        ("::1", 80),
        ("127.0.0.1", 9),
    }
    for wrong in ("127.0.0.1", "host", ":80", "http://host:80", "host:80:90", "host:*", "*:80"):
        with pytest.raises(ValueError, match="host:port"):
            parse_allowed(wrong)


def _answers(*found: str) -> addresses.Resolver:
    async def resolver(host: str, port: int) -> list[str]:
        return list(found)

    return resolver


def _ask(guard: Guard, host: str, port: int = 80) -> list[str]:
    return asyncio.run(guard.addresses(host, port))


def test_a_name_gives_the_addresses_that_were_checked() -> None:
    guard = Guard(resolver=_answers("93.184.216.34", "2606:4700:4700::1111"))
    assert _ask(guard, "example.org") == ["93.184.216.34", "2606:4700:4700::1111"]


@pytest.mark.parametrize("address", [*NOT_PUBLIC, "localhost", "127.1", ""])
def test_a_name_with_one_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(Refused):
        _ask(Guard(resolver=_answers("93.184.216.34", address)), "example.org")


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(Refused):
        _ask(Guard(resolver=_answers("93.184.216.34")), address)


@pytest.mark.parametrize("port", [1, 22, 25, 53, 81, 3306, 5432, 6379, 8000, 9200, 65535])
def test_ports_of_other_services_are_refused(port: int) -> None:
    with pytest.raises(Refused, match=f"port {port} "):
        _ask(Guard(resolver=_answers("93.184.216.34")), "example.org", port)


@pytest.mark.parametrize("port", [80, 443, 8080, 8443])
def test_ports_of_the_web(port: int) -> None:
    assert _ask(Guard(resolver=_answers("93.184.216.34")), "example.org", port)


def test_the_allow_list_is_exact() -> None:
    guard = Guard(parse_allowed("127.0.0.1:8000 intranet:9000"), resolver=_answers("127.0.0.1"))
    assert _ask(guard, "127.0.0.1", 8000) == ["127.0.0.1"]
    assert _ask(guard, "intranet", 9000) == ["127.0.0.1"]
    for host, port in (
        ("127.0.0.1", 8080),
        ("127.0.0.2", 8000),
        ("::1", 8000),
        ("::ffff:7f00:1", 8000),
        ("evil.example", 8000),  # a name that stands for an allowed address is another name
        ("evil.example", 9000),
        ("intranet", 80),
        ("127.0.0.1", 9000),
    ):
        with pytest.raises(Refused):
            _ask(guard, host, port)


def test_names_without_addresses_are_an_error() -> None:
    with pytest.raises(OSError):
        _ask(Guard(resolver=_answers()), "example.org")


def test_a_slow_name_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_RESOLVE_SECONDS", 0.05)

    async def resolver(host: str, port: int) -> list[str]:
        await asyncio.sleep(30)
        return ["93.184.216.34"]

    with pytest.raises(TimeoutError):
        _ask(Guard(resolver=resolver), "example.org")


def test_this_machines_own_addresses_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = _bindable("203.0.113.7")
    monkeypatch.setattr(addresses, "_can_bind", bound)
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    assert is_own(ipaddress.ip_address("203.0.113.7"))
    with pytest.raises(Refused):
        _ask(Guard(resolver=_answers("203.0.113.7")), "example.org")
    assert _ask(Guard(resolver=_answers("203.0.113.8")), "example.org")


def test_a_system_that_binds_anything_owns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_can_bind", lambda address: True)
    assert not is_own(ipaddress.ip_address("93.184.216.34"))


def test_loopback_is_own_and_others_are_not() -> None:
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    assert not is_own(ipaddress.ip_address("93.184.216.34"))


def _bindable(*own: str) -> Callable[[str], bool]:
    return lambda address: address in own


def test_resolve_reads_every_spelling_of_loopback() -> None:
    assert asyncio.run(resolve("127.0.0.1", 80)) == ["127.0.0.1"]
    found = asyncio.run(resolve("localhost", 80))
    assert found
    assert all(ipaddress.ip_address(text).is_loopback for text in found)
    assert len(found) == len(set(found))


def test_what_the_system_resolves_numbers_to_is_what_is_checked() -> None:
    """Where a spelling reaches the system's resolver after all, the address is the same one."""
    for text in ("0x7f.1", "0177.0.0.1", "2130706433", "127.1"):
        assert socket.gethostbyname(text) == parse_host(text) == "127.0.0.1"
