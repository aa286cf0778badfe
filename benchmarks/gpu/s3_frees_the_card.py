"""3. Does a sleeping model give the card back? For no quantisation, nf4 and int8, with and without expandable segments."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common_gpu import main

CASES = [
    (quantization, ready) for quantization in ("none", "nf4", "int8") for ready in (False, True)
]


def work(dry: bool) -> list[dict[str, Any]]:
    """Every case in a process of its own: an allocator's settings hold for its life."""
    from random_models import QWEN3_06B, QWEN3_IDS, TINY, write_model

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        shape, ids = (TINY, 300) if dry else (QWEN3_06B, QWEN3_IDS)
        write_model(Path(folder) / "model", shape, ids=ids, device="cpu" if dry else "cuda")
        for quantization, ready in CASES[:1] if dry else CASES:
            command = [
                sys.executable,
                __file__,
                "--child",
                folder,
                quantization,
                str(int(ready)),
                str(int(dry)),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            case = {"quantization": quantization, "ready_card": ready}
            lines = done.stdout.splitlines()
            if done.returncode or not lines:
                rows.append(case | {"error": done.stderr[-600:]})
            else:
                rows.append(case | json.loads(lines[-1]))
    return rows


def measure(folder: Path, quantization: str, ready: bool, dry: bool) -> dict[str, Any]:
    """What is used of the card with the model awake and asleep, and how long changing takes."""
    import torch

    from rnow.models.card import ready_card
    from rnow.models.loading import load_causal_lm
    from rnow.teacher.transformers import TransformersTeacher

    device = torch.device("cpu" if dry else "cuda")

    def used() -> float:
        if dry:
            return 0.0
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9

    if ready and not dry:
        ready_card(device)
    elif not dry:
        torch.cuda.init()
    row: dict[str, Any] = {"before_gb": used()}
    dtype = torch.float32 if dry else torch.bfloat16
    lm = load_causal_lm(
        folder / "model", vocabulary=300, dtype=dtype, device=device, quantization=quantization
    )
    teacher = TransformersTeacher(lm)
    ids = list(range(5, 69))
    expected = teacher.compute_logprobs(ids)
    row["awake_gb"] = used()
    started = time.perf_counter()
    asyncio.run(teacher.sleep())
    row |= {"sleep_s": time.perf_counter() - started, "asleep_gb": used()}
    if not dry:
        row["reserved_asleep_gb"] = torch.cuda.memory_reserved() / 1e9
    started = time.perf_counter()
    asyncio.run(teacher.wake())
    row |= {
        "wake_s": time.perf_counter() - started,
        "same": teacher.compute_logprobs(ids) == expected,
    }
    return row


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, where, kind, prepared, tiny = sys.argv
        print(json.dumps(measure(Path(where), kind, prepared == "1", tiny == "1")))
    else:
        main("s3_frees_the_card", __doc__ or "", work)
