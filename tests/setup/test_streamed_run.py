"""Whole runs with a streamed teacher: the numbers of a resident one, stops and kill -9 in the middle of a layer."""

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
from tests.rollouts import read_transcripts
from tests.setup.projects import Project, Watcher

from rnow.errors import ModelError, StopRequested, TemporaryError
from rnow.models.streaming import StreamedLayers
from rnow.setup.build import check, run

MakeModel = Callable[..., Path]
LAYERS, BEFORE = 4, 4
"""Of the teacher; passes before the first step: those that check its weights and how it shares rows, and two that must say the
same."""
SECTIONS: dict[str, Any] = {
    "trainer": {"max_steps": 3, "save_step": 1, "micro_batch_tokens": 40},
}
STREAMED: dict[str, Any] = {**SECTIONS, "teacher": {"residency": "streamed"}}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(folder: Path, make_model: MakeModel) -> Project:
    project = Project(folder, make_model)
    project.teacher = make_model(seed=1, num_hidden_layers=LAYERS, vocab_size=104)
    return project


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: MakeModel) -> Project:
    return make(tmp_path / "project", tiny_model_dir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    """A run with a resident teacher that nothing interrupts."""
    torch.set_num_threads(1)
    project = make(tmp_path_factory.mktemp("whole"), tiny_model_dir)
    run(project.config(**SECTIONS, teacher={"residency": "resident"}), folder=project.folder)
    return project


def assert_same_run(project: Project, whole: Project) -> None:
    assert project.numbers == whole.numbers
    for row in whole.numbers:
        mine, theirs = (
            read_transcripts(one.run_dir / "transcripts", row["step"]) for one in (project, whole)
        )
        assert mine == theirs
    name = Path("adapter") / "adapter_model.safetensors"
    assert (project.run_dir / name).read_bytes() == (whole.run_dir / name).read_bytes()


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that a streamed teacher has run, by index."""
    seen: list[int] = []
    original = StreamedLayers._end

    def end(self: StreamedLayers, index: int) -> None:
        seen.append(index)
        original(self, index)

    monkeypatch.setattr(StreamedLayers, "_end", end)
    return seen


def test_a_run_is_that_of_a_resident_teacher_bit_for_bit(
    project: Project, whole: Project, passed: list[int]
) -> None:
    run(project.config(**STREAMED), folder=project.folder)
    assert_same_run(project, whole)
    assert passed == [*range(LAYERS)] * (BEFORE + 3), "each layer once a step"


@pytest.mark.parametrize("algorithm", [{"kl_estimator": "exact"}, {"kl_estimator": "topk"}])
def test_its_distribution_is_that_too(
    project: Project, tmp_path: Path, tiny_model_dir: MakeModel, algorithm: dict[str, Any]
) -> None:
    run(project.config(**STREAMED, algorithm=algorithm), folder=project.folder)
    other = make(tmp_path / "other", tiny_model_dir)
    run(other.config(**SECTIONS, algorithm=algorithm), folder=other.folder)
    assert_same_run(project, other)


def test_a_stop_in_the_middle_of_a_layer_saves_and_the_run_goes_on(
    project: Project, whole: Project, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, ahead = StreamedLayers._begin, (BEFORE + 1) * LAYERS + 2  # in step 2, its layer 2

    def begin(self: StreamedLayers, index: int) -> None:
        original(self, index)
        if len(passed) == ahead:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StreamedLayers, "_begin", begin)
    with pytest.raises(StopRequested):
        run(project.config(**STREAMED), folder=project.folder)
    assert passed[-1] == 1
    monkeypatch.setattr(StreamedLayers, "_begin", original)
    watcher = Watcher()
    run(project.config(**STREAMED), folder=project.folder, display=watcher)
    assert any("continuing after step 1" in note for note in watcher.notes)
    assert_same_run(project, whole)


KILLED = """
import json, os, signal, sys
from pathlib import Path
import torch
from rnow.config import Config
from rnow.models.streaming import StreamedLayers
from rnow.setup import build
from tests.setup.projects import Watcher

torch.set_num_threads(1)
left, original = int(sys.argv[1]), StreamedLayers._end
def end(self, index):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, index)
StreamedLayers._end = end
build.run(Config(**json.loads(sys.argv[3])), folder=Path(sys.argv[2]), display=Watcher())
"""


def test_kill_9_in_the_middle_of_a_layer_changes_no_number(
    project: Project, whole: Project
) -> None:
    root = Path(__file__).parents[2]
    layers = (BEFORE + 1) * LAYERS + 3  # in step 2, before its last layer
    ended = subprocess.run(
        [
            sys.executable, "-c", KILLED, str(layers), str(project.folder),
            json.dumps(project.values(**STREAMED)),
        ],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    watcher = Watcher()
    run(project.config(**STREAMED), folder=project.folder, display=watcher)
    assert any("continuing after step 1" in note for note in watcher.notes)
    assert_same_run(project, whole)


def test_a_run_may_go_on_with_the_other_kind(project: Project, whole: Project) -> None:
    watcher = Watcher().at("update", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StopRequested):
        run(project.config(**SECTIONS), folder=project.folder, display=watcher)
    run(project.config(**STREAMED), folder=project.folder)
    assert_same_run(project, whole)


def test_weights_that_are_cut_off_while_it_runs_are_named_and_the_run_goes_on(
    project: Project, whole: Project, tmp_path: Path
) -> None:
    import shutil

    project.teacher = shutil.copytree(project.teacher, tmp_path / "teacher")
    file = project.teacher / "model.safetensors"
    content, state = file.read_bytes(), file.stat()
    watcher = Watcher().at("teacher", 2, lambda: file.write_bytes(content[: len(content) // 2]))
    with pytest.raises(TemporaryError, match="cannot be read any more") as caught:
        run(project.config(**STREAMED), folder=project.folder, display=watcher)
    assert caught.value.where == str(file)
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    run(project.config(**STREAMED), folder=project.folder)
    assert_same_run(project, whole)


def test_what_cannot_be_streamed_is_refused_before_anything_is_loaded(
    project: Project, tiny_model_dir: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.models.families.UNSTREAMED", {"qwen3": "it is odd"})
    monkeypatch.setattr("rnow.models.shape.UNSTREAMED", {"qwen3": "it is odd"})
    with pytest.raises(ModelError, match="cannot be streamed") as caught:
        check(project.config(**STREAMED), folder=project.folder)
    assert (caught.value.where, caught.value.why) == ("teacher.residency", "it is odd")
