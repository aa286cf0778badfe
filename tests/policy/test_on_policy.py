"""Sampler and trainer agree on what the student just wrote."""

from __future__ import annotations

import pytest
import torch
from tests.policy.conftest import MakePolicy

from rnow.algorithm.batching import build_batch
from rnow.algorithm.records import Batch, SampledEvidence, TrainingSample
from rnow.policy.student import LoraPolicy
from rnow.sampling.decode import Request, decode
from rnow.types import Sample, SamplingParams

PROMPTS = ((5, 9, 12), (40, 7, 33, 21, 90), (5, 9, 12), (61, 62))


def _sampled(policy: LoraPolicy, *, step: int, temperature: float) -> Batch:
    params = SamplingParams(max_tokens=12, stop_token_ids=(2, 17), temperature=temperature)
    requests = [
        Request(prompt_token_ids=prompt, params=params, seed=100 * step + number)
        for number, prompt in enumerate(PROMPTS)
    ]
    device = torch.device("cpu")
    drawn = decode(policy.lm.body, policy.lm.head, requests, device=device, poll=lambda: None)
    training = []
    for number, (prompt, answer) in enumerate(zip(PROMPTS, drawn, strict=True)):
        before, length = len(prompt), len(answer.token_ids)
        sample = Sample(
            id=f"dataset_0/{number}#0",
            dataset="dataset_0",
            token_ids=(*prompt, *answer.token_ids),
            loss_mask=(False,) * before + (True,) * length,
            sampler_logprobs=(*[0.0] * before, *answer.logprobs),
        )
        scores = torch.tensor([-2.0] * length)
        training.append(
            TrainingSample(
                sample=sample,
                reward_advantage=0.0,
                evidence=SampledEvidence(teacher_logprobs=scores),
            )
        )
    return build_batch(training)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_of_fresh_rollouts_is_one(make_policy: MakePolicy, temperature: float) -> None:
    policy = make_policy(
        model={"vocab_size": 128},
        objective={"kl_penalty_coef": 1.0, "temperature": temperature},
    )
    for step in range(2):
        batch = _sampled(policy, step=step, temperature=temperature)
        assert batch.num_loss_tokens > 12
        ratio = torch.cat(policy._accumulate(batch).values["ratio"])
        assert (ratio - 1.0).abs().max() < 1e-4
        metrics = policy.update(batch).metrics
        assert abs(metrics["sampler_trainer_kl"]) < 1e-5
        assert metrics["clip_fraction"] == 0.0
        stale = torch.cat(policy._accumulate(batch).values["ratio"])
        assert (stale - 1.0).abs().max() > 1e-2
