"""The scripts of the first hour on a card, tiny and on the CPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.benchmarks.scripts import BENCHMARKS

NAMES = sorted(path.stem for path in (BENCHMARKS / "gpu").glob("s[0-9]_*.py"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    return importlib.import_module


def test_there_are_six_and_each_is_told_of(script: Any) -> None:
    readme = (BENCHMARKS / "gpu" / "README.md").read_text()
    assert [name[1] for name in NAMES] == list("123456")
    for name in NAMES:
        assert f"benchmarks/gpu/{name}.py" in readme
        assert callable(script(name).work)


def test_one_file_with_device_and_versions(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("s1_versions")
    monkeypatch.setattr(sys, "argv", ["s1_versions", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        module.main("s1_versions", "", module.work)
    assert caught.value.code == 0
    found = json.loads((tmp_path / "s1_versions.json").read_text())
    assert found["dry_run"]
    assert found["error"] is None
    assert found["versions"].keys() >= {"python", "torch", "transformers", "peft"}
    gaps = {row["dtype"]: row["largest_relative_gap"] for row in found["rows"][1:]}
    assert gaps["torch.float32"] < 1e-5
    assert gaps["torch.bfloat16"] < 2e-2


def test_what_fails_is_written_too(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def work(dry: bool) -> list[dict[str, Any]]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(sys, "argv", ["x", "--dry-run", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        script("common_gpu").main("x", "", work)
    assert caught.value.code == 1
    assert "no kernel image" in json.loads((tmp_path / "x.json").read_text())["error"]


def test_the_profile_of_an_update(script: Any) -> None:
    summary, *kernels = script("s6_update_profile").work(True)
    assert summary["tokens"] == 64
    assert kernels[0]["ms"] > 0


def test_a_model_that_sleeps_says_the_same_after(script: Any, tmp_path: Path) -> None:
    from random_models import TINY, write_model  # type: ignore[import-not-found]

    write_model(tmp_path / "model", TINY, ids=300)
    assert script("s3_frees_the_card").measure(tmp_path, "none", False, True)["same"]
