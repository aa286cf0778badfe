"""Every family of causal LMs: sampler, teacher and trainer give the numbers of a plain forward pass, or it is refused."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models import families
from tests.models.families import VOCABULARY, every_family, exact_families, tiny_model

from rnow.algorithm.batching import build_batch
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import Batch, SampledEvidence, TrainingSample
from rnow.errors import ModelError
from rnow.models.families import SHARES_ROWS, UNSAMPLED, UNUSABLE
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.models.resolved import ResolvedModel
from rnow.models.shape import build_empty
from rnow.policy.lora import count_adapter
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling.transformers import TransformersSampler
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Completion, Sample, SamplingParams

TOLERANCE = 2e-5
LENGTHS = (5, 13, 21)
NOISE = 0.3  # what dropout and jitter are set to: none of it may reach a number
# A threshold that is there in evaluation too; one that the family itself refuses.
FIXED = {("phimoe", "router_jitter_noise"), ("diffllama", "attention_dropout")}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(family: str, folder: Path, **changes: Any) -> Path:
    tiny_model(family, **changes).save_pretrained(folder)
    return folder


def load(folder: Path, **changes: Any) -> CausalLM:
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "window": 64}
    return load_causal_lm(folder, vocabulary=VOCABULARY, **settings | changes)


def build_policy(lm: CausalLM, **changes: Any) -> LoraPolicy:
    """A policy whose adapter has left the identity."""
    policy = LoraPolicy(
        lm,
        rank=2,
        alpha=4,
        seed=0,
        base_name="x",
        objective=PolicyGradient(loss_fn="importance_sampling", kl_penalty_coef=1.0),
        optimizer=OptimizerSettings(learning_rate=1e-3),
        **changes,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy._parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return policy


def prompts() -> list[tuple[int, ...]]:
    """Of different lengths, one of them twice."""
    draw = random.Random(0)
    found = [tuple(draw.randrange(3, VOCABULARY) for _ in range(n)) for n in LENGTHS]
    return [found[0], *found]


def sample(sampler: TransformersSampler, asked: Sequence[tuple[int, ...]]) -> list[Completion]:
    async def one(prompt: tuple[int, ...], seed: int) -> Completion:
        with sampler.live_rollout():
            params = SamplingParams(max_tokens=4 + 3 * seed, stop_token_ids=(2,))
            return await sampler.complete(prompt, params, seed)

    async def all_of_them() -> list[Completion]:
        return list(await asyncio.gather(*[one(p, seed) for seed, p in enumerate(asked)]))

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


@torch.no_grad()
def plain_logprobs(model: Any, token_ids: Sequence[int]) -> list[float]:
    """Of each token but the first, by the whole model on this sequence alone."""
    ids = torch.tensor(token_ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :, :VOCABULARY].float()
    return torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()


def batch_of(samples: Sequence[Sample]) -> Batch:
    return build_batch(
        [
            TrainingSample(
                sample=item,
                reward_advantage=0.0,
                evidence=SampledEvidence(teacher_logprobs=torch.full((sum(item.loss_mask),), -5.0)),
            )
            for item in samples
        ]
    )


def gradient(policy: LoraPolicy) -> torch.Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy._parameters.values()]
    return torch.cat([part.flatten() for part in parts])


def noisy(family: str) -> dict[str, float]:
    """Every dropout and jitter of the family, switched on."""
    if "text_config" in families.SPECIAL.get(family, {}):
        return {}
    return {
        name: NOISE
        for name, value in vars(families.tiny_config(family)).items()
        if isinstance(value, float)
        and ("drop" in name or "jitter" in name)
        and (family, name) not in FIXED
    }


@pytest.mark.parametrize("family", exact_families())
def test_sampler_teacher_and_trainer_are_the_plain_forward(family: str, tmp_path: Path) -> None:
    lm = load(save(family, tmp_path, **noisy(family)))
    written_out = load(tmp_path, attn_implementation="eager").model
    first = torch.tensor(plain_logprobs(lm.model, prompts()[-1]))
    close(torch.tensor(plain_logprobs(written_out, prompts()[-1])), first, "attention kernel")
    sampler = TransformersSampler.for_student(lm)
    policy = build_policy(
        lm, recomputed_layers=None if lm.model.supports_gradient_checkpointing else 0
    )
    sampler.load_policy(policy.adapter(), version=0)

    asked = prompts()
    answers = sample(sampler, asked)
    samples, expected = [], []
    for number, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        ids = (*prompt, *answer.token_ids)
        own = plain_logprobs(policy.model, ids)
        expected.append(torch.tensor(own[len(prompt) - 1 :]))
        close(torch.tensor(answer.logprobs), expected[-1], "sampler")
        mask = (False,) * len(prompt) + (True,) * len(answer.token_ids)
        item = Sample(
            id=str(number),
            dataset="d",
            token_ids=ids,
            loss_mask=mask,
            sampler_logprobs=(0.0, *own),
        )
        samples.append(item)

    alone = sample(sampler, asked[:1])  # nothing is padded: no mask
    close(torch.tensor(alone[0].logprobs), torch.tensor(answers[0].logprobs), "sampler alone")

    scored = TransformersTeacher(lm).score_now(samples)
    live = policy._accumulate(batch_of(samples)).by_sample()["logprobs"]
    for item, values in zip(samples, expected, strict=True):
        close(scored[item.id].teacher_logprobs, values, "teacher")
        close(live[item.id], values, "trainer")
    checkpointed = gradient(policy)
    policy._recomputing = []
    policy._accumulate(batch_of(samples))
    assert torch.isfinite(checkpointed).all()
    assert checkpointed.any()
    shared = gradient(policy).clone()
    torch.testing.assert_close(checkpointed, shared, rtol=1e-3, atol=1e-6)
    assert (lm.sharing is not None) == (family in SHARES_ROWS), lm.separate
    assert bool(lm.separate) == (lm.sharing is None)
    if lm.sharing is not None:
        assert any(
            part.per_row and max(part.per_row) > 1 for part in policy._plan(batch_of(samples))
        )
        policy.lm = replace(lm, sharing=None)
        policy._accumulate(batch_of(samples))
        apart = gradient(policy)
        torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5 * apart.abs().max().item())
        policy.lm = lm
    assert policy.update(batch_of(samples)).skipped is None

    resolved = ResolvedModel(path=family, local_dir=tmp_path, revision=None, weights_bytes=0)
    planned = count_adapter(build_empty(resolved, sampled=True), rank=2, targets=("all-linear",))
    assert planned == sum(p.numel() for p in policy._parameters.values())


def close(found: torch.Tensor, expected: torch.Tensor, who: str) -> None:
    gap = (found.float() - expected.float()).abs().max().item()
    assert gap <= TOLERANCE, f"the {who} is off by {gap:.2g} nats"


@pytest.mark.parametrize("family", sorted({*UNUSABLE} & {*every_family()}))
def test_an_unusable_family_is_refused_by_its_config(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
    resolved = ResolvedModel(path="m", local_dir=tmp_path, revision=None, weights_bytes=0)
    with pytest.raises(ModelError, match=f"family {family}") as caught:
        build_empty(resolved, key="teacher.path")
    assert caught.value.where == "teacher.path"
    assert caught.value.why


@pytest.mark.parametrize("family", sorted(UNSAMPLED))
def test_what_cannot_be_sampled_is_refused_as_student_only(family: str, tmp_path: Path) -> None:
    lm = load(save(family, tmp_path))
    resolved = ResolvedModel(path="m", local_dir=tmp_path, revision=None, weights_bytes=0)
    with pytest.raises(ModelError, match=f"family {family}"):
        build_empty(resolved, sampled=True)
    build_empty(resolved, sampled=False)
    ids = prompts()[1] + prompts()[2]
    expected = torch.tensor(plain_logprobs(lm.model, ids))
    close(torch.tensor(TransformersTeacher(lm).compute_logprobs(ids)[1:]), expected, "teacher")


def test_every_family_is_in_one_list_and_on_the_page() -> None:
    known = {*UNUSABLE, *UNSAMPLED, *families.UNTRIED}
    assert known <= {*every_family()}, "a name that transformers does not know"
    assert len(exact_families()) > 100
    assert PAGE.read_text(encoding="utf-8") == families.page(), (
        "run: python -m tests.models.families docs/models.md"
    )


LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16} | {
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
    "factor": 8.0,
    "partial_rotary_factor": 1.0,
}
MIXED = LONG | {"short_mscale": 1.0, "long_mscale": 1.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PHI = {"original_max_position_embeddings": 16, "rope_parameters": LONG}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", PHI),
        ("phimoe", {"original_max_position_embeddings": 16, "rope_parameters": MIXED}),
        ("llama", {"max_position_embeddings": 16, "rope_parameters": DYNAMIC}),
    ],
)
@pytest.mark.parametrize("window", [16, 64])
def test_scores_do_not_depend_on_who_shares_the_batch(
    family: str, changes: dict[str, Any], window: int, tmp_path: Path
) -> None:
    """Rotary factors that follow the longest row would move a sample's scores by a nat."""
    lm = load(save(family, tmp_path, **changes), window=window)
    draw = random.Random(1)
    ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(60))

    def scores(*lengths: int) -> torch.Tensor:
        items = [
            Sample(
                id=str(n),
                dataset="d",
                token_ids=ids[:n],
                loss_mask=(False,) * 4 + (True,) * (n - 4),
                sampler_logprobs=(0.0,) * n,
            )
            for n in lengths
        ]
        return TransformersTeacher(lm).score_now(items)[str(lengths[0])].teacher_logprobs

    close(scores(12), scores(12, 14 if window == 16 else 60), "company")
    sampler = TransformersSampler(lm, mode=None)
    prompt = ids[:8]
    (answer,) = sample(sampler, [prompt])
    if window == 64:  # an answer that grows past the switch
        params = SamplingParams(max_tokens=30, stop_token_ids=())

        async def long() -> Completion:
            return await sampler.complete(prompt, params, 5)

        answer = asyncio.run(long())
        assert len(answer.token_ids) == 30
    teacher = TransformersTeacher(lm).compute_logprobs((*prompt, *answer.token_ids))
    close(torch.tensor(answer.logprobs), torch.tensor(teacher[len(prompt) :]), "sampler")


def test_the_window_chooses_the_factors(tmp_path: Path) -> None:
    folder = save("phi3", tmp_path, **PHI)
    ids = prompts()[1]
    short, long = (
        torch.tensor(TransformersTeacher(load(folder, window=window)).compute_logprobs(ids)[1:])
        for window in (16, 64)
    )
    assert (short - long).abs().max() > 0.01
    close(short, torch.tensor(plain_logprobs(load(folder, window=None).model, ids)), "short")


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (("all-linear",), "q_proj k_proj v_proj o_proj"),
        (("q_proj", "v_proj"), "q_proj v_proj"),
        (("all-linear", "gate_up_proj", "down_proj"), "q_proj k_proj v_proj o_proj experts"),
        (("gate_proj", "up_proj", "down_proj"), "experts"),
    ],
)
def test_experts_are_adapted_when_they_are_named(
    targets: tuple[str, ...], adapted: str, tmp_path: Path
) -> None:
    lm = load(save("qwen3_moe", tmp_path))
    policy = build_policy(lm, targets=targets)
    found = {part for name in policy._parameters for part in name.split(".")}
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "experts"):
        assert (part in found) == (part in adapted.split()), part
    resolved = ResolvedModel(path="m", local_dir=tmp_path, revision=None, weights_bytes=0)
    planned = count_adapter(build_empty(resolved), rank=2, targets=targets)
    assert planned == sum(p.numel() for p in policy._parameters.values())


def test_a_name_that_the_model_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'q_prj'") as caught:
        build_policy(load(save("llama", tmp_path)), targets=("q_prj",))
    assert "q_proj" in caught.value.details
    assert caught.value.where == "model.lora_targets"
