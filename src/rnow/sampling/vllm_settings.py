"""What a vLLM for the student is started with, and how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from rnow.errors import ModelError

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``max_lora_rank`` that vLLM accepts (1 too, from some version on)."""

Quantization = Literal["none", "nf4"]
_SHORT = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """Of a server given by url only ``local_dir``, ``vocabulary``, ``work_dir``, ``max_num_seqs``, ``max_lora_rank``,
    ``probe`` and ``request_timeout`` count; ``dtype`` and ``quantization`` then say how far its probes may be off.

    Attributes:
        local_dir: the student's folder.
        vocabulary: the tokenizer's length; the head's rows above it get no probability.
        work_dir: where adapters are written for vLLM; emptied by ``close``.
        log: vLLM's output is appended here.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``. vLLM computes the adapter in the base's dtype.
        quantization: ``nf4`` needs vLLM's bitsandbytes support, from 0.32 on a package of its own.
        max_model_len: tokens of prompt and completion together; None takes the model's.
        gpu_memory_utilization: share of the card for weights and KV cache. On a CPU the environment variable
            VLLM_CPU_KVCACHE_SPACE (GiB, 2 by default) counts instead.
        max_num_seqs: completions in flight at once.
        engine: further arguments of the engine that is started, by vLLM's own names (``enforce_eager``, ...).
        max_lora_rank: the adapter's rank; vLLM is told the next one it knows.
        cards: on which the engine runs, numbered as this process sees them; none: wherever vLLM likes.
        enable_sleep: reserve what ``sleep`` needs; no use on a CPU.
        probe: a short text's ids, scored to see that vLLM still has the right weights; without any nothing is probed.
        measured: the probe's limits hold on this hardware. Where nobody has measured yet what is usual, a gap beyond them is
            told, and only one that no rounding makes is an error.
        gaps: every gap that a probe finds is appended here, a JSON object a line.
        request_timeout: seconds without any token or answer after which the engine counts as dead; with a server, seconds
            that one completion may take.
    """

    local_dir: Path
    vocabulary: int
    work_dir: Path
    log: Path
    dtype: str = "auto"
    quantization: Quantization = "none"
    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 256
    engine: Mapping[str, object] = field(default_factory=dict)
    cards: tuple[int, ...] = ()
    enable_sleep: bool = False
    trust_remote_code: bool = False
    max_lora_rank: int = 32
    probe: tuple[int, ...] = ()
    measured: bool = True
    gaps: Path | None = None
    request_timeout: float = 600.0

    @property
    def adapter_dtype(self) -> torch.dtype | None:
        """What the engine rounds an adapter to as it loads it, where that is 16 bits: rounding before gives the same numbers. None:
        it takes more, or does not say."""
        asked = self.engine.get("lora_dtype", "auto")
        return _SHORT.get(str(self.dtype if asked == "auto" else asked))

    @property
    def allowed_rank(self) -> int:
        """The smallest ``max_lora_rank`` of vLLM that holds this one; the adapter keeps its own.

        Raises:
            ModelError: vLLM has no room for this rank.
        """
        return allowed_rank(self.max_lora_rank)


def allowed_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` of vLLM that holds an adapter of this rank.

    Raises:
        ModelError: it has no room for it.
    """
    for allowed in LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ModelError(
        f"vLLM loads LoRA adapters up to rank {LORA_RANKS[-1]}, and this one has {rank}",
        where="model.qlora_rank",
        fix=f"use a rank of at most {LORA_RANKS[-1]}, or sampler.backend: transformers",
    )
