"""Stopping and going on: what comes after a stop is what would have come without it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.rollouts import read_transcripts
from tests.setup.projects import Killed, Project, Watcher, die

from rnow.disk import folder as folder_module
from rnow.disk.folder import RunFolder
from rnow.disk.transcripts import step_file
from rnow.errors import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    ConfigError,
    InputError,
    StopRequested,
    TemporaryError,
)
from rnow.plan import changes
from rnow.sampling.transformers import TransformersSampler
from rnow.setup.build import run

SIX_STEPS: dict[str, Any] = {
    "data": {"val_split": 0.25},
    "evaluation": {"num_samples": 1, "max_prompts": 2, "teacher": False},
    "evals": [{"step": 2, "name": "often"}],
    "trainer": {"num_epochs": 2, "save_step": 2, "warmup_steps": 3},
}
"""12 prompts, 3 steps an epoch: step 4 is in a new order."""

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    """A run that nothing interrupts."""
    torch.set_num_threads(1)
    project = Project(tmp_path_factory.mktemp("whole"), tiny_model_dir)
    run(project.config(**SIX_STEPS), folder=project.folder)
    return project


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


def checkpoints(project: Project) -> list[str]:
    return sorted(path.name for path in (project.run_dir / "checkpoints").iterdir())


def assert_same_run(project: Project, whole: Project) -> None:
    """The same numbers, evaluations, transcripts and adapter, bit by bit."""
    assert project.numbers == whole.numbers
    assert project.evaluations == whole.evaluations
    for row in whole.numbers:
        mine, theirs = (
            read_transcripts(one.run_dir / "transcripts", row["step"]) for one in (project, whole)
        )
        assert mine == theirs
        files = [step_file(one.run_dir / "transcripts", row["step"]) for one in (project, whole)]
        assert files[0].read_bytes() == files[1].read_bytes()
    name = Path("adapter") / "adapter_model.safetensors"
    assert (project.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


# ---- stops at a safe point ------------------------------------------------------------------------------------------


STAGES = [
    (2, "evaluating: before", 1),
    (0, "rollout", 1),
    (1, "update", 2),
    (3, "rollout", 4),
    (4, "teacher", 5),
    (2, "evaluating often", 1),
    (6, "evaluating: after", 1),
]


@pytest.mark.parametrize(("done", "stage", "nth"), STAGES)
def test_a_signal_in_each_stage_saves_and_the_run_goes_on(
    project: Project, whole: Project, done: int, stage: str, nth: int
) -> None:
    config = project.config(**SIX_STEPS)
    watcher = Watcher().at(stage, nth, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StopRequested) as caught:
        run(config, folder=project.folder, display=watcher)
    assert caught.value.exit_code == EXIT_INTERRUPTED
    assert "again to continue" in str(caught.value.fix)
    if stage != "evaluating: before":
        assert checkpoints(project)[-1] == f"step-{done:06d}"
    assert not (project.run_dir / "summary.json").exists()
    summary = run(config, folder=project.folder)
    assert summary.values["steps"] == 6
    assert_same_run(project, whole)


def test_sigterm_has_its_own_exit_code(project: Project) -> None:
    watcher = Watcher().at("teacher", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopRequested) as caught:
        run(project.config(**SIX_STEPS), folder=project.folder, display=watcher)
    assert caught.value.exit_code == EXIT_TERMINATED
    told = json.loads((project.run_dir / "process.json").read_text())
    assert told["stopping"] is True, "rnow stop only waits then"


def test_a_stop_between_two_updates_of_a_step_changes_nothing(
    tmp_path: Path, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first update of step 2 is done, the second is not: the step has to begin again from the weights before it."""
    from rnow.policy.student import LoraPolicy

    sections = {**SIX_STEPS, "trainer": {"max_steps": 2, "updates_per_batch": 2}}
    straight = Project(tmp_path / "straight", tiny_model_dir)
    run(straight.config(**sections), folder=straight.folder)

    accumulate, calls = LoraPolicy._accumulate, []

    def interrupted(self: LoraPolicy, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return accumulate(self, *args, **options)

    stopped = Project(tmp_path / "stopped", tiny_model_dir)
    monkeypatch.setattr(LoraPolicy, "_accumulate", interrupted)
    with pytest.raises(StopRequested):
        run(stopped.config(**sections), folder=stopped.folder)
    monkeypatch.undo()
    run(stopped.config(**sections), folder=stopped.folder)
    assert_same_run(stopped, straight)


# ---- sudden ends ---------------------------------------------------------------------------------------------------

KILLED_AGAIN_AND_AGAIN = """
import json, os, signal, sys
from pathlib import Path

import bitsandbytes, datasets, peft, torch
from transformers import Qwen3ForCausalLM
from rnow.config import Config
from rnow.setup import build
from rnow.disk import checkpoints, transcripts
from tests.setup.projects import Watcher

torch.set_num_threads(1)
folder, values = Path(sys.argv[1]), json.loads(sys.argv[2])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_save(nth):
    write, count = checkpoints.write_synced, []

    def dies(path, data):
        count.append(path)
        if len(count) == nth:
            path.write_bytes(data[: len(data) // 2])
            kill()
        write(path, data)

    checkpoints.write_synced = dies


def kill_in_a_transcript(step):
    replace = transcripts.replace_file

    def dies(path, data):
        if path.stem == step:
            path.with_name("." + path.name + ".1").write_bytes(data[: len(data) // 2])
            kill()
        replace(path, data)

    transcripts.replace_file = dies


def attempt(death):
    # Nothing was computed in this process, so a fork is a whole run that saves importing everything again.
    child = os.fork()
    if child == 0:
        watcher = Watcher()
        if isinstance(death, int):
            kill_in_a_save(death)
        elif isinstance(death, str):
            kill_in_a_transcript(death)
        elif death is not None:
            watcher.at(*death, kill)
        try:
            build.run(Config(**values), folder=folder, display=watcher)
        finally:
            os._exit(0 if death is None else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


DEATHS = [("rollout", 2), ("update", 2), 3, ("reward", 3), ("sync", 2), 4, ("step 5", 1), "step-000005", ("rollout", 2)]
codes = [attempt(death) for death in DEATHS]
sys.stdout.write(json.dumps(codes))
"""


def subprocess_environment() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}


def test_kill_9_again_and_again_changes_no_number(project: Project, whole: Project) -> None:
    """Killed in sampling, in the update, in half-written checkpoints and transcripts ..., continued each time, and once to the end."""
    ended = subprocess.run(
        [
            sys.executable, "-c", KILLED_AGAIN_AND_AGAIN,
            str(project.folder), json.dumps(project.values(**SIX_STEPS)),
        ],
        capture_output=True, text=True, timeout=300, env=subprocess_environment(),
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * 9, ended.stderr
    watcher = Watcher()
    run(project.config(**SIX_STEPS), folder=project.folder, display=watcher)
    assert any("continuing after step 4" in note for note in watcher.notes)
    assert_same_run(project, whole)
    assert not list((project.run_dir / "transcripts").glob(".*")), "nothing is left of a kill"


def test_rollouts_that_were_finished_are_not_drawn_again(project: Project, whole: Project) -> None:
    config = project.config(**SIX_STEPS)
    with pytest.raises(Killed):
        run(config, folder=project.folder, display=Watcher().at("teacher", 3, die))
    journal = project.run_dir / "journal" / "step-000003.jsonl"
    lines = journal.read_text().splitlines()
    assert len(lines) == 9
    # Half of them lost: sampled again, to the same tokens.
    journal.write_text("".join(line + "\n" for line in lines[:4]) + '{"commit":true}\n')
    run(config, folder=project.folder)
    tokens = [
        [
            [token["id"] for token in line["tokens"]]
            for line in read_transcripts(one.run_dir / "transcripts", 3)
        ]
        for one in (project, whole)
    ]
    assert tokens[0] == tokens[1]


def test_a_damaged_newest_checkpoint_costs_steps_and_nothing_else(
    project: Project, whole: Project
) -> None:
    config = project.config(**SIX_STEPS)
    with pytest.raises(Killed):
        run(config, folder=project.folder, display=Watcher().at("update", 6, die))
    assert checkpoints(project) == ["step-000002", "step-000004"]
    (project.run_dir / "checkpoints" / "step-000004" / "adapter_model.safetensors").write_bytes(b"")
    watcher = Watcher()
    run(config, folder=project.folder, display=watcher)
    assert any("damaged" in note for note in watcher.notes)
    assert any("continuing after step 2" in note for note in watcher.notes)
    assert_same_run(project, whole)


def test_all_checkpoints_damaged(project: Project) -> None:
    config = project.config(**SIX_STEPS)
    run(config, folder=project.folder)
    for path in (project.run_dir / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    (project.run_dir / "summary.json").unlink()
    with pytest.raises(InputError, match="every checkpoint of this run is damaged") as caught:
        run(config, folder=project.folder)
    assert caught.value.exit_code == EXIT_BAD_INPUT


# ---- going on after the end ----------------------------------------------------------------------------------------


def test_a_finished_run_says_so(whole: Project, tmp_path: Path) -> None:
    before = (whole.run_dir / "summary.json").read_bytes()
    watcher = Watcher()
    summary = run(whole.config(**SIX_STEPS), folder=whole.folder, display=watcher)
    assert summary.values["steps"] == 6
    assert any("finished already" in note for note in watcher.notes)
    assert "loading the student" not in watcher.stages
    assert (whole.run_dir / "summary.json").read_bytes() == before


def test_more_epochs_go_on(project: Project, whole: Project) -> None:
    shorter = {**SIX_STEPS, "trainer": SIX_STEPS["trainer"] | {"num_epochs": 1}}
    run(project.config(**shorter), folder=project.folder)
    assert len(project.numbers) == 3
    watcher = Watcher()
    summary = run(project.config(**SIX_STEPS), folder=project.folder, display=watcher)
    assert any("continuing after step 3" in note for note in watcher.notes)
    assert summary.values["steps"] == 6
    assert project.numbers == whole.numbers
    named = [(row["name"], row["step"]) for row in project.evaluations]
    assert named == [
        ("before", 0), ("often", 2), ("after", 3), ("often", 4), ("often", 6), ("after", 6),
    ]  # fmt: skip
    assert summary.values["evaluation"]["after"]["step"] == 6
    assert summary.values["evaluation"]["before"]["step"] == 0


def test_evaluations_of_other_settings_are_not_compared(project: Project) -> None:
    shorter = {**SIX_STEPS, "trainer": SIX_STEPS["trainer"] | {"num_epochs": 1}}
    run(project.config(**shorter), folder=project.folder)
    first = project.evaluations
    watcher = Watcher()
    other = {**SIX_STEPS, "evaluation": SIX_STEPS["evaluation"] | {"success_reward": 0.5}}
    summary = run(project.config(**other), folder=project.folder, display=watcher)
    told = [note for note in watcher.notes if "warning" in note]
    assert told == [
        "warning: changed since the checkpoint, for evaluations from here on: "
        "evaluation.success_reward: 1.0 -> 0.5",
        "warning: evaluated with other settings than those of now, and left out of every comparison: "
        "before (step 0), often (step 2), after (step 3)",
    ]
    assert summary.values["evaluation"]["before"] is None
    assert summary.values["evaluation"]["after"]["step"] == 6
    assert project.evaluations[: len(first)] == first, "they are kept"
    assert [line.partition(":")[0] for line in watcher.lines[1:3]] == ["prompt", "after"]
    # Finished: now they would only be relabelled.
    again = {**SIX_STEPS, "evaluation": SIX_STEPS["evaluation"] | {"success_reward": 0.75}}
    with pytest.raises(ConfigError, match="this run is finished") as caught:
        run(project.config(**again), folder=project.folder)
    assert caught.value.details == ("evaluation.success_reward: 0.5 -> 0.75",)


def test_fewer_epochs_do_not_claim_to_have_trained_less(project: Project) -> None:
    run(project.config(**SIX_STEPS), folder=project.folder)
    shorter = {**SIX_STEPS, "trainer": SIX_STEPS["trainer"] | {"num_epochs": 1}}
    summary = run(project.config(**shorter), folder=project.folder)
    assert summary.values["steps"] == 6, "the adapter has six steps in it"


def test_fresh_leaves_the_old_run_alone(whole: Project, tmp_path: Path) -> None:
    copy = shutil.copytree(whole.folder, tmp_path / "copy")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (copy / "runs/tiny").iterdir())
    config = whole.config(**{**SIX_STEPS, "trainer": {"max_steps": 1}})
    summary = run(config, folder=copy, fresh=True)
    assert summary.values["run_dir"].endswith("runs/tiny-2")
    after = sorted((path.name, path.stat().st_mtime_ns) for path in (copy / "runs/tiny").iterdir())
    assert after == before


# ---- changes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(project: Project) -> Project:
    """A run killed after a checkpoint at step 2."""
    with pytest.raises(Killed):
        run(
            project.config(**SIX_STEPS),
            folder=project.folder,
            display=Watcher().at("update", 3, die),
        )
    return project


def test_another_learning_rate_is_warned_of(stopped: Project) -> None:
    sections = {**SIX_STEPS, "trainer": SIX_STEPS["trainer"] | {"learning_rate": 1e-3}}
    watcher = Watcher()
    run(stopped.config(**sections), folder=stopped.folder, display=watcher)
    (note,) = [note for note in watcher.notes if "trainer.learning_rate" in note]
    assert note.startswith("warning:")
    assert "0.005 -> 0.001" in note
    assert [row["lr"] for row in stopped.numbers[3:]] == [1e-3] * 3


def test_another_rank_is_refused(stopped: Project) -> None:
    before = sorted(path.name for path in stopped.run_dir.rglob("*"))
    with pytest.raises(ConfigError, match="cannot be continued") as caught:
        run(stopped.config(**SIX_STEPS, model={"qlora_rank": 8}), folder=stopped.folder)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "model.qlora_rank: 4 -> 8" in caught.value.details
    assert sorted(path.name for path in stopped.run_dir.rglob("*")) == before


def test_other_data_is_refused(stopped: Project) -> None:
    text = (stopped.folder / "train.jsonl").read_text()
    (stopped.folder / "train.jsonl").write_text(text.replace("cat", "cow"))
    with pytest.raises(ConfigError, match="cannot be continued") as caught:
        run(stopped.config(**SIX_STEPS), folder=stopped.folder)
    assert "the training data changed" in caught.value.details


def test_other_weights_in_the_students_folder_are_refused(
    stopped: Project, tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    """The same path, another model: the adapter was not made for it."""
    student = shutil.copytree(stopped.student, tmp_path / "student")
    fresh = Project(tmp_path / "again", tiny_model_dir)
    fresh.student = student
    with pytest.raises(Killed):
        run(fresh.config(**SIX_STEPS), folder=fresh.folder, display=Watcher().at("update", 3, die))
    other = tiny_model_dir(seed=9, num_hidden_layers=1, vocab_size=128)
    shutil.copy(other / "model.safetensors", student / "model.safetensors")
    with pytest.raises(InputError):
        run(fresh.config(**SIX_STEPS), folder=fresh.folder)


def test_another_temperature_does_not_reuse_rollouts(stopped: Project) -> None:
    """What the journal holds of step 3 was drawn at another temperature than it would be trained at."""
    assert (stopped.run_dir / "journal" / "step-000003.jsonl").stat().st_size > 0
    run(stopped.config(**SIX_STEPS, rollout={"temperature": 0.5}), folder=stopped.folder)
    assert abs(stopped.numbers[2]["sampler_trainer_kl"]) < 1e-5


def test_rollouts_of_a_start_in_between_are_not_reused_either(stopped: Project) -> None:
    """Back at the checkpoint's temperature, but the journal was written at another in the meantime."""
    with pytest.raises(Killed):
        run(
            stopped.config(**SIX_STEPS, rollout={"temperature": 0.5}),
            folder=stopped.folder,
            display=Watcher().at("update", 1, die),
        )
    assert (stopped.run_dir / "journal" / "step-000003.jsonl").stat().st_size > 0
    run(stopped.config(**SIX_STEPS), folder=stopped.folder)
    assert abs(stopped.numbers[2]["sampler_trainer_kl"]) < 1e-5


# ---- two at once ---------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(stopped: Project) -> None:
    refused = pytest.raises(InputError, match="another rnow process")
    with RunFolder(stopped.run_dir).lock(), refused as caught:
        run(stopped.config(**SIX_STEPS), folder=stopped.folder)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_a_run_that_began_while_this_one_loaded_is_noticed(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find no run folder; the one that comes second to make it must not go on beside the first."""
    held: list[Any] = []

    def other_begins() -> None:
        folder_module.RunFolder(project.run_dir).make()
        held.append(RunFolder(project.run_dir).lock())
        held[0].__enter__()

    try:
        with pytest.raises(InputError, match="another rnow process"):
            run(
                project.config(**SIX_STEPS),
                folder=project.folder,
                display=Watcher().at("loading the teacher", 1, other_begins),
            )
    finally:
        held[0].__exit__(None, None, None)


# ---- dead before the first checkpoint -------------------------------------------------------------------------------

UNSAVED: dict[str, Any] = {
    "data": {"val_split": 0.25},
    "evaluation": {"num_samples": 1, "max_prompts": 2, "teacher": False},
    "trainer": {"max_steps": 2},
}


@pytest.fixture
def unsaved(project: Project) -> Project:
    """Killed in the first update: "before" is measured, step 1 is journalled, nothing is saved."""
    with pytest.raises(Killed):
        run(
            project.config(**UNSAVED),
            folder=project.folder,
            display=Watcher().at("update", 1, die),
        )
    assert not (project.run_dir / "checkpoints").exists()
    assert (project.run_dir / "journal" / "step-000001.jsonl").stat().st_size > 0
    return project


def test_what_was_sampled_before_the_first_checkpoint_is_used(unsaved: Project) -> None:
    before = unsaved.evaluations
    run(unsaved.config(**UNSAVED), folder=unsaved.folder)
    assert unsaved.evaluations[:1] == before


def test_other_prompts_before_the_first_checkpoint_start_clean(
    unsaved: Project, tmp_path: Path, tiny_model_dir: MakeModel
) -> None:
    """The ids of the prompts and the policy version are the same; the prompts are not."""
    fresh = Project(tmp_path / "fresh", tiny_model_dir)
    rows = [
        {"messages": [{"role": "user", "content": f"another {row}"}], "rewards": ["short"]}
        for row in range(16)
    ]
    for project in (unsaved, fresh):
        project.write_rows(rows)
        run(project.config(**UNSAVED), folder=project.folder)
    assert unsaved.numbers == fresh.numbers
    assert unsaved.evaluations == fresh.evaluations
    assert read_transcripts(unsaved.run_dir / "transcripts", 1) == read_transcripts(
        fresh.run_dir / "transcripts", 1
    )


@pytest.mark.parametrize(
    ("change", "rollouts", "evaluations"),
    [
        ({"evaluation": {"max_prompts": 1}}, True, False),
        ({"rollout": {"tool_timeout": 5.0}}, True, True),
        ({"sampler": {"max_num_seqs": 7}}, True, True),
        ({"trainer": {"learning_rate": 1e-3}}, True, True),
        ({"rollout": {"temperature": 0.5}}, False, False),
    ],
)
def test_what_holds_of_a_start_that_saved_nothing(
    unsaved: Project, change: dict[str, Any], rollouts: bool, evaluations: bool
) -> None:
    (name, section), *_ = change.items()
    sections = {**UNSAVED, name: {**UNSAVED.get(name, {}), **section}}
    journal = unsaved.run_dir / "journal" / "step-000001.jsonl"
    watcher = Watcher().at("rollout", 1, die)
    with pytest.raises(Killed):
        run(unsaved.config(**sections), folder=unsaved.folder, display=watcher)
    assert journal.exists() == rollouts
    assert ("evaluating: before" in watcher.stages) == (not evaluations)


def test_a_fault_between_update_and_sync_does_not_train_a_step_twice(
    project: Project, whole: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy holds step 4 already, but step 4 is not finished: saving it as step 3 would repeat its update."""
    load = TransformersSampler.load_policy

    def fail_at_four(self: TransformersSampler, adapter: Any, *, version: int) -> None:
        if version == 4:
            raise TemporaryError("the sampler is gone")
        load(self, adapter, version=version)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersSampler, "load_policy", fail_at_four)
        with pytest.raises(TemporaryError, match="the sampler is gone"):
            run(project.config(**SIX_STEPS), folder=project.folder)
    run(project.config(**SIX_STEPS), folder=project.folder)
    assert_same_run(project, whole)


@pytest.mark.parametrize(
    "sections",
    [
        {"trainer": {"learning_rate": 1e-4}},
        {"algorithm": {"kl_estimator": "sampled"}},
        {"rollout": {"temperature": 0.5}},
    ],
    ids=["learning rate", "loss", "temperature"],
)
def test_a_finished_run_is_not_relabelled(project: Project, sections: dict[str, Any]) -> None:
    """A sweep by overrides would give N equal adapters under N labels."""
    short: dict[str, Any] = {"trainer": {"max_steps": 1}}
    run(project.config(**short), folder=project.folder)
    told = ("summary.json", "config.yml", "run.json", "metrics.jsonl")
    before = [(project.run_dir / name).read_bytes() for name in told]
    changed = {name: short.get(name, {}) | values for name, values in (short | sections).items()}
    with pytest.raises(ConfigError, match="this run is finished") as caught:
        run(project.config(**changed), folder=project.folder)
    assert "-n NAME" in caught.value.render()
    assert "--fresh" in caught.value.render()
    assert [(project.run_dir / name).read_bytes() for name in told] == before
    more = {"trainer": {"max_steps": 2} | sections.get("trainer", {})}
    summary = run(project.config(**(sections | more)), folder=project.folder)
    assert summary.values["steps"] == 2, "to train on under new settings is another matter"


# ---- finished, and asked again --------------------------------------------------------------------------------------


def told(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "process.json")
    }


@pytest.fixture
def finished(whole: Project, tmp_path: Path) -> Project:
    """A copy of the whole run, to be spoilt."""
    project = Project(tmp_path / "project", whole.make_model)
    shutil.copytree(whole.run_dir, project.run_dir)
    return project


def test_fewer_steps_leave_a_finished_run_alone(finished: Project) -> None:
    before = told(finished.run_dir)
    watcher = Watcher()
    short = {**SIX_STEPS, "trainer": SIX_STEPS["trainer"] | {"max_steps": 2}}
    summary = run(finished.config(**short), folder=finished.folder, display=watcher)
    assert summary.values["steps"] == 6
    assert any("finished already after 6 steps" in note for note in watcher.notes)
    assert told(finished.run_dir) == before
    assert "loading the student" not in watcher.stages


def change_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    "damage",
    [
        shutil.rmtree,
        lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b""),
        lambda adapter: change_a_bit(adapter / "adapter_model.safetensors"),
        lambda adapter: (adapter / "adapter_config.json").write_text("null"),
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        lambda adapter: (
            shutil.rmtree(adapter),
            adapter.mkdir(),
            os.mkfifo(adapter / "tokenizer.json"),
        ),
        lambda adapter: pipe(adapter / "adapter_model.safetensors"),
    ],
    ids=["gone", "empty", "a bit", "null", "no config", "a pipe for the tokenizer", "a pipe"],
)
def test_a_lost_or_damaged_adapter_is_written_anew(
    finished: Project, whole: Project, damage: Callable[[Path], object]
) -> None:
    damage(finished.run_dir / "adapter")
    run(finished.config(**SIX_STEPS), folder=finished.folder)
    assert_same_run(finished, whole)
    assert (finished.run_dir / "adapter" / "tokenizer.json").is_file()


@pytest.mark.parametrize("steps", [6, 7])
def test_an_adapter_that_was_changed_is_kept(finished: Project, steps: int) -> None:
    adapter = finished.run_dir / "adapter"
    (adapter / "mine.txt").write_text("notes")
    change_a_bit(adapter / "adapter_model.safetensors")
    changed = (adapter / "adapter_model.safetensors").read_bytes()
    watcher = Watcher()
    config = finished.config(**SIX_STEPS | {"trainer": SIX_STEPS["trainer"] | {"max_steps": steps}})
    run(config, folder=finished.folder, display=watcher)
    kept = finished.run_dir / "damaged-adapter"
    assert (kept / "adapter_model.safetensors").read_bytes() == changed
    assert (kept / "mine.txt").exists()
    assert (adapter / "adapter_model.safetensors").read_bytes() != changed
    assert [text for text in watcher.notes if "was changed since this run wrote it" in text]


@pytest.mark.parametrize("content", [b'{"steps": "six"}', b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_summary_is_written_anew(
    finished: Project, whole: Project, content: bytes
) -> None:
    (finished.run_dir / "summary.json").write_bytes(content)
    run(finished.config(**SIX_STEPS), folder=finished.folder)
    assert json.loads((finished.run_dir / "summary.json").read_text())["steps"] == 6
    assert_same_run(finished, whole)


def test_a_change_that_no_key_shows_is_no_other_label_either(finished: Project) -> None:
    """The reward is another, the adapter is not: to say \"finished\" would be to say it of the new reward."""
    rewards = finished.folder / "rewards.py"
    rewards.write_text(rewards.read_text() + "\n")
    before = told(finished.run_dir)
    with pytest.raises(ConfigError, match="this run is finished") as caught:
        run(finished.config(**SIX_STEPS), folder=finished.folder)
    assert caught.value.details == ("rewards.py changed",)
    assert told(finished.run_dir) == before


def test_a_name_is_offered_for_the_changed_keys(finished: Project) -> None:
    sections = {**SIX_STEPS, "trainer": SIX_STEPS["trainer"] | {"learning_rate": 2e-5}}
    with pytest.raises(ConfigError) as caught:
        run(finished.config(**sections), folder=finished.folder)
    assert "-n 'tiny-{trainer.learning_rate}'" in str(caught.value.fix)
    named = finished.config(
        **{**sections, "trainer": {**sections["trainer"], "max_steps": 1}},
        model={"name": "tiny-{trainer.learning_rate}"},
    )
    summary = run(named, folder=finished.folder)
    assert str(summary.values["run_dir"]).endswith("runs/tiny-2e-5")


def test_an_interrupted_fresh_run_is_continued_by_its_name(finished: Project) -> None:
    before = told(finished.run_dir)
    watcher = Watcher().at("update", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(StopRequested) as caught:
        run(finished.config(**SIX_STEPS), folder=finished.folder, fresh=True, display=watcher)
    assert "a new run: tiny-2" in watcher.notes
    assert "with -n tiny-2 instead of --fresh" in str(caught.value.fix)
    again = Watcher()
    config = finished.config(**SIX_STEPS, model={"name": "tiny-2"})
    summary = run(config, folder=finished.folder, display=again)
    assert any("continuing after step 2" in note for note in again.notes)
    assert str(summary.values["run_dir"]).endswith("runs/tiny-2")
    assert told(finished.run_dir) == before


# ---- what is not there, or not ours ---------------------------------------------------------------------------------


def test_lost_checkpoints_of_an_unfinished_run_are_told(stopped: Project) -> None:
    shutil.rmtree(stopped.run_dir / "checkpoints")
    before = told(stopped.run_dir)
    for _ in range(2):
        with pytest.raises(InputError, match="its checkpoints are gone") as caught:
            run(stopped.config(**SIX_STEPS), folder=stopped.folder)
        assert "--fresh" in caught.value.render()
    assert told(stopped.run_dir) == before


def test_to_begin_again_is_told_where_nothing_was_saved(project: Project) -> None:
    config = project.config(trainer={"max_steps": 3})
    with pytest.raises(Killed):
        run(config, folder=project.folder, display=Watcher().at("update", 3, die))
    watcher = Watcher()
    run(config, folder=project.folder, display=watcher)
    assert any("writes its first 2 steps anew" in note for note in watcher.notes)


def test_a_checkpoint_of_another_run_is_not_continued_from(stopped: Project) -> None:
    folder = stopped.run_dir / "checkpoints" / "step-000002"
    other = stopped.config(**SIX_STEPS, model={"name": "other"}, seed=1)
    with pytest.raises(Killed):
        run(other, folder=stopped.folder, display=Watcher().at("update", 5, die))
    foreign = stopped.folder / "runs" / "other" / "checkpoints" / "step-000004"
    shutil.copytree(foreign, folder.with_name("step-000004"))
    watcher = Watcher()
    run(stopped.config(**SIX_STEPS), folder=stopped.folder, display=watcher)
    assert any("it is of another run" in note for note in watcher.notes)
    assert any("continuing after step 2" in note for note in watcher.notes)


def test_runs_of_earlier_versions_are_continued(stopped: Project, whole: Project) -> None:
    """Neither run.json nor a checkpoint says which run it is, nor what was not kept then."""
    new = (*changes.ADDED, "run", "name", "saved")
    for path in (*stopped.run_dir.glob("checkpoints/*/state.json"), stopped.run_dir / "run.json"):
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k not in new}
        path.write_text(json.dumps(kept))
    for path in stopped.run_dir.glob("checkpoints/*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["run"]
        state = path.with_name("state.json").read_bytes()
        manifest["files"]["state.json"] = {
            "size": len(state), "sha256": hashlib.sha256(state).hexdigest(),
        }  # fmt: skip
        path.write_text(json.dumps(manifest))
    watcher = Watcher()
    run(stopped.config(**SIX_STEPS), folder=stopped.folder, display=watcher)
    assert not [note for note in watcher.notes if "changed since" in note]
    assert_same_run(stopped, whole)


def test_lines_that_are_lost_are_told(stopped: Project) -> None:
    metrics = stopped.run_dir / "metrics.jsonl"
    first, second = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first[:20] + second)
    (stopped.run_dir / "evaluations.jsonl").write_bytes(b"\xff\xfe\n[1]\n")
    watcher = Watcher()
    run(stopped.config(**SIX_STEPS), folder=stopped.folder, display=watcher)
    found = " ".join(watcher.notes)
    assert "metrics.jsonl lacks earlier steps (1, 2)" in found
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (stopped.run_dir / f"damaged-{name}").exists()
        assert f"{name} has lines that cannot be read" in found
    assert [row["step"] for row in stopped.numbers] == [3, 4, 5, 6]


# ---- what the models are --------------------------------------------------------------------------------------------


def own_models(project: Project) -> Project:
    """Models of the project's own, which a test may change."""
    for name in ("student", "teacher"):
        copy = shutil.copytree(getattr(project, name), project.folder / name)
        setattr(project, name, copy)
    return project


def copy_weights(folder: Path, other: Path) -> None:
    shutil.copy(other / "model.safetensors", folder)


def change_json(name: str, **values: Any) -> Callable[[Path, Path], None]:
    def change(folder: Path, other: Path) -> None:
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | values))

    return change


def touch(folder: Path, other: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (1, 1))


MODELS = [
    ("teacher", copy_weights, "the teacher's weights changed"),
    ("teacher", change_json("config.json", rms_norm_eps=0.1), "the teacher's config.json changed"),
    ("student", change_json("config.json", rms_norm_eps=0.1), "the student's config.json changed"),
    ("teacher", change_json("generation_config.json", eos_token_id=[2, 7]), "what ends an answer"),
    ("student", change_json("generation_config.json", eos_token_id=[2, 7]), "what ends an answer"),
    ("student", change_json("config.json", transformers_version="9"), None),
    ("teacher", touch, None),
]


@pytest.mark.parametrize(("role", "change", "words"), MODELS)
def test_models_that_changed_are_noticed(
    project: Project, role: str, change: Callable[[Path, Path], None], words: str | None
) -> None:
    own_models(project)
    config = project.config(trainer={"max_steps": 1, "save_step": 1})
    run(config, folder=project.folder)
    other = project.make_model(seed=5, num_hidden_layers=1, vocab_size=104)
    change(getattr(project, role), other)
    if words is None:
        run(config, folder=project.folder)
        return
    with pytest.raises(ConfigError, match="this run is finished") as caught:
        run(config, folder=project.folder)
    assert any(words in line for line in caught.value.details), caught.value.details


def test_a_replaced_teacher_is_another_teacher(project: Project) -> None:
    own_models(project)
    run(project.config(trainer={"max_steps": 1}), folder=project.folder)
    copy_weights(project.teacher, project.make_model(seed=5, num_hidden_layers=1, vocab_size=104))
    with pytest.raises(ConfigError, match="the teacher's weights changed"):
        run(project.config(trainer={"max_steps": 2}), folder=project.folder)


def test_a_module_that_rewards_import_is_part_of_them(project: Project) -> None:
    rewards = project.folder / "rewards.py"
    rewards.write_text("import helper\n" + rewards.read_text())
    (project.folder / "helper.py").write_text("SCALE = 8\n")
    run(project.config(trainer={"max_steps": 1}), folder=project.folder)
    (project.folder / "helper.py").write_text("SCALE = 9\n")
    watcher = Watcher()
    run(project.config(trainer={"max_steps": 2}), folder=project.folder, display=watcher)
    assert any("what rewards.py imports changed: helper.py" in note for note in watcher.notes)


def test_another_number_of_threads_is_told(project: Project) -> None:
    run(project.config(trainer={"max_steps": 1}), folder=project.folder)
    watcher = Watcher()
    torch.set_num_threads(2)
    try:
        run(project.config(trainer={"max_steps": 2}), folder=project.folder, display=watcher)
    finally:
        torch.set_num_threads(1)
    assert any("the number of CPU threads changed: 1 -> 2" in note for note in watcher.notes)
