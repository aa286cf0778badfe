"""6. A profile of one update of a random model of the shape of Qwen3-8B at 16k tokens: seconds per kernel, peak of memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common_gpu import main

SHAPE_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "vocab_size": 151_936,
}  # fmt: skip
TOP = 25


def work(dry: bool) -> list[dict[str, Any]]:
    """The second update, by stage and by kernel; the first warms up."""
    import torch
    from random_models import QWEN3_IDS, TINY, write_model

    from rnow.algorithm.batching import build_batch
    from rnow.algorithm.policy_gradient import PolicyGradient
    from rnow.algorithm.records import SampledEvidence, TrainingSample
    from rnow.models.loading import load_causal_lm
    from rnow.policy.student import LoraPolicy, OptimizerSettings
    from rnow.types import Sample

    device = torch.device("cpu" if dry else "cuda")
    shape, ids, rows, length = (TINY, 300, 2, 32) if dry else (SHAPE_8B, QWEN3_IDS, 4, 4096)
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "m", shape, ids=ids, device=str(device))
        dtype = torch.float32 if dry else torch.bfloat16
        lm = load_causal_lm(Path(folder) / "m", vocabulary=ids, dtype=dtype, device=device)
    policy = LoraPolicy(
        lm, rank=32, alpha=64, seed=0, base_name="random", objective=PolicyGradient(),
        optimizer=OptimizerSettings(), micro_batch_tokens=rows * length, recomputed_layers=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    samples = []
    for row in range(rows):
        tokens = torch.randint(5, ids, (length,), generator=generator).tolist()
        mask = tuple(position >= length // 8 for position in range(length))
        sample = Sample(
            id=f"d/{row}", dataset="d", token_ids=tuple(tokens), loss_mask=mask,
            sampler_logprobs=tuple(-12.0 * on for on in mask),
        )  # fmt: skip
        evidence = SampledEvidence(teacher_logprobs=torch.full((sum(mask),), -12.0))
        samples.append(TrainingSample(sample=sample, reward_advantage=0.0, evidence=evidence))
    batch = build_batch(samples)
    policy.update(batch)
    if not dry:
        torch.cuda.reset_peak_memory_stats()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [] if dry else [torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profile:
        policy.update(batch)
        if not dry:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    field = "self_cpu_time_total" if dry else "self_device_time_total"
    found = sorted(profile.key_averages(), key=lambda event: getattr(event, field), reverse=True)
    summary: dict[str, Any] = {"tokens": rows * length, "profiled_s": seconds}
    if not dry:
        summary["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return [
        summary,
        *(
            {"kernel": event.key[:120], "calls": event.count, "ms": getattr(event, field) / 1e3}
            for event in found[:TOP]
        ),
    ]


if __name__ == "__main__":
    main("s6_update_profile", __doc__ or "", work)
