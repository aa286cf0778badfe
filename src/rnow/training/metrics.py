"""The numbers of a step that come from its rollouts and rewards. Names are ``family/name``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rnow.types import Message, Prompt, RewardResult, Rollout, RolloutGroup

if TYPE_CHECKING:
    from torch import Tensor

    from rnow.algorithm.records import StepData, TrainingSample

TROUBLE = 8


def reward_metrics(
    groups: Sequence[RolloutGroup], rewards: Mapping[str, RewardResult]
) -> dict[str, float]:
    """``reward/mean``, ``reward/<name>``, ``reward_failures/<name>`` (the share of its calls that failed) and
    ``reward/failure_fraction`` (of rollouts with any failure); empty when no prompt names a reward. Failed rollouts are
    counted in ``rollouts/failed_fraction``, not here."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    results = [rewards[r.id] for r in rollouts if r.id in rewards and r.status != "failed"]
    if not results:
        return {}
    metrics = {"reward/mean": _mean([result.total for result in results])}
    for name in sorted({name for result in results for name in result.breakdown}):
        called = [result for result in results if name in result.breakdown]
        metrics[f"reward/{name}"] = _mean([result.breakdown[name] for result in called])
        metrics[f"reward_failures/{name}"] = _mean([float(name in r.errors) for r in called])
    metrics["reward/failure_fraction"] = _mean([float(bool(result.errors)) for result in results])
    return metrics


def signal_metrics(
    groups: Sequence[RolloutGroup], rewards: Mapping[str, RewardResult]
) -> dict[str, float]:
    """``reward/equal_groups_fraction``: the share of groups, of those with two or more rewards, whose rewards are all equal. Group
    advantages are 0 there."""
    totals = [
        [rewards[r.id].total for r in group.rollouts if r.id in rewards and r.status != "failed"]
        for group in groups
    ]
    compared = [found for found in totals if len(found) > 1]
    if not compared:
        return {}
    return {
        "reward/equal_groups_fraction": _mean([float(len({*found}) == 1) for found in compared])
    }


def rollout_metrics(groups: Sequence[RolloutGroup], *, agentic: bool = False) -> dict[str, float]:
    """``completions/*`` and ``tokens/*`` of a step; with ``agentic``, ``tools/*`` and how the rollouts ended."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if not rollouts:
        return {}
    usable = [rollout for rollout in rollouts if rollout.status != "failed"]
    completion = sum(rollout.completion_tokens for rollout in usable)
    total = sum(rollout.total_tokens for rollout in usable)
    count = max(1, len(usable))
    ended = [r for r in usable if r.turns and r.turns[-1].completion.finish_reason == "stop"]
    metrics = _agent_metrics(usable) if agentic else {}
    return metrics | {
        "completions/mean_length": completion / count,
        "completions/truncated_fraction": _count(usable, "truncated") / count,
        "completions/eos_fraction": len(ended) / count,
        "rollouts/failed_fraction": _count(rollouts, "failed") / max(1, len(rollouts)),
        "tokens/prompt": float(total - completion),
        "tokens/completion": float(completion),
        "tokens/total": float(total),
    }


def row_metrics(data: StepData) -> dict[str, float]:
    """``tokens/*`` of a step whose samples nobody rolled out: what is trained on counts as completion, the rest as prompt."""
    if data.groups:
        return {}
    total = sum(len(item.sample.token_ids) for item in data.training)
    learned = sum(sum(item.sample.loss_mask) for item in data.training)
    return {
        "tokens/prompt": float(total - learned),
        "tokens/completion": float(learned),
        "tokens/total": float(total),
    }


def _agent_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """``tools/failure_fraction`` is of the calls, the ``rollouts/`` ones of the rollouts; ``last_tool`` is the end by an
    answer without a call."""
    answers = _tool_answers(rollouts)
    count = max(1, len(rollouts))
    failed = sum(bool(message.get("failed")) for message in answers)
    return {
        "tools/calls_per_rollout": len(answers) / count,
        "tools/failure_fraction": failed / max(1, len(answers)),
        "rollouts/turns": sum(len(rollout.turns) for rollout in rollouts) / count,
        "rollouts/last_tool_fraction": sum(r.end_reason == "answer" for r in rollouts) / count,
        "rollouts/max_turns_fraction": sum(r.end_reason == "max_turns" for r in rollouts) / count,
    }


def call_metrics(
    groups: Sequence[RolloutGroup], of: Callable[[Prompt], str | None]
) -> dict[str, float]:
    """``tools/calls_per_rollout/<name>`` by what ``of`` names of a prompt: a teacher that teaches to call too often is lost in
    the mean over all."""
    answers: dict[str, list[int]] = {}
    for group in groups:
        usable = [r for r in group.rollouts if r.status != "failed"]
        found = answers.setdefault(f"tools/calls_per_rollout/{of(group.prompt)}", [])
        found += [len(_tool_answers([rollout])) for rollout in usable]
    return {name: _mean(found) for name, found in sorted(answers.items()) if found}


def teacher_metrics(
    training: Sequence[TrainingSample], streams: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """``teacher_kl/<role>``: the mean over the loss tokens that each teacher judged."""
    found: dict[str, list[float]] = {}
    kls = streams.get("teacher_kl", {})
    for sample in (item.sample for item in training if item.sample.id in kls):
        found.setdefault(f"teacher_kl/{sample.teacher}", []).extend(kls[sample.id].tolist())
    return {
        name: math.fsum(values) / len(values) for name, values in sorted(found.items()) if values
    }


def tool_trouble(groups: Sequence[RolloutGroup]) -> str | None:
    """A sentence for the user when more than half of at least ``TROUBLE`` tool calls failed: such a step or evaluation says
    more of the tools than of the student."""
    answers = _tool_answers([rollout for group in groups for rollout in group.rollouts])
    failed = [str(message.get("content", "")) for message in answers if message.get("failed")]
    if len(answers) < TROUBLE or 2 * len(failed) <= len(answers):
        return None
    (common, count), *_ = Counter(text.partition("\n")[0][:200] for text in failed).most_common(1)
    return f"{len(failed)} of {len(answers)} tool calls failed; the most frequent answer ({count}): {common}"


def throughput_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """``throughput/completion_tokens_per_s`` over the whole step."""
    seconds = metrics.get("time/step", 0.0)
    tokens = metrics.get("tokens/completion", 0.0)
    return {"throughput/completion_tokens_per_s": tokens / seconds if seconds > 0 else 0.0}


def memory_metrics() -> dict[str, float]:
    """``memory/peak_gb``: most memory so far, of the fullest GPU if torch uses one, else of the process; 10^9 bytes."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cards = range(torch.cuda.device_count())
        return {"memory/peak_gb": max(map(torch.cuda.max_memory_allocated, cards)) / 1e9}
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory/peak_gb": peak * (1 if sys.platform == "darwin" else 1024) / 1e9}


def _tool_answers(rollouts: Sequence[Rollout]) -> list[Message]:
    return [message for r in rollouts for message in r.messages if message["role"] == "tool"]


def _count(rollouts: Sequence[Rollout], status: str) -> int:
    return sum(rollout.status == status for rollout in rollouts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
