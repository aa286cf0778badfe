"""Held-out rows of sft and midtrain: how improbable the student finds them before, during and after training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rnow.algorithm.records import SAMPLED, sampled_logprobs
from rnow.protocols import Teacher
from rnow.training.evaluations import AFTER, BEFORE
from rnow.training.recorder import Recorder
from rnow.training.residency import Residency
from rnow.training.rows import TokenRow

AT_ONCE = 64
"""Rows that are scored together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutLoss:
    """The evaluations of a run that learns from rows; a ``Schedule``.

    Attributes:
        rows: held out from training; without any nothing is evaluated.
        scheduled: name -> every so many steps, the ``evals`` of the config.
        student: the student's own weights behind the Teacher protocol.
    """

    rows: Sequence[TokenRow]
    scheduled: Mapping[str, int]
    student: Teacher
    gpu: Residency
    recorder: Recorder

    async def before(self, done: int) -> None:
        """Before the first step; what was due after the last step of a resumed run."""
        if done > 0:
            await self.after_step(done)
        else:
            await self._evaluate(BEFORE, 0)

    async def after_step(self, step: int) -> None:
        """Those that are due."""
        for name, every in self.scheduled.items():
            if step % every == 0:
                await self._evaluate(name, step)

    async def after(self, step: int) -> None:
        """After the last step."""
        await self._evaluate(AFTER, step)

    async def _evaluate(self, name: str, step: int) -> None:
        known = {(row["name"], row["step"]) for row in self.recorder.evaluations()}
        if not self.rows or (name, step) in known:
            return
        self.recorder.stage(f"evaluating: {name}")
        async with self.gpu.only("trainer"):
            metrics = await held_out_loss(self.rows, self.student)
        self.recorder.evaluated(name, step, metrics)


async def held_out_loss(rows: Sequence[TokenRow], student: Teacher) -> dict[str, float]:
    """``loss``, the mean over all loss tokens of their negative log-probability in nats, and ``perplexity``, its exponential; of
    several datasets ``loss/<dataset>`` too."""
    sums: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for start in range(0, len(rows), AT_ONCE):
        samples = [row.sample() for row in rows[start : start + AT_ONCE]]
        evidence = await student.score(samples, SAMPLED)
        for sample in samples:
            own = -sampled_logprobs(evidence[sample.id])
            sums.setdefault(sample.dataset, []).append(math.fsum(own.tolist()))
            counts[sample.dataset] += len(own)
    loss = math.fsum(value for of in sums.values() for value in of) / counts.total()
    # A float's largest exponent: a student that is so far off has no perplexity that says more.
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if len(sums) > 1:
        metrics |= {f"loss/{name}": math.fsum(of) / counts[name] for name, of in sums.items()}
    return metrics
