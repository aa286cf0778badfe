"""Run folders made up on the spot, for what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from rnow.disk.folder import RunFolder
from rnow.disk.transcripts import schema, step_file, to_parquet

CONFIG: dict[str, Any] = {
    "dataset_type": "distill",
    "model": {"path": "student"},
    "teacher": {"path": "teacher"},
    "trainer": {"learning_rate": 0.001},
}


def rollout_row(
    step: int, prompt: int, index: int = 0, tokens: Sequence[str] = ("a", "b", "c"), **changes: Any
) -> dict[str, Any]:
    """A row of a transcript: the teacher finds each token 0.5 nats less likely than the student."""
    count = len(tokens)
    kl = changes.pop("kl", [0.5] * count)
    row: dict[str, Any] = {
        "step": step,
        "id": f"dataset_0/{prompt}#{index}",
        "prompt_id": f"dataset_0/{prompt}",
        "dataset": "dataset_0",
        "teacher": "teacher",
        "messages": [{"role": "user", "content": f"say {prompt}"}],
        "answer": [{"role": "assistant", "content": "".join(tokens)}],
        "status": "completed",
        "end_reason": "answer",
        "completion_tokens": count,
        "reward": 1.0,
        "rewards": {"accuracy": 1.0},
        "reward_errors": {},
        "teacher_kl": sum(kl) / count if kl and count else None,
        "turn": [0] * count,
        "token_ids": [ord(token[0]) for token in tokens],
        "tokens": list(tokens),
        "loss_mask": [True] * count,
        "sampler_logprobs": [-0.25] * count,
        "logprobs": [-0.25] * count,
        "teacher_logprobs": None if kl is None else [-0.25 - value for value in kl],
        "kl": kl,
        "entropy": [0.75] * count,
    }
    return row | changes


def write_transcript(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """``step-000001.parquet`` and its like."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        dict(row)
        | {name: json.dumps(row[name]) for name in ("messages", "answer")}
        | {name: list(row[name].items()) for name in ("rewards", "reward_errors")}
        for row in rows
    ]
    step_file(folder, step).write_bytes(to_parquet(pa.Table.from_pylist(written, schema=schema())))


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def metrics_row(step: int, steps: int, **changes: float | None) -> dict[str, float | None]:
    """A step of a run that gets better."""
    row: dict[str, float | None] = {
        "step": step,
        "loss": 0.1 / step,
        "entropy": 0.3,
        "teacher_kl": 1.0 - 0.9 * step / steps,
        "teacher_kl/dataset_0": 1.0 - 0.9 * step / steps,
        "grad_norm": 0.2,
        "lr": 0.001,
        "reward/mean": 0.5 + 0.5 * step / steps,
        "completions/mean_length": 3.0,
        "completions/truncated_fraction": 0.0,
        "completions/eos_fraction": 1.0,
        "rollouts/failed_fraction": 0.0,
        "tokens/completion": 12.0,
        "time/rollout": 0.2,
        "time/step": 0.5,
        "throughput/completion_tokens_per_s": 24.0,
        "memory/peak_gb": 0.5,
    }
    return row | changes


def make_run(path: Path, *, steps: int = 4, prompts: int = 4, config: Any = None) -> RunFolder:
    """A finished run of distill: each step asks each of ``prompts`` prompts once."""
    folder = RunFolder(path)
    path.mkdir(parents=True, exist_ok=True)
    numbers = range(1, steps + 1)
    write_lines(folder.metrics, [metrics_row(step, steps) for step in numbers])
    for step in numbers:
        write_transcript(
            folder.transcripts, step, [rollout_row(step, prompt) for prompt in range(prompts)]
        )
    evaluations = [
        {"name": "before", "step": 0, "pass@1": 0.25, "reward/mean": 0.25, "settings": "x"},
        {"name": "after", "step": steps, "pass@1": 0.75, "reward/mean": 0.75, "settings": "x"},
    ]
    write_lines(folder.evaluations, evaluations)
    for row, passed in zip(evaluations, (1, 3), strict=True):
        write_lines(
            folder.answers / f"{row['name']}.jsonl",
            [held_out_row(row["name"], row["step"], at, reward=at < passed) for at in range(4)],
        )
    facts = {"config": CONFIG if config is None else config, "student": "student", "seed": 0}
    folder.facts.write_text(json.dumps(facts | {"teacher": "teacher"}))
    folder.summary.write_text(json.dumps({"steps": steps, "wall_seconds": 12.5, "device": "cpu"}))
    return folder


def held_out_row(name: str, step: int, prompt: int, *, reward: bool, **changes: Any) -> Any:
    """A line of ``answers/``."""
    row = {
        "name": name,
        "step": step,
        "id": f"held/{prompt}#0",
        "prompt_id": f"held/{prompt}",
        "messages": [{"role": "user", "content": f"held out {prompt}"}],
        "answer": [{"role": "assistant", "content": f"{name} {int(reward)}"}],
        "status": "completed",
        "reward": float(reward),
    }
    return row | changes


def data_of(page: bytes) -> dict[str, Any]:
    """What the script of a page reads."""
    start = b'<script type="application/json" id="data">'
    return json.loads(page.split(start, 1)[1].split(b"</script>", 1)[0])
