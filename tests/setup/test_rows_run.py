"""Runs that learn from rows, from the config to the adapter: they learn, stop, and go on as if they had not stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plan.test_rows import Rows, says
from tests.setup.projects import Watcher

from rnow.cli.main import app
from rnow.errors import ConfigError, StopRequested
from rnow.plan import changes
from rnow.plan.prepare import prepare
from rnow.setup.build import run
from rnow.setup.facts import RunSummary
from rnow.setup.rehearse import rehearse

MakeModel = Callable[..., Path]
KINDS = ("sft", "midtrain")
WORDS = ("cat", "dog", "bird", "fish", "tree", "leaf", "root", "stem") * 2
ROWS: dict[str, list[Any]] = {
    "sft": [
        {"messages": says(f"{word} {n}", word, "again", word * 2)[: 2 + 2 * (n % 2)]}
        for n, word in enumerate(WORDS)
    ],
    "midtrain": [
        {"text": f"a {word} is a {word} and no {word}s. " * (1 + n % 3)}
        for n, word in enumerate(WORDS)
    ],
}
SECTIONS: dict[str, Any] = {
    "data": {"batch_size": 5, "val_split": 0.25},
    "rollout": {"max_context_window": 70},
    "trainer": {"num_epochs": 2, "save_step": 2, "learning_rate": 1e-2},
    "evals": [{"step": 2, "name": "often"}],
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def project_of(folder: Path, make_model: MakeModel, kind: str) -> Rows:
    return Rows(folder / kind, make_model, kind, ROWS[kind])


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel
) -> dict[str, tuple[Rows, RunSummary, Watcher]]:
    """A run of each kind that nothing interrupts."""
    torch.set_num_threads(1)
    found = {}
    for kind in KINDS:
        project = project_of(tmp_path_factory.mktemp("whole"), tiny_model_dir, kind)
        watcher = Watcher()
        summary = run(project.config(**SECTIONS), folder=project.folder, display=watcher)
        found[kind] = project, summary, watcher
    return found


def assert_same_run(project: Rows, other: Rows) -> None:
    """The same numbers, evaluations and adapter, bit by bit."""
    assert project.numbers == other.numbers
    assert project.evaluations == other.evaluations
    name = Path("adapter") / "adapter_model.safetensors"
    assert (project.run_dir / name).read_bytes() == (other.run_dir / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_loss_falls(whole: dict[str, tuple[Rows, RunSummary, Watcher]], kind: str) -> None:
    project, summary, watcher = whole[kind]
    steps = summary.steps
    rows = project.evaluations
    assert [(row["name"], row["step"]) for row in rows] == [
        ("before", 0),
        *(("often", step) for step in range(2, steps + 1, 2)),
        ("after", steps),
    ]
    before, after = summary.evaluation["before"], summary.evaluation["after"]
    assert after["loss"] < 0.8 * before["loss"]
    assert after["perplexity"] < before["perplexity"]
    assert summary.values["loss"]["last"] < summary.values["loss"]["first"]
    assert summary.values["teacher_kl"]["first"] is None
    assert summary.values["sampler"] == {}
    assert summary.values["completion_tokens"] == sum(
        row["tokens/completion"] for row in project.metrics
    )
    assert [stage for stage in watcher.stages if stage in ("rollout", "reward", "teacher")] == []
    assert any("the loss of the first rows is" in note for note in watcher.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_of_a_step(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]], kind: str
) -> None:
    project, _, _ = whole[kind]
    (row, *_) = project.metrics
    assert {name for name in row if not name.startswith(("time/", "memory/", "throughput/"))} == {
        "step", "loss", "loss/dataset_0", "entropy", "grad_norm", "lr",
        "tokens/prompt", "tokens/completion", "tokens/total",
    }  # fmt: skip
    assert row["loss"] == row["loss/dataset_0"]
    assert row["throughput/completion_tokens_per_s"] > 0
    assert {"time/batch", "time/update", "time/step"} <= row.keys()
    assert not (project.run_dir / "transcripts").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_the_mean_over_the_tokens_of_the_step(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]], kind: str
) -> None:
    """Against transformers' own logits of each row alone, in float64."""
    from transformers import AutoModelForCausalLM

    from rnow.plan.sources import rows_of

    project, _, _ = whole[kind]
    prepared = project.prepared(**SECTIONS)
    assert prepared.source is not None
    import asyncio

    from rnow.training.residency import StageClock

    data = asyncio.run(prepared.source.open(None).batch(1, StageClock()))
    model = AutoModelForCausalLM.from_pretrained(project.student).double()
    total, count = 0.0, 0
    for item in data.training:
        ids = torch.tensor([item.sample.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :, : prepared.rendered.vocabulary]
        logprobs = torch.log_softmax(logits, -1)
        for at, on in enumerate(item.sample.loss_mask):
            if on:
                total -= float(logprobs[at - 1, ids[0, at]])
                count += 1
    assert project.metrics[0]["loss"] == pytest.approx(total / count, abs=1e-5)
    assert project.metrics[0]["tokens/completion"] == count
    assert rows_of(prepared.evaluated, prepared.rendered.rows)


STOPS = [
    ("evaluating: before", 1, 0),
    ("update", 2, 1),
    ("batch", 3, 3),
    ("evaluating: often", 1, 4),
]
"""Where each start of the run is stopped, for the n-th time that it comes there, and how many steps are done then."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_in_each_stage_saves_and_the_run_goes_on(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]],
    tmp_path: Path,
    tiny_model_dir: MakeModel,
    kind: str,
) -> None:
    project = project_of(tmp_path, tiny_model_dir, kind)
    config = project.config(**SECTIONS)
    for stage, nth, done in STOPS:
        watcher = Watcher().at(stage, nth, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(StopRequested):
            run(config, folder=project.folder, display=watcher)
        saved = sorted(path.name for path in (project.run_dir / "checkpoints").glob("step-*"))
        assert not done or saved[-1] == f"step-{done:06d}", stage
    run(config, folder=project.folder)
    assert_same_run(project, whole[kind][0])


@pytest.mark.whole
@pytest.mark.parametrize("kind", KINDS)
def test_kill_9_and_resume_are_bit_identical(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]],
    tmp_path: Path,
    tiny_model_dir: MakeModel,
    kind: str,
) -> None:
    """Killed in the fourth step, after a checkpoint at the second, in a process of its own."""
    project = project_of(tmp_path, tiny_model_dir, kind)
    values = project.values(**SECTIONS)
    program = (
        "import json, os, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "from rnow import Config, run\n"
        "from rnow.display.display import QuietDisplay\n"
        "class Display(QuietDisplay):\n"
        "    seen = 0\n"
        "    def stage(self, name):\n"
        "        Display.seen += name == 'update'\n"
        "        if Display.seen == 4:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(Config(**json.loads(sys.argv[1])), folder=sys.argv[2], display=Display())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(values), str(project.folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (project.run_dir / "checkpoints" / "step-000002").is_dir()
    run(project.config(**SECTIONS), folder=project.folder)
    assert_same_run(project, whole[kind][0])


def test_what_may_change_between_two_starts(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]],
) -> None:
    """Settings of answers are free; rows and their windows are not."""
    project, _, _ = whole["sft"]
    facts = json.loads((project.run_dir / "run.json").read_text())
    readers = frozenset({"every run"})

    def compared(**sections: Any) -> changes.Changes:
        from rnow.config import to_dict

        merged = {**SECTIONS, **sections}
        new = {**facts, "config": json.loads(json.dumps(to_dict(project.config(**merged))))}
        return changes.compare(facts, new, readers)

    assert compared() == changes.Changes()
    free = compared(algorithm={"kl_penalty_coef": 1.0}, sampler={"max_num_seqs": 3})
    assert len(free.free) == 2
    assert free.evaluations_hold
    window = compared(rollout={"max_context_window": 71})
    assert len(window.refused) == 1
    assert len(compared(trainer={**SECTIONS["trainer"], "learning_rate": 1e-3}).warned) == 1
    assert facts["rewards_hash"] is None, "no reward is run"


def test_other_rows_are_refused(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]], tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    project = project_of(tmp_path, tiny_model_dir, "midtrain")
    watcher = Watcher().at("step 2", 1, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StopRequested):
        run(project.config(**SECTIONS), folder=project.folder, display=watcher)
    project.write_rows([*ROWS["midtrain"][:-1], {"text": "another"}])
    with pytest.raises(ConfigError, match="cannot be continued"):
        run(project.config(**SECTIONS), folder=project.folder)


def test_several_datasets_have_losses_of_their_own(
    tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    project = project_of(tmp_path, tiny_model_dir, "sft")
    rows = (project.folder / "train.jsonl").read_text()
    (project.folder / "more.jsonl").write_text(rows)
    files = [{"path": "train.jsonl", "name": "a"}, {"path": "more.jsonl", "name": "b"}]
    data = {"batch_size": 8, "val_split": 0.25, "train_file": files}
    # Of eight rows that are held out four are evaluated: two of each.
    config = project.config(data=data, trainer={"max_steps": 1}, evaluation={"max_prompts": 4})
    evaluated = prepare(config, project.folder, weights=False).evaluated
    assert [prompt.dataset for prompt in evaluated] == ["a", "a", "b", "b"]
    summary = run(config, folder=project.folder)
    assert {"loss", "loss/a", "loss/b", "perplexity"} <= summary.evaluation["before"].keys()
    assert {"loss/a", "loss/b"} <= project.metrics[0].keys()


def test_packing_that_is_off_is_said_in_the_run(tmp_path: Path, tiny_model_dir: MakeModel) -> None:
    """And the numbers are those of packed rows."""
    notes, losses = {}, {}
    for name, extra in {"packed": {}, "separate": {"attention_chunk_size": 4096}}.items():
        project = project_of(tmp_path / name, tiny_model_dir, "sft")
        student = tiny_model_dir(seed=0, num_hidden_layers=1, vocab_size=128, **extra)
        watcher = Watcher()
        config = project.config(
            model={"path": str(student)}, trainer={"max_steps": 2, "learning_rate": 1e-2}
        )
        run(config, folder=project.folder, display=watcher)
        notes[name] = [note for note in watcher.notes if note.startswith("packing is off")]
        losses[name] = [row["loss"] for row in project.metrics]
    assert notes["packed"] == []
    (note,) = notes["separate"]
    assert "attention_chunk_size" in note
    assert losses["packed"] == pytest.approx(losses["separate"], abs=1e-5)


def test_rehearsing_an_sft_project(tmp_path: Path, tiny_model_dir: MakeModel) -> None:
    project = project_of(tmp_path, tiny_model_dir, "sft")
    sections = {"data": {"batch_size": 2, "group_size": 1}, "rollout": {"max_tokens": 3}}
    done = rehearse(project.config(**sections), folder=project.folder, limit=2)
    files = sorted(done.folder.rglob("*.json"))
    assert len(files) == 2
    (first, second) = (json.loads(file.read_text())["conversation"] for file in files)
    assert [message["role"] for message in first] == ["user", "assistant"]
    assert [message["role"] for message in second] == ["user", "assistant", "user", "assistant"]
    assert first[1]["content"] != "cat", "the student's own"


def test_there_are_no_rollouts_to_show(
    whole: dict[str, tuple[Rows, RunSummary, Watcher]], capsys: pytest.CaptureFixture[str]
) -> None:
    project, _, _ = whole["sft"]
    assert app is not None
    from rnow.cli.rollouts import show_rollouts
    from rnow.errors import InputError

    with pytest.raises(InputError, match="the student learns from rows"):
        show_rollouts("tiny", folder=project.folder)
