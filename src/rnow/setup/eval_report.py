"""What ``rnow eval`` found: pass@k of each subject, with intervals, and how the others differ from the first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rnow.setup.subjects import Subject
from rnow.training.intervals import (
    HOW,
    Interval,
    difference_interval,
    mean_interval,
    pass_at_k,
)

LENGTH = "completions/mean_length"
FAILED = ("rollouts/failed_fraction", "reward/failure_fraction")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One subject's numbers.

    Attributes:
        kept: the file that holds them.
        fresh: they were measured now, not read back.
        values: the file's content (``disk.evals``).
    """

    subject: Subject
    kept: Path
    fresh: bool
    values: Mapping[str, Any]

    @property
    def temperatures(self) -> dict[int, float]:
        """k -> at which temperature its samples were drawn."""
        return {k: sampling["temperature"] for k, sampling in self._each()}

    @property
    def pass_at(self) -> dict[int, dict[str, float]]:
        """k -> prompt id -> the unbiased estimate of pass@k (``pass_at_k``)."""
        return {
            k: {
                prompt: pass_at_k(sampling["samples"], passed, k)
                for prompt, passed in sampling["passed"].items()
            }
            for k, sampling in self._each()
        }

    @property
    def length(self) -> float | None:
        """Tokens of an answer, the mean over all samplings."""
        found = [s["metrics"].get(LENGTH) for s in self.values["samplings"]]
        known = [value for value in found if value is not None]
        return fmean(known) if known else None

    @property
    def failed(self) -> float:
        """The share of answers of which there is no whole reward: the rollout failed, or a reward on it. What failed counts as 0."""
        shares = [(s["samples"], s["metrics"]) for s in self.values["samplings"]]
        lost = (samples * _failed(metrics) for samples, metrics in shares)
        return math.fsum(lost) / sum(samples for samples, _ in shares)

    def _each(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        found = {k: s for s in self.values["samplings"] for k in s["pass_at"]}
        yield from sorted(found.items())


def _failed(metrics: Mapping[str, float | None]) -> float:
    """The share of one sampling: rewards were called on the rollouts that did not fail."""
    rollouts, rewards = (metrics.get(name) or 0.0 for name in FAILED)
    return rollouts + (1 - rollouts) * rewards


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """The subjects of one call, in the order they were named.

    Attributes:
        prompts: of what, in words: ``12 held-out prompts``.
        count: how many of them.
    """

    rows: Sequence[Evaluated]
    prompts: str
    count: int

    def intervals(self) -> list[dict[int, Interval]]:
        """Of each subject k -> pass@k."""
        return [
            {k: mean_interval([*found.values()]) for k, found in row.pass_at.items()}
            for row in self.rows
        ]

    def differences(self) -> list[dict[int, Interval]]:
        """Of each subject but the first, k -> its pass@k minus the first's, prompt by prompt."""
        first, *others = self.rows
        return [
            {k: difference_interval(first.pass_at[k], found) for k, found in row.pass_at.items()}
            for row in others
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain values for ``--json``."""
        first, *others = self.rows
        return {
            "prompts": self.prompts,
            "count": self.count,
            "intervals": HOW,
            "subjects": [
                {
                    **row.subject.to_dict(),
                    "pass": {
                        f"pass@{k}": {"temperature": row.temperatures[k], **asdict(interval)}
                        for k, interval in found.items()
                    },
                    "samplings": [
                        {name: value for name, value in sampling.items() if name != "passed"}
                        for sampling in row.values["samplings"]
                    ],
                    "failed": row.failed,
                    "kept": str(row.kept.resolve()),
                    "measured_now": row.fresh,
                }
                for row, found in zip(self.rows, self.intervals(), strict=True)
            ],
            "differences": [
                {
                    "subject": row.subject.name,
                    "minus": first.subject.name,
                    "pass": {f"pass@{k}": asdict(interval) for k, interval in found.items()},
                }
                for row, found in zip(others, self.differences(), strict=True)
            ],
        }
