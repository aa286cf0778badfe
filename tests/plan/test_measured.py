"""The plan against what each stage really takes, at three sizes: never below it, and at most 30 % above."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.plan.measured import held_bytes, peak_bytes
from tests.plan.test_memory import ROLES
from tests.policy.batches import make_batch

from rnow.algorithm import head as head_module
from rnow.algorithm.batching import build_batch, build_training_samples
from rnow.algorithm.exact import ExactDivergence
from rnow.algorithm.objective import Objective
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import TeacherNeeds
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.models.shape import shape_of
from rnow.models.streaming import StreamedLayers
from rnow.plan.memory import MemorySettings, ModelMemory, memory_parts
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling.decode import Request, decode
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import SamplingParams

ROWS, NEW = 4, 6
CPU = torch.device("cpu")
SIZES: dict[str, dict[str, Any]] = {
    "wide vocabulary": {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048, "tokens": 256,
    },
    "wide": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "tokens": 192,
    },
    "deep": {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 512, "tokens": 224,
    },
}  # fmt: skip


class Case:
    """A model of one size and four sequences of one length, which one pass takes together."""

    def __init__(self, make_model: Callable[..., Path], size: dict[str, Any], buffer: int) -> None:
        shape = dict(size)
        self.tokens: int = shape.pop("tokens")
        self.buffer = buffer
        self.folder = make_model(max_position_embeddings=1024, **shape)
        self.vocabulary: int = shape["vocab_size"]
        self.layers: int = shape["num_hidden_layers"]

    def load(self, *, streamed: bool = False) -> CausalLM:
        return load_causal_lm(
            self.folder,
            vocabulary=self.vocabulary,
            dtype=torch.float32,
            device=CPU,
            streamed=streamed,
        )

    def planned(
        self,
        lm: CausalLM,
        stage: str,
        *,
        recomputed: int = 0,
        hidden_states: bool = False,
        shared: int = 0,
        streamed: bool = False,
    ) -> int:
        """``shared``: tokens of a prompt that all rows have; otherwise each has one of its own. ``streamed``: the teacher is."""
        model = ModelMemory(
            role=ROLES["student"], shape=shape_of(lm.model), width=4, quantization="none"
        )
        teacher = replace(model, role=ROLES["teacher"], streamed=streamed)
        settings = MemorySettings(
            models={"student": model, "teacher": teacher},
            rank=16,
            adapter_parameters=16 * sum(map(sum, model.shape.linear)),
            rollouts=ROWS,
            prompts=1 if shared else ROWS,
            prompt_tokens=shared or self.tokens - NEW,
            completion_tokens=self.tokens - shared if shared else NEW,
            window=self.tokens,
            micro_batch_tokens=ROWS * self.tokens,
            scoring_tokens=ROWS * self.tokens,
            recomputed_layers=recomputed,
            cache_budget=10**12,
            head_tile=self.buffer,
            head_kept=self.buffer,
            hidden_states=hidden_states,
        )
        return sum(part.bytes for part in memory_parts(settings) if part.stage == stage)

    def batch(self, shared: int = 0) -> Any:
        batch = make_batch(("." * 16 + "X" * (self.tokens - 16),) * ROWS)
        if not shared:
            return batch
        prompt = batch.samples[0].sample.token_ids[:shared]
        own = [
            replace(i.sample, token_ids=(*prompt, *i.sample.token_ids[shared:]))
            for i in batch.samples
        ]
        return build_batch([replace(i, sample=s) for i, s in zip(batch.samples, own, strict=True)])


@pytest.fixture(params=SIZES)
def case(
    request: pytest.FixtureRequest,
    tiny_model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Case:
    buffer = 256 * 1024  # several chunks of rows, as with a real vocabulary
    monkeypatch.setattr(head_module, "CPU_BUFFER_BYTES", buffer)
    monkeypatch.setattr(head_module, "CPU_TILE_ROWS", 16)
    monkeypatch.setattr(head_module, "cpu_tile_bytes", lambda: buffer)
    return Case(tiny_model_dir, SIZES[request.param], buffer)


def check(planned: int, measured: int) -> None:
    assert measured <= planned <= 1.3 * measured, f"{planned / measured:.2f} of what was measured"


def test_loading(case: Case) -> None:
    lm = case.load()
    held = sum(p.nbytes for p in lm.model.parameters())
    parts = ModelMemory(
        role=ROLES["teacher"], shape=shape_of(lm.model), width=4, quantization="none"
    )
    check(round(parts.weight_bytes), held)


def test_scoring(case: Case) -> None:
    lm = case.load()
    teacher = TransformersTeacher(lm, micro_batch_tokens=ROWS * case.tokens)
    samples = [item.sample for item in case.batch().samples]
    check(case.planned(lm, "teacher"), peak_bytes(lambda: teacher.score_now(samples)))


def test_loading_for_streaming(case: Case) -> None:
    lm = case.load(streamed=True)
    assert lm.layers is not None
    held = sum(p.nbytes for p in (*lm.model.parameters(), *lm.layers.tensors) if not p.is_meta)
    model = ModelMemory(role=ROLES["teacher"], shape=shape_of(lm.model), width=4, quantization="none")  # fmt: skip
    check(round(replace(model, streamed=True).weight_bytes * 1.01), held)  # and what aligns them


@pytest.mark.parametrize("shared", [False, True])
def test_what_waits_while_a_streamed_teacher_scores(
    case: Case, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two layers, where one pass after the other has come to."""
    held: list[int] = []
    original = StreamedLayers._end

    def end(self: StreamedLayers, index: int) -> None:
        original(self, index)
        held.append(held_bytes())

    monkeypatch.setattr(StreamedLayers, "_end", end)
    lm = case.load(streamed=True)
    prompt = 3 * case.tokens // 4 if shared else 0
    samples = [item.sample for item in case.batch(prompt).samples]
    teacher = TransformersTeacher(lm, micro_batch_tokens=2 * case.tokens)
    held.clear()
    before = held_bytes()
    teacher.score_now(samples)
    most = max(held) - before
    resident = case.planned(lm, "teacher", shared=prompt)
    planned = case.planned(lm, "teacher", shared=prompt, streamed=True) - resident
    if shared:
        assert most <= planned
    else:
        check(planned, most)


def test_scoring_for_the_whole_distribution(case: Case) -> None:
    lm = case.load()
    teacher = TransformersTeacher(lm, micro_batch_tokens=ROWS * case.tokens)
    samples = [item.sample for item in case.batch().samples]
    found = peak_bytes(lambda: teacher.score_now(samples, TeacherNeeds(hidden=True)))
    check(case.planned(lm, "teacher", hidden_states=True), found)


def test_sampling(case: Case) -> None:
    lm = case.load()
    params = SamplingParams(max_tokens=NEW, stop_token_ids=(), temperature=1.0)
    length = case.tokens - NEW
    requests = [
        Request(
            prompt_token_ids=tuple((5 + 7 * i + row) % 90 for i in range(length)),
            params=params,
            seed=row,
        )
        for row in range(ROWS)
    ]

    def draw() -> Any:
        return decode(lm.body, lm.head, requests, device=CPU, poll=lambda: None)

    check(case.planned(lm, "sampling"), peak_bytes(draw))


def policy_of(case: Case, lm: CausalLM, objective: Objective, **settings: Any) -> LoraPolicy:
    return LoraPolicy(
        lm,
        rank=16,
        alpha=32,
        seed=0,
        base_name="tiny",
        objective=objective,
        optimizer=OptimizerSettings(),
        micro_batch_tokens=ROWS * case.tokens,
        **settings,
    )


RECOMPUTED = {
    "none": lambda layers: 0,
    "one": lambda layers: 1,
    "half": lambda layers: layers // 2,
    "all but one": lambda layers: layers - 1,
    "all": lambda layers: layers,
}


@pytest.fixture(params=["none", "half", "all"])
def recomputed(request: pytest.FixtureRequest, case: Case) -> int:
    return RECOMPUTED[request.param](case.layers)


@pytest.mark.parametrize("which", RECOMPUTED)
def test_the_update(case: Case, which: str) -> None:
    lm, recomputed = case.load(), RECOMPUTED[which](case.layers)
    planned = case.planned(lm, "update", recomputed=recomputed)
    objective = PolicyGradient(reward_coef=1.0)
    policy = policy_of(case, lm, objective, recomputed_layers=recomputed)
    batch = case.batch()
    policy.update(batch)  # the optimizer's state is there from the second on
    check(planned, peak_bytes(lambda: policy.update(batch)))


def test_the_update_of_a_group_that_shares_its_prompt(case: Case, recomputed: int) -> None:
    lm, shared = case.load(), 3 * case.tokens // 4
    planned = case.planned(lm, "update", recomputed=recomputed, shared=shared)
    policy = policy_of(case, lm, PolicyGradient(reward_coef=1.0), recomputed_layers=recomputed)
    batch = case.batch(shared)
    assert planned < case.planned(lm, "update", recomputed=recomputed)
    policy.update(batch)
    check(planned, peak_bytes(lambda: policy.update(batch)))


def test_scoring_a_group_that_shares_its_prompt(case: Case) -> None:
    lm, shared = case.load(), 3 * case.tokens // 4
    teacher = TransformersTeacher(lm, micro_batch_tokens=ROWS * case.tokens)
    samples = [item.sample for item in case.batch(shared).samples]
    check(
        case.planned(lm, "teacher", shared=shared), peak_bytes(lambda: teacher.score_now(samples))
    )


@pytest.mark.parametrize("divergence", ["reverse", "forward", "jsd"])
def test_the_update_with_the_whole_distribution(case: Case, divergence: Any) -> None:
    lm, teacher = case.load(), case.load()
    planned = case.planned(lm, "update", recomputed=case.layers, hidden_states=True)
    objective = ExactDivergence(heads={"teacher": teacher.head}, divergence=divergence)
    policy = policy_of(case, lm, objective, recomputed_layers=None)
    samples = [item.sample for item in case.batch().samples]

    def step() -> None:
        evidence = TransformersTeacher(teacher).score_now(samples, TeacherNeeds(hidden=True))
        zeros = {sample.id: 0.0 for sample in samples}
        batch = build_batch(build_training_samples(samples, zeros, evidence))
        policy.update(batch)

    step()
    # The scoring before the update takes less than the update: the peak is the update's, with the step's hidden states.
    check(planned, peak_bytes(step))
