"""Per-token estimates of the reverse KL between student and teacher, from the sampled token alone.

With x sampled from the student and d = log p_student(x) - log p_teacher(x), both estimators average to
KL(student || teacher); see J. Schulman, "Approximating KL divergence" (2020), for the names k1 and k3.
"""

from __future__ import annotations

import torch
from torch import Tensor

K3_EXPONENT_LIMIT = 20.0


def k1(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """d itself: unbiased, may be negative. Any shape, natural log."""
    return logprobs - teacher_logprobs


def k3(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative, lower variance near 0. The exponent is clamped so one token cannot be inf."""
    difference = teacher_logprobs - logprobs
    return torch.exp(difference.clamp(max=K3_EXPONENT_LIMIT)) - 1 - difference
