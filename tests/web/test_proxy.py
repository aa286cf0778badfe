"""The proxy against servers on loopback: what gets through, what does not, and that only checked addresses are dialled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from rnow.web.addresses import Guard
from rnow.web.proxy import Limits, PinningProxy

PUBLIC = "93.184.216.34"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Net:
    """A pretended internet: names with answers that change, and one server behind every public address."""

    def __init__(self) -> None:
        self.names: dict[str, list[Sequence[str]]] = {}
        self.lookups: list[str] = []
        self.dialled: list[tuple[str, int]] = []
        self.requests: list[bytes] = []
        self.port = 0
        self.handler: Handler = self._page
        self.body = b"<p>hello</p>"

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.lookups.append(host)
        answers = self.names.get(host)
        if not answers:
            raise OSError("no such name")
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def dial(
        self, address: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.dialled.append((address, port))
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def _page(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: keep-alive\r\n\r\n%s"
            % (len(self.body), self.body)
        )
        await writer.drain()


@asynccontextmanager
async def running(net: Net, **limits: Any) -> AsyncIterator[PinningProxy]:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await net.handler(reader, writer)
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    net.port = server.sockets[0].getsockname()[1]
    proxy = PinningProxy(Guard(resolver=net.resolve), limits=Limits(**limits), dial=net.dial)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        server.close()


async def ask(proxy: PinningProxy, request: str | bytes, *, more: bytes = b"") -> bytes:
    """Everything the proxy says to one request, until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(request.encode("latin-1") if isinstance(request, str) else request)
    writer.write(more)
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


def get(url: str, headers: str = "") -> str:
    return f"GET {url} HTTP/1.1\r\nHost: wrong.example\r\n{headers}\r\n"


def connect(authority: str) -> str:
    return f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_plain_request_reaches_the_address_that_was_checked() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            answer = await ask(
                proxy,
                get(
                    "http://example.org/a?b=c",
                    "Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\nX-Own: 1\r\n",
                ),
            )
        assert net.dialled == [(PUBLIC, 80)]
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert b"Connection: close" in head
        assert b"keep-alive" not in head
        assert body == net.body
        (seen,) = net.requests
        assert seen.startswith(b"GET /a?b=c HTTP/1.1\r\nHost: example.org\r\nConnection: close\r\n")
        assert b"X-Own: 1\r\n" in seen
        assert b"wrong.example" not in seen
        assert b"proxy" not in seen.lower()

    run(scenario)


def test_a_request_without_a_path() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            await ask(proxy, get("http://example.org?q=1"))
        assert net.requests[0].startswith(b"GET /?q=1 HTTP/1.1\r\n")

    run(scenario)


def test_a_tunnel_passes_bytes_both_ways() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data.upper())

    async def scenario() -> None:
        net = Net()
        net.handler = echo
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(connect("example.org:443").encode())
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            for word in (b"one", b"two"):
                writer.write(word)
                assert await reader.readexactly(3) == word.upper()
            writer.close()
        assert net.dialled == [(PUBLIC, 443)]

    run(scenario)


def test_a_name_that_changes_its_address_is_never_dialled_unchecked() -> None:
    """Rebinding: public when it is checked, private when somebody asks again. Nobody asks again for the same request, and
    the next request is checked by itself."""

    async def scenario() -> None:
        net = Net()
        net.names["rebind.example"] = [[PUBLIC], ["127.0.0.1"], ["169.254.169.254"], [PUBLIC]]
        async with running(net) as proxy:
            answers = [await ask(proxy, get("http://rebind.example/")) for _ in range(4)]
        assert net.lookups == ["rebind.example"] * 4
        assert net.dialled == [(PUBLIC, 80)] * 2
        assert [answer.split()[1] for answer in answers] == [b"200", b"403", b"403", b"200"]

    run(scenario)


@pytest.mark.parametrize(
    "authority",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "0x7f.1",
        "2130706433",
        "[::ffff:127.0.0.1]",
        "169.254.169.254",
        "[64:ff9b::7f00:1]",
        "10.0.0.1",
        "private.example",
        "mixed.example",
        "example.org:22",
        "user@example.org",
        "a%00b",
    ],
)
@pytest.mark.parametrize("tunnel", [False, True])
def test_what_is_refused(authority: str, tunnel: bool) -> None:
    async def scenario() -> None:
        net = Net()
        net.names = {
            "example.org": [[PUBLIC]],
            "private.example": [["192.168.1.1"]],
            "mixed.example": [[PUBLIC, "10.0.0.1"]],
            "localhost": [["127.0.0.1"]],
        }
        async with running(net) as proxy:
            if tunnel:
                whole = authority if authority == "example.org:22" else f"{authority}:443"
                answer = await ask(proxy, connect(whole))
            else:
                answer = await ask(proxy, get(f"http://{authority}/"))
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert net.dialled == []

    run(scenario)


@pytest.mark.parametrize(
    "request_text",
    [
        "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",  # as to a server: another browser's page tries this port
        "GET //example.org/ HTTP/1.1\r\n\r\n",
        "GET https://example.org/ HTTP/1.1\r\n\r\n",
        "GET ftp://example.org/ HTTP/1.1\r\n\r\n",
        "GET file:///etc/passwd HTTP/1.1\r\n\r\n",
        "GET http:/// HTTP/1.1\r\n\r\n",
        "GET http://example.org/ HTTP/2.0\r\n\r\n",
        "GET http://example.org/ a HTTP/1.1\r\n\r\n",
        "get http://example.org/ HTTP/1.1\r\n\r\n",
        "GET http://example.org/\x00 HTTP/1.1\r\n\r\n",
        "GET http://example.org/ HTTP/1.1\r\nfolded\r\n header: x\r\n\r\n",
        "GET http://example.org/ HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
        "GET http://example.org/ HTTP/1.1\r\nA : b\r\n\r\n",
        "\r\n\r\n",
        "CONNECT example.org:443\r\n\r\n",
        "\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    ],
)
def test_what_is_no_proxy_request(request_text: str) -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            answer = await ask(proxy, request_text)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert net.dialled == []

    run(scenario)


def test_a_tunnel_needs_a_port() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            assert b" 403 " in await ask(proxy, connect("example.org"))

    run(scenario)


def test_reasons_are_kept_until_the_host_answers() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [["10.0.0.1"], [PUBLIC]]
        async with running(net) as proxy:
            answer = await ask(proxy, get("http://example.org/"))
            assert b"not on the public web" in answer
            assert proxy.failure("example.org", 80) == "it is not on the public web"
            assert proxy.failure("example.org", 443) is None
            await ask(proxy, get("http://example.org/"))
            assert proxy.failure("example.org", 80) is None
            answer = await ask(proxy, get("http://nowhere.example/"))
            assert answer.startswith(b"HTTP/1.1 502 ")
            assert proxy.failure("nowhere.example", 80) == "it cannot be reached"
            for index in range(600):
                net.names[f"h{index}.example"] = [["10.0.0.1"]]
                await ask(proxy, get(f"http://h{index}.example/"))
            assert proxy.failure("nowhere.example", 80) is None  # bounded

    run(scenario)


def test_the_second_address_is_tried_when_the_first_is_dead() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [["1.1.1.1", PUBLIC]]
        real = net.dial

        async def dial(
            address: str, port: int
        ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            opened = await real(address, port)
            if address == "1.1.1.1":
                opened[1].close()
                raise ConnectionRefusedError
            return opened

        net.dial = dial  # type: ignore[method-assign]
        async with running(net) as proxy:
            assert b" 200 OK" in await ask(proxy, get("http://example.org/"))
        assert [address for address, _ in net.dialled] == ["1.1.1.1", PUBLIC]

    run(scenario)


def test_long_headers_are_refused() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            many = "".join(f"X-{index}: {'a' * 1000}\r\n" for index in range(100))
            try:
                answer = await ask(proxy, get("http://example.org/", many))
            except ConnectionResetError:
                answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")
        assert net.dialled == []

    run(scenario)


@pytest.mark.parametrize("tunnel", [False, True])
def test_too_much_is_cut_with_a_reset(tunnel: bool) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not tunnel:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async def scenario() -> None:
        net = Net()
        net.handler = flood
        net.names["example.org"] = [[PUBLIC]]
        async with running(net, received=1_000_000) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            text = connect("example.org:443") if tunnel else get("http://example.org/")
            writer.write(text.encode())
            received, broken = 0, False
            try:
                while data := await reader.read(65536):
                    received += len(data)
            except ConnectionResetError:
                broken = True
            assert broken, "a quiet end would look like the whole page"
            assert received <= 1_000_200
            writer.close()

    run(scenario)


def test_uploads_are_bounded() -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass

    async def scenario() -> None:
        net = Net()
        net.handler = swallow
        net.names["example.org"] = [[PUBLIC]]
        async with running(net, sent=100_000) as proxy:
            with pytest.raises(ConnectionResetError):
                await ask(
                    proxy, get("http://example.org/").replace("GET", "POST"), more=b"x" * 3_000_000
                )

    run(scenario)


@pytest.mark.parametrize("limits", [{"idle_seconds": 0.2}, {"total_seconds": 0.3}])
def test_silence_and_slowness_end(limits: dict[str, float]) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def scenario() -> None:
        net = Net()
        net.handler = silent
        net.names["example.org"] = [[PUBLIC]]
        async with running(net, **limits) as proxy:
            begun = asyncio.get_running_loop().time()
            with pytest.raises(ConnectionResetError):
                await ask(proxy, get("http://example.org/"))
            assert asyncio.get_running_loop().time() - begun < 5

    run(scenario)


def test_one_direction_may_rest_while_the_other_is_busy() -> None:
    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(10):
            writer.write(b"x")
            await asyncio.sleep(0.1)

    async def scenario() -> None:
        net = Net()
        net.handler = slowly
        net.names["example.org"] = [[PUBLIC]]
        async with running(net, idle_seconds=0.5) as proxy:
            answer = await ask(proxy, connect("example.org:443"))
        assert answer.endswith(b"x" * 10)

    run(scenario)


def test_a_client_that_never_asks_is_hung_up_on() -> None:
    async def scenario() -> None:
        async with running(Net(), head_seconds=0.2) as proxy:
            with pytest.raises(ConnectionResetError):
                await ask(proxy, "GET http://exam")

    run(scenario)


def test_connections_are_counted() -> None:
    async def scenario() -> None:
        net = Net()
        net.names["example.org"] = [[PUBLIC]]
        async with running(net, connections=3) as proxy:
            idle = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(3)]
            await asyncio.sleep(0.1)
            with pytest.raises(ConnectionResetError):
                await ask(proxy, get("http://example.org/"))
            for _, writer in idle:
                writer.close()
            await asyncio.sleep(0.1)
            assert b" 200 " in await ask(proxy, get("http://example.org/"))

    run(scenario)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbroken header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"",
    ],
)
def test_answers_that_are_none(answer: bytes) -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)

    async def scenario() -> None:
        net = Net()
        net.handler = handler
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            with pytest.raises(ConnectionResetError):
                await ask(proxy, get("http://example.org/"))

    run(scenario)


def test_interim_answers_are_passed_over() -> None:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nA: b\r\n\r\nbody"
        )

    async def scenario() -> None:
        net = Net()
        net.handler = handler
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            answer = await ask(proxy, get("http://example.org/"))
        assert answer == b"HTTP/1.1 200 OK\r\nA: b\r\nConnection: close\r\n\r\nbody"

    run(scenario)


def test_closing_cuts_what_is_open() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    async def scenario() -> None:
        net = Net()
        net.handler = silent
        net.names["example.org"] = [[PUBLIC]]
        async with running(net) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(connect("example.org:443").encode())
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await proxy.close()
            with pytest.raises(ConnectionResetError):
                await reader.read()
            writer.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", proxy.port)

    run(scenario)
