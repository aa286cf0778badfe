"""Run folders as runs leave them, written by what writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rnow.disk.folder import RunFolder
from rnow.disk.sinks import JsonlSink

PROMPTS = tuple(f"dataset_0/{number}" for number in range(8))


def make_run(
    folder: Path,
    *,
    steps: int = 20,
    metrics: Mapping[str, Callable[[int], float]] | None = None,
    config: Mapping[str, object] | None = None,
    facts: Mapping[str, object] | None = None,
) -> RunFolder:
    """A run with a course for each metric; ``teacher_kl`` falls by itself."""
    run = RunFolder(folder)
    folder.mkdir(parents=True)
    sink = JsonlSink(run.metrics, run.evaluations, warn=pytest.fail)
    courses = {"teacher_kl": lambda step: 1 / step, **(metrics or {})}
    for step in range(1, steps + 1):
        sink.log(step, {name: of(step) for name, of in courses.items()})
    whole = {"run": "a" * 16, "config": {"seed": 0, **(config or {})}, **(facts or {})}
    run.facts.write_text(json.dumps(whole))
    return run


def evaluate(
    run: RunFolder,
    name: str,
    step: int,
    passed: Sequence[int],
    *,
    of: int = 4,
    said: str = "How many?",
) -> None:
    """An evaluation of the run itself: of each prompt, how many of its answers passed."""
    sink = JsonlSink(run.metrics, run.evaluations, warn=pytest.fail)
    mean = sum(passed) / len(passed) / of
    sink.evaluated(name, step, {"pass@1": mean, "teacher_kl": 0.5, "completions/mean_length": 9.0})
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "step": step,
            "id": f"{prompt}#{number}",
            "prompt_id": prompt,
            "messages": [{"role": "user", "content": f"{said} {prompt}"}],
            "answer": [],
            "reward": float(number < right),
            "rewards": {"right": float(number < right)},
            "reward_errors": {},
        }
        for prompt, right in zip(PROMPTS, passed, strict=False)
        for number in range(of)
    ]
    run.answers.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run.answers / f"{name}.jsonl").write_text(text)


def keep_eval(run: RunFolder, step: int, passed: Mapping[str, int], *, prompts: str = "p") -> None:
    """What ``rnow eval`` keeps of a step of the run."""
    (run.path / "evals").mkdir(exist_ok=True)
    kept = {
        "subject": {"name": run.path.name},
        "measured": {
            "adapter": f"{run.path.name}{step}",
            "prompts": prompts,
            "samplings": [[0.6, 4, [1, 4]]],
            "seed": 0,
        },
        "samplings": [
            {"temperature": 0.6, "samples": 4, "pass_at": [1, 4], "passed": dict(passed)}
        ],
    }
    path = run.path / "evals" / f"step-{step:06d}-{prompts}0000000.json"
    path.write_text(json.dumps(kept))
