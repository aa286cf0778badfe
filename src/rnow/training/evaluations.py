"""When to evaluate: before training, every so many steps, and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rnow.protocols import Sampler, Teacher
from rnow.training.evaluate import Evaluator
from rnow.training.recorder import Recorder
from rnow.training.residency import Part, Residency

BEFORE, AFTER, TEACHER = "before", "after", "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """An evaluation that runs every ``every`` steps. Several evaluators: one per sampling temperature."""

    name: str
    every: int
    evaluators: Sequence[Evaluator]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluations:
    """All evaluations of a run.

    Attributes:
        main: runs before and after training, or None when nothing is held out.
        scheduled: the ``evals`` of the config.
        teacher_sampler: answers with the teacher, or None to leave the teacher out.
    """

    main: Evaluator | None
    scheduled: Sequence[Scheduled]
    sampler: Sampler
    teacher: Teacher | None
    teacher_sampler: Sampler | None
    gpu: Residency
    recorder: Recorder

    async def before(self, done: int) -> None:
        """Student and teacher before the first step. A resumed run has them already; what it may lack are those that
        were due after its last step, when the stop came during them."""
        if done > 0:
            await self.after_step(done)
            return
        if self.main is None:
            return
        known = {row["name"] for row in self.recorder.evaluations()}
        if BEFORE not in known:
            await self._run(BEFORE, self.main, 0, self.sampler, self.teacher)
        if self.teacher_sampler is not None and TEACHER not in known:
            await self._run(TEACHER, self.main, 0, self.teacher_sampler, None, answering="teacher")

    async def after_step(self, step: int) -> None:
        """The scheduled ones that are due."""
        known = {(row["name"], row["step"]) for row in self.recorder.evaluations()}
        for scheduled in self.scheduled:
            if step % scheduled.every == 0 and (scheduled.name, step) not in known:
                self.recorder.stage(f"evaluating {scheduled.name}")
                metrics: dict[str, float] = {}
                for evaluator in scheduled.evaluators:
                    metrics |= await evaluator.evaluate(self.sampler, self.teacher, self.gpu)
                self.recorder.evaluated(scheduled.name, step, metrics)

    async def after(self, step: int) -> None:
        """The student after the last step, unless an earlier attempt got that far."""
        known = {(row["name"], row["step"]) for row in self.recorder.evaluations()}
        if self.main is not None and (AFTER, step) not in known:
            await self._run(AFTER, self.main, step, self.sampler, self.teacher)

    async def _run(
        self,
        name: str,
        evaluator: Evaluator,
        step: int,
        sampler: Sampler,
        teacher: Teacher | None,
        *,
        answering: Part = "sampler",
    ) -> None:
        self.recorder.stage(f"evaluating: {name}")
        metrics = await evaluator.evaluate(sampler, teacher, self.gpu, answering=answering)
        self.recorder.evaluated(name, step, metrics)
