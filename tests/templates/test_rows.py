"""templates/sft and templates/posttrain: what they ship, and that it trains as shipped."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rnow.config import load_config
from rnow.project.templates import find_template, plan_init, write_template
from rnow.setup.build import check, run

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "templates"
NAMES = ("sft", "posttrain")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def project(folder: Path, name: str) -> Path:
    """As `rnow init` writes it."""
    write_template(plan_init(find_template(name), folder))
    return folder


def test_the_data_is_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in NAMES:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "argv", ["make_row_templates.py", "--templates", str(tmp_path)])
    runpy.run_path(str(ROOT / "scripts" / "make_row_templates.py"), run_name="__main__")
    for name in NAMES:
        made = (tmp_path / name / "train.jsonl").read_bytes()
        assert made == (TEMPLATES / name / "train.jsonl").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_check_has_nothing_to_warn_of(tmp_path: Path, name: str) -> None:
    folder = project(tmp_path, name)
    config = load_config(folder).config
    plan = check(config, folder=folder)
    assert plan.warnings == ()
    assert plan.rows is not None
    assert plan.models["student"].separate == "", "rows are packed"
    assert (plan.rows.sequences > plan.prompts) == (name == "posttrain"), "long texts are cut"


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_lower_the_held_out_loss(tmp_path: Path, name: str) -> None:
    folder = project(tmp_path, name)
    overrides = [
        "trainer.max_steps=8",
        "evaluation.max_prompts=16",
        "evals=[]",
        "trainer.save_step=-1",
    ]
    config = load_config(folder, overrides).config
    summary = run(config, folder=folder)
    before, after = summary.evaluation["before"], summary.evaluation["after"]
    assert after["loss"] < 0.9 * before["loss"]


@pytest.mark.whole
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_template(tmp_path: Path, name: str) -> None:
    """Well within three minutes, to the numbers that its README gives."""
    folder = project(tmp_path, name)
    summary = run(load_config(folder).config, folder=folder)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for row in ("before", "after"):
        loss = summary.evaluation[row]["loss"]
        assert any(f"{loss + near:.2f}" in readme for near in (-0.02, -0.01, 0.0, 0.01, 0.02)), loss
    assert summary.values["wall_seconds"] < 180


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = (TEMPLATES / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_answers_are_right() -> None:
    for row in rows_of("sft"):
        asked, answered = row["messages"]
        assert answered["content"] == asked["content"].removeprefix("Reverse: ")[::-1]
        assert row["metadata"]["answer"] == answered["content"]


def test_nothing_else_is_shipped(tmp_path: Path) -> None:
    for name in NAMES:
        shutil.rmtree(tmp_path, ignore_errors=True)
        names = {path.name for path in project(tmp_path, name).iterdir()}
        assert names - {"rewards.py"} == {"config.yml", "train.jsonl", "README.md", "student"}
