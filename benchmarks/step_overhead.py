"""How much of a training step is neither sampling, nor scoring, nor updating: a student of 100 million parameters on vLLM.

One run of the program with a teacher of the student's shape, float32, a checkpoint after every step. The wall time of a step
is from one step's end to the next one's, so that saving, transcripts and metrics are in it; the three stages are the
run's own ``time/*``. What is left is the overhead: loading the adapter into vLLM, the checkpoint, everything else. The first
step is left out (vLLM and torch warm up).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import write_results
from random_models import HUNDRED_MILLION, TINY, write_model, write_prompts

import rnow
from rnow.display.display import QuietDisplay

WORK = ("rollout", "teacher", "update")


class Watch(QuietDisplay):
    """Remembers when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.ends.append(time.perf_counter())
        row = times(metrics)
        if len(self.ends) > 1:
            row |= split(self.ends[-1] - self.ends[-2], row)
        print(f"step {step}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()), flush=True)

    def note(self, text: str) -> None:
        print(text)


def times(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by stage."""
    return {
        name.removeprefix("time/"): value
        for name, value in metrics.items()
        if name.startswith("time/")
    }


def measure(folder: Path, *, tiny: bool, backend: str, steps: int) -> dict[str, Any]:
    """Train ``steps`` + 1 steps in ``folder`` and split their wall time."""
    shape, ids = (TINY, 300) if tiny else (HUNDRED_MILLION, 31_900)
    prompts, group, prompt_tokens, new_tokens = (2, 2, 24, 8) if tiny else (8, 4, 64, 96)
    for seed, name in enumerate(("student", "teacher")):
        count = write_model(folder / name, shape, ids=ids, seed=seed, dtype="float32")
    write_prompts(folder, prompts * (steps + 1), prompt_tokens)
    config = rnow.Config(
        dataset_type="distill",
        data={"batch_size": prompts, "group_size": group},
        model={
            "path": str(folder / "student"),
            "name": "overhead",
            "device": "cpu",
            "dtype": "float32",
            "quantization": "none",
        },
        teacher={
            "path": str(folder / "teacher"),
            "device": "cpu",
            "dtype": "float32",
            "backend": "transformers",
        },
        sampler={"backend": backend},
        rollout={"max_tokens": new_tokens, "max_context_window": 256},
        trainer={"max_steps": steps + 1, "save_step": 1},
    )
    watch = Watch()
    rnow.run(config, folder=folder, display=watch)
    lines = (folder / "runs" / "overhead" / "metrics.jsonl").read_text().splitlines()
    rows = [times(json.loads(line)) for line in lines]
    walls = [after - before for before, after in zip(watch.ends, watch.ends[1:], strict=False)]
    per_step = [split(wall, row) for wall, row in zip(walls, rows[1:], strict=True)]
    seconds = {name: statistics.mean(row[name] for row in per_step) for name in per_step[0]}
    return {
        "parameters": count,
        "sampler": backend,
        "prompts": prompts,
        "group_size": group,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "lora_rank": config.model.qlora_rank,
        "steps": len(per_step),
        "seconds": seconds,
        "overhead_share": seconds["overhead"] / seconds["wall"],
        "overhead_share_worst_step": max(row["overhead"] / row["wall"] for row in per_step),
    }


def split(wall: float, row: Mapping[str, float]) -> dict[str, float]:
    """One step's wall time: the three stages, the adapter's way into vLLM, and what the clock of the step does not see:
    the checkpoint, transcripts, metrics."""
    found = {name: row[name] for name in WORK}
    overhead = wall - sum(found.values())
    others = {f"of_it_{name}": row[name] for name in row if name not in (*WORK, "step")}
    rest = overhead - sum(others.values())
    return {"wall": wall, **found, "overhead": overhead, **others, "of_it_saving_and_records": rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="measured steps")
    parser.add_argument("--backend", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--tiny", action="store_true", help="see that it works; writes nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(
            Path(folder), tiny=arguments.tiny, backend=arguments.backend, steps=arguments.steps
        )
    print(json.dumps(row, indent=2))
    if not arguments.tiny:
        print(f"written to {write_results('step_overhead', [row])}")


if __name__ == "__main__":
    main()
