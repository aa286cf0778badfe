"""Whole runs of a tiny project."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.rollouts import read_transcripts
from tests.setup.projects import Project, Watcher, read_jsonl

from rnow.config import Config, to_dict
from rnow.models import loading
from rnow.policy.student import LoraPolicy
from rnow.setup.build import run
from rnow.setup.facts import RunSummary


@pytest.fixture(scope="module")
def project(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Callable[..., Path]
) -> Project:
    return Project(tmp_path_factory.mktemp("whole") / "my project", tiny_model_dir)


@pytest.fixture(scope="module")
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture(scope="module")
def summary(project: Project, watcher: Watcher) -> RunSummary:
    """One run that everything below looks at: 12 prompts trained on in 3 steps, 4 held out."""
    torch.set_num_threads(1)
    config = project.config(
        data={"val_split": 0.25},
        evaluation={"num_samples": 4},
        evals=[{"step": 2, "name": "often", "pass4": True}],
        trainer={"save_step": 2},
        algorithm={"kl_estimator": "sampled"},
    )
    return run(config, folder=project.folder, display=watcher)


def test_it_finishes(summary: RunSummary, project: Project) -> None:
    assert summary.values["status"] == "finished"
    assert summary.values["steps"] == 3
    assert [row["step"] for row in project.metrics] == [1, 2, 3]


def test_the_files_of_a_run(summary: RunSummary, project: Project) -> None:
    names = {path.name for path in project.run_dir.iterdir()}
    assert names == {
        ".lock", "adapter", "answers", "checkpoints", "config.yml", "evaluations.jsonl", "journal",
        "metrics.jsonl", "plan.json", "process.json", "report.html", "run.json", "run.log", "summary.json",
        "transcripts",
    }  # fmt: skip
    checkpoints = sorted(path.name for path in (project.run_dir / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000003"]
    transcripts = sorted(path.name for path in (project.run_dir / "transcripts").iterdir())
    assert transcripts == [f"step-{step:06d}.parquet" for step in (1, 2, 3)]


def test_the_summary(summary: RunSummary, project: Project) -> None:
    values = json.loads((project.run_dir / "summary.json").read_text())
    assert values == json.loads(json.dumps(dict(summary.values)))
    assert values["completion_tokens"] == sum(row["tokens/completion"] for row in project.metrics)
    assert values["wall_seconds"] > 0
    kls = [row["teacher_kl"] for row in project.metrics]
    assert values["teacher_kl"] == {"first": kls[0], "last": kls[-1], "averaged_steps": 1}
    assert set(values["evaluation"]) == {"before", "after", "teacher"}
    for evaluation in values["evaluation"].values():
        assert 0 <= evaluation["pass@1"] <= evaluation["pass@4"] <= 1
    assert values["evaluation"]["before"]["step"] == 0
    assert values["evaluation"]["after"]["step"] == 3
    assert values["evaluation"]["before"]["teacher_kl"] > 0
    assert "teacher_kl" not in values["evaluation"]["teacher"]
    assert values["sampler"] == {"backend": "transformers", "mode": "merged weights"}
    assert values["device"].startswith("cpu")
    assert values["versions"]["torch"] == torch.__version__


def test_the_metrics_of_a_step(summary: RunSummary, project: Project) -> None:
    promised = {
        "teacher_kl", "teacher_kl/dataset_0", "teacher_kl/k3", "sampler_trainer_kl", "loss",
        "advantage/mean", "advantage/std", "reward/mean", "reward/short", "entropy", "grad_norm",
        "ratio/mean", "ratio/max", "clip_fraction", "kl_clamp_fraction", "completions/mean_length",
        "completions/truncated_fraction", "completions/eos_fraction", "tokens/prompt",
        "tokens/completion", "tokens/total", "time/rollout", "time/reward", "time/teacher",
        "time/update", "time/sync", "throughput/completion_tokens_per_s", "memory/peak_gb", "lr",
    }  # fmt: skip
    for row in project.metrics:
        assert promised <= row.keys()
        assert row["teacher_kl"] == row["teacher_kl/dataset_0"]
        assert row["lr"] == 5e-3
        assert row["tokens/total"] == row["tokens/prompt"] + row["tokens/completion"]


def test_sampler_and_trainer_agree(summary: RunSummary, project: Project, watcher: Watcher) -> None:
    for row in project.metrics:
        assert abs(row["ratio/mean"] - 1) < 1e-4
        assert abs(row["ratio/max"] - 1) < 1e-4
        assert abs(row["sampler_trainer_kl"]) < 1e-5
    assert any("sampler and trainer agree" in note for note in watcher.notes)


def test_evaluations_come_before_during_and_after(summary: RunSummary, project: Project) -> None:
    found = [(row["name"], row["step"]) for row in project.evaluations]
    assert found == [("before", 0), ("teacher", 0), ("often", 2), ("after", 3)]


def test_held_out_answers_are_kept_and_three_are_shown(
    summary: RunSummary, project: Project, watcher: Watcher
) -> None:
    kept = {
        name: read_jsonl(project.run_dir / "answers" / f"{name}.jsonl")
        for name in ("before", "after", "teacher")
    }
    assert {path.name for path in (project.run_dir / "answers").iterdir()} == {
        f"{name}.jsonl" for name in kept
    }
    for name, rows in kept.items():
        assert {row["step"] for row in rows} == {3 if name == "after" else 0}
        assert len(rows) == 4 * 4, "every sample of every prompt"
    title, *lines = watcher.lines[: watcher.lines.index(f"adapter: {project.run_dir / 'adapter'}")]
    assert title.startswith("held-out answers, 3 of 4 prompts")
    assert str(project.run_dir / "answers") in title
    for number in range(3):
        shown = dict(line.split(": ", 1) for line in lines[4 * number : 4 * number + 4])
        assert list(shown) == ["prompt", "before", "after", "teacher"]
        first = {name: rows[4 * number] for name, rows in kept.items()}
        assert shown["prompt"] == first["after"]["messages"][-1]["content"]
        for name, row in first.items():
            assert shown[name] == " ".join(row["answer"][-1]["content"].split()) or "(nothing)"
    assert len(lines) == 12


def test_transcripts_say_what_the_metrics_say(summary: RunSummary, project: Project) -> None:
    for row in project.metrics:
        lines = read_transcripts(project.run_dir / "transcripts", row["step"])
        assert len(lines) == 8
        tokens = [token for line in lines for token in line["tokens"]]
        assert len(tokens) == row["tokens/completion"]
        mean = sum(token["kl"] for token in tokens) / len(tokens)
        assert mean == pytest.approx(row["teacher_kl"], abs=1e-5)
        assert all(token["teacher_logprob"] <= 0 for token in tokens)
        rewards = [line["reward"] for line in lines]
        assert sum(rewards) / len(rewards) == pytest.approx(row["reward/mean"])


def test_held_out_prompts_are_not_trained_on(summary: RunSummary, project: Project) -> None:
    trained = {
        line["prompt_id"]
        for step in (1, 2, 3)
        for line in read_transcripts(project.run_dir / "transcripts", step)
    }
    assert len(trained) == 12


def test_the_config_is_kept_and_runs_again(summary: RunSummary, project: Project) -> None:
    kept = Config.from_file(project.run_dir / "config.yml")
    assert kept.trainer.save_step == 2
    assert to_dict(kept)["model"]["qlora_rank"] == 4


@torch.no_grad()
def test_the_adapter_loads_as_promised(
    summary: RunSummary, project: Project, watcher: Watcher
) -> None:
    """The lines of Python that the run ends with, and the numbers that it trained."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    promised = "\n".join(watcher.lines)
    assert "from peft import AutoPeftModelForCausalLM" in promised
    assert f'AutoPeftModelForCausalLM.from_pretrained("{summary.values["adapter"]}")' in promised
    model = AutoPeftModelForCausalLM.from_pretrained(summary.values["adapter"])
    tokenizer = AutoTokenizer.from_pretrained(summary.values["adapter"])
    ids = torch.tensor([tokenizer.encode("cat 0")])

    lm = load_student(project)
    policy = LoraPolicy(lm, **policy_options())
    policy.load_adapter(
        load_file(project.run_dir / "checkpoints" / "step-000003" / "adapter_model.safetensors")
    )
    expected = policy.model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    plain = load_student(project).model(input_ids=ids).logits
    assert (plain - expected).abs().max() > 1e-3


def load_student(project: Project) -> loading.CausalLM:
    return loading.load_causal_lm(
        project.student, vocabulary=100, dtype=torch.float32, device=torch.device("cpu")
    )


def policy_options() -> dict[str, Any]:
    from rnow.algorithm.policy_gradient import PolicyGradient
    from rnow.policy.student import OptimizerSettings

    return {
        "rank": 4,
        "alpha": 8,
        "seed": 0,
        "base_name": "x",
        "objective": PolicyGradient(),
        "optimizer": OptimizerSettings(),
    }


# ---- other projects ------------------------------------------------------------------------------------------------


def test_the_documentations_minimal_config(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    project = Project(tmp_path, tiny_model_dir, rewards=False)
    config = Config(
        dataset_type="distill",
        model={"path": str(project.student)},
        teacher={"path": str(project.teacher)},
        # Answers of random models go on to the cap; nothing else is set.
        rollout={"max_tokens": 4},
    )
    summary = run(config, folder=tmp_path)
    assert summary.values["steps"] == 4
    assert Path(summary.values["adapter"], "adapter_model.safetensors").is_file()
    assert summary.values["evaluation"] == {"before": None, "after": None, "teacher": None}


def test_two_steps_move_the_whole_adapter_and_nothing_else(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    make = LoraPolicy.__init__

    def remembered(self: LoraPolicy, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        made.append((self, {name: p.detach().clone() for name, p in self.model.named_parameters()}))

    monkeypatch.setattr(LoraPolicy, "__init__", remembered)
    project = Project(tmp_path, tiny_model_dir)
    run(project.config(trainer={"max_steps": 2}), folder=tmp_path)
    ((policy, before),) = made
    after = dict(policy.model.named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    lora = {name for name in before if "lora_" in name}
    assert len(lora) == 14
    assert changed == lora


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_teacher_that_is_the_student_teaches_nothing(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], temperature: float
) -> None:
    project = Project(tmp_path, tiny_model_dir)
    config = project.config(
        teacher={"path": str(project.student)},
        rollout={"temperature": temperature},
        data={"val_split": 0.25},
        evaluation={"num_samples": 1, "temperature": temperature, "teacher": False},
        trainer={"max_steps": 1},
        algorithm={"kl_estimator": "sampled"},
    )
    run(config, folder=tmp_path)
    (row,) = project.metrics
    assert abs(row["teacher_kl"]) < 1e-4
    assert row["teacher_kl/k3"] < 1e-6
    (before, _) = project.evaluations
    assert abs(before["teacher_kl"]) < 1e-4


def test_an_evaluation_at_another_temperature_than_training(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    """Both sides of an evaluation's KL are at the evaluation's temperature, so an equal teacher is at 0."""
    project = Project(tmp_path, tiny_model_dir)
    config = project.config(
        teacher={"path": str(project.student)},
        rollout={"temperature": 0.7},
        data={"val_split": 0.25},
        evaluation={"num_samples": 1, "temperature": 1.0, "teacher": False},
        trainer={"max_steps": 1},
    )
    run(config, folder=tmp_path)
    (before, _) = project.evaluations
    assert abs(before.get("teacher_kl", 0.0)) < 1e-4


def test_several_datasets_have_their_own_kl(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    project = Project(tmp_path, tiny_model_dir)
    text = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(text)
    config = project.config(
        data={"train_file": [{"path": "train.jsonl"}, {"path": "more.jsonl", "name": "more"}]},
        trainer={"max_steps": 2},
    )
    run(config, folder=tmp_path)
    named = {name for row in project.metrics for name in row if name.startswith("teacher_kl/")}
    assert {"teacher_kl/dataset_0", "teacher_kl/more"} <= named


def test_several_updates_per_batch(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    project = Project(tmp_path, tiny_model_dir)
    config = project.config(trainer={"max_steps": 1, "updates_per_batch": 3})
    run(config, folder=tmp_path)
    state = json.loads((project.run_dir / "checkpoints/step-000001/state.json").read_text())
    assert state["updates"] == 3


def test_two_runs_give_the_same_numbers(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    numbers = []
    for name in ("one", "two"):
        project = Project(tmp_path / name, tiny_model_dir)
        run(project.config(trainer={"max_steps": 2}), folder=project.folder)
        numbers.append(project.numbers)
    assert numbers[0] == numbers[1]


def test_another_seed_gives_other_numbers(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    numbers = []
    for seed in (1, 2):
        project = Project(tmp_path / str(seed), tiny_model_dir)
        run(project.config(trainer={"max_steps": 1}, seed=seed), folder=project.folder)
        numbers.append(project.numbers)
    assert numbers[0] != numbers[1]


def test_secrets_stay_out_of_every_file(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    project = Project(tmp_path, tiny_model_dir)
    (tmp_path / ".env").write_text("API_KEY=sk-very-secret-1\n")
    (tmp_path / "rewards.py").write_text(
        "from rnow.core import reward\n"
        "@reward\n"
        "def short(args, messages):\n"
        "    raise ValueError(args.secrets['API_KEY'])\n"
    )
    config = project.config(
        description="key sk-very-secret-1", trainer={"max_steps": 1, "save_step": 1}
    )
    run(config, folder=tmp_path)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 8
    leaks = [
        str(path.relative_to(tmp_path))
        for path in files
        if b"sk-very-secret-1" in path.read_bytes()
    ]
    assert leaks == []
