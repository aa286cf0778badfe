"""`rnow doctor`: what it prints, and the code it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rnow.cli.main import run_command_line
from rnow.setup import doctor
from rnow.setup.probes import Finding, Status


def finding(name: str, status: Status, text: str, fix: str = "") -> Finding:
    return Finding(name=name, status=status, text=text, fix=fix)


def find(monkeypatch: pytest.MonkeyPatch, *found: Finding) -> None:
    def examine(folder: Path) -> Iterator[Finding]:
        yield from found

    monkeypatch.setattr(doctor, "examine", examine)


def test_a_line_for_each_and_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find(
        monkeypatch,
        finding("torch", "ok", "2.13\x1b[31m"),
        finding("vLLM", "warning", "not installed", "pip install '.[vllm]'"),
    )
    assert run_command_line(["doctor"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "ok      torch             2.13\\x1b[31m",
        "warning vLLM              not installed",
        "                          fix: pip install '.[vllm]'",
        "no faults, 1 warning",
    ]


def test_a_fault_ends_it_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = finding("CUDA", "fault", "the driver is too old", "update it")
    find(monkeypatch, bad, finding("hub", "ok", "answers"))
    assert run_command_line(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 fault, no warnings"
    assert run_command_line(["doctor", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert not shown["ok"]
    assert shown["findings"][0] == {
        "name": "CUDA",
        "status": "fault",
        "text": "the driver is too old",
        "fix": "update it",
    }


def test_looking_loads_no_model_library(tmp_path: Path) -> None:
    code = (
        "import sys\nimport rnow.setup.doctor\nfrom rnow.cli import doctor\n"
        "print(*(name for name in ('torch', 'transformers', 'huggingface_hub', 'pydantic') if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
