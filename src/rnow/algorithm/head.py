"""The language-model head, in tiles: log-probabilities of chosen tokens without a [tokens, vocabulary] tensor.

A chunk of rows meets the vocabulary tile by tile. A tile of logits is as large as the cache: it is normalised, reduced to a few
numbers per row, multiplied back with its own rows of the head where the student needs a gradient, and forgotten. The derivative
of a row with respect to its hidden state is

    d log p(x) / d h = scale / temperature * (W[x] - sum_v p(v) W[v])

whose sum is taken there and then (the head is frozen, LoRA never touches it): two head GEMMs in all, no recomputation, and
memory that depends on the tile, not on the number of tokens nor on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rnow.algorithm.products import linear, packed_linear, wide_product

CPU_TILE_BYTES = 2**20
"""Of one core: a tile of logits and one of probabilities stay in its caches."""
CPU_BUFFER_BYTES = 96 * 2**20
"""Of the tiles of a chunk that are kept. Half of it would cost a twentieth of the time at 152,000 ids, twice as much would save
next to nothing."""
GPU_BUFFER_BYTES = 256 * 2**20
CPU_GATHERED_BYTES, GPU_GATHERED_BYTES = 2**22, 2**26
"""Of rows of the head that are gathered at once."""
CPU_TILE_ROWS = 256
"""Rows that a tile of a large vocabulary has: so often is a weight used when it is in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """A frozen output projection. logits = softcap(scale * (h W^T + bias)), cut to the tokenizer's real ids.

    Attributes:
        weight: ``[V, H]``, already cut to the ``V`` ids the tokenizer can produce: padded rows take no probability.
        bias: ``[V]`` or None.
        scale: a constant factor on the logits (Cohere, Granite), 1 for most.
        softcap: ``c`` in ``c * tanh(logits / c)`` (Gemma 2), or None.
        packed: the weight once more, for products with few rows (``products.pack``), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    packed: Tensor | None = None

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def dtype(self) -> torch.dtype:
        """Of its logits: at least float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def logits(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """``[R, H]`` -> ``[R, V]``, at least float32, or of some ``columns``. Only for a few rows or columns: this is the tensor
        the tiles avoid."""
        weight = self.weight[columns]
        bias = None if self.bias is None else self.bias[columns]
        if hidden.is_cuda and hidden.ndim == 2:
            logits = wide_product(hidden.to(weight.dtype), weight.t())
            logits = logits if bias is None else logits.add_(bias)
        elif self.packed is not None and weight.shape == self.weight.shape:
            logits = packed_linear(hidden, self.packed, bias)
        else:
            logits = linear(hidden.to(weight.dtype), weight, bias, steady=True)
            logits = logits.to(self.dtype)
        return self._shaped(logits)

    def _shaped(self, products: Tensor) -> Tensor:
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def tempered_at(self, hidden: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """``[R, m]``: what ``tempered`` gives at a few ids of each row ``[R, m]``."""
        found = torch.empty(ids.shape, dtype=self.dtype, device=ids.device)
        least = ids.shape[1] * self.weight.shape[1] * self.dtype.itemsize  # of one row
        rows = max(1, (GPU_GATHERED_BYTES if ids.is_cuda else CPU_GATHERED_BYTES) // least)
        for at in range(0, len(ids), rows):
            part = slice(at, at + rows)
            # A CPU's products are rounded to the weight's format; here too, or the normaliser would be of other logits.
            dtype = self.dtype if ids.is_cuda else self.weight.dtype
            weight = self.weight[ids[part]].to(dtype)
            found[part] = (weight @ hidden[part].to(dtype)[:, :, None]).squeeze(-1).to(self.dtype)
        if self.bias is not None:
            found += self.bias[ids]
        return self._shaped(found) / temperature

    def tempered(self, hidden: Tensor, columns: slice, temperature: float) -> Tensor:
        """``[R, columns]``: the logits over the temperature."""
        logits = self.logits(hidden, columns)
        return logits if temperature == 1.0 else logits.div_(temperature)

    def slope(self, tempered: Tensor, temperature: float) -> Tensor | None:
        """The softcap's derivative where the tempered logits are these; None without a softcap."""
        if self.softcap is None:
            return None
        return 1.0 - (tempered * (temperature / self.softcap)) ** 2

    def pull(self, weights: Tensor, ids: Tensor) -> Tensor:
        """``[R, H]``: the sum over j of ``weights`` ``[R, m]`` times the head's rows at ``ids`` ``[R, m]``."""
        return torch.nn.functional.embedding_bag(
            ids, self.weight, per_sample_weights=weights.to(self.weight.dtype), mode="sum"
        ).to(weights.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How many ``rows`` are worked on together, and how many columns a tile of the vocabulary has at most."""

    rows: int
    width: int

    def columns(self, vocabulary: int) -> Iterator[slice]:
        """The tiles of a vocabulary."""
        for start in range(0, vocabulary, self.width):
            yield slice(start, min(start + self.width, vocabulary))

    def chunks(self, rows: int) -> Iterator[slice]:
        """The chunks of so many rows. One even without rows: the empty result then has its shapes and types from the same
        operations."""
        for start in range(0, max(1, rows), self.rows):
            yield slice(start, min(start + self.rows, rows))


def tiling_for(head: Head, *, kept: bool = False) -> Tiling:
    """Tiles that stay in the cache on a CPU; on a GPU the whole vocabulary for as many rows as the buffer holds.

    Args:
        kept: all tiles of a chunk are held until the last is there, so that a chunk must not exceed the buffer either.
    """
    vocabulary = head.vocabulary
    if head.weight.device.type != "cpu":
        return Tiling(rows=max(16, GPU_BUFFER_BYTES // (4 * vocabulary)), width=vocabulary)
    tile = cpu_tile_bytes() // 4
    rows = max(CPU_TILE_ROWS, tile // vocabulary)
    if kept:
        rows = max(16, min(rows, CPU_BUFFER_BYTES // (4 * vocabulary)))
    return Tiling(rows=rows, width=max(256, tile // rows))


def cpu_tile_bytes() -> int:
    """Bytes of a tile of logits on a CPU: its cores work on one together."""
    return CPU_TILE_BYTES * torch.get_num_threads()


class TiledSoftmax:
    """The softmax of r rows over a vocabulary that comes tile by tile.

    Each tile is normalised by itself while it is in the cache; when all have been there, their normalisers say what ``shares``
    of the probability they have. Numbers per row are float64: they cost nothing, and a KL is a small difference of them.
    """

    def __init__(self) -> None:
        self._normalisers: list[Tensor] = []

    def tile(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """``[r, w]``: the softmax of one tile alone."""
        probabilities = torch.softmax(logits, dim=-1, out=out)
        # The largest logit's share is at least 1 / w: its logarithm loses nothing.
        log_largest = probabilities.amax(-1).double().log_()
        self._normalisers.append(logits.amax(-1).double().sub_(log_largest))
        return probabilities

    @property
    def last(self) -> Tensor:
        """float64 ``[r]``: the normaliser of the latest tile."""
        return self._normalisers[-1]

    @property
    def normaliser(self) -> Tensor:
        """float64 ``[r]``: log sum exp over all tiles."""
        return torch.stack(self._normalisers).logsumexp(0)

    @property
    def shares(self) -> Tensor:
        """float64 ``[tiles, r]``: the probability that each tile has."""
        tiles = torch.stack(self._normalisers)
        return (tiles - tiles.logsumexp(0)).exp()

    def expect(self, parts: Sequence[Tensor], *, power: int = 1) -> Tensor:
        """float64 ``[r]``: of the means ``[r]`` under each tile's softmax the mean under that of all; with a ``power``, of sums
        weighted by that power of the softmax."""
        return (self.shares**power * torch.stack([*parts])).sum(0)


class Picked:
    """The logits at ``ids`` ``[r, m]``, picked out of the tiles as they pass."""

    def __init__(self, ids: Tensor, dtype: torch.dtype) -> None:
        self._ids = ids
        self.values = torch.zeros(ids.shape, dtype=dtype, device=ids.device)

    def look(self, columns: slice, logits: Tensor) -> None:
        """Take what this tile holds of them."""
        own = self._ids - columns.start
        here = (own >= 0) & (own < logits.shape[1])
        found = logits.gather(1, own.clamp_(0, logits.shape[1] - 1))
        self.values = torch.where(here, found, self.values)

    def drop_first(self, columns: slice, probabilities: Tensor) -> None:
        """Set the probability of each row's first id to 0 where this tile holds it."""
        own = self._ids[:, :1] - columns.start
        here = (own >= 0) & (own < probabilities.shape[1])
        own = own.clamp_(0, probabilities.shape[1] - 1)
        kept = probabilities.gather(1, own).masked_fill_(here, 0.0)
        probabilities.scatter_(1, own, kept)


class Look(Protocol):
    """Sees every tile of every chunk, read-only, and is told when a chunk is through."""

    def tile(self, at: slice, columns: slice, logits: Tensor, probabilities: Tensor) -> None:
        """The tempered logits ``[r, w]`` of the rows ``at`` and their softmax over this tile alone."""
        ...

    def done(self, at: slice, softmax: TiledSoftmax) -> None:
        """Every tile of the rows was shown."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedLogprobs:
    """``logprobs`` ``[R]`` or ``[R, m]`` with gradient to the hidden states, ``entropy`` ``[R]`` without, None where it was not
    asked for; natural log, >= float32."""

    logprobs: Tensor
    entropy: Tensor | None


def selected_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = True,
    tiling: Tiling | None = None,
    look: Look | None = None,
) -> SelectedLogprobs:
    """log softmax(logits / temperature) at ``targets``, and the entropy of that distribution.

    Args:
        hidden: ``[R, H]`` final hidden states (after the last norm) that predict the targets.
        head: the frozen head.
        targets: int64 ``[R]``, or several of each row ``[R, m]``, below ``head.vocabulary``.
        temperature: as in sampling; 1 leaves the model's own distribution.
        entropy: whether it is needed.
        tiling: chosen from the device when None.
        look: is shown the whole distribution of each row.
    """
    one_pass = _Pass(
        head=head,
        temperature=temperature,
        entropy=entropy,
        tiling=tiling or tiling_for(head),
        look=look,
    )
    ids = targets if targets.ndim == 2 else targets[:, None]
    logprobs, entropies = _Select.apply(hidden, ids, one_pass)  # type: ignore[misc]
    return SelectedLogprobs(
        logprobs=logprobs if targets.ndim == 2 else logprobs[:, 0],
        entropy=entropies if entropy else None,
    )


def expect(probabilities: Tensor, values: Tensor) -> Tensor:
    """``[r]``: the sum over a row of ``[r, w]`` probabilities times ``[r, w]`` values."""
    if (
        probabilities.device.type == "cpu"
    ):  # in the cache a product costs less than a batch of tiny GEMMs
        return (probabilities * values).sum(-1)
    return torch.bmm(probabilities[:, None, :], values[:, :, None]).flatten()


class MeanRow:
    """The mean of the head's rows under each of r distributions ``[r, H]``, tile by tile: weights ``[r, w]`` times those rows."""

    def __init__(self, rows: int, head: Head) -> None:
        weight = head.weight
        self._head = head
        self.value = torch.zeros(rows, weight.shape[1], dtype=head.dtype, device=weight.device)
        self._total: Tensor | None = None

    def add(self, weights: Tensor, columns: slice, normaliser: Tensor) -> None:
        """Add a tile's, normalised by itself, whose ``normaliser`` is given ``[r]``. The weights are used up."""
        before = self._total
        self._total = normaliser if before is None else torch.logaddexp(before, normaliser)
        if before is not None:
            self.value *= (before - self._total).exp_().to(self.value.dtype)[:, None]
            weights *= (normaliser - self._total).exp_().to(weights.dtype)[:, None]
        self.accumulate(weights, columns)

    def accumulate(self, weights: Tensor, columns: slice, share: Tensor | None = None) -> None:
        """Add a tile's as they are, or ``share`` ``[r]`` of them."""
        rows = self._head.weight[columns]
        if rows.dtype == self.value.dtype:
            found = linear(weights, rows.t(), steady=True)
        else:
            found = wide_product(weights.to(rows.dtype), rows)
        if share is None:
            self.value += found
        else:
            self.value.addcmul_(found, share[:, None].to(found.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """One pass of the vocabulary over a chunk of rows."""

    head: Head
    temperature: float
    entropy: bool
    tiling: Tiling
    look: Look | None

    def __call__(
        self, hidden: Tensor, ids: Tensor, at: slice, *, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Logits ``[r, m]`` at ``ids``, normalisers and entropies ``[r]``, and of all tokens but the first of the ids their
        probability ``[r]`` and the sum of their probabilities times the head's rows ``[r, H]``; the latter three mean nothing
        where they are not asked for. Without the first id, since W[x] - sum_v p(v) W[v] would leave nothing but rounding of a
        token that is almost certain.
        """
        head, softmax = self.head, TiledSoftmax()
        picked, mean = Picked(ids, head.dtype), MeanRow(hidden.shape[0] if gradient else 0, head)
        expected: list[Tensor] = []
        rests: list[Tensor] = []
        for columns in self.tiling.columns(head.vocabulary):
            logits = head.tempered(hidden, columns, self.temperature)
            picked.look(columns, logits)
            probabilities = softmax.tile(logits)
            if self.entropy:
                expected.append(expect(probabilities, logits))
            if self.look is not None:
                self.look.tile(at, columns, logits, probabilities)
            if gradient:
                picked.drop_first(columns, probabilities)
                rests.append(probabilities.sum(-1))
                slope = head.slope(logits, self.temperature)
                weights = probabilities if slope is None else probabilities.mul_(slope)
                mean.add(weights, columns, softmax.last)
        if self.look is not None:
            self.look.done(at, softmax)
        normaliser = softmax.normaliser
        entropies = normaliser - softmax.expect(expected) if self.entropy else normaliser
        rest = softmax.expect(rests) if gradient else normaliser
        return picked.values, normaliser, entropies, rest, mean.value


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ids: Tensor, one_pass: _Pass) -> tuple[Tensor, Tensor]:
        gradient = ctx.needs_input_grad[0]
        chunks = [
            one_pass(hidden[at], ids[at], at, gradient=gradient)
            for at in one_pass.tiling.chunks(hidden.shape[0])
        ]
        logits, normalisers, entropies, rests, means = map(torch.cat, zip(*chunks, strict=True))
        dtype = one_pass.head.dtype
        if gradient:
            ctx.one_pass, ctx.dtype = one_pass, hidden.dtype
            ctx.save_for_backward(means, rests.to(dtype), ids, logits)
        entropies = entropies.to(dtype)
        ctx.mark_non_differentiable(entropies)
        return (logits - normalisers[:, None]).to(dtype), entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        means, rests, ids, logits = ctx.saved_tensors
        head, temperature = ctx.one_pass.head, ctx.one_pass.temperature
        upstream = gradients[0].to(means.dtype)
        others = upstream[:, 1:].sum(1)
        first = upstream[:, 0] * rests - others * (1.0 - rests)
        chosen = torch.cat([first[:, None], upstream[:, 1:]], 1)
        slope = head.slope(logits, temperature)
        chosen = chosen if slope is None else chosen * slope
        found = head.pull(chosen, ids) - upstream.sum(1, keepdim=True) * means
        return (found * (head.scale / temperature)).to(ctx.dtype), None, None
