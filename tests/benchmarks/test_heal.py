"""``benchmarks/heal.py`` on tiny models: what it measures, and when it ends a run."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.benchmarks.scripts import load_benchmark
from tests.setup.projects import Project

from rnow.models.loading import load_causal_lm
from rnow.types import Completion, Prompt, Rollout, RolloutGroup, Turn

MakeModel = Callable[..., Path]
CONFIG = {
    "data": {"batch_size": 4, "group_size": 2, "val_split": 0.25},
    "evaluation": {"num_samples": 1},
}


@pytest.fixture(scope="module")
def heal() -> ModuleType:
    torch.set_num_threads(1)
    return load_benchmark("heal")


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    project = Project(tmp_path / "project", tiny_model_dir, rewards=False)
    # JSON is YAML.
    (project.folder / "config.yml").write_text(json.dumps(project.values(**CONFIG)))
    return project


def group_of(row: int, prompt: list[int], *answers: list[int]) -> RolloutGroup:
    def rollout(index: int, ids: list[int]) -> Rollout:
        completion = Completion(
            token_ids=tuple(ids),
            logprobs=(0.0,) * len(ids),
            finish_reason="stop",
            policy_version=0,
        )
        return Rollout(
            prompt_id=f"dataset_0/{row}",
            index=index,
            turns=(Turn(observation_token_ids=tuple(prompt), completion=completion),),
            messages=({"role": "assistant", "content": f"answer {index}"},),
            status="completed" if ids[-1] == 2 else "truncated",
            end_reason="answer" if ids[-1] == 2 else "length",
        )

    asked = Prompt(
        id=f"dataset_0/{row}",
        dataset="dataset_0",
        row=row,
        messages=({"role": "user", "content": f"question {row}"},),
    )
    return RolloutGroup(
        prompt=asked, rollouts=tuple(rollout(index, ids) for index, ids in enumerate(answers))
    )


def test_the_measure_is_the_mean_over_tokens_with_an_error_over_prompts(
    heal: ModuleType, tiny_model_dir: MakeModel
) -> None:
    """Against a plain float64 sum, over the 100 ids of a head of 128."""
    student, teacher = (
        load_causal_lm(
            tiny_model_dir(seed=seed, vocab_size=128),
            vocabulary=100,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for seed in (0, 1)
    )
    groups = [
        group_of(0, [5, 9, 11], [40, 41, 2], [50]),
        group_of(1, [7, 8], [60, 61, 62, 63, 2], [70, 2]),
        group_of(2, [30, 31, 32, 33], [80, 2], [81, 82, 83]),
    ]
    sums, counts = [], []
    for group in groups:
        values: list[float] = []
        for rollout in group.rollouts:
            (turn,) = rollout.turns
            ids = [*turn.observation_token_ids, *turn.completion.token_ids]
            with torch.no_grad():
                p, q = (
                    lm.model(torch.tensor([ids])).logits[0, :, :100].double().softmax(-1)
                    for lm in (student, teacher)
                )
            for place in range(len(turn.observation_token_ids) - 1, len(ids) - 1):
                values.append(
                    math.fsum(
                        float(a) * (math.log(a) - math.log(b))
                        for a, b in zip(p[place], q[place], strict=True)
                    )
                )
        sums.append(math.fsum(values))
        counts.append(len(values))
    mean = sum(sums) / sum(counts)
    around = [total - mean * count for total, count in zip(sums, counts, strict=True)]
    error = math.sqrt(3 / 2 * math.fsum(value**2 for value in around)) / sum(counts)

    measured = heal.measure(groups, student, teacher)
    assert measured.kl == pytest.approx(mean, rel=1e-6)
    assert measured.error == pytest.approx(error, rel=1e-4)
    assert measured.tokens == 16
    assert measured.ended == pytest.approx(4 / 6)
    assert measured.answers == {f"question {row}": "answer 0" for row in range(3)}


def test_no_step_begins_that_would_end_too_late(
    heal: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, signals = [100.0], []
    monkeypatch.setattr(heal.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(heal.os, "kill", lambda process, number: signals.append(number))
    budget = heal.Budget(10.0)
    budget.stage("evaluating: before")
    now[0] = 200.0
    budget.stage("rollout")
    for step, at in enumerate((203.0, 206.0), start=1):
        now[0] = at
        budget.step(step, 9, {"teacher_kl": 1.0})
        budget.stage("rollout")
        assert signals == []
    now[0] = 208.5  # another one of 2.5 seconds would end after 11
    budget.step(3, 9, {"teacher_kl": 1.0})
    assert signals == [signal.SIGINT]
    assert (budget.steps, budget.elapsed) == (3, 8.5)


def test_it_trains_and_measures(heal: ModuleType, project: Project) -> None:
    overrides = [
        "algorithm.kl_estimator=exact",
        "trainer.learning_rate=0.02",
        "trainer.max_steps=4",
    ]
    row: dict[str, Any] = heal.benchmark(project.folder, overrides, seconds=60.0, samples=2)
    assert row["steps"] == 4
    assert 0 < row["seconds"] < 60
    assert row["overrides"] == overrides
    assert row["kl_estimator"] == "exact"
    assert row["held_out_prompts"] == 4
    assert row["before"]["kl_per_token"] > 0
    assert row["after"] != row["before"], "the adapter was loaded"
    assert len(row["answers"]) == 3
    assert all(set(answer) == {"prompt", "before", "after"} for answer in row["answers"])


def test_a_run_that_ran_out_of_time_is_measured_too(heal: ModuleType, project: Project) -> None:
    row: dict[str, Any] = heal.benchmark(project.folder, [], seconds=0.001, samples=1)
    assert row["steps"] == 1
    assert row["after"]["tokens"] > 0


def test_results_of_other_settings_stay(
    heal: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "RESULTS", tmp_path)
    monkeypatch.setitem(heal.write_results.__globals__, "RESULTS", tmp_path)
    one = {"overrides": [], "seconds_allowed": 5.0, "answers_per_prompt": 2, "steps": 1}
    other = one | {"overrides": ["algorithm.kl_estimator=exact"]}
    for row in (one, other, one | {"steps": 7}):
        heal.keep(row)
    rows = json.loads((tmp_path / "heal.json").read_text())["rows"]
    assert rows == [other, one | {"steps": 7}]
