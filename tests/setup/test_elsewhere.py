"""A whole run whose policy and teacher live in other processes: nothing reaches for a raw model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.setup.elsewhere import (
    PolicyElsewhere,
    Process,
    TeacherElsewhere,
    student_process,
    teacher_process,
)
from tests.setup.projects import Killed, Project, Watcher, die

from rnow.plan.prepare import Prepared
from rnow.protocols import Policy, Teacher
from rnow.sampling.transformers import TransformersSampler
from rnow.setup import build
from rnow.setup.backends import Backends
from rnow.setup.models import load_model
from rnow.training.residency import Residency

SECTIONS: dict[str, Any] = {
    "data": {"val_split": 0.25},
    "evaluation": {"num_samples": 2, "teacher": False},
    "evals": [{"step": 2, "name": "often"}],
    "trainer": {"save_step": 2, "updates_per_batch": 2, "num_epochs": 2},
    "algorithm": {"kl_estimator": "sampled"},  # exact reads the head of a teacher in this process
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


def live_elsewhere(
    monkeypatch: pytest.MonkeyPatch, project: Project, processes: list[Process]
) -> None:
    """From now on a run's policy and teacher are in processes of their own. The sampler has a model of its own, too."""
    values = project.values(**SECTIONS)

    async def load_backends(
        prepared: Prepared, run_folder: Any, stack: ExitStack, *, poll: Any, stage: Any
    ) -> Backends:
        student = student_process(values, project.folder)
        teacher = teacher_process(values, project.folder)
        processes.extend((student, teacher))
        drawing = load_model(prepared.student, prepared.rendered)
        return Backends(
            student=student.call("facts"),
            policy=PolicyElsewhere(student),
            sampler=TransformersSampler.for_student(drawing, poll=poll),
            trainer_as_teacher=TeacherElsewhere(student),
            teacher=TeacherElsewhere(teacher),
            answering=[],
            gpu=Residency(),
            sampler_facts={"backend": "transformers", "mode": "merged weights"},
            poll=poll,
        )

    monkeypatch.setattr(build, "load_backends", load_backends)


def test_the_doubles_are_what_they_stand_for(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], processes: list[Process]
) -> None:
    project = Project(tmp_path, tiny_model_dir)
    process = student_process(project.values(), project.folder)
    processes.append(process)
    assert process.pid != os.getpid()
    policy: Any = PolicyElsewhere(process)
    assert isinstance(policy, Policy)
    assert isinstance(TeacherElsewhere(process), Teacher)
    assert policy.updates == 0
    with pytest.raises(ValueError, match="other layers"):
        policy.load_adapter({})


@pytest.mark.whole
def test_a_whole_run_gives_the_numbers_of_a_run_in_one_process(
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    processes: list[Process],
) -> None:
    """Self-check, evaluations, checkpoints, a kill in the middle of a step and the resume after it included."""
    here = Project(tmp_path / "here", tiny_model_dir)
    build.run(here.config(**SECTIONS), folder=here.folder)
    there = Project(tmp_path / "there", tiny_model_dir)
    live_elsewhere(monkeypatch, there, processes)
    config = there.config(**SECTIONS)
    with pytest.raises(Killed):
        build.run(config, folder=there.folder, display=Watcher().at("update", 4, die))
    watcher = Watcher()
    summary = build.run(config, folder=there.folder, display=watcher)
    assert any("continuing after step 2" in note for note in watcher.notes)
    assert summary.values["steps"] == 6
    assert there.numbers == here.numbers
    assert there.evaluations == here.evaluations
    weights = [p.run_dir / "adapter" / "adapter_model.safetensors" for p in (here, there)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
