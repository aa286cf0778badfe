"""Rows of several samples: which models give the numbers of each sample alone, and the mask that makes them.

A model takes part where its family is among those that ``tests/models/test_families.py`` holds to it, nothing in its config
speaks against it, and a few tokens through its own weights agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnow.algorithm.batching import pad
from rnow.algorithm.records import Branches, PaddedTokens
from rnow.errors import RnowError, ran_out_of_memory, ran_out_of_threads
from rnow.models.families import SHARES_ROWS, why_separate_family
from rnow.types import Sample

TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
"""How far two hidden states may be apart, as a share of their length: in float32, and in 16 bits or less. Another mask or
position moves them by tenths."""
CELLS_PER_TOKEN = 6
"""Pairs of tokens that attention weighs in the time of one token in everything else, for each number of a hidden state."""

INT8_APART = "LLM.int8 picks its outlier columns over all tokens of a pass"

_WINDOW = "sliding_window"
_PROBE_WINDOW = 4
_FULL, _SLIDING = "full_attention", "sliding_attention"
_KEYS = {
    "attention_chunk_size": "its attention is cut into chunks at fixed places of a row",
    "index_topk": "its attention picks some of the tokens of a row",
    "alibi": "its attention goes by distances within the row",
}

AttentionMask = Tensor | Mapping[str, Tensor]
Run = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How a model takes rows of several samples.

    Attributes:
        windows: layer type -> its sliding window, None where it sees everything; where all layers are alike one of any name.
        by_type: the model takes a mask for each type.
        cells_per_token: as ``plan_passes`` takes it.
    """

    windows: Mapping[str, int | None]
    by_type: bool
    cells_per_token: float


def why_separate(config: Any) -> str | None:
    """Why every sample of a model has a row of its own, by its config with the attention kernel chosen; None where they may
    share."""
    family = str(config.model_type)
    if family not in SHARES_ROWS:
        return why_separate_family(family)
    text = config.get_text_config()
    for key, why in _KEYS.items():
        if getattr(text, key, None):
            return f"{why} ({key})"
    strange = sorted({*(getattr(text, "layer_types", None) or ())} - {_FULL, _SLIDING})
    if strange:
        return f"it has layers that read a row in order ({', '.join(strange)})"
    attention = text._attn_implementation
    if not _takes_masks(attention):
        return f"its attention ({attention}) takes no mask of ours"
    return None


def _takes_masks(attention: str) -> bool:
    """Whether transformers makes masks for an attention kernel that say of each pair whether it counts."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    return attention in ALL_MASK_ATTENTION_FUNCTIONS and "flash" not in attention


def _one_by_one(passes: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    return [one() for one in passes]


def find_sharing(
    model: Any, body: Any, device: torch.device, run: Run = _one_by_one
) -> Sharing | str:
    """How a loaded model's rows are shared, tried with its own weights; or why not. ``run``: how passes go through it."""
    if (why := why_separate(model.config)) is not None:
        return why
    if getattr(model, "is_loaded_in_8bit", False):
        return INT8_APART
    text = model.config.get_text_config()
    for found in _candidates(text):
        if _agrees(model, body, device, found, run):
            return found
    return "a row of several samples gave it other numbers than each alone"


def attention_mask(body: Any, branches: Branches, dtype: torch.dtype, found: Sharing) -> Any:
    """``[B, 1, T, T]`` in the form that the body's attention takes, or one for each type of layer."""
    batch, length = branches.ends.shape
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    build = ALL_MASK_ATTENTION_FUNCTIONS[body.config._attn_implementation]
    masks = {
        kind: build(
            batch_size=batch,
            q_length=length,
            kv_length=length,
            mask_function=_sees(branches, window),
            allow_is_causal_skip=False,
            dtype=dtype,
            device=branches.ends.device,
        )
        for kind, window in found.windows.items()
    }
    return masks if found.by_type else next(iter(masks.values()))


def _sees(branches: Branches, window: int | None) -> Callable[..., Tensor]:
    ends, positions = branches.ends, branches.positions

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        inside = (key <= query) & (query < ends[batch, key])
        if window is None:
            return inside
        return inside & (positions[batch, query] < positions[batch, key] + window)

    return sees


def _candidates(text: Any) -> Iterator[Sharing]:
    """The forms in which models take masks, the likeliest first."""
    window = getattr(text, _WINDOW, None) or None
    types = {*(getattr(text, "layer_types", None) or ())}
    cells = cells_per_token(text.hidden_size)
    windows = {kind: window if kind == _SLIDING else None for kind in sorted(types)}
    if _SLIDING in types:
        yield Sharing(windows=windows, by_type=True, cells_per_token=cells)
    if len(types) < 2:
        yield Sharing(windows=windows or {_FULL: window}, by_type=False, cells_per_token=cells)
    if not types and window:
        yield Sharing(windows={_FULL: None}, by_type=False, cells_per_token=cells)


def cells_per_token(hidden: int) -> float:
    """As ``plan_passes`` takes it, of a model whose hidden states have so many numbers."""
    return float(CELLS_PER_TOKEN * hidden)


@torch.no_grad()
def _agrees(model: Any, body: Any, device: torch.device, found: Sharing, run: Run) -> bool:
    """Two trees in a row and padding, against each sample alone. A window is made so short for it that it cuts."""
    dtype = model.get_output_embeddings().weight.dtype
    samples, per_row = _probe_samples(model.get_input_embeddings().weight.shape[0])
    plain, packed = pad(samples, device), pad(samples, device, per_row)
    windowed = any(found.windows.values())
    try:
        wide = run([partial(_states, body, plain)])[0] if windowed else None
        with _short_window(model, body, windowed):
            short = {kind: _PROBE_WINDOW if w else None for kind, w in found.windows.items()}
            tried = Sharing(
                windows=short, by_type=found.by_type, cells_per_token=found.cells_per_token
            )
            alone, shared = run(
                [partial(_states, body, plain), partial(_states, body, packed, dtype, tried)]
            )
    except (
        Exception
    ) as error:  # whatever an architecture makes of a mask that it was not written for
        if isinstance(error, RnowError) or ran_out_of_memory(error) or ran_out_of_threads(error):
            raise
        return False
    exact = dtype == torch.float32 and not getattr(model, "is_quantized", False)
    tolerance = TOLERANCE if exact else HALF_TOLERANCE
    # A window that is read elsewhere than in the config cannot be tried.
    cut = wide is None or _gap(wide, alone) > tolerance
    return cut and _gap(shared, alone) <= tolerance


def _gap(found: Tensor, expected: Tensor) -> float:
    """The largest distance of two states, as a share of the expected one's length; infinite where either is no number."""
    apart = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    return apart if apart < math.inf else math.inf


def _states(
    body: Any, tokens: PaddedTokens, dtype: torch.dtype | None = None, found: Sharing | None = None
) -> Tensor:
    arguments: dict[str, Any] = {}
    if found is not None and dtype is not None and tokens.branches is not None:
        mask = attention_mask(body, tokens.branches, dtype, found)
        arguments = {"attention_mask": mask, "position_ids": tokens.branches.positions}
    output = body(input_ids=tokens.token_ids, use_cache=False, **arguments)
    hidden = output.last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])[tokens.rows.to(hidden.device)].float()


def _probe_samples(vocabulary: int) -> tuple[list[Sample], tuple[int, ...]]:
    """A group of three, one of them ending in the prompt of the others, another sample, and a row apart that is shorter."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (64,), generator=draw).tolist()
    first, second, third = ids[:9], ids[20:28], ids[40:46]
    branches = [first[:7], [*first, *ids[9:14]], [*first, *ids[14:20]], second, third]
    samples = [
        Sample(
            id=str(number),
            dataset="probe",
            token_ids=tuple(tokens),
            loss_mask=(False, *[True] * (len(tokens) - 1)),
            sampler_logprobs=(0.0,) * len(tokens),
        )
        for number, tokens in enumerate(branches)
    ]
    return samples, (4, 1)


@contextmanager
def _short_window(model: Any, body: Any, windowed: bool) -> Iterator[None]:
    configs = {id(c): c for c in (model.config, model.config.get_text_config(), body.config)}
    held = [(c, getattr(c, _WINDOW)) for c in configs.values() if getattr(c, _WINDOW, None)]
    if not windowed:
        held = []
    try:
        for config, _ in held:
            setattr(config, _WINDOW, _PROBE_WINDOW)
        yield
    finally:
        for config, window in held:
            setattr(config, _WINDOW, window)
