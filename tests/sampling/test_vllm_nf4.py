"""A 4-bit base on the real vLLM: the same numbers as the trainer's own 4-bit base, with and without the adapter."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sampling.conformance import make_policy
from tests.teacher.conformance import make_sample

from rnow.models.loading import CausalLM, load_causal_lm
from rnow.sampling.vllm_engine import EngineBackend
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_settings import VllmSettings
from rnow.serving.nf4 import ARGUMENT, PLUGIN
from rnow.setup.vllm import probe_reference, trainer_tolerance
from rnow.teacher.transformers import TransformersTeacher
from rnow.teacher.vllm import VllmTeacher
from rnow.teacher.vllm_server import TeacherServerSettings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.metadata.entry_points(group="vllm.general_plugins", name=ARGUMENT),
        reason=f"needs {PLUGIN}",
    ),
]

IDS = [(7 * i) % 90 + 5 for i in range(60)]
BFLOAT16_MEAN = 0.02
"""Nats per token between two bfloat16 engines on the same weights; the wrong base is ten times as far away."""

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "vocab_size": 100,
}


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bfloat16, as real models are: one stored in float32 is rounded by the trainer before it is quantised, and
    not by vLLM."""
    made = tmp_path_factory.mktemp("nf4") / "model"
    plain = load(tiny_model_dir(**SHAPE), "none", torch.float32)
    plain.model.to(torch.bfloat16).save_pretrained(made)
    for file in tiny_model_dir(**SHAPE).glob("tokenizer*"):
        (made / file.name).write_bytes(file.read_bytes())
    return made


def load(folder: Path, quantization: Any, dtype: torch.dtype = torch.bfloat16) -> CausalLM:
    return load_causal_lm(
        folder,
        vocabulary=100,
        dtype=dtype,
        device=torch.device("cpu"),
        quantization=quantization,
    )


def mean_gap(found: list[float], lm: CausalLM) -> float:
    expected = TransformersTeacher(lm).compute_logprobs(IDS)[1:]
    return (torch.tensor(found) - torch.tensor(expected)).abs().mean().item()


def test_the_students_base_and_adapter(folder: Path, tmp_path: Path) -> None:
    """Also under the probes of a run: the base, and the adapter as the trainer computes it."""
    student = load(folder, "nf4")
    settings = VllmSettings(
        local_dir=folder,
        vocabulary=100,
        work_dir=tmp_path / "adapters",
        log=tmp_path / "engine.log",
        dtype="bfloat16",
        quantization="nf4",
        max_model_len=256,
        engine={"enforce_eager": True},
        max_num_seqs=8,
        max_lora_rank=8,
        probe=tuple(IDS[:24]),
    )
    sampler = VllmSampler(EngineBackend(settings))
    with closing(sampler):
        sampler.watch(probe_reference(student), tolerance=trainer_tolerance(student))
        sampler.start().result()
        base = asyncio.run(sampler._backend.probe(IDS, None))
        assert mean_gap(base, student) < BFLOAT16_MEAN
        assert mean_gap(base, load(folder, "none")) > 5 * BFLOAT16_MEAN, "4 bits do show"
        policy = make_policy(student)
        sampler.load_policy(policy.adapter(), version=1)
        adapted = asyncio.run(sampler._backend.probe(IDS, sampler._current))
    assert mean_gap(adapted, student) < 2 * BFLOAT16_MEAN
    assert (torch.tensor(adapted) - torch.tensor(base)).abs().mean() > 5 * BFLOAT16_MEAN


def test_a_managed_teacher(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = make_sample("a", 40)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    settings = TeacherServerSettings(
        local_dir=folder,
        log=tmp_path / "teacher.log",
        dtype="bfloat16",
        quantization="nf4",
        max_model_len=128,
    )
    teacher = VllmTeacher.managed(settings)
    try:
        found = asyncio.run(teacher.score([sample]))["a"].teacher_logprobs
    finally:
        teacher.close()
    gaps = {}
    for quantization in ("nf4", "none"):
        lm = load(folder, quantization)
        expected = TransformersTeacher(lm).score_now([sample])["a"].teacher_logprobs
        gaps[quantization] = (found - expected).abs().mean().item()
    assert gaps["nf4"] < BFLOAT16_MEAN
    assert gaps["none"] > 5 * BFLOAT16_MEAN
