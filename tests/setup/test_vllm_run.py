"""Whole runs with the real vLLM: as sampler, and as the teacher's server."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.rollouts import read_transcripts
from tests.setup.projects import Project, Watcher

from rnow.processes.leash import descendants
from rnow.setup.build import run

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TWO_STEPS: dict[str, Any] = {
    "data": {"val_split": 0.25},
    "evaluation": {"num_samples": 1, "max_prompts": 2, "teacher": True},
    "trainer": {"max_steps": 2},
}


@pytest.fixture
def project(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> Project:
    return Project(tmp_path / "project", tiny_model_dir)


def vllm_processes() -> list[str]:
    """Command lines of this process's descendants that are vLLM's."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            # The environment of these tests may have vllm in its own name.
            if (
                "vllm" in command.replace(sys.prefix, "").lower()
                and f"RNOW_TEST={os.getpid()}".encode() in environment
            ):
                found.append(command)
    return found


@pytest.mark.parametrize(
    ("sampler", "teacher"),
    [({"backend": "vllm"}, {}), ({}, {"backend": "vllm"})],
    ids=["sampler", "teacher"],
)
def test_a_run_on_vllm(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    sampler: dict[str, Any],
    teacher: dict[str, Any],
) -> None:
    monkeypatch.setenv("RNOW_TEST", str(os.getpid()))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    # A teacher without padding rows: a served one could not leave them out of its softmax.
    project.teacher = project.make_model(seed=1, num_hidden_layers=1)
    config = project.config(**TWO_STEPS, sampler=sampler, teacher=teacher)
    summary = run(config, folder=project.folder)
    assert summary.values["sampler"]["backend"] == sampler.get("backend", "transformers")
    assert len(project.numbers) == 2
    for row in project.numbers:
        assert abs(row["sampler_trainer_kl"]) < 1e-3
        assert row["teacher_kl"] > 0
        assert row["completions/eos_fraction"] + row["completions/truncated_fraction"] == 1
    assert [row["name"] for row in project.evaluations] == ["before", "teacher", "after"]
    assert project.evaluations[1]["completions/mean_length"] > 0, "the teacher answered"
    assert (project.run_dir / "adapter" / "adapter_model.safetensors").exists()
    assert vllm_processes() == []


def test_an_engine_killed_in_the_middle_of_a_step_costs_no_number(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rollouts that are owed are drawn again by a new engine with the same adapter, and the run goes on."""
    monkeypatch.setenv("RNOW_TEST", str(os.getpid()))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    killed: list[int] = []

    def kill_soon() -> None:
        threading.Timer(0.5, lambda: killed.extend(kill_engines())).start()

    watcher = Watcher().at("rollout", 2, kill_soon)
    config = project.config(
        sampler={"backend": "vllm"}, rollout={"max_tokens": 300}, trainer={"max_steps": 3}
    )
    run(config, folder=project.folder, display=watcher)
    assert killed, "there was no engine to kill"
    assert [row["step"] for row in project.metrics] == [1, 2, 3]
    for step in (1, 2, 3):
        rows = read_transcripts(project.run_dir / "transcripts", step)
        assert len({row["id"] for row in rows}) == 4 * 2
        assert {row["status"] for row in rows} <= {"completed", "truncated"}
        assert all(token["kl"] is not None for row in rows for token in row["tokens"])
    for row in project.numbers:
        assert abs(row["sampler_trainer_kl"]) < 1e-3, "drawn from the adapter of its step"
        assert row["rollouts/failed_fraction"] == 0
    assert vllm_processes() == []


def kill_engines() -> list[int]:
    """kill -9 to the engine's own processes below this one."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"VLLM::" in command:
            os.kill(pid, signal.SIGKILL)
            found.append(pid)
    return found


@pytest.mark.parametrize("estimator", ["sampled", "topk"])
def test_a_served_teacher_gives_the_numbers_of_a_loaded_one(
    project: Project, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    project.teacher = project.make_model(seed=1, num_hidden_layers=1)
    for name, teacher in (("loaded", {}), ("served", {"backend": "vllm"})):
        config = project.config(
            **TWO_STEPS,
            teacher=teacher,
            model={"name": name},
            algorithm={"kl_estimator": estimator},
        )
        run(config, folder=project.folder)
    series = []
    for name in ("loaded", "served"):
        project.name = name
        series.append([row["teacher_kl"] for row in project.numbers])
    assert series[0] == pytest.approx(series[1], abs=1e-3)
