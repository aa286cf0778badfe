"""The vLLM server that rnow starts for a teacher: what it is told, and how its answers are limited."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rnow.errors import ConfigError
from rnow.serving.client import MAX_LOGPROBS
from rnow.serving.nf4 import ARGUMENT as BITSANDBYTES
from rnow.serving.nf4 import require_nf4
from rnow.serving.server import VllmServer, card_environment, require_vllm
from rnow.teacher.served import Asking

MAX_NUM_BATCHED_TOKENS = 1024
"""Prompt tokens per forward pass. vLLM materialises the logits of a whole chunk of the prompt: at 8,192 tokens and 151,936
ids that is 5 GB in float32, several times over; at 1,024 it is 0.6 GB."""

SERVED_NAME = "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherServerSettings:
    """What the server is started with.

    Attributes:
        log: its output is appended here.
        quantization: ``none``, ``nf4`` (bitsandbytes), or one of vLLM's own words (``fp8``, ``awq`` ...).
        gpu_memory_utilization: share of the card; None: vLLM's default.
        cards: on which it runs, numbered as this process sees them; none: wherever vLLM likes.
        max_num_batched_tokens: prompt tokens whose logits are in memory at once.
        max_model_len: tokens of the longest sample to be scored; None: the model's limit.
        enable_sleep: reserve what sleeping needs.
        samples: the teacher will answer prompts too.
    """

    local_dir: Path
    log: Path
    dtype: str = "auto"
    quantization: str = "none"
    tensor_parallel_size: int = 1
    cards: tuple[int, ...] = ()
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    max_model_len: int | None = None
    enable_sleep: bool = False
    trust_remote_code: bool = False
    samples: bool = False


def teacher_server(settings: TeacherServerSettings, asking: Asking) -> VllmServer:
    """The server, not started yet.

    Raises:
        ConfigError: a quantization that vLLM does not have.
        ModelError: vLLM is not installed, or cannot load nf4.
    """
    require_vllm("teacher.backend")
    environment = card_environment(settings.cards)
    if settings.max_model_len is not None:
        environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if settings.enable_sleep:
        environment["VLLM_SERVER_DEV_MODE"] = "1"
    return VllmServer(
        settings.local_dir,
        name=SERVED_NAME,
        log=settings.log,
        arguments=_arguments(settings, asking),
        env=environment,
        poll=asking.poll,
    )


def _arguments(settings: TeacherServerSettings, asking: Asking) -> list[str]:
    completions = asking.sampling_concurrency if settings.samples else 0
    batched = settings.max_num_batched_tokens
    # On a CPU a prompt prefilled in two parts makes vLLM rewind the request's random generator, which a CPU's cannot: the
    # engine dies.
    whole_prompts = settings.samples and not torch.cuda.is_available()
    if whole_prompts:
        batched = max(batched, (settings.max_model_len or 0) + 1)
    options = {
        "--dtype": settings.dtype,
        "--tensor-parallel-size": settings.tensor_parallel_size,
        "--max-num-batched-tokens": batched,
        "--max-num-seqs": max(asking.max_concurrency, completions),
        "--max-logprobs": max(MAX_LOGPROBS, asking.top_k),
        # Those of completions; prompts keep the model's own.
        "--logprobs-mode": "processed_logprobs",
    }
    if settings.max_model_len is not None:
        # vLLM insists on room for one more token, which is never fed back: it may lie past the model's limit.
        options["--max-model-len"] = settings.max_model_len + 1
    if settings.gpu_memory_utilization is not None:
        options["--gpu-memory-utilization"] = settings.gpu_memory_utilization
    if settings.quantization != "none":
        options["--quantization"] = _quantization(settings)
    arguments = [str(part) for option in options.items() for part in option]
    # Prompt log-probabilities are computed anew, cached or not.
    arguments += ["--no-enable-prefix-caching", "--enforce-eager"]
    if whole_prompts:
        arguments.append("--no-enable-chunked-prefill")
    if settings.trust_remote_code:
        arguments.append("--trust-remote-code")
    if settings.enable_sleep:
        arguments.append("--enable-sleep-mode")
    return arguments


def _quantization(settings: TeacherServerSettings) -> str:
    """vLLM's word for it."""
    if settings.quantization == "int8":
        raise ConfigError(
            "vLLM does not quantise to int8 while it loads",
            where="teacher.quantization",
            fix="use nf4 or fp8, or teacher.backend: transformers",
        )
    if settings.quantization == "nf4":
        require_nf4("teacher.quantization", dtype=settings.dtype)
        return BITSANDBYTES
    return settings.quantization
