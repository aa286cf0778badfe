"""metrics.jsonl: what it holds, and that it never stops a run."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from rnow.disk import sinks
from rnow.disk.sinks import JsonlSink, read_evaluations


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
