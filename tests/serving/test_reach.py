"""Whether anybody listens at an address."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from tests.serving.scripted import ScriptedServer

from rnow.errors import InputError
from rnow.processes.process import free_port
from rnow.serving import reach
from rnow.serving.reach import check_listening


def check(url: str) -> None:
    asyncio.run(check_listening(url, where="teacher.url"))


def test_somebody_listens() -> None:
    with ScriptedServer() as server:
        check(server.url)
        check(server.url.replace("127.0.0.1", "localhost") + "/v1")
        assert server.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_nobody_listens(host: str) -> None:
    port = free_port()
    with pytest.raises(InputError) as caught:
        check(f"http://{host}:{port}/v1")
    assert f"nobody listens at {host}:{port}" in caught.value.message
    assert caught.value.where == "teacher.url"


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="nobody listens at no-such-host"):
        check("https://no-such-host.invalid")


def test_a_connection_that_does_not_come_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full queue drops what else comes, as a firewall does."""
    assert reach.CONNECT_SECONDS == 10
    monkeypatch.setattr(reach, "CONNECT_SECONDS", 0.3)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        began = time.monotonic()
        with pytest.raises(InputError, match="nobody listens") as caught:
            check(f"http://127.0.0.1:{full.getsockname()[1]}")
        assert time.monotonic() - began < 5
        assert "0.3 s" in (caught.value.why or "")
        for one in waiting:
            one.close()


def test_behind_a_proxy_the_host_itself_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    check("https://no-such-host.invalid")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError):  # to this machine itself there is no proxy
        check(f"http://127.0.0.1:{free_port()}")
