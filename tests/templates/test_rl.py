"""templates/rl-single and templates/rl-tools: as shipped they train on a CPU, and the reward rises."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.projects import Killed, Watcher, die

from rnow.config import Config, load_config
from rnow.project.templates import find_template, plan_init, write_template
from rnow.setup.build import run

SECONDS = 180
SHORT = (
    "data.batch_size=4", "data.group_size=4", "data.val_split=0.002", "evaluation.num_samples=1", "trainer.max_steps=3",
    "trainer.save_step=1",
)  # fmt: skip


def project(name: str, folder: Path, *overrides: str) -> Config:
    write_template(plan_init(find_template(name), folder))
    return load_config(folder, overrides).config


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    (run_dir,) = (folder / "runs").iterdir()
    found = [json.loads(line) for line in (run_dir / file).read_text().splitlines()]
    timed = ("time/", "throughput/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]


@pytest.mark.parametrize("name", ["rl-single", "rl-tools"])
def test_it_trains_and_goes_on_after_a_kill_to_the_same_numbers(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(project(name, whole, *SHORT), folder=whole)
    config = project(name, killed, *SHORT)
    with pytest.raises(Killed):
        run(config, folder=killed, display=Watcher().at("update", 2, die))
    run(config, folder=killed)
    for file in ("metrics.jsonl", "evaluations.jsonl"):
        assert rows(killed, file) == rows(whole, file)
    trained = rows(whole, "metrics.jsonl")
    assert any("grad_norm" in row for row in trained)
    assert all("reward/equal_groups_fraction" in row for row in trained)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["rl-single", "rl-tools"])
def test_as_shipped_the_reward_rises_within_three_minutes(name: str, tmp_path: Path) -> None:
    began = time.monotonic()
    summary = run(project(name, tmp_path), folder=tmp_path)
    assert time.monotonic() - began < SECONDS
    before, after = (summary.evaluation[when]["pass@1"] for when in ("before", "after"))
    assert after > before + 0.1
    rewards = [row["reward/mean"] for row in rows(tmp_path, "metrics.jsonl")]
    tenth = max(1, len(rewards) // 10)
    assert sum(rewards[-tenth:]) > sum(rewards[:tenth])
