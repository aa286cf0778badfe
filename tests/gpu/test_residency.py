"""One card for all, on a real card: sleep and wake of each part, and whole runs in turns. Models are random and made here."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.gpu.device import needs_cuda, needs_vllm
from tests.setup.projects import Project

from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.errors import TemporaryError
from rnow.models.loading import load_causal_lm
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling.vllm_engine import EngineBackend
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_settings import VllmSettings
from rnow.setup.build import run
from rnow.setup.vllm import probe_reference
from rnow.teacher.transformers import TransformersTeacher
from rnow.training.residency import Residency
from rnow.types import Adapter, Completion, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.slow, needs_cuda]

# Qwen3-shaped, and large enough to be seen beside a CUDA context: 250 MB in bfloat16.
SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "head_dim": 128,
    "num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.02,
    "vocab_size": 128,
}  # fmt: skip
VOCABULARY = 100
RANK = 8
SHARE = 0.3
IDS = tuple(range(5, 37))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def make_policy(folder: Path, quantization: str = "none") -> LoraPolicy:
    lm = load_causal_lm(
        folder,
        vocabulary=VOCABULARY,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        quantization=quantization,  # type: ignore[arg-type]
    )
    policy = LoraPolicy(
        lm,
        rank=RANK,
        alpha=2 * RANK,
        seed=0,
        base_name="random",
        objective=PolicyGradient(),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        recomputed_layers=None,
    )
    shift(policy, 0.02)
    return policy


def shift(policy: LoraPolicy, amount: float) -> None:
    """Move the adapter by an amount that shows in its log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    policy.load_adapter(
        {
            name: tensor + amount * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in policy.adapter().tensors.items()
        }
    )


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info()[0]


# ---- trainer and teacher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_loaded_teacher_frees_the_card_and_says_the_same_after(
    tiny_model_dir: Callable[..., Path], quantization: str
) -> None:
    lm = load_causal_lm(
        tiny_model_dir(**SHAPE),
        vocabulary=VOCABULARY,
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        quantization=quantization,  # type: ignore[arg-type]
    )
    teacher = TransformersTeacher(lm)
    expected = teacher.compute_logprobs(IDS)
    held = torch.cuda.memory_allocated()
    for _ in range(2):
        asyncio.run(teacher.sleep())
        assert torch.cuda.memory_allocated() < 0.05 * held
        asyncio.run(teacher.wake())
        assert teacher.compute_logprobs(IDS) == expected
    assert torch.cuda.memory_allocated() <= 1.05 * held


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_trainer_frees_the_card_and_learns_on_after(
    tiny_model_dir: Callable[..., Path], quantization: str
) -> None:
    from tests.policy.batches import make_batch

    policy = make_policy(tiny_model_dir(**SHAPE), quantization)
    policy.update(make_batch())
    score = probe_reference(policy.lm)
    before = {name: tensor.clone() for name, tensor in policy.adapter().tensors.items()}
    moments = {name: m.clone() for name, m in policy.state_dict()["moments"].items()}
    expected = score(IDS, True)
    kept = sum(tensor.nbytes for tensor in (*before.values(), *moments.values()))
    held = torch.cuda.memory_allocated() - kept  # ours for comparing
    asyncio.run(policy.sleep())
    assert torch.cuda.memory_allocated() - kept < 0.05 * held
    for name, tensor in policy.adapter().tensors.items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name].cpu())
    asyncio.run(policy.wake())
    for name, tensor in policy.adapter().tensors.items():
        assert torch.equal(tensor, before[name])
    for name, moment in policy.state_dict()["moments"].items():
        assert moment.device.type == "cuda"
        assert torch.equal(moment, moments[name])
    assert score(IDS, True) == expected
    assert not policy.update(make_batch()).skipped
    assert score(IDS, True) != expected


# ---- vLLM -----------------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    policy: LoraPolicy
    sampler: VllmSampler
    gpu: Residency

    def draw(self) -> Completion:
        params = SamplingParams(max_tokens=16, stop_token_ids=(0,), temperature=0.0)

        async def one() -> Completion:
            async with self.gpu.only("sampler"):
                return await self.sampler.complete(IDS, params, 1)

        return asyncio.run(one())

    def sync(self, version: int) -> None:
        async def load() -> None:
            async with self.gpu.only("trainer"):
                self.sampler.load_policy(self.policy.adapter(), version=version)

        asyncio.run(load())


@pytest.fixture(scope="module", params=[pytest.param(None, id="engine", marks=needs_vllm)])
def shared(
    tiny_model_dir: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Shared]:
    folder, work = tiny_model_dir(**SHAPE), tmp_path_factory.mktemp("one card")
    settings = VllmSettings(
        local_dir=folder,
        vocabulary=VOCABULARY,
        work_dir=work / "adapters",
        log=work / "log",
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=16,
        gpu_memory_utilization=SHARE,
        engine={"enforce_eager": True},
        enable_sleep=True,
        max_lora_rank=RANK,
        probe=IDS,
    )
    sampler = VllmSampler(EngineBackend(settings))
    gpu = Residency()
    with closing(sampler):
        sampler.start().result()
        gpu.add("sampler", sampler)

        async def load() -> LoraPolicy:
            async with gpu.only("trainer"):
                return make_policy(folder)

        policy = asyncio.run(load())
        gpu.add("trainer", policy)
        sampler.watch(probe_reference(policy.lm))
        yield Shared(policy, sampler, gpu)


def test_it_can_sleep(shared: Shared) -> None:
    assert shared.sampler._backend.supports_sleep


def test_asleep_it_leaves_the_card_to_others(shared: Shared) -> None:
    shared.sync(1)
    shared.draw()
    awake = free_bytes()
    asyncio.run(shared.sampler.sleep())
    total = torch.cuda.mem_get_info()[1]
    assert free_bytes() - awake > 0.7 * SHARE * total
    asyncio.run(shared.sampler.wake())
    assert abs(free_bytes() - awake) < 0.1 * SHARE * total


def test_after_waking_it_draws_what_it_drew(shared: Shared) -> None:
    shared.sync(2)
    before = shared.draw()
    for _ in range(3):
        asyncio.run(shared.sampler.sleep())
        after = shared.draw()
        assert after.token_ids == before.token_ids
        assert after.logprobs == pytest.approx(before.logprobs, abs=2e-2)
    assert shared.sampler._starts == 1, "each wake found the base that it was"


def test_an_adapter_that_came_while_it_slept_is_the_trainers(shared: Shared) -> None:
    shared.sync(3)
    before = shared.draw()
    asyncio.run(shared.sampler.sleep())
    shift(shared.policy, 0.02)
    shared.sync(4)
    after = shared.draw()
    assert after.policy_version == 4
    assert after != before
    assert shared.sampler._proven, "the adapter was held against the trainer"
    assert shared.sampler._starts == 1


def test_killed_in_its_sleep_it_is_started_once(shared: Shared) -> None:
    import os
    import signal

    shared.sync(5)
    before = shared.draw()
    asyncio.run(shared.sampler.sleep())
    backend: Any = shared.sampler._backend
    pids = backend._process.pids()
    (core,) = [pid for pid in pids if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(core, signal.SIGKILL)
    after = shared.draw()
    assert shared.sampler._starts == 2
    assert after.token_ids == before.token_ids


def test_an_adapter_that_is_not_the_trainers_is_found(shared: Shared) -> None:
    """Last: it ends the sampler."""
    shared.sync(6)
    shared.draw()
    adapter = shared.policy.adapter()
    other = {name: 3 * tensor for name, tensor in adapter.tensors.items()}
    shared.sampler.load_policy(Adapter(tensors=other, config=adapter.config), version=7)
    with pytest.raises(TemporaryError, match="adapter version 7"):
        shared.draw()


# ---- whole runs -----------------------------------------------------------------------------------------------------

CASES = [
    pytest.param({"backend": "transformers"}, {}, id="embedded"),
    pytest.param({"backend": "vllm"}, {}, id="engine", marks=needs_vllm),
    pytest.param({"backend": "vllm"}, {"backend": "vllm"}, id="served teacher", marks=needs_vllm),
]


@pytest.mark.parametrize(("sampler", "teacher"), CASES)
def test_a_run_in_turns(
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    sampler: dict[str, Any],
    teacher: dict[str, Any],
) -> None:
    def make(**config: Any) -> Path:
        return tiny_model_dir(**(SHAPE | {"seed": config["seed"], "vocab_size": VOCABULARY}))

    project = Project(tmp_path, make)
    config = project.config(
        model={"device": "cuda", "quantization": "none"},
        teacher={"device": "cuda"} | teacher,
        sampler=sampler,
        residency="time_shared",
        data={"val_split": 0.25},
        evaluation={"num_samples": 1, "max_prompts": 2, "teacher": False},
        trainer={"max_steps": 2, "save_step": 1},
    )
    summary = run(config, folder=tmp_path)
    assert summary.values["steps"] == 2
    own_sampler = sampler["backend"] == "vllm"  # the embedded one sleeps and wakes as the trainer
    for row in project.metrics:
        assert row["time/wake_teacher"] > 0
        assert row["time/wake_trainer"] > 0
        assert row["time/wake_sampler"] > 0
        assert ("time/sleep_trainer" in row) == own_sampler
        assert abs(row["sampler_trainer_kl"]) < 0.05
        assert row["teacher_kl"] > 0
