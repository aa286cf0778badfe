"""``rnow eval`` with the real vLLM: the adapter and the served teacher answer as they do in transformers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.setup.projects import Project, read_jsonl
from tests.setup.test_evaluate import SECTIONS, make_project

from rnow.setup.build import run
from rnow.setup.eval_report import Evaluated
from rnow.setup.evaluate import Asked, evaluate

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

GREEDY = Asked(temperatures={1: 0.0}, samples=1)
"""Two samplers draw with two generators: only the likeliest answers can be compared."""


def test_an_adapter_and_a_teacher_answer_as_in_transformers(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    project = make_project(tmp_path / "project", tiny_model_dir)
    run(project.config(**SECTIONS, sampler={"backend": "transformers"}), folder=project.folder)
    student, *wanted = measured(project, "transformers", "student", "tiny", "teacher")
    found = measured(project, "vllm", "tiny", "teacher")
    assert said(student) != said(wanted[0]), "the adapter does something"
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.fresh
        assert mine.kept != theirs.kept, "who answered is part of what was measured"
        assert said(mine) == said(theirs)
        assert mine.pass_at == theirs.pass_at
    # Adapters and logs were in a folder of this process, which is not needed any more.
    left = [*(project.folder / "evals").iterdir(), *(project.run_dir / "evals").iterdir()]
    assert {path.suffix for path in left} == {".json", ".jsonl"}


def measured(project: Project, backend: str, *subjects: str) -> list[Evaluated]:
    sections: dict[str, Any] = SECTIONS | {
        "sampler": {"backend": backend},
        "teacher": {"backend": backend},
    }
    report = evaluate(
        project.config(**sections),
        subjects,
        folder=project.folder,
        asked=GREEDY,
        console=Console(file=io.StringIO()),
    )
    return [*report.rows]


def said(row: Evaluated) -> dict[str, str]:
    answers = read_jsonl(row.kept.with_name(f"{row.kept.stem}-t0.jsonl"))
    return {answer["id"]: answer["answer"][-1]["content"] for answer in answers}
