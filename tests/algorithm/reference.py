"""Naive float64 forms of the algorithm, written from its formulas and not from our code: loops and scalars, no chunks.

Everything is differentiable by plain autograd, so gradients can be compared as well as values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
STD_EPSILON = 1e-6


def grpo(groups: Sequence[Sequence[float]], *, scale: bool) -> list[list[float]]:
    """(r - group mean) / (group std + 1e-6), the division optional."""
    answer = []
    for group in groups:
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group))
        divisor = std + STD_EPSILON if scale else 1.0
        answer.append([(r - mean) / divisor for r in group])
    return answer


def reinforce(groups: Sequence[Sequence[float]]) -> list[list[float]]:
    """r - batch mean."""
    everything = [r for group in groups for r in group]
    mean = math.fsum(everything) / len(everything)
    return [[r - mean for r in group] for group in groups]


def shaped_advantage(
    reward_advantage: float,
    logprob: float,
    teacher_logprob: float | None,
    *,
    kl_penalty_coef: float,
    reward_coef: float,
    kl_clamp: float,
) -> float:
    """reward_coef * A_reward - kl_penalty_coef * clamp(log p_student - log p_teacher)."""
    kl = 0.0 if teacher_logprob is None else logprob - teacher_logprob
    return reward_coef * reward_advantage - kl_penalty_coef * max(-kl_clamp, min(kl_clamp, kl))


def token_loss(
    logprob: Tensor,
    sampler_logprob: float,
    advantage: float,
    *,
    loss_fn: str,
    clip_ratio_low: float,
    clip_ratio_high: float,
    ratio_cap: float,
) -> Tensor:
    """The loss of one token; ``logprob`` is a float64 scalar. A bound that bites is a constant: no gradient."""
    log_ratio = logprob - sampler_logprob
    if abs(log_ratio.item()) > LOG_RATIO_LIMIT:
        log_ratio = logprob.new_tensor(math.copysign(LOG_RATIO_LIMIT, log_ratio.item()))
    ratio = torch.exp(log_ratio)
    if ratio.item() > ratio_cap:
        ratio = logprob.new_tensor(ratio_cap)
    surrogate = ratio * advantage
    if loss_fn == "importance_sampling":
        return -surrogate
    low, high = 1.0 - clip_ratio_low, 1.0 + clip_ratio_high
    clipped = max(low, min(high, ratio.item())) * advantage
    if clipped < surrogate.item():
        return logprob.new_tensor(-clipped)
    return -surrogate


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocabulary: int,
) -> Tensor:
    """``[R, V]`` float64 logits of the first ``vocabulary`` ids."""
    full = hidden @ weight.T
    if bias is not None:
        full = full + bias
    full = scale * full
    if softcap is not None:
        full = softcap * torch.tanh(full / softcap)
    return full[:, :vocabulary] / temperature


def log_softmax(values: Tensor) -> Tensor:
    """log(exp(l) / sum exp(l)), literally."""
    exponentials = torch.exp(values)
    return torch.log(exponentials / exponentials.sum(dim=-1, keepdim=True))


def entropy(values: Tensor) -> Tensor:
    """- sum p log p per row."""
    logprobs = log_softmax(values)
    return -(torch.exp(logprobs) * logprobs).sum(dim=-1)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher) per row over the whole vocabulary."""
    student, teacher = log_softmax(student_logits), log_softmax(teacher_logits)
    return (torch.exp(student) * (student - teacher)).sum(dim=-1)


def divergence(student_logits: Tensor, teacher_logits: Tensor, name: str) -> Tensor:
    """``[R]``: KL(p, q), KL(q, p) or (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, literally."""
    p, q = torch.exp(log_softmax(student_logits)), torch.exp(log_softmax(teacher_logits))
    if name == "reverse":
        return (p * torch.log(p / q)).sum(-1)
    if name == "forward":
        return (q * torch.log(q / p)).sum(-1)
    m = (p + q) / 2
    return 0.5 * ((p * torch.log(p / m)).sum(-1) + (q * torch.log(q / m)).sum(-1))


def bucket_kl(logprobs: Tensor, ids: Sequence[int], teacher: Sequence[float], name: str) -> Tensor:
    """A scalar: the divergence between k tokens and one bucket for all others, of one row of log-probabilities ``[V]``."""
    p = torch.stack([torch.exp(logprobs[i]) for i in ids])
    q = torch.tensor([math.exp(value) for value in teacher], dtype=p.dtype)
    p, q = torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]])
    return (p * torch.log(p / q)).sum() if name == "reverse" else (q * torch.log(q / p)).sum()


def residual(
    logprobs: Tensor, x: int, ids: Sequence[int], teacher: Sequence[float], teacher_x: float
) -> float:
    """a_x - c of a token outside of the k; 0 inside."""
    if x in ids:
        return 0.0
    rest = 1 - sum(math.exp(logprobs[i].item()) for i in ids)
    teacher_rest = 1 - sum(math.exp(value) for value in teacher)
    return logprobs[x].item() - teacher_x - math.log(rest / teacher_rest)


def optimal_baseline(logprobs: Tensor, teacher_logprobs: Tensor) -> float:
    """The b for which sum_x p_x |(a_x - b)(e_x - p)|^2 is least, from the three values of that parabola."""
    p, a = torch.exp(logprobs), logprobs - teacher_logprobs

    def noise(b: float) -> float:
        total = 0.0
        for x in range(len(p)):
            gradient = -(a[x] - b) * p
            gradient[x] += a[x] - b
            total += (p[x] * gradient @ gradient).item()
        return total

    low, middle, high = noise(-1.0), noise(0.0), noise(1.0)
    return (low - high) / (2 * (low + high - 2 * middle))
