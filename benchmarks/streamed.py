"""A streamed teacher against a resident one, on the CPU: equal scores, memory, seconds.

A random Qwen3 of 24 layers, hidden 1,024. Each mode scores the same rollouts in a process of its own, in turns, so that what
else the machine does falls on both; the files are in the page cache. Ends with status 1 where a bound is broken.

    python benchmarks/streamed.py
    python benchmarks/streamed.py --tiny      # to see that it works, without writing
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import write_results

MODES = ("resident", "streamed")
VOCABULARY = 8192
SLACK = 100e6
"""Anonymous memory beside two layers, embedding and head that a streamed teacher may take."""
SLOWER = 1.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16, help="rollouts in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a rollout")
    parser.add_argument("--micro", type=int, default=512, help="tokens of a micro-batch")
    parser.add_argument("--steps", type=int, default=4, help="the first of each process is dropped")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--child", nargs=2)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.layers, arguments.hidden, arguments.rows, arguments.pairs = 4, 128, 4, 1
    if arguments.child:
        print(json.dumps(child(*arguments.child, arguments)))
        return 0
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "teacher"
        sizes = make_model(folder, arguments.layers, arguments.hidden)
        make_model(folder.with_name("small"), layers=2, hidden=128)
        runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for _ in range(arguments.pairs):
            for mode in MODES:
                runs[mode].append(in_child(mode, folder))
    text, passed = report(runs, sizes, arguments)
    print(text)
    if not arguments.tiny:
        rows = [{"mode": mode, **run} for mode in MODES for run in runs[mode]]
        asked = {name: value for name, value in vars(arguments).items() if name != "child"}
        write_results("streamed", [{"settings": asked, "bytes": sizes}, *rows])
    return 0 if passed else 1


def make_model(folder: Path, layers: int, hidden: int) -> dict[str, float]:
    """Random float32 weights; bytes of its parts."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    layer = 4 * sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    table = 4 * VOCABULARY * hidden
    return {"layer": layer, "tables": 2 * table, "whole": layers * layer + 2 * table}


def in_child(mode: str, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, __file__, "--child", mode, str(folder), *sys.argv[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class Memory:
    """Anonymous memory of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.most = self.now()
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self.now())


def child(mode: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One mode: seconds of each step but the first, anonymous memory, a digest of the scores."""
    samples = make_samples(arguments)
    score(mode, Path(folder).with_name("small"), samples[:1], arguments, steps=1)  # what code takes
    base = Memory.now()
    memory = Memory()
    seconds, scores = score(mode, Path(folder), samples, arguments, steps=arguments.steps)
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(scores[sample.id].teacher_logprobs.numpy().tobytes())
    return {"seconds": seconds[1:], "memory": memory.most - base, "digest": digest.hexdigest()}


def score(
    mode: str, folder: Path, samples: Sequence[Any], arguments: argparse.Namespace, *, steps: int
) -> tuple[list[float], Any]:
    """Seconds of each step, and what the last one said."""
    import torch

    from rnow.models.loading import load_causal_lm
    from rnow.teacher.transformers import TransformersTeacher

    lm = load_causal_lm(
        folder,
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        device=torch.device("cpu"),
        streamed=mode == "streamed",
    )
    if mode == "resident":
        for parameter in lm.model.parameters():  # in memory of its own, not that of the page cache
            parameter.data = parameter.data.clone()
        object.__setattr__(lm.head, "weight", lm.model.lm_head.weight.data)
    teacher = TransformersTeacher(lm, micro_batch_tokens=arguments.micro)
    seconds, scores = [], {}
    for _ in range(steps):
        started = time.perf_counter()
        scores = teacher.score_now(samples)
        seconds.append(time.perf_counter() - started)
    return seconds, scores


def make_samples(arguments: argparse.Namespace) -> Sequence[Any]:
    import random

    from rnow.types import Sample

    draw, half = random.Random(0), arguments.length // 2
    return [
        Sample(
            id=str(row),
            dataset="d",
            token_ids=tuple(draw.randrange(VOCABULARY) for _ in range(arguments.length)),
            loss_mask=(False,) * half + (True,) * (arguments.length - half),
            sampler_logprobs=(0.0,) * arguments.length,
        )
        for row in range(arguments.rows)
    ]


def report(
    runs: dict[str, list[dict[str, Any]]], sizes: dict[str, float], arguments: argparse.Namespace
) -> tuple[str, bool]:
    """The table, and whether all of it is within bounds."""
    seconds = {mode: [s for run in runs[mode] for s in run["seconds"]] for mode in MODES}
    median = {mode: statistics.median(seconds[mode]) for mode in MODES}
    memory = {mode: max(run["memory"] for run in runs[mode]) for mode in MODES}
    allowed = 2 * sizes["layer"] + sizes["tables"] + SLACK
    equal = len({run["digest"] for mode in MODES for run in runs[mode]}) == 1
    ratio = median["streamed"] / median["resident"]
    lines = [
        f"A streamed teacher: {arguments.layers} layers, hidden {arguments.hidden}, {arguments.rows} x {arguments.length} "
        f"tokens, micro-batches of {arguments.micro}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"{arguments.pairs} processes each, in turns; page cache warm.",
        "",
        "| | seconds a step, median (range) | anonymous memory, at most |",
        "|---|---|---|",
    ]
    lines += [
        f"| {mode} | {median[mode]:.2f} ({min(seconds[mode]):.2f}-{max(seconds[mode]):.2f}) | {memory[mode] / 1e6:.0f} MB |"
        for mode in MODES
    ]
    lines += [
        "",
        f"- Scores equal bit for bit: {'yes' if equal else 'NO'}.",
        f"- Time: {ratio:.2f} of the resident one (bound {SLOWER:.2f}).",
        f"- Memory: {memory['streamed'] / 1e6:.0f} MB of {allowed / 1e6:.0f} MB allowed (two layers, embedding, head, "
        f"{SLACK / 1e6:.0f} MB; the whole model has {sizes['whole'] / 1e6:.0f} MB).",
    ]
    return "\n".join(lines), equal and ratio <= SLOWER and memory["streamed"] <= allowed


if __name__ == "__main__":
    sys.exit(main())
