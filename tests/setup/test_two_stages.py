"""The commands of docs/how-to/two-stages.md, word for word, with the real vLLM as the teacher's server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from rnow.processes.process import free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "two-stages.md"
PORT = "8010"
STARTING = 600.0


def commands(port: int) -> list[str]:
    """The blocks of the page, with a port that is free."""
    found = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [block.replace(PORT, str(port)) for block in found]


def shell(command: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def served(command: str, folder: Path, port: int) -> Iterator[None]:
    """The server of the page, until the block is left."""
    with (folder / "vllm.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health", folder / "vllm.log")
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_for(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + STARTING
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"no answer from {url}:\n{log.read_text()[-3000:]}")


def test_the_walk_as_it_is_written(tmp_path: Path) -> None:
    port = free_port()
    init, serve, first, second, evaluate = commands(port)
    shell(init, tmp_path)
    project = tmp_path / "road"
    with served(serve, project, port):
        shell(first, project)
    shell(second, project)
    assert "distilled" in shell(evaluate, project)
    report = json.loads(shell(f"{evaluate.strip()} --json", project))
    assert report["count"] == 256
    assert not any(subject["measured_now"] for subject in report["subjects"])
    student, answers, distilled = (
        subject["pass"]["pass@1"]["mean"] for subject in report["subjects"]
    )
    assert answers > student + 0.1
    assert distilled > answers + 0.05
    rows = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    assert {row["teacher"] for row in rows} == {"teacher"}
