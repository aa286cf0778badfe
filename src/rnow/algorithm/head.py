"""The language-model head, in chunks: log-probabilities of chosen tokens without a [tokens, vocabulary] tensor.

A chunk of rows is multiplied by the head, normalised, reduced to one number per row, and forgotten. When the student
needs a gradient, the row's own derivative with respect to its hidden state

    d log p(x) / d h = scale / temperature * (W[x] - sum_v p(v) W[v])

is taken there and then (the head is frozen, LoRA never touches it), so the backward pass is one multiplication: two head
GEMMs in all, no recomputation, and memory that depends on the chunk, not on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Look = Callable[[slice, Tensor, Tensor], None]
"""Told of every chunk: which rows, their log-probabilities and probabilities ``[r, V]``, both read-only."""

CPU_BUFFER_BYTES = 64 * 2**20
GPU_BUFFER_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A frozen output projection. logits = softcap(scale * (h W^T + bias)), cut to the tokenizer's real ids.

    Attributes:
        weight: ``[V, H]``, already cut to the ``V`` ids the tokenizer can produce: padded rows take no probability.
        bias: ``[V]`` or None.
        scale: a constant factor on the logits (Cohere, Granite), 1 for most.
        softcap: ``c`` in ``c * tanh(logits / c)`` (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, H]`` -> ``[R, V]``, at least float32. Only for a few rows: this is the tensor the chunks avoid."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedLogprobs:
    """``logprobs`` ``[R]`` with gradient to the hidden states, ``entropy`` ``[R]`` without; natural log, >= float32."""

    logprobs: Tensor
    entropy: Tensor


def chunk_rows_for(head: Head) -> int:
    """Rows per chunk so that one chunk's float32 logits stay within the device's buffer."""
    budget = CPU_BUFFER_BYTES if head.weight.device.type == "cpu" else GPU_BUFFER_BYTES
    return max(16, budget // (4 * head.vocabulary))


def selected_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    look: Look | None = None,
) -> SelectedLogprobs:
    """log softmax(logits / temperature) at ``targets``, and the entropy of that distribution.

    Args:
        hidden: ``[R, H]`` final hidden states (after the last norm) that predict the targets.
        head: the frozen head.
        targets: int64 ``[R]``, below ``head.vocabulary``.
        temperature: as in sampling; 1 leaves the model's own distribution.
        chunk_rows: rows per chunk; chosen from the device when None.
        look: is shown the whole distribution of each row.
    """
    rows = chunk_rows or chunk_rows_for(head)
    logprobs, entropy = _ChunkedSelect.apply(hidden, targets, head, temperature, rows, look)  # type: ignore[misc]
    return SelectedLogprobs(logprobs=logprobs, entropy=entropy)


class _ChunkedSelect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        temperature: float,
        chunk_rows: int,
        look: Look | None,
    ) -> tuple[Tensor, Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        logprobs, entropies, derivatives = [], [], []
        for start in range(0, hidden.shape[0], chunk_rows):
            part = hidden[start : start + chunk_rows]
            chosen = targets[start : start + chunk_rows, None]
            capped = head.logits(part)
            logits = capped / temperature if temperature != 1.0 else capped
            normaliser = torch.logsumexp(logits, dim=-1)
            logprobs.append(logits.gather(1, chosen).squeeze(1) - normaliser)
            probabilities = torch.exp(logits - normaliser[:, None])
            expected = torch.bmm(probabilities[:, None, :], logits[:, :, None]).flatten()
            entropies.append(normaliser - expected)
            if look is not None:
                at = slice(start, start + chunk_rows)
                look(at, logits - normaliser[:, None], probabilities)
            if wants_gradient:
                # onehot(x) - p, pulled back through temperature, softcap and scale to the hidden state.
                towards = probabilities.neg_()
                towards.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=towards.dtype))
                if head.softcap is not None:
                    towards *= 1.0 - (capped / head.softcap) ** 2
                towards *= head.scale / temperature
                derivatives.append((towards.to(head.weight.dtype) @ head.weight).to(hidden.dtype))
        if wants_gradient:
            empty = hidden.new_zeros(0, hidden.shape[1])
            ctx.save_for_backward(torch.cat(derivatives) if derivatives else empty)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if not logprobs:
            logprobs.append(hidden.new_zeros(0, dtype=dtype))
            entropies.append(hidden.new_zeros(0, dtype=dtype))
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        gradient = gradients[0][:, None].to(derivative.dtype) * derivative
        return gradient, *[None] * 5
