"""The sets of packages, and the script that asks an index about one."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FILES = {
    "constraints.txt": ["dev", "real"],
    "constraints-cuda.txt": ["vllm", "dev"],
    "constraints-agents.txt": ["agents", "dev"],
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "check_resolves", ROOT / "scripts" / "check_resolves.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in rows}


@pytest.mark.parametrize("file", FILES)
def test_a_set_holds_what_the_project_asks_for(file: str) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in FILES[file]:
        asked += project["optional-dependencies"][extra]
    found = pins(file)
    for text in asked:
        wanted = Requirement(text)
        if normal(wanted.name) == "rnow-local":
            continue
        assert found[normal(wanted.name)] in wanted.specifier, text


def test_an_unconstrained_vllm_is_one_that_was_tested() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (vllm,) = [
        Requirement(text)
        for text in project["optional-dependencies"]["vllm"]
        if Requirement(text).name == "vllm"
    ]
    assert "0.28.1" not in vllm.specifier
    assert pins("constraints-cuda.txt")["vllm"] in vllm.specifier
    assert "0.33.0" not in vllm.specifier


@pytest.mark.parametrize(
    ("fetched", "resolved", "code", "said"),
    [(1, 0, 0, "skipped"), (0, 0, 0, "resolves"), (0, 1, 1, "the conflict is")],
)
def test_what_the_script_says(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fetched: int,
    resolved: int,
    code: int,
    said: str,
) -> None:
    def pip(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = resolved if "--dry-run" in arguments else fetched
        return subprocess.CompletedProcess([], done, "", "WARNING: old\nthe conflict is here\n")

    monkeypatch.setattr(script, "pip", pip)
    monkeypatch.setattr(sys, "argv", ["x", "--constraints", "constraints-cuda.txt", ".[vllm]"])
    assert script.main() == code
    told = capsys.readouterr().out
    assert said in told
    assert "WARNING" not in told
