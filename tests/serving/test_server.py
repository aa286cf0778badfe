"""A server that rnow starts, with a scripted program in vLLM's place."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from tests.processes.test_leash import wait_for
from tests.serving import scripted
from tests.serving.scripted import ScriptedServer

from rnow.errors import ModelError, StopRequested, TemporaryError
from rnow.processes.process import ProcessFailed, StartFailed, free_port
from rnow.serving import server as server_module
from rnow.serving.server import VllmServer, require_vllm

PROGRAM = (sys.executable, scripted.__file__)


def make(tmp_path: Path, *arguments: str, command: tuple[str, ...] = PROGRAM) -> VllmServer:
    return VllmServer(
        tmp_path / "model",
        name="teacher",
        log=tmp_path / "server.log",
        arguments=arguments,
        command=command,
    )


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "START_TIMEOUT", 20.0)


def pids(server: VllmServer) -> set[int]:
    assert server._process
    return server._process.pids()


@pytest.fixture
def server(tmp_path: Path) -> VllmServer:
    return make(tmp_path)


def test_it_serves_behind_a_key_until_stopped(server: VllmServer) -> None:
    asyncio.run(server.start())
    try:
        client = server.client(timeout=5)
        (model,) = asyncio.run(client.models())
        assert model.id == "teacher"
        assert model.root == str(server.model)
        assert server.url.startswith("http://127.0.0.1:")
        assert server.log_tail() == ["serving"]
        for pid in pids(server):
            command = Path(f"/proc/{pid}/cmdline").read_text()
            assert server._key not in command, "any user can read a command line"
        assert server._key not in server.log.read_text()
    finally:
        server.stop()
    assert not server.alive()
    server.stop()


def test_a_restart_is_another_server(server: VllmServer) -> None:
    asyncio.run(server.start())
    try:
        first, key = pids(server), server._key
        os.kill(first.pop(), signal.SIGKILL)
        wait_for(lambda: not server.alive())
        asyncio.run(server.restart())
        assert server.alive()
        assert server._key != key
        assert asyncio.run(server.client(timeout=5).health())
    finally:
        server.stop()


def test_a_taken_port_is_replaced(server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stranger on the port is healthy, and serves a model of the same name: only the key tells them apart."""
    with ScriptedServer(key="another") as stranger:
        stranger.models = {"teacher": ("/elsewhere", None)}
        ports = [stranger.server_address[1], stranger.server_address[1], free_port()]
        monkeypatch.setattr(server_module, "free_port", lambda host: ports.pop(0))
        asyncio.run(server.start())
        try:
            assert ports == []
            assert server.url != stranger.url
            (model,) = asyncio.run(server.client(timeout=5).models())
            assert model.root == str(server.model)
        finally:
            server.stop()


def test_when_every_port_is_taken_it_says_so(
    server: VllmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ScriptedServer(key="another") as stranger:
        tried: list[int] = []

        def taken(host: str) -> int:
            tried.append(stranger.server_address[1])
            return tried[0]

        monkeypatch.setattr(server_module, "free_port", taken)
        with pytest.raises(StartFailed) as caught:
            asyncio.run(server.start())
    assert len(tried) == 5
    assert any("Address already in use" in line for line in caught.value.details)


def test_a_start_that_fails(tmp_path: Path) -> None:
    script = "import sys; sys.exit('CUDA out of memory')"
    server = make(tmp_path, command=(sys.executable, "-c", script))
    with pytest.raises(
        StartFailed, match=r"teacher ended while it started \(exit code 1\)"
    ) as caught:
        asyncio.run(server.start())
    assert isinstance(caught.value, ModelError)
    assert caught.value.details == ("CUDA out of memory",)
    with pytest.raises(ProcessFailed, match="could not be started again") as again:
        asyncio.run(server.restart())
    assert isinstance(again.value, TemporaryError)


def test_a_stop_is_noticed_while_it_starts(tmp_path: Path) -> None:
    def poll() -> None:
        raise StopRequested

    server = VllmServer(
        tmp_path,
        name="teacher",
        log=tmp_path / "log",
        command=(sys.executable, "-c", "import time; time.sleep(600)"),
        poll=poll,
    )
    with pytest.raises(StopRequested):
        asyncio.run(server.start())
    assert not server.alive()


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed"):
        require_vllm("sampler.backend")


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("0.26.0", False),
        ("0.28.1.post1", False),
        ("0.29.0", True),
        ("0.32.0+cpu", True),
        ("1.0.0", True),
        ("0.1.dev17+gabc", True),
        (None, True),
    ],
)
def test_a_vllm_that_wakes_with_other_weights_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str | None, fine: bool
) -> None:
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(server_module, "vllm_version", lambda: version)
    if fine:
        require_vllm("here")
        return
    with pytest.raises(ModelError, match=r"rnow needs 0\.29 or newer") as caught:
        require_vllm("here")
    assert caught.value.where == "here"
