"""Rollouts written down as flat sequences, and read back as such."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rnow.types import Completion, Rollout, Turn


class Flat(NamedTuple):
    """A rollout's tokens in order; index i of each describes token i."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    sampler_logprobs: tuple[float, ...]


def flat(rollout: Rollout) -> Flat:
    """All tokens of a rollout, what nobody answered included."""
    rows: list[tuple[int, bool, float]] = []
    for turn in rollout.turns:
        rows += [(token, False, 0.0) for token in turn.observation_token_ids]
        rows += [
            (token, True, logprob)
            for token, logprob in zip(
                turn.completion.token_ids, turn.completion.logprobs, strict=True
            )
        ]
    rows += [(token, False, 0.0) for token in rollout.unanswered_token_ids]
    ids, mask, logprobs = zip(*rows, strict=True) if rows else ((), (), ())
    return Flat(ids, mask, logprobs)


def turns_of(
    token_ids: Sequence[int], loss_mask: Sequence[bool], sampler_logprobs: Sequence[float]
) -> tuple[tuple[Turn, ...], tuple[int, ...]]:
    """The turns of a flat sequence, and what follows the last."""
    turns: list[Turn] = []
    shown: tuple[int, ...] = ()
    rows = zip(token_ids, loss_mask, sampler_logprobs, strict=True)
    for on, part in groupby(rows, key=lambda row: row[1]):
        ids, _, logprobs = zip(*part, strict=True)
        if not on:
            shown = ids
            continue
        completion = Completion(
            token_ids=ids, logprobs=logprobs, finish_reason="stop", policy_version=0
        )
        turns.append(Turn(observation_token_ids=shown, completion=completion))
        shown = ()
    return tuple(turns), shown


def read_transcripts(folder: Path, step: int) -> list[dict[str, Any]]:
    """The rows of one step, as dicts."""
    text = (folder / f"step-{step:06d}.jsonl").read_text(encoding="utf-8")
    # Not splitlines(): U+2028 and its like stand unescaped inside the texts.
    return [json.loads(line) for line in text.split("\n") if line]
