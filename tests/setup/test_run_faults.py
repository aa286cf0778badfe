"""Faults of a whole run: before training nothing is written; during it the state survives."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.setup.projects import Project, Watcher
from transformers.utils import logging as transformers_logging

from rnow import progress
from rnow.algorithm.batching import evidence_tensors
from rnow.config import to_yaml
from rnow.disk import checkpoints
from rnow.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TEMPORARY,
    EXIT_TERMINATED,
    InputError,
    RnowError,
    StopRequested,
    TemporaryError,
)
from rnow.sampling import transformers as transformers_sampler
from rnow.setup.build import check, run
from rnow.teacher.transformers import TransformersTeacher

MakeModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


# ---- before training -----------------------------------------------------------------------------------------------


def test_a_check_shows_no_advice_of_the_model_libraries(project: Project) -> None:
    """transformers warns of tokenizers that are in order; a run is spared it too."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        check(project.config(), folder=project.folder)
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
    finally:
        transformers_logging.set_verbosity(before)


def copied_teacher(project: Project) -> Path:
    return shutil.copytree(project.teacher, project.folder.parent / "teacher")


def api_teacher(project: Project) -> dict[str, Any]:
    return {"teacher": {"path": "openai/gpt-4o"}}


def empty_teacher(project: Project) -> dict[str, Any]:
    folder = project.folder.parent / "empty"
    folder.mkdir()
    return {"teacher": {"path": str(folder)}}


def wrong_tokenizer(project: Project) -> dict[str, Any]:
    teacher = copied_teacher(project)
    file = teacher / "tokenizer.json"
    text = file.read_text()
    swapped = text.replace('"a": ', '"@": ').replace('"b": ', '"a": ').replace('"@": ', '"b": ')
    assert swapped != text
    file.write_text(swapped)
    return {"teacher": {"path": str(teacher)}}


def truncated_weights(project: Project) -> dict[str, Any]:
    teacher = copied_teacher(project)
    file = teacher / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    return {"teacher": {"path": str(teacher)}}


def teacher_of_nan(project: Project) -> dict[str, Any]:
    teacher = copied_teacher(project)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    return {"teacher": {"path": str(teacher)}}


def teacher_of_zeros(project: Project) -> dict[str, Any]:
    teacher = copied_teacher(project)
    tensors = load_file(teacher / "model.safetensors")
    save_file(
        {name: torch.zeros_like(t) for name, t in tensors.items()},
        teacher / "model.safetensors",
        metadata={"format": "pt"},
    )
    return {"teacher": {"path": str(teacher)}}


def unknown_reward(project: Project) -> dict[str, Any]:
    project.write_rows([{"messages": [{"role": "user", "content": "x"}], "rewards": ["shorty"]}])
    return {"data": {"batch_size": 1}}


def oversized_prompt(project: Project) -> dict[str, Any]:
    rows: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "x" * 600}]}]
    project.write_rows(rows * 4)
    return {}


def broken_line(project: Project) -> dict[str, Any]:
    with (project.folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [\n')
    return {}


def no_data(project: Project) -> dict[str, Any]:
    (project.folder / "train.jsonl").unlink()
    return {}


def broken_rewards(project: Project) -> dict[str, Any]:
    (project.folder / "rewards.py").write_text("import no_such_module_anywhere\n")
    return {}


def a_file_for_output(project: Project) -> dict[str, Any]:
    (project.folder / "out").write_text("a file")
    return {"output_dir": "out"}


FAULTS = [
    (api_teacher, "gpt-4o"),
    (empty_teacher, "empty"),
    (wrong_tokenizer, "token"),
    (truncated_weights, "model.safetensors"),
    (teacher_of_nan, "hold NaN or infinity"),
    (teacher_of_zeros, "same log-probability"),
    (unknown_reward, "shorty"),
    (oversized_prompt, "not fit the window"),
    (broken_line, "train.jsonl"),
    (no_data, "train.jsonl"),
    (broken_rewards, "no_such_module_anywhere"),
    (a_file_for_output, "cannot write to the run folder"),
    (lambda project: {"data": {"batch_size": 17}}, "only 16 prompts"),
    (lambda project: {"algorithm": {"kl_horizon": 5, "reward_coef": 1}}, "cuts the answers"),
    (lambda project: {"evals": [{"step": 2}]}, "held out"),
    (lambda project: {"model": {"path": "nowhere"}}, "nowhere"),
    (lambda project: {"model": {"device": "cuda:0"}}, "no GPU"),
    (lambda project: {"rollout": {"max_context_window": 5000}}, "at most 512"),
]
NAMES = [
    "api-teacher", "empty-teacher", "wrong-tokenizer", "truncated-weights", "nan-teacher", "zero-teacher",
    "unknown-reward", "oversized-prompt", "broken-line", "no-data", "broken-rewards", "output-is-a-file",
    "large-batch", "horizon-with-rewards", "evals-without-prompts", "no-student", "no-gpu", "large-window",
]  # fmt: skip


@pytest.mark.parametrize(("make", "words"), FAULTS, ids=NAMES)
def test_a_fault_before_training_leaves_nothing(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Project], dict[str, Any]],
    words: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sections = make(project)
    before = listing(project)
    with pytest.raises(InputError) as caught:
        run(project.config(**sections), folder=project.folder)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert words in caught.value.render()
    assert listing(project) == before


def listing(project: Project) -> list[str]:
    return sorted(
        str(path.relative_to(project.folder))
        for path in project.folder.rglob("*")
        if "__pycache__" not in path.parts
    )


# ---- disks ---------------------------------------------------------------------------------------------------------


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path], bool]) -> list[Path]:
    """Writing fails from now on wherever ``when`` says so."""
    refused: list[Path] = []
    open_file, write_bytes = Path.open, Path.write_bytes

    def full(path: Path) -> None:
        if when(path):
            refused.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode[0] in "wa" or "+" in mode:
            full(self)
        return open_file(self, mode, *args, **kwargs)

    def written(self: Path, data: Any) -> int:
        full(self)
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "write_bytes", written)
    return refused


def test_a_full_disk_while_saving_ends_with_75_and_keeps_the_last_checkpoint(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = project.config(trainer={"save_step": 1})
    refused = fill_the_disk(monkeypatch, lambda path: path.parent.name.startswith(".tmp-3-"))
    with pytest.raises(TemporaryError, match="last good checkpoint is step 2") as caught:
        run(config, folder=project.folder)
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert refused
    monkeypatch.undo()
    names = sorted(path.name for path in (project.run_dir / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    watcher = Watcher()
    summary = run(config, folder=project.folder, display=watcher)
    assert any("continuing after step 2" in note for note in watcher.notes)
    assert summary.values["steps"] == 4


def test_a_full_disk_for_metrics_is_told_and_survived(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rnow.disk import sinks

    def full(path: Path, line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sinks, "_append_whole", full)
    watcher = Watcher()
    summary = run(project.config(), folder=project.folder, display=watcher)
    assert summary.values["steps"] == 4
    assert sum("metrics are not being written" in note for note in watcher.notes) == 1


@pytest.mark.parametrize("place", ["transcripts", "evaluations.jsonl", ".summary.json"])
def test_a_full_disk_anywhere_else_is_temporary(
    project: Project, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    config = project.config(
        data={"val_split": 0.25}, evaluation={"num_samples": 1}, trainer={"save_step": 1}
    )
    fill_the_disk(monkeypatch, lambda path: place in str(path))
    with pytest.raises(TemporaryError) as caught:
        run(config, folder=project.folder)
    assert caught.value.exit_code == EXIT_TEMPORARY
    monkeypatch.undo()
    assert run(config, folder=project.folder).values["steps"] == 3


def test_a_full_disk_for_the_journal_is_survived(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = fill_the_disk(monkeypatch, lambda path: "journal" in path.parts)
    assert run(project.config(), folder=project.folder).values["steps"] == 4
    assert refused


def replace_by_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


@pytest.mark.parametrize(
    ("name", "spoil"),
    [("transcripts", replace_by_a_file), ("metrics.jsonl", replace_by_a_folder)],
)
def test_what_becomes_unwritable_in_mid_run_is_temporary(
    project: Project, name: str, spoil: Callable[[Path], None]
) -> None:
    """And the next start says what is in the way before it loads anything; put right, the run goes on."""
    path = project.run_dir / name
    watcher = Watcher().at("update", 3, lambda: spoil(path))
    with pytest.raises(TemporaryError) as caught:
        run(project.config(), folder=project.folder, display=watcher)
    assert name in str(caught.value.where)
    again = Watcher()
    with pytest.raises(InputError, match="cannot write to the run folder") as refused:
        run(project.config(), folder=project.folder, display=again)
    assert str(path) in str(refused.value.where)
    assert "loading the student" not in again.stages
    path.unlink() if path.is_file() else path.rmdir()
    assert run(project.config(), folder=project.folder).values["steps"] == 4


@pytest.mark.parametrize("what", ["project", "run", "working directory"])
def test_a_folder_that_is_deleted_under_the_run(
    project: Project, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project.run_dir if what == "run" else project.folder
    monkeypatch.chdir(project.folder if what == "working directory" else tmp_path)
    at = Path() if what == "working directory" else project.folder
    watcher = Watcher().at("update", 3, lambda: shutil.rmtree(folder))
    with pytest.raises(TemporaryError, match="the run folder is gone"):
        run(project.config(), folder=at, display=watcher)
    assert not folder.exists(), "it is not made again"


def test_a_file_that_may_not_grow_is_temporary(project: Project) -> None:
    """ulimit -f: the kernel refuses the write with EFBIG."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    program = (
        f"{limited}import sys\nsys.argv = ['rnow', 'run']\nfrom rnow.__main__ import main\nmain()"
    )
    process = start(project, program=("-c", program), trainer={"save_step": 1, "max_steps": 2})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_TEMPORARY, output
    assert "Traceback" not in output
    assert "File too large" in output


@pytest.mark.parametrize("value", ["a\0b", "x" * 300, "x/" * 3000])
def test_check_refuses_an_output_folder_that_cannot_be(project: Project, value: str) -> None:
    for refuse in (check, run):
        with pytest.raises(InputError, match="cannot write to the run folder"):
            refuse(project.config(output_dir=value), folder=project.folder)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux shows its kernel there")
def test_check_refuses_an_output_folder_on_a_file_system_that_takes_none(
    project: Project,
) -> None:
    for refuse in (check, run):
        with pytest.raises(InputError, match="cannot write to the run folder"):
            refuse(project.config(output_dir="/proc/x"), folder=project.folder)


# ---- numbers -------------------------------------------------------------------------------------------------------


class BrokenTeacher:
    """Makes the teacher answer NaN from its n-th question on, ``times`` times (the self-check asks three)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, first: int, times: int) -> None:
        self.asked = 0
        score = TransformersTeacher.score

        async def broken(teacher: TransformersTeacher, samples: Any, needs: Any) -> Any:
            self.asked += 1
            evidence = await score(teacher, samples, needs)
            if first + 3 <= self.asked < first + 3 + times:
                return {
                    name: replace(
                        found,
                        **{key: t * float("nan") for key, t in evidence_tensors(found).items()},
                    )
                    for name, found in evidence.items()
                }
            return evidence

        monkeypatch.setattr(TransformersTeacher, "score", broken)


def test_a_fault_of_any_kind_saves_first(project: Project) -> None:
    """Not only our own errors: what ends a run must not cost the steps since the last checkpoint."""

    def fail() -> None:
        raise RuntimeError("something nobody thought of")

    config = project.config()
    with pytest.raises(RuntimeError, match="nobody thought of"):
        run(config, folder=project.folder, display=Watcher().at("update", 3, fail))
    watcher = Watcher()
    summary = run(config, folder=project.folder, display=watcher)
    assert any("continuing after step 2" in note for note in watcher.notes)
    assert summary.values["steps"] == 4


@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.EPERM, errno.EACCES])
def test_a_disk_that_fails_otherwise_is_temporary_too(
    project: Project, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    open_file = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if self.parent.name == "transcripts" and "step-000003" in self.name:
            raise OSError(code, "the disk's own words", str(self))
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    config = project.config(trainer={"save_step": 1})
    with pytest.raises(TemporaryError, match="the disk's own words") as caught:
        run(config, folder=project.folder)
    assert caught.value.exit_code == EXIT_TEMPORARY
    monkeypatch.undo()
    assert run(config, folder=project.folder).values["steps"] == 4


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("rollout", MemoryError()),
        ("reward", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        ("teacher", OSError(errno.ENOMEM, "Cannot allocate memory")),
        ("loading the teacher", torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB")),
    ],
)
def test_memory_that_ends_anywhere_is_temporary_and_the_state_is_saved(
    project: Project, stage: str, fault: Exception
) -> None:
    """Where half as much at a time is no way out."""

    def fail() -> None:
        raise fault

    loading = stage.startswith("loading")
    with pytest.raises(TemporaryError, match="no more memory") as caught:
        run(project.config(), folder=project.folder, display=Watcher().at(stage, 1 if loading else 3, fail))  # fmt: skip
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert caught.value.__cause__ is fault
    assert "run the same command again" in str(caught.value.fix)
    again = Watcher()
    assert run(project.config(), folder=project.folder, display=again).values["steps"] == 4
    assert any("continuing after step 2" in note for note in again.notes) != loading


def test_a_finished_run_without_its_checkpoints_is_not_begun_over(project: Project) -> None:
    run(project.config(trainer={"max_steps": 2}), folder=project.folder)
    shutil.rmtree(project.run_dir / "checkpoints")
    before = {path.name: path.stat().st_mtime_ns for path in project.run_dir.iterdir()}
    for _ in range(2):
        with pytest.raises(InputError, match="its checkpoints are gone") as caught:
            run(project.config(trainer={"max_steps": 3}), folder=project.folder)
        assert "--fresh" in caught.value.render()
    after = {path.name: path.stat().st_mtime_ns for path in project.run_dir.iterdir()}
    told = before.keys() - {".lock", "process.json"}
    assert {name: after[name] for name in told} == {name: before[name] for name in told}


def test_one_step_of_nan_is_skipped(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    BrokenTeacher(monkeypatch, first=2, times=1)
    watcher = Watcher()
    run(project.config(), folder=project.folder, display=watcher)
    assert [row.get("skipped_updates") for row in project.metrics] == [None, 1.0, None, None]
    assert project.metrics[1]["teacher_kl"] is None, "NaN is null in JSON"
    assert any("step 2 brought no finite update" in note for note in watcher.notes)
    adapter = load_file(project.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


def test_three_steps_of_nan_end_the_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    BrokenTeacher(monkeypatch, first=2, times=99)
    with pytest.raises(RnowError, match="3 steps in a row") as caught:
        run(project.config(trainer={"save_step": 1}), folder=project.folder)
    assert caught.value.exit_code == EXIT_FAILED
    assert "step-00000" in str(caught.value)
    store = checkpoints.CheckpointStore(project.run_dir / "checkpoints", keep=2, warn=pytest.fail)
    saved = store.latest()
    assert saved is not None
    assert all(torch.isfinite(tensor).all() for tensor in saved.adapter.values())
    assert saved.state["updates"] == 1


def test_a_run_that_only_skipped_has_failed_however_often_it_is_started(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    BrokenTeacher(monkeypatch, first=1, times=2)
    config = project.config(trainer={"max_steps": 2})
    for fault in ("not finite", None):
        with pytest.raises(RnowError, match="nothing was trained") as caught:
            run(config, folder=project.folder)
        assert caught.value.exit_code == EXIT_FAILED
        assert fault is None or fault in str(caught.value.why)
        assert not (project.run_dir / "adapter").exists()
    run(project.config(trainer={"max_steps": 3}), folder=project.folder)
    assert (project.run_dir / "adapter").is_dir()


def test_ten_steps_of_nothing_end_the_run_and_are_saved(project: Project) -> None:
    """Every answer is worth the same, and the reference is the student's own start. The warm-up counts steps, of two
    updates each."""
    (project.folder / "rewards.py").write_text(
        "from rnow.core import reward\n\n@reward\ndef short(args, messages):\n    return 0.7\n"
    )
    trainer = {"num_epochs": 3, "updates_per_batch": 2, "warmup_steps": 3, "learning_rate": 6e-3}
    config = project.config(dataset_type="rl", teacher=None, trainer=trainer)
    watcher = Watcher()
    with pytest.raises(RnowError, match="10 steps in a row was exactly zero") as caught:
        run(config, folder=project.folder, display=watcher)
    assert caught.value.title == "Nothing to learn"
    assert "same reward" in caught.value.render()
    assert len([note for note in watcher.notes if "nothing was learned in step 1" in note]) == 1
    store = checkpoints.CheckpointStore(project.run_dir / "checkpoints", keep=2, warn=pytest.fail)
    saved = store.latest()
    assert saved is not None
    assert (saved.step, saved.state["updates"]) == (10, 20)
    # The rate of a step's last update.
    assert [row["lr"] for row in project.metrics[:4]] == pytest.approx([2e-3, 4e-3, 6e-3, 6e-3])


# ---- signals to the real program -----------------------------------------------------------------------------------


SLOW_DISK = """
import pathlib, sys, time
from rnow.__main__ import main
from rnow.training.saver import Saver

def rescue(saver, done):
    pathlib.Path("saving").touch()
    time.sleep(60)

Saver.rescue = rescue
sys.argv = ["rnow", "run"]
main()
"""


def start(
    project: Project,
    *,
    program: Sequence[str] = ("-m", "rnow", "run"),
    stdout: int = subprocess.PIPE,
    environment: Mapping[str, str] | None = None,
    **sections: Any,
) -> subprocess.Popen[str]:
    (project.folder / "config.yml").write_text(to_yaml(project.config(**sections)))
    source = Path(__file__).parents[2] / "src"
    return subprocess.Popen(
        [sys.executable, *program],
        cwd=project.folder,
        env=os.environ
        | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        | dict(environment or {}),
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ctrl_c_ends_with_130_and_the_state_saved(project: Project) -> None:
    process = start(project, trainer={"num_epochs": 200})
    wait_for(project.run_dir / "transcripts" / "step-000003.parquet", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, output
    assert "Traceback" not in output
    assert "run the same command again to continue" in " ".join(output.split())
    (saved, *_) = sorted((project.run_dir / "checkpoints").iterdir(), reverse=True)
    done = int(saved.name.removeprefix("step-"))
    assert done >= 3
    watcher = Watcher()
    config = project.config(trainer={"num_epochs": 200, "max_steps": done + 1})
    assert run(config, folder=project.folder, display=watcher).values["steps"] == done + 1
    assert any(f"continuing after step {done}" in note for note in watcher.notes)


def test_a_second_ctrl_c_ends_at_once(project: Project) -> None:
    """The first ends a reward that hangs and then waits for a disk that does; nothing holds up the second."""
    (project.folder / "rewards.py").write_text(
        "import pathlib, time\n"
        "from rnow.core import reward\n"
        "@reward\n"
        "def short(args, messages):\n"
        "    folder = pathlib.Path('runs/tiny/checkpoints/step-000001')\n"
        "    if folder.exists():\n"
        "        pathlib.Path('hangs').touch()\n"
        "        time.sleep(60)\n"
        "    return 1.0\n"
    )
    process = start(project, program=("-c", SLOW_DISK), trainer={"save_step": 1})
    wait_for(project.folder / "hangs", process)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    wait_for(project.folder / "saving", process)
    assert time.monotonic() - began < 10
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == EXIT_INTERRUPTED, output
    state = json.loads((project.run_dir / "checkpoints/step-000001/state.json").read_text())
    assert state["step"] == 1


# ---- nothing waits for ever ----------------------------------------------------------------------------------------------


def test_a_sampler_that_fails_before_it_draws_ends_the_run(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(lm: object) -> int:
        raise TypeError("head_dim differs per layer")

    monkeypatch.setattr(transformers_sampler, "kv_bytes_per_token", unknown)
    with pytest.raises(TypeError, match="differs per layer"):
        run(project.config(), folder=project.folder)


@pytest.mark.parametrize("stage", ["checking the models against each other", "rollout"])
def test_a_stop_is_heard_while_the_sampler_never_answers(
    project: Project, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    async def never(*arguments: object) -> None:
        await asyncio.get_running_loop().create_future()

    def hang() -> None:
        monkeypatch.setattr(transformers_sampler.TransformersSampler, "complete", never)
        os.kill(os.getpid(), signal.SIGTERM)

    began = time.monotonic()
    with pytest.raises(StopRequested) as caught:
        run(project.config(), folder=project.folder, display=Watcher().at(stage, 1, hang))
    assert caught.value.exit_code == EXIT_TERMINATED
    assert time.monotonic() - began < 60


def test_a_standstill_ends_with_75_and_the_state_saved(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*arguments: object) -> None:
        await asyncio.get_running_loop().create_future()

    def hang() -> None:
        monkeypatch.setattr(progress, "_due_at", 0.0)
        monkeypatch.setattr(transformers_sampler.TransformersSampler, "complete", never)

    with pytest.raises(TemporaryError, match="nothing got on") as caught:
        run(
            project.config(trainer={"watchdog_minutes": 0.05}),
            folder=project.folder,
            display=Watcher().at("rollout", 2, hang),
        )
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert ".never\n" in (project.run_dir / "stacks.txt").read_text()
    monkeypatch.undo()
    watcher = Watcher()
    run(project.config(), folder=project.folder, display=watcher)
    assert any("continuing after step 1" in note for note in watcher.notes)


HUNG_SERVICE = """
import atexit, time
from unittest.mock import MagicMock

class Settings:
    base_url = "https://wandb.test"
    def __init__(self, **settings): pass

Table = Artifact = MagicMock()

def init(**arguments):
    atexit.register(time.sleep, 600)
    return MagicMock(summary={}, starting_step=0, finish=lambda: time.sleep(600))
"""
LESS_PATIENCE = """
import sys
from rnow.cli import leave
from rnow.setup import build
build.CLOSE_SECONDS = leave.LEAVE_SECONDS = 1.0
from rnow.__main__ import main
sys.argv = ["rnow", "run"]
main()
"""


def test_a_metrics_service_that_does_not_come_back_ends_no_run(project: Project) -> None:
    """Neither its last words nor what it does at exit; and Ctrl-C is not needed."""
    service = project.folder / "service"
    service.mkdir()
    (service / "wandb.py").write_text(HUNG_SERVICE)
    source = Path(__file__).parents[2] / "src"
    environment = {"PYTHONPATH": f"{service}{os.pathsep}{source}", "WANDB_API_KEY": "k" * 40}
    process = start(
        project,
        program=("-c", LESS_PATIENCE),
        environment=environment,
        wandb_project="w",
        trainer={"max_steps": 1},
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "Weights & Biases did not finish" in output
    assert output.index("adapter") < output.index("did not finish")


def closed() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def never_read() -> int:
    _, write_end = os.pipe()  # the other end stays open in this process
    os.write(write_end, b"." * fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ))
    return write_end


@pytest.mark.parametrize("make", [closed, never_read])
def test_nobody_who_reads_decides_what_a_run_does(
    project: Project, make: Callable[[], int]
) -> None:
    shown_on = make()
    process = start(project, stdout=shown_on, trainer={"max_steps": 2})
    os.close(shown_on)
    assert process.wait(timeout=120) == 0
    assert [row["step"] for row in project.metrics] == [1, 2]
    assert (project.run_dir / "summary.json").exists()
