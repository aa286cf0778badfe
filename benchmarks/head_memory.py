"""Peak memory of teacher scoring and of the update, against the same with full logits.

Full logits of T tokens take 4 * T * V bytes, several times over in a backward pass. The chunked head takes a fixed buffer.
Each measurement runs in a process of its own, so that no allocator keeps pages for the next.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

SEQUENCE = 256
CASES = [(8_192, 4096), (151_936, 512), (151_936, 1024), (151_936, 2048), (151_936, 4096)]
FULL_LIMIT = 2048  # full logits beyond this many tokens of 151,936 do not fit a small machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "V", "T"))
    arguments = parser.parse_args()
    if arguments.child:
        what, vocabulary, tokens = arguments.child
        print(json.dumps(measure(what, int(vocabulary), int(tokens))))
        return
    from common import write_results

    rows = []
    print(f"{'':10}{'V':>9}{'tokens':>8}{'chunked':>12}{'full':>12}{'ratio':>8}{'time ratio':>12}")
    for vocabulary, tokens in CASES:
        for what in ("score", "update"):
            row: dict[str, Any] = {"what": what, "vocabulary": vocabulary, "tokens": tokens}
            row["chunked"] = in_child(what, vocabulary, tokens)
            if vocabulary < 100_000 or tokens <= FULL_LIMIT:
                row["full"] = in_child(f"{what}-full", vocabulary, tokens)
            rows.append(row)
            print_row(row)
    print(f"written to {write_results('head_memory', rows)}")


def in_child(what: str, vocabulary: int, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", what, str(vocabulary), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, vocabulary: int, tokens: int) -> dict[str, float]:
    """Peak bytes beyond the loaded model, and seconds, of one pass over ``tokens`` loss tokens."""
    import torch
    from common import PeakMemory, qwen3

    from rnow.algorithm.batching import build_batch, build_training_samples
    from rnow.algorithm.policy_gradient import PolicyGradient
    from rnow.models.loading import take_apart
    from rnow.policy.student import LoraPolicy, OptimizerSettings
    from rnow.teacher.transformers import TransformersTeacher
    from rnow.types import Sample

    lm = take_apart(qwen3(vocabulary=vocabulary, hidden=128, layers=2), vocabulary=vocabulary)
    lm.model.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    samples = [
        Sample(
            id=str(index),
            dataset="dataset_0",
            token_ids=tuple(
                torch.randint(vocabulary, (SEQUENCE + 1,), generator=generator).tolist()
            ),
            loss_mask=(False, *[True] * SEQUENCE),
            sampler_logprobs=(0.0, *[-11.9] * SEQUENCE),
        )
        for index in range(tokens // SEQUENCE)
    ]
    token_ids = torch.tensor([sample.token_ids for sample in samples])
    if what == "score":
        teacher = TransformersTeacher(lm, micro_batch_tokens=tokens * 2)

        def work() -> None:
            teacher.score_now(samples)

    elif what == "score-full":

        @torch.inference_mode()
        def work() -> None:
            logits = lm.model(input_ids=token_ids).logits[:, :-1].float()
            torch.log_softmax(logits, -1).gather(-1, token_ids[:, 1:, None])

    else:
        evidence = TransformersTeacher(lm).score_now(samples)
        policy = LoraPolicy(
            lm,
            rank=8,
            alpha=16,
            seed=0,
            base_name="benchmark",
            objective=PolicyGradient(),
            optimizer=OptimizerSettings(),
            micro_batch_tokens=tokens * 2,
        )
        batch = build_batch(
            build_training_samples(samples, {sample.id: 0.0 for sample in samples}, evidence)
        )
        targets = torch.stack([evidence[s.id].teacher_logprobs for s in samples])

        def work() -> None:
            if what == "update":
                policy.update(batch)
                return
            logits = lm.model(input_ids=token_ids).logits[:, :-1].float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, token_ids[:, 1:, None]).squeeze(-1)
            advantages = -0.1 * (logprobs.detach() - targets)
            (-(torch.exp(logprobs + 11.9) * advantages).sum() / tokens).backward()

    with PeakMemory() as memory:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    return {"bytes": memory.extra, "seconds": seconds}


def print_row(row: dict[str, Any]) -> None:
    chunked, full = row["chunked"], row.get("full")
    line = f"{row['what']:10}{row['vocabulary']:>9,}{row['tokens']:>8,}{chunked['bytes'] / 1e6:>9.0f} MB"
    if full:
        line += f"{full['bytes'] / 1e6:>9.0f} MB{chunked['bytes'] / full['bytes']:>8.2f}"
        line += f"{chunked['seconds'] / full['seconds']:>12.2f}"
    print(line, flush=True)


if __name__ == "__main__":
    main()
