"""Sampler, teacher and trainer on one card: peak memory and tokens per second of each stage.

Real runs of the program: a student of the shape of Qwen3-0.6B sampled by vLLM, a teacher of the shape of Qwen3-4B, random
weights, a tokenizer of Qwen3's size. In 4 bits and in bfloat16, with the parts resident together and taking turns. Every case
is a process of its own. ``--tiny`` does the same with models of a hundred thousand parameters on the CPU.

    python benchmarks/one_card.py            # about 12 GB of disk in the temporary folder
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import write_results
from random_models import (
    QWEN3_06B,
    QWEN3_4B,
    QWEN3_IDS,
    TINY,
    write_model,
    write_prompts,
)

QUANTIZATIONS, RESIDENCIES = ("nf4", "none"), ("time_shared", "resident")
TOKENS_OF = {
    "rollout": "tokens/completion",
    "teacher": "tokens/total",
    "update": "tokens/total",
}
SAMPLED_EVERY = 0.02
BETWEEN = "between steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="on the CPU, tiny; writes nothing")
    parser.add_argument("--backend", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--quantization", choices=QUANTIZATIONS, nargs="*", default=QUANTIZATIONS)
    parser.add_argument("--residency", choices=RESIDENCIES, nargs="*", default=RESIDENCIES)
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "QUANTIZATION", "RESIDENCY"))
    arguments = parser.parse_args()
    if arguments.child:
        folder, quantization, residency = arguments.child
        try:
            row = measure(
                Path(folder),
                quantization,
                residency,
                tiny=arguments.tiny,
                backend=arguments.backend,
                steps=arguments.steps,
            )
        except Exception as error:  # a case that does not fit the card is a result, too
            row = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(row))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), tiny=arguments.tiny)
        for quantization in arguments.quantization:
            for residency in arguments.residency:
                rows.append(in_child(folder, quantization, residency, arguments))
                show(rows[-1])
    if not arguments.tiny:
        print(f"written to {write_results('one_card', rows)}")
    if any("error" in row for row in rows):
        sys.exit(1)


def in_child(
    folder: str, quantization: str, residency: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", folder, quantization, residency]
    command += ["--backend", arguments.backend, "--steps", str(arguments.steps)]
    command += ["--tiny"] if arguments.tiny else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    case = {"quantization": quantization, "residency": residency}
    if done.returncode:
        return case | {"error": f"its process ended with {done.returncode}"}
    return case | json.loads(done.stdout.splitlines()[-1])


def write_models(folder: Path, *, tiny: bool) -> None:
    """Student and teacher for all cases."""
    import torch

    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    student, teacher, ids = (TINY, TINY, 300) if tiny else (QWEN3_06B, QWEN3_4B, QWEN3_IDS)
    for seed, (name, shape) in enumerate({"student": student, "teacher": teacher}.items()):
        write_model(folder / name, shape, ids=ids, seed=seed, device=device)


def measure(
    folder: Path, quantization: str, residency: str, *, tiny: bool, backend: str, steps: int
) -> dict[str, Any]:
    """One run of ``steps`` steps in a project of its own below ``folder``."""
    import rnow

    prompts, group, prompt_tokens, new_tokens = (2, 2, 24, 8) if tiny else (8, 8, 256, 512)
    project = folder / f"{quantization}-{residency}"
    project.mkdir()
    write_prompts(project, prompts * steps, prompt_tokens)
    device = "cpu" if tiny else "cuda"
    common = {"device": device, "dtype": "bfloat16", "quantization": quantization}
    config = rnow.Config(
        dataset_type="distill",
        data={"batch_size": prompts, "group_size": group},
        model={"path": str(folder / "student"), "name": "one-card", **common},
        teacher={"path": str(folder / "teacher"), "backend": "transformers", **common},
        sampler={"backend": backend},
        rollout={"max_tokens": new_tokens, "max_context_window": 1024},
        trainer={"max_steps": steps},
        residency=residency,
    )
    memory = Memory(used_memory(tiny))
    display = watching(memory)
    with memory:
        rnow.run(config, folder=project, display=display)
    lines = (project / "runs" / "one-card" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    return {
        "steps": len(metrics),
        "prompts": prompts,
        "group_size": group,
        "new_tokens": new_tokens,
        "memory_of": "the process tree" if tiny else f"the card, {card_gb():.1f} GB",
        "peak_gb": {stage: peak / 1e9 for stage, peak in memory.peaks.items()},
        "tokens_per_s": {
            stage: rate(metrics[1:] or metrics, stage, tokens)
            for stage, tokens in TOKENS_OF.items()
        },
        "seconds": {
            name.removeprefix("time/"): mean(metrics[1:] or metrics, name)
            for name in metrics[-1]
            if name.startswith("time/")
        },
        "teacher_kl": [row["teacher_kl"] for row in metrics],
        "sampler_trainer_kl": [row["sampler_trainer_kl"] for row in metrics],
        "notes": display.notes,
    }


def card_gb() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 1e9


def rate(metrics: list[dict[str, float]], stage: str, tokens: str) -> float:
    """Tokens per second of a stage over all steps; the first is left out where there are more: it warms up."""
    return sum(row[tokens] for row in metrics) / sum(row[f"time/{stage}"] for row in metrics)


def mean(metrics: list[dict[str, float]], name: str) -> float:
    return sum(row.get(name, 0.0) for row in metrics) / len(metrics)


class Memory:
    """The most memory in use during each stage, asked for fifty times a second: the only measure that sees vLLM's
    process too."""

    def __init__(self, used: Callable[[], int]) -> None:
        self.peaks: dict[str, int] = {}
        self._used = used
        self._stage = "starting"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def enter(self, stage: str) -> None:
        """What is measured from now on belongs to ``stage``."""
        self._note(self._stage)
        self._stage = stage
        self._note(stage)

    def _note(self, stage: str) -> None:
        self.peaks[stage] = max(self.peaks.get(stage, 0), self._used())

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLED_EVERY):
            self._note(self._stage)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


def used_memory(tiny: bool) -> Callable[[], int]:
    """Bytes in use: of the card, whoever uses it, or of this process and its children."""
    if not tiny:
        import torch

        def card() -> int:
            free, total = torch.cuda.mem_get_info()
            return total - free

        return card

    from rnow.processes.leash import descendants

    def tree() -> int:
        found = 0
        for pid in {os.getpid(), *descendants(os.getpid())}:
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):  # ended meanwhile
                continue
            found += pages * os.sysconf("SC_PAGE_SIZE")
        return found

    return tree


def watching(memory: Memory) -> Any:
    """A display that tells ``memory`` what happens."""
    from rnow.display.display import QuietDisplay

    class Watch(QuietDisplay):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def stage(self, name: str) -> None:
            memory.enter(name)

        def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
            memory.enter(BETWEEN)
            sys.stderr.write(f"step {step} of {total}: {metrics['time/step']:.1f} s\n")

        def note(self, text: str) -> None:
            self.notes.append(text)

    return Watch()


def show(row: Mapping[str, Any]) -> None:
    print(f"{row['quantization']}, {row['residency']}:", flush=True)
    if "error" in row:
        print(f"    failed: {row['error']}", flush=True)
        return
    for stage, peak in row["peak_gb"].items():
        speed = row["tokens_per_s"].get(stage)
        shown = f"{speed:12,.0f} tokens/s" if speed else ""
        print(f"    {stage:40}{peak:8.2f} GB{shown}", flush=True)


if __name__ == "__main__":
    main()
