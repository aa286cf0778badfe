"""Making and reading ``replay.json``: 20 batches of rollouts, the teacher's evidence, and what the updates reported.

Nothing in it depends on the machine but for float32 rounding: weights are made from raw Philox bits by plain arithmetic,
not by torch's generators, and the rollouts are replayed, not sampled again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnow.algorithm.advantages import reward_advantages
from rnow.algorithm.batching import build_batch
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import Batch, SampledEvidence, TrainingSample
from rnow.models.loading import CausalLM, take_apart
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.rollout.collect import rollout_seed
from rnow.sampling.decode import uniforms
from rnow.types import Sample

FILE = Path(__file__).with_name("replay.json")

VOCABULARY = 24
PADDED_VOCABULARY = 32
STOP = 1
UPDATES = 20
PROMPTS = 2
GROUP_SIZE = 4
MAX_TOKENS = 10
SERIES = ("loss", "teacher_kl", "grad_norm", "sampler_trainer_kl", "clip_fraction", "entropy")

OBJECTIVE = PolicyGradient(loss_fn="ppo", kl_penalty_coef=1.0, reward_coef=0.2, kl_clamp=4.0)
OPTIMIZER = OptimizerSettings(
    learning_rate=1.2e-2, warmup_updates=3, schedule="cosine", total_updates=60, updates_per_batch=2
)


def make_model(*, away: float = 0.0, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A one-layer Qwen3 model, the same bits on every machine; ``away`` moves its weights to make a teacher of it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=PADDED_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                moved = _spread(2, number, parameter.shape, away)
                parameter.copy_(_spread(1, number, parameter.shape, 0.45) + moved)
    model.requires_grad_(False)
    model.eval()
    return take_apart(model, vocabulary=VOCABULARY)


def make_policy(*, dtype: torch.dtype = torch.float32, micro_batch_tokens: int = 64) -> LoraPolicy:
    """The student of the recording."""
    policy = LoraPolicy(
        make_model(dtype=dtype),
        rank=4,
        alpha=8,
        seed=0,
        base_name="recording",
        objective=OBJECTIVE,
        optimizer=OPTIMIZER,
        micro_batch_tokens=micro_batch_tokens,
    )
    start = policy.adapter().tensors
    policy.load_adapter(
        {
            name: _spread(3, number, tensor.shape, 0.2)
            if "lora_A" in name
            else torch.zeros_like(tensor)
            for number, (name, tensor) in enumerate(sorted(start.items()))
        }
    )
    return policy


def _spread(seed: int, number: int, shape: torch.Size, width: float) -> Tensor:
    """float32, evenly spread in [-width, width): the top 24 bits of raw Philox words, so that no rounding is involved."""
    words = np.random.Philox(key=1000 * seed + number).random_raw(shape.numel())
    values = (words >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1.0)
    return torch.from_numpy(values * np.float32(width)).reshape(shape)


def replay(policy: LoraPolicy, recording: Mapping[str, Any]) -> list[dict[str, float]]:
    """The metrics of each recorded batch's update."""
    rows = []
    for recorded in recording["batches"]:
        result = policy.update(to_batch(recorded))
        if result.skipped:
            raise AssertionError("an update was skipped")
        rows.append({name: result.metrics[name] for name in SERIES})
    return rows


def to_batch(recorded: list[dict[str, Any]]) -> Batch:
    """One recorded step."""
    return build_batch([_to_training_sample(row) for row in recorded])


def _to_training_sample(row: dict[str, Any]) -> TrainingSample:
    first, count = row["prompt_tokens"], len(row["sampler_logprobs"])
    padding = [0.0] * first
    return TrainingSample(
        sample=Sample(
            id=row["id"],
            dataset="dataset_0",
            token_ids=tuple(row["token_ids"]),
            loss_mask=(False,) * first + (True,) * count,
            sampler_logprobs=(*padding, *row["sampler_logprobs"]),
        ),
        reward_advantage=row["reward_advantage"],
        evidence=SampledEvidence(teacher_logprobs=torch.tensor(row["teacher_logprobs"])),
    )


def record() -> dict[str, Any]:
    """Sample, score and train for 20 steps, and write down what was seen."""
    policy, teacher = make_policy(), make_model(away=0.25)
    batches, rows = [], []
    for step in range(UPDATES):
        recorded = []
        for prompt in range(PROMPTS):
            rollouts = [_rollout(policy.lm, teacher, step, prompt, i) for i in range(GROUP_SIZE)]
            # A reward that has nothing to do with the teacher: short answers.
            rewards = [-float(len(rollout["token_ids"])) for rollout in rollouts]
            (advantages,) = reward_advantages([rewards], "grpo")
            for rollout, advantage in zip(rollouts, advantages, strict=True):
                recorded.append(rollout | {"reward_advantage": round(advantage, 5)})
        batches.append(recorded)
        result = policy.update(to_batch(recorded))
        rows.append({name: result.metrics[name] for name in SERIES})
    return {"batches": batches, "metrics": rows}


@torch.no_grad()
def _rollout(
    student: CausalLM, teacher: CausalLM, step: int, prompt: int, index: int
) -> dict[str, Any]:
    name = f"dataset_0/{(step * PROMPTS + prompt) % 7}"
    start = [2 + (prompt * 5 + step * 3 + k * 7) % (VOCABULARY - 2) for k in range(3 + prompt)]
    draws = uniforms(rollout_seed(0, "train", step, name, index, 0), 0, MAX_TOKENS)
    token_ids = list(start)
    for draw in draws:
        cumulative = _logprobs(student, token_ids)[-1].exp().cumsum(0)
        token_ids.append(min(int((cumulative <= draw).sum()), VOCABULARY - 1))
        if token_ids[-1] == STOP:
            break
    answer = torch.tensor(token_ids[len(start) :])[:, None]

    def selected(lm: CausalLM) -> list[float]:
        rows = _logprobs(lm, token_ids)[len(start) - 1 : -1].gather(1, answer)
        return [round(value, 5) for value in rows[:, 0].tolist()]

    return {
        "id": f"{name}.{prompt}#{index}",
        "prompt_tokens": len(start),
        "token_ids": token_ids,
        "sampler_logprobs": selected(student),
        "teacher_logprobs": selected(teacher),
    }


def _logprobs(lm: CausalLM, token_ids: list[int]) -> Tensor:
    hidden = lm.body(input_ids=torch.tensor([token_ids]), use_cache=False).last_hidden_state[0]
    return torch.log_softmax(lm.head.logits(hidden).double(), dim=-1)


def write(recording: Mapping[str, Any]) -> None:
    """One line per sequence and per update, so that a change shows in a diff."""

    def rows(items: list[Any], indent: str) -> str:
        return ",\n".join(indent + json.dumps(item) for item in items)

    batches = ",\n".join(
        "    [\n" + rows(batch, "      ") + "\n    ]" for batch in recording["batches"]
    )
    metrics = rows(recording["metrics"], "    ")
    FILE.write_text(
        f'{{\n  "batches": [\n{batches}\n  ],\n  "metrics": [\n{metrics}\n  ]\n}}\n',
        encoding="utf-8",
    )


def read() -> dict[str, Any]:
    """The committed recording."""
    return json.loads(FILE.read_text(encoding="utf-8"))
