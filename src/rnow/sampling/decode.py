"""A plain batched decode loop over a HuggingFace body and a frozen head.

``generate`` would do, but for three things that matter here: equal prompts share one prefill, each row has its own
counter-based random stream, and the log-probability of the drawn token comes from the very distribution it was drawn from.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnow.algorithm.batching import pad_right
from rnow.algorithm.head import Head
from rnow.algorithm.products import can_pack, pack
from rnow.sampling.cache import build_cache
from rnow.types import SamplingParams

RANDOM_BLOCK = 64
BLOCK, UNBLOCKED = 512, 4096
BELOW_ONE = math.nextafter(1.0, 0.0)
PACKING_STEPS = 8
"""Tokens from which on laying out the head for few rows is repaid: it costs what two of them save."""
COMPACTION_STEPS = 0.5
"""What moving the cache of the rows that go on costs, in steps of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to draw."""

    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What was drawn for one request; ``stopped`` is True when the last id is a stop id."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


@torch.inference_mode()
def decode(
    body: Any,
    head: Head,
    requests: Sequence[Request],
    *,
    device: torch.device,
    poll: Callable[[], None],
) -> list[Drawn]:
    """Draw one completion per request, all decoded as one batch.

    Args:
        body: the transformer without its head.
        head: the frozen head, cut to the tokenizer's real ids (padding rows cannot be drawn).
        requests: they must agree in everything but prompt, seed and ``max_tokens``.
        poll: called once per decoded token; may raise to stop.
    """
    params = requests[0].params
    cache, hidden, padding, positions = _prefill(body, requests, device)
    rows = len(requests)
    limits = torch.tensor([request.params.max_tokens for request in requests], device=device)
    if int(limits.max()) >= PACKING_STEPS and can_pack(head.weight):
        head = replace(head, packed=pack(head.weight))
    stops = torch.tensor(params.stop_token_ids, device=device)
    longest = int(limits.max())
    mask = _Mask(padding, longest)
    token_ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
    logprobs = torch.zeros(rows, longest, dtype=torch.float32, device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    stopped = torch.zeros(rows, dtype=torch.bool, device=device)
    # Rows still in the batch, and which of them are still going. The finished ones ride along until they have cost as
    # much as moving the others away from them.
    live = torch.arange(rows, device=device)
    going = torch.ones(rows, dtype=torch.bool, device=device)
    wasted = 0
    noise = _Noise([request.seed for request in requests], device)

    for position in range(longest):
        poll()
        drawn, drawn_logprobs = draw(head.logits(hidden), params, noise.at(position)[live])
        token_ids[live, position] = drawn
        logprobs[live, position] = drawn_logprobs.float()
        lengths[live] += going
        hit = torch.isin(drawn, stops)
        stopped[live] |= hit & going
        going = going & ~hit & (limits[live] > position + 1)
        remaining = int(going.sum())
        if remaining == 0:
            break
        wasted += live.numel() - remaining
        if wasted > COMPACTION_STEPS * remaining:
            kept = going.nonzero().flatten()
            cache.reorder_cache(kept)
            mask.select_rows(kept)
            live, drawn, going, positions = live[kept], drawn[kept], going[kept], positions[kept]
            wasted = 0
        # A finished row rides along at its last position: beyond the window there is none.
        positions = positions + going
        hidden = _read(body, drawn[:, None], mask.until(position), positions[:, None], cache)
    return _collect(token_ids, logprobs, lengths, stopped)


def draw(logits: Tensor, params: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one id per row by inverting the cumulative distribution at ``uniform``.

    Args:
        logits: ``[B, V]`` float32 or wider.
        uniform: float64 ``[B]`` in [0, 1).

    Returns:
        ids int64 ``[B]`` and their log-probabilities ``[B]`` after temperature, top-k and top-p, i.e. under the
        distribution that was sampled. Greedy (temperature 0) reports them at temperature 1.
    """
    if params.temperature == 0:
        chosen = logits.argmax(dim=-1)
        return chosen, torch.log_softmax(logits, dim=-1).gather(1, chosen[:, None]).squeeze(1)
    if params.temperature != 1.0:
        logits = logits / params.temperature
    logits = _truncate(logits, params)
    probabilities = torch.softmax(logits, dim=-1)
    chosen = _invert(probabilities, uniform[:, None])
    return chosen.squeeze(1), probabilities.gather(1, chosen).log_().squeeze(1)


def _invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulative mass exceeds the share ``uniform`` of the whole.

    A long row is cut into blocks: one is chosen by the blocks' sums, then an index within it by the share that is left. So
    the cumulative sums, in float64, are over a few hundred numbers each, and the row is read once.

    Args:
        mass: ``[B, V]``, not negative, with something in each row.
        uniform: float64 ``[B, 1]`` in [0, 1).

    Returns:
        int64 ``[B, 1]``; never an index of mass 0.
    """
    width = mass.shape[1]
    blocked = width > UNBLOCKED
    weights = _block_sums(mass) if blocked else mass
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    threshold = uniform * cumulative[:, -1:]
    # right=True: one that exceeds the threshold, not one that reaches it, so mass 0 is never chosen.
    chosen = torch.searchsorted(cumulative, threshold, right=True)
    chosen.clamp_(max=weights.shape[1] - 1)
    if not blocked:
        return chosen
    held = weights.gather(1, chosen)
    left = (threshold - (cumulative.gather(1, chosen) - held)) / held
    columns = chosen * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = mass.gather(1, columns.clamp(max=width - 1)).masked_fill_(columns >= width, 0.0)
    return chosen * BLOCK + _invert(inside, left.clamp_(0.0, BELOW_ONE))


def _block_sums(mass: Tensor) -> Tensor:
    """float64 ``[B, ceil(V / BLOCK)]``."""
    whole = mass.shape[1] // BLOCK * BLOCK
    sums = mass[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)
    rest = mass[:, whole:].sum(dim=1, keepdim=True)
    return torch.cat([sums, rest], dim=1).double()


def _truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    if 0 < params.top_k < logits.shape[-1]:
        smallest = torch.topk(logits, params.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if params.top_p < 1.0:
        ordered, order = torch.sort(logits, dim=-1, descending=True)
        mass = torch.softmax(ordered, dim=-1)
        outside = mass.cumsum(dim=-1) - mass >= params.top_p
        outside[:, 0] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits


def uniforms(seed: int, start: int, count: int) -> np.ndarray:
    """float64 ``[count]`` in [0, 1): numbers ``start .. start + count`` of the stream of ``seed`` (Philox, so the stream
    can be entered anywhere; ``start`` must be a multiple of 4, one Philox block)."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=start // 4))
    return generator.random(count)


class _Noise:
    """Uniform numbers per row and position, made in blocks as the decode goes on."""

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds = list(seeds)
        self._device = device
        self._block: Tensor | None = None

    def at(self, position: int) -> Tensor:
        """float64 ``[rows]`` of one position; positions must be asked in order."""
        offset = position % RANDOM_BLOCK
        if offset == 0 or self._block is None:
            start = position - offset
            block = np.stack([uniforms(seed, start, RANDOM_BLOCK) for seed in self._seeds])
            self._block = torch.from_numpy(block).to(self._device)
        return self._block[:, offset]


class _Mask:
    """Which columns of the cache each row may see; None, which is much cheaper, where every row sees all of them."""

    def __init__(self, padding: Tensor | None, longest: int) -> None:
        self._width = 0 if padding is None else padding.shape[1]
        self._seen = padding
        if padding is not None:
            ones = padding.new_ones(padding.shape[0], longest)
            self._seen = torch.cat([padding, ones], dim=1)

    def until(self, position: int) -> Tensor | None:
        """int64 ``[B, T]``: the prompt and the tokens drawn up to this position."""
        return None if self._seen is None else self._seen[:, : self._width + position + 1]

    def select_rows(self, rows: Tensor) -> None:
        """Make these the rows."""
        if self._seen is not None:
            seen = self._seen[rows]
            self._seen = None if bool(seen.all()) else seen


def _prefill(
    body: Any, requests: Sequence[Request], device: torch.device
) -> tuple[Any, Tensor, Tensor | None, Tensor]:
    """Run each distinct prompt once, then copy its cache to every request that has it.

    Returns the cache, the last hidden states ``[B, H]``, the attention mask ``[B, T]`` (None where prompts are equally
    long) and the last position ids ``[B]``.
    """
    distinct: dict[tuple[int, ...], int] = {}
    source = [distinct.setdefault(request.prompt_token_ids, len(distinct)) for request in requests]
    prompts = list(distinct)
    width = max(len(prompt) for prompt in prompts)
    # Left padding, so that every row's next token lands in the same column of the cache.
    token_ids = pad_right([prompt[::-1] for prompt in prompts]).flip(1).to(device)
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(width, device=device)[None, :] - padding[:, None]
    attention = None
    if any(len(prompt) < width for prompt in prompts):
        attention = (positions >= 0).long()
    longest = max(request.params.max_tokens for request in requests)
    cache: Any = build_cache(body.config, width + longest)
    hidden = _read(body, token_ids, attention, positions.clamp(min=0), cache)
    index = torch.tensor(source, device=device)
    if len(prompts) < len(requests):
        cache.reorder_cache(index)
    attention = None if attention is None else attention[index]
    return cache, hidden[index], attention, positions[index, -1]


def _read(
    body: Any, token_ids: Tensor, attention: Tensor | None, positions: Tensor, cache: Any
) -> Tensor:
    """The hidden states ``[B, H]`` after the last of ``token_ids`` ``[B, T]``, which are added to the cache."""
    given: dict[str, Any] = {"attention_mask": attention, "past_key_values": cache}
    if _is_mamba(type(body)):
        # Mamba's name for it. One token alone has no mask there: padding left no trace in the state.
        mask = attention if token_ids.shape[1] > 1 else None
        given = {"attention_mask": mask, "cache_params": cache}
    output = body(input_ids=token_ids, position_ids=positions, use_cache=True, **given)
    return output.last_hidden_state[:, -1]


@functools.cache
def _is_mamba(kind: type) -> bool:
    """Whether a body names its cache as Mamba does. Asked for every token; looked up once."""
    return "cache_params" in inspect.signature(kind.forward).parameters


def _collect(token_ids: Tensor, logprobs: Tensor, lengths: Tensor, stopped: Tensor) -> list[Drawn]:
    return [
        Drawn(token_ids=tuple(ids[:length]), logprobs=tuple(values[:length]), stopped=bool(end))
        for ids, values, length, end in zip(
            token_ids.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True
        )
    ]
