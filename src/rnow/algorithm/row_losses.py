"""Losses that need every token's probability: chunk by chunk, with their gradient taken in the forward pass.

A rule is given the whole distribution of a chunk of rows and says the loss of each row and its derivative with respect to the
row's logits. That is pulled back to the hidden states there and then (the head is frozen), so the backward pass is one
multiplication: two head GEMMs, no recomputation, and never a [tokens, vocabulary] tensor. See ``head`` for losses of the
sampled token's log-probability alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rnow.algorithm.head import Head, chunk_rows_for


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTerms:
    """What a rule says of r rows.

    Attributes:
        losses: ``[r]``.
        gradient: ``[r, V]``, d loss / d logits (after softcap, scale and temperature), or None where it was not asked for.
        streams: name -> ``[r]``.
    """

    losses: Tensor
    gradient: Tensor | None
    streams: Mapping[str, Tensor]


class RowRule(Protocol):
    """A loss of a token's whole distribution."""

    def __call__(self, logprobs: Tensor, at: slice, *, gradient: bool) -> RowTerms:
        """
        Args:
            logprobs: ``[r, V]`` log-probabilities of the student, at least float32; the rule may write into them.
            at: which of all the rows these are.
            gradient: whether it is needed.
        """
        ...


def row_losses(
    hidden: Tensor,
    head: Head,
    rule: RowRule,
    *,
    weight: float = 1.0,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``weight`` times the losses of a rule, ``[R]`` with gradient to the hidden states, and its streams, ``[R]`` without.

    Args:
        hidden: ``[R, H]`` final hidden states (after the last norm).
        head: the frozen head.
        temperature: logits are divided by it before the rule sees them.
        chunk_rows: rows per chunk; chosen from the device when None.
    """
    streams: dict[str, list[Tensor]] = {}
    rows = chunk_rows or chunk_rows_for(head)
    losses = _RowLosses.apply(hidden, head, rule, weight, temperature, rows, streams)
    assert isinstance(losses, Tensor)
    return losses, {name: torch.cat(parts) for name, parts in streams.items()}


def normalise(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, written over the logits."""
    return logits.sub_(torch.logsumexp(logits, dim=-1, keepdim=True))


def expect(probabilities: Tensor, values: Tensor) -> Tensor:
    """``[r]``: the mean of ``[r, V]`` values under ``[r, V]`` probabilities, without a product of that size."""
    return torch.bmm(probabilities[:, None, :], values[:, :, None]).flatten()


def teacher_logprobs(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """``[r, V]``: a teacher's tempered log-probabilities, on its head's device."""
    logits = head.logits(hidden.to(head.weight.device))
    if temperature != 1.0:
        logits /= temperature
    return normalise(logits)


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Head,
        rule: RowRule,
        weight: float,
        temperature: float,
        chunk_rows: int,
        streams: dict[str, list[Tensor]],
    ) -> Tensor:
        wants_gradient = ctx.needs_input_grad[0]
        losses, derivatives = [], []
        # One pass even without rows: the empty result then has its shapes and types from the same operations.
        for start in range(0, max(1, hidden.shape[0]), chunk_rows):
            at = slice(start, start + chunk_rows)
            logits = head.logits(hidden[at])
            slope = None
            if wants_gradient and head.softcap is not None:
                slope = 1.0 - (logits / head.softcap) ** 2
            if temperature != 1.0:
                logits /= temperature
            found = rule(normalise(logits), at, gradient=wants_gradient)
            losses.append(weight * found.losses)
            for name, values in found.streams.items():
                streams.setdefault(name, []).append(values)
            if wants_gradient:
                assert found.gradient is not None
                towards = found.gradient if slope is None else found.gradient.mul_(slope)
                derivative = towards.to(head.weight.dtype) @ head.weight
                derivative *= weight * head.scale / temperature
                derivatives.append(derivative.to(hidden.dtype))
        if wants_gradient:
            ctx.save_for_backward(torch.cat(derivatives))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return gradients[0][:, None].to(derivative.dtype) * derivative, *[None] * 6
