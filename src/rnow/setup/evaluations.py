"""Config -> the evaluations of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from rnow.config import EvalEntry
from rnow.plan.prepare import Prepared
from rnow.plan.sources import rows_of
from rnow.rewards.watch import RewardWatch
from rnow.setup.backends import Backends
from rnow.setup.usercode import UserCode, build_episodes, rollout_settings
from rnow.training.evaluations import PASS_AT, Evaluations, Evaluator, Scheduled
from rnow.training.held_out import HeldOutLoss
from rnow.training.recorder import Recorder
from rnow.types import Prompt


def build_held_out(prepared: Prepared, backends: Backends, recorder: Recorder) -> HeldOutLoss:
    """The loss of the held-out rows before and after training, and as often as the config's ``evals`` say."""
    return HeldOutLoss(
        rows=rows_of(prepared.evaluated, prepared.rendered.rows),
        scheduled={
            entry.name or f"eval_{index}": entry.step
            for index, entry in enumerate(prepared.config.evals)
        },
        student=backends.trainer_as_teacher,
        gpu=backends.gpu,
        recorder=recorder,
    )


def build_evaluations(
    prepared: Prepared,
    backends: Backends,
    recorder: Recorder,
    code: UserCode,
    reward_watch: RewardWatch,
) -> Evaluations:
    """The held-out prompts before and after training, and the config's ``evals`` in between."""
    section = prepared.config.evaluation
    held_out = prepared.evaluated

    def evaluator(samples: int, temperature: float, pass_at: tuple[int, ...]) -> Evaluator:
        return build_evaluator(
            prepared,
            code,
            held_out,
            reward_watch=reward_watch,
            poll=backends.poll,
            warn=recorder.warn,
            samples=samples,
            temperature=temperature,
            pass_at=pass_at,
        )

    def scheduled(index: int, entry: EvalEntry) -> Scheduled:
        temperatures = {}
        for k in PASS_AT:
            if getattr(entry, f"pass{k}"):
                chosen = getattr(entry, f"pass{k}_temp")
                temperatures[k] = section.temperature if chosen is None else chosen
        samples = entry.num_samples or section.num_samples
        return Scheduled(
            name=entry.name or f"eval_{index}",
            every=entry.step,
            evaluators=[
                evaluator(max(samples, *ks, 1), temperature, ks)
                for temperature, ks in by_temperature(temperatures).items()
            ],
        )

    return Evaluations(
        main=evaluator(section.num_samples, section.temperature, PASS_AT) if held_out else None,
        scheduled=[scheduled(index, entry) for index, entry in enumerate(prepared.config.evals)],
        sampler=backends.sampler,
        teacher=backends.teacher,
        teachers=backends.answering,
        gpu=backends.gpu,
        recorder=recorder,
    )


def by_temperature(temperatures: Mapping[int, float]) -> dict[float, tuple[int, ...]]:
    """k -> temperature as temperature -> the k that are measured at it, in order: samples at one temperature serve them all."""
    found: dict[float, tuple[int, ...]] = {}
    for k, temperature in temperatures.items():
        found[temperature] = (*found.get(temperature, ()), k)
    return found


def build_evaluator(
    prepared: Prepared,
    code: UserCode,
    prompts: Sequence[Prompt],
    *,
    reward_watch: RewardWatch,
    poll: Callable[[], None],
    warn: Callable[[str], None],
    samples: int,
    temperature: float,
    pass_at: tuple[int, ...],
) -> Evaluator:
    """What asks these prompts, ``samples`` rollouts each, drawn from the whole distribution at one temperature."""
    settings = rollout_settings(prepared, "eval", group_size=samples)
    return Evaluator(
        prompts=prompts,
        environments=build_episodes(prepared, code),
        settings=replace(settings, temperature=temperature, top_p=1.0, top_k=0, poll=poll),
        rewarder=code.rewarder,
        reward_watch=reward_watch,
        success_reward=prepared.config.evaluation.success_reward,
        judged=temperature == prepared.config.rollout.temperature,
        pass_at=pass_at,
        agentic=code.toolbox is not None,
        by_teacher=prepared.several_teachers,
        warn=warn,
    )
