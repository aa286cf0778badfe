"""Where student and teacher disagree, over all tokens of the steps that are looked at: by token, and by place in the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from rnow.report.curves import rounded
from rnow.report.text import safe

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]

BY_MEAN, BY_SHARE = 40, 20
"""Tokens that are listed: those with the largest mean KL, and those that hold most of all KL."""

LEAST, LEAST_SHARE = 5, 1 / 20_000
"""How many tokens a mean is taken of at least, and as a share of all tokens."""

PLACES = 48
"""Stretches that the longest answer is cut into."""

LONGEST = 1 << 16
"""Places that are told apart; what is beyond counts as the last."""

TOKEN_TEXT = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """All tokens of a step, one rollout after the other, N of R rollouts.

    Attributes:
        lengths: int64 ``[R]``.
        ids: int32 ``[N]``.
        kl, entropy: float64 ``[N]``, NaN where unknown.
        texts: ``[N]``.
    """

    lengths: Array
    ids: Array
    kl: Array
    entropy: Array
    texts: pa.Array

    @classmethod
    def of(cls, table: pa.Table) -> StepTokens:
        """Of a transcript's table."""
        ids = table.column("token_ids").combine_chunks()
        lengths = ids.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(int)
        return cls(
            lengths=lengths,
            ids=ids.flatten().to_numpy(zero_copy_only=False),
            kl=_numbers(table, "kl", lengths),
            entropy=_numbers(table, "entropy", lengths),
            texts=table.column("tokens").combine_chunks().flatten(),
        )

    @property
    def places(self) -> Array:
        """int64 ``[N]``: of each token in its rollout, from 0."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(len(self.ids)) - np.repeat(starts, self.lengths)

    def worst(self) -> list[float | None]:
        """The largest KL of each rollout, None where none is known."""
        ends = np.cumsum(self.lengths)
        parts = (
            part[np.isfinite(part)]
            for part in (self.kl[a:b] for a, b in zip(ends - self.lengths, ends, strict=True))
        )
        return [float(part.max()) if part.size else None for part in parts]


def _numbers(table: pa.Table, name: str, lengths: Array) -> Array:
    lists = table.column(name).combine_chunks()
    found = np.full(int(lengths.sum()), np.nan)
    there = np.repeat(lists.is_valid().to_numpy(zero_copy_only=False), lengths)
    values = lists.flatten().to_numpy(zero_copy_only=False)
    # A list that is there has a number for each token.
    found[there] = values
    return found


@dataclass(slots=True)
class _Sum:
    """Of one token: how often, its KL in all, and both in the later half of the steps."""

    text: str
    count: int = 0
    kl: float = 0.0
    late_count: int = 0
    late_kl: float = 0.0

    @property
    def mean(self) -> float:
        return self.kl / self.count


@dataclass(slots=True)
class _ByPlace:
    """Sums and counts by place in the answer."""

    sums: Array = field(default_factory=lambda: np.zeros(0))
    counts: Array = field(default_factory=lambda: np.zeros(0))

    def add(self, places: Array, values: Array) -> None:
        known = np.isfinite(values)
        at = np.minimum(places[known], LONGEST - 1)
        size = max(len(self.sums), int(at.max(initial=-1)) + 1)
        self.sums = _grown(self.sums, size) + np.bincount(at, values[known], size)
        self.counts = _grown(self.counts, size) + np.bincount(at, minlength=size)

    def means(self, edges: Sequence[int]) -> list[float | None]:
        """Of each stretch between two edges; None where there is next to nothing, a mean of which says nothing."""
        stretches = list(pairwise(edges))
        counts = [self.counts[start:end].sum() for start, end in stretches]
        least = LEAST if max(counts, default=0) >= LEAST else 1
        return [
            rounded(self.sums[start:end].sum() / count) if count >= least else None
            for (start, end), count in zip(stretches, counts, strict=True)
        ]


def _grown(values: Array, size: int) -> Array:
    return np.concatenate([values, np.zeros(size - len(values))])


class Disagreement:
    """Gathered step by step; what is held does not grow with the steps."""

    def __init__(self) -> None:
        self._tokens: dict[int, _Sum] = {}
        self._kl = {False: _ByPlace(), True: _ByPlace()}
        self._entropy = {False: _ByPlace(), True: _ByPlace()}

    def add(self, step: StepTokens, *, late: bool) -> None:
        """One step; ``late``: of the later half of those that are looked at."""
        places = step.places
        self._kl[late].add(places, step.kl)
        self._entropy[late].add(places, step.entropy)
        known = np.flatnonzero(np.isfinite(step.kl))
        ids, first, which = np.unique(step.ids[known], return_index=True, return_inverse=True)
        counts = np.bincount(which, minlength=len(ids))
        sums = np.bincount(which, step.kl[known], len(ids))
        for token, at, count, kl in zip(
            ids.tolist(), first.tolist(), counts.tolist(), sums.tolist(), strict=True
        ):
            found = self._tokens.get(token)
            if found is None:
                text = safe(step.texts[int(known[at])].as_py(), TOKEN_TEXT)
                found = self._tokens[token] = _Sum(text)
            found.count += count
            found.kl += kl
            if late:
                found.late_count += count
                found.late_kl += kl

    def tokens(self) -> list[dict[str, object]]:
        """Those with the largest mean KL, and those that hold most of it, the largest mean first; JSON-ready."""
        every = sum(found.count for found in self._tokens.values())
        least = max(LEAST, every * LEAST_SHARE)
        often = [found for found in self._tokens.values() if found.count >= least]
        often = often or list(self._tokens.values())
        # Where the student is less sure than its teacher, nothing is wrong.
        often = [found for found in often if found.kl > 0]
        whole = sum(max(0.0, found.kl) for found in self._tokens.values()) or 1.0
        by_mean = sorted(often, key=lambda found: -found.mean)[:BY_MEAN]
        by_share = sorted(often, key=lambda found: -found.kl)[:BY_SHARE]
        listed = {id(found): found for found in (*by_mean, *by_share)}.values()
        return [
            {
                "text": found.text,
                "count": found.count,
                "mean": rounded(found.mean),
                "early": _mean(found.kl - found.late_kl, found.count - found.late_count),
                "late": _mean(found.late_kl, found.late_count),
                "share": rounded(found.kl / whole),
            }
            for found in sorted(listed, key=lambda found: -found.mean)
        ]

    def charts(self) -> list[dict[str, object]]:
        """KL and entropy by place in the answer, early and late in the run."""
        found = (
            ("KL by place in the answer", "The beginning of an answer is on the left.", self._kl),
            ("Entropy by place in the answer", "", self._entropy),
        )
        return [chart for title, about, by in found if (chart := _place_chart(title, about, by))]


def _mean(total: float, count: int) -> float | None:
    return rounded(total / count) if count else None


def _place_chart(title: str, about: str, by: dict[bool, _ByPlace]) -> dict[str, object] | None:
    longest = max(len(found.sums) for found in by.values())
    if not longest:
        return None
    edges = sorted(set(np.linspace(0, longest, min(PLACES, longest) + 1).round().astype(int)))
    edges = [int(edge) for edge in edges]
    series = [
        {"label": label, "values": by[late].means(edges)}
        for label, late in (("first half of the steps", False), ("second half", True))
        if by[late].counts.sum()
    ]
    return {
        "title": title,
        "unit": "nats per token",
        "about": about,
        "x": _middles(edges),
        "along": "token",
        "series": series,
    }


def _middles(edges: Sequence[int]) -> list[float]:
    """Where each stretch of tokens is, counted from 1."""
    return [(start + 1 + end) / 2 for start, end in pairwise(edges)]


def spread(values: Iterable[int], count: int) -> list[int]:
    """At most ``count`` of the values, evenly spread, the first and the last among them."""
    found = list(values)
    if len(found) <= count:
        return found
    places = np.linspace(0, len(found) - 1, count).round().astype(int)
    return [found[place] for place in sorted({int(place) for place in places})]
