"""Does vLLM still hold the weights it should? One short text, scored by both sides.

What it can see depends on the dtype. In float32 a step's change of the adapter shows; in bfloat16 both sides round by more
than one step moves them, so a probe finds a base that lost its weights, another scaling or a missing adapter, and the
adapter's name that comes with every completion is what tells one version from the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MAX_PROBE_TOKENS = 32

Reference = Callable[[Sequence[int], bool], Sequence[float]]
"""The trainer's log-probabilities of all ids but the first, adapter on, temperature 1; the flag says whether padded ids are
left out of the softmax."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far log-probabilities may be apart, in nats, on average over the probe.

    Attributes:
        same: two answers of one engine, before and after something that must not change it.
        trainer: vLLM and the trainer, whose kernels differ, and which computes the adapter in float32.
    """

    same: float
    trainer: float


EXACT = Tolerance(same=1e-3, trainer=1e-3)
TF32 = Tolerance(same=1e-3, trainer=1e-2)
"""float32 on a GPU, where kernels may multiply in TF32."""
ROUNDED = Tolerance(same=2e-2, trainer=0.15)
QUANTISED = Tolerance(same=2e-2, trainer=0.25)


WRONG = 1.0
"""Nats per token that no rounding makes: other weights."""


def tolerance_of(dtype: str, quantization: str) -> Tolerance:
    """What a dtype (``auto`` counts as rounded) and a quantisation allow."""
    if quantization != "none":
        return QUANTISED
    if dtype != "float32":
        return ROUNDED
    return TF32 if torch.cuda.is_available() else EXACT


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far two scorings of the same ids are apart, in nats."""

    mean: float
    largest: float
    tokens: int

    def within(self, tolerance: float) -> bool:
        """Whether the mean is. Not a number is never."""
        return self.mean <= tolerance

    def __str__(self) -> str:
        return (
            f"{self.mean:.3g} nats per token on average ({self.largest:.3g} at most, {self.tokens} "
            f"token{'s' if self.tokens != 1 else ''})"
        )


def gap_between(one: Sequence[float], other: Sequence[float]) -> Gap:
    """Compare two lists of log-probabilities; of unequal lengths, or with an infinity, they are infinitely far apart."""
    if len(one) != len(other) or not one:
        return Gap(mean=math.inf, largest=math.inf, tokens=len(one))
    gaps = [abs(a - b) for a, b in zip(one, other, strict=True)]
    return Gap(mean=math.fsum(gaps) / len(gaps), largest=max(gaps), tokens=len(gaps))
