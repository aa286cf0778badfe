"""metrics.jsonl and Weights & Biases: what they write, and that they never stop a run."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rnow.disk import sinks
from rnow.disk.sinks import JsonlSink, Sink, WandbSink, has_wandb_key, read_evaluations


def make_sink(path: Path, **arguments: Any) -> JsonlSink:
    return JsonlSink(path, path.with_name("evaluations.jsonl"), **{"warn": pytest.fail} | arguments)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_json_object_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = make_sink(path)
    sink.log(1, {"teacher_kl": 0.25, "loss": math.nan, "lr": -math.inf})
    sink.log(2, {"teacher_kl": 0.125})
    assert read(path) == [
        {"step": 1, "teacher_kl": 0.25, "loss": None, "lr": None},
        {"step": 2, "teacher_kl": 0.125},
    ]


def test_floats_survive_exactly(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    make_sink(path).log(1, {"loss": 0.1 + 0.2})
    assert read(path)[0]["loss"] == 0.1 + 0.2


def test_resume_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = make_sink(path)
    for step in range(1, 6):
        sink.log(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    sink.forget_from(4)
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    sink.forget_from(4)
    sink.log(4, {"loss": 4.0})
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_without_a_file(tmp_path: Path) -> None:
    make_sink(tmp_path / "metrics.jsonl").forget_from(1)
    assert list(tmp_path.iterdir()) == []


def test_evaluations_have_a_file_of_their_own_and_are_forgotten_alike(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = make_sink(path)
    for step in (0, 2, 4):
        sink.evaluated("often", step, {"pass@1": step / 4, "teacher_kl": math.nan})
    assert not path.exists()
    sink.forget_from(3)
    assert read_evaluations(tmp_path / "evaluations.jsonl") == [
        {"name": "often", "step": 0, "pass@1": 0.0, "teacher_kl": None},
        {"name": "often", "step": 2, "pass@1": 0.5, "teacher_kl": None},
    ]


def test_a_line_after_a_broken_one_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lo')
    make_sink(path).log(2, {})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 2}


def test_full_disk_warns_once_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    warnings: list[str] = []
    sink = make_sink(path, warn=warnings.append)
    sink.log(1, {"loss": 1.0})

    real_write = os.write
    calls = iter(range(1000))

    def full(descriptor: int, data: bytes) -> int:
        if next(calls) % 2 == 0:
            return real_write(descriptor, bytes(data)[:5])  # a short write, as before ENOSPC
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sinks.os, "write", full)
        sink.log(2, {"loss": 2.0})
        sink.log(3, {"loss": 3.0})
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    sink.log(4, {"loss": 4.0})
    assert [line["step"] for line in read(path)] == [1, 4]
    assert len(warnings) == 2


class FakeRun:
    """A W&B run that records, and fails where told."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.finished = False

    def log(self, data: Mapping[str, float], *, step: int) -> None:
        if self.fails == "log":
            raise RuntimeError("connection lost")
        self.logged.append((step, data))

    def finish(self) -> None:
        if self.fails == "finish":
            raise RuntimeError("service died")
        self.finished = True


def fake_wandb(monkeypatch: pytest.MonkeyPatch, run: FakeRun) -> dict[str, Any]:
    """Install a fake wandb module; the arguments of its init end up in the returned dict."""
    given: dict[str, Any] = {}
    module: Any = types.ModuleType("wandb")

    class Settings:
        base_url = "https://wandb.test"

        def __init__(self, **settings: Any) -> None:
            self.settings = settings

    def init(**arguments: Any) -> FakeRun:
        if run.fails == "init":
            raise RuntimeError("no such project")
        given.update(arguments)
        return run

    module.Settings, module.init = Settings, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    return given


def make(tmp_path: Path, warnings: list[str], **options: Any) -> WandbSink:
    return WandbSink("project", "name", {"a": 1}, tmp_path, warn=warnings.append, **options)


@pytest.mark.parametrize("kind", ["jsonl", "wandb", "wandb that does not start"])
def test_what_every_sink_keeps_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    warnings: list[str] = []
    fake_wandb(monkeypatch, FakeRun("init" if "not" in kind else ""))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    jsonl = make_sink(tmp_path / "metrics.jsonl", warn=warnings.append)
    sink: Sink = jsonl if kind == "jsonl" else make(tmp_path, warnings)
    sink.forget_from(1)
    sink.log(1, {"loss": 0.5, "teacher_kl": math.nan})
    sink.evaluated("often", 1, {"pass@1": 0.5})
    sink.forget_from(1)
    sink.log(1, {"loss": 0.5})
    sink.close(10.0)
    sink.close(10.0)
    assert len(warnings) == (kind == "wandb that does not start")


def test_wandb_with_a_key_is_online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, warnings = FakeRun(), []
    given = fake_wandb(monkeypatch, run)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    sink = make(tmp_path, warnings, run_id="abc")
    sink.log(3, {"loss": 1.0})
    sink.close(10.0)
    sink.close(10.0)
    assert (given["mode"], given["id"], given["resume"]) == (None, "abc", "allow")
    assert (given["project"], given["name"], given["config"]) == ("project", "name", {"a": 1})
    assert run.logged == [(3, {"loss": 1.0})]
    assert run.finished
    assert warnings == []


def test_wandb_without_a_key_is_offline_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warnings: list[str] = []
    given = fake_wandb(monkeypatch, FakeRun())
    make(tmp_path, warnings)
    assert given["mode"] == "offline"
    assert len(warnings) == 1
    assert "offline" in warnings[0]


def test_wandb_mode_of_the_user_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warnings: list[str] = []
    given = fake_wandb(monkeypatch, FakeRun())
    monkeypatch.setenv("WANDB_MODE", "disabled")
    make(tmp_path, warnings)
    assert given["mode"] == "disabled"
    assert warnings == []


@pytest.mark.parametrize("hangs", ["init", "log", "finish"])
def test_a_wandb_that_does_not_come_back_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hangs: str
) -> None:
    """Neither the steps nor the end, and it is told once."""
    warnings: list[str] = []
    run = FakeRun()
    fake_wandb(monkeypatch, run)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(sinks, "START_SECONDS", 0.1)
    target = sys.modules["wandb"] if hangs == "init" else run
    never = threading.Event()
    monkeypatch.setattr(target, hangs, lambda *args, **kwargs: never.wait(60))
    began = time.monotonic()
    sink = make(tmp_path, warnings)
    for step in range(1, 5):
        sink.log(step, {"loss": 1.0})
    sink.close(0.3)
    sink.log(5, {"loss": 1.0})
    sink.close(0.3)
    assert time.monotonic() - began < 5
    told = ["has not answered yet"] if hangs == "init" else []
    told.append("did not finish")
    assert [text in warning for text, warning in zip(told, warnings, strict=True)] == [True] * len(
        told
    )
    never.set()
    sink._thread.join(10)
    assert len(warnings) == len(told), "what comes later is not told"


def test_more_metrics_than_can_wait_are_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    warnings: list[str] = []
    run, never = FakeRun(), threading.Event()
    fake_wandb(monkeypatch, run)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(sinks, "MAX_UNSENT", 3)
    monkeypatch.setattr(run, "log", lambda *args, **kwargs: never.wait(60))
    sink = make(tmp_path, warnings)
    for step in range(1, 10):
        sink.log(step, {"loss": 1.0})
    assert len(warnings) == 1
    assert "are not sent" in warnings[0]
    sink.close(60.0)
    never.set()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failing_wandb_gives_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: str
) -> None:
    warnings: list[str] = []
    run = FakeRun(fails)
    fake_wandb(monkeypatch, run)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    sink = make(tmp_path, warnings)
    sink.log(1, {"loss": 1.0})
    sink.log(2, {"loss": 1.0})
    sink.close(10.0)
    assert len(warnings) == 1
    assert "training goes on" in warnings[0]


def test_wandb_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    sink = make(tmp_path, warnings)
    sink.log(1, {"loss": 1.0})
    sink.close(10.0)
    assert len(warnings) == 1
    assert "pip install" in warnings[0]


@pytest.mark.parametrize(
    ("netrc", "found"),
    [
        ("machine wandb.test login user password secret\n", True),
        ("machine other.test login user password secret\n", False),
        ("not a netrc file", False),
        ("", False),
    ],
)
def test_key_in_netrc(tmp_path: Path, netrc: str, found: bool) -> None:
    path = tmp_path / "netrc"
    path.write_text(netrc)
    path.chmod(0o600)
    assert has_wandb_key("https://wandb.test", {"NETRC": str(path)}) is found


@pytest.mark.slow
def test_real_wandb_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    warnings: list[str] = []
    sink = make(tmp_path, warnings)
    sink.log(1, {"loss": 0.5, "bad": math.nan})
    sink.close(10.0)
    assert len(warnings) == 1, warnings
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
