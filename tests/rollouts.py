"""Rollouts written down as flat sequences, and read back as such."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rnow.disk.transcript_rows import read_step, steps_of
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
    """The rows of one step, and in each its ``tokens`` as one dict per token."""
    columns = {
        "turn": "turn",
        "token_ids": "id",
        "tokens": "text",
        "sampler_logprobs": "sampler_logprob",
        "teacher_logprobs": "teacher_logprob",
        "kl": "kl",
    }
    rows = read_step(steps_of(folder)[step])
    for row in rows:
        unknown = [None] * len(row["token_ids"])
        lists = [unknown if row[name] is None else row[name] for name in columns]
        row["tokens"] = [
            dict(zip(columns.values(), values, strict=True)) for values in zip(*lists, strict=True)
        ]
    return rows
