"""What the workers of ``estimators.py`` do: train for some seconds, judge the adapters afterwards, measure gradients.

A worker is a process with one thread on one core. It trains with ``rnow.run``, which saves after every step; the clock is the
sum of the run's own ``time/step`` (sampling, teacher, update, loading the adapter), so that neither saving nor judging is in it.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import rnow
from rnow.algorithm.batching import (
    build_batch,
    build_samples,
    build_training_samples,
    pad,
    plan_micro_batches,
)
from rnow.algorithm.records import TeacherNeeds
from rnow.disk.folder import RunFolder
from rnow.display.display import QuietDisplay
from rnow.errors import StopRequested
from rnow.models.loading import quiet_libraries
from rnow.plan.prepare import prepare
from rnow.policy.lora import trainable_parameters
from rnow.rewards.score import score_rewards
from rnow.rollout.collect import collect_rollouts
from rnow.setup.backends import load_backends
from rnow.setup.objective import build_objective
from rnow.setup.usercode import build_episodes, open_user_code, rollout_settings
from rnow.tasks import run_anywhere
from rnow.types import Adapter, RolloutGroup, Sample

TEMPLATES = Path(__file__).parents[1] / "templates"
HELD_OUT = 256
"""Prompts that are never trained on, the last of each template's file."""
ENDLESS = 1000
EVAL_TOKENS, EVAL_LOGITS = 4096, 1 << 25
"""At most so many tokens, and so many logits, in one float64 forward pass."""
EVALUATION, PROBE = "eval", "train"
MODELS = ("student", "teacher")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        arm: the estimator's name in the study, whose config ``settings`` are: section -> key -> value.
        purpose: ``choose`` a learning rate, or ``measure``.
        seconds: of the training's clock.
        marks: at how many moments, evenly spread and the end among them, the adapter is judged.
        prompts: held-out prompts for that.
    """

    template: str
    arm: str
    settings: Mapping[str, Mapping[str, Any]]
    learning_rate: float
    seed: int
    purpose: str
    seconds: float
    marks: int
    prompts: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """A moment of a run: its steps, sampled tokens and seconds so far, and the adapter's held-out figures."""

    step: int
    tokens: int
    seconds: float
    kl: float = math.nan
    accuracy: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Start:
    """A template's student before training, judged on so many prompts."""

    template: str
    prompts: int


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Gradients on one batch of prompts, answered ``repeats`` times: at the start, or with the adapter of a short training."""

    template: str
    arms: Mapping[str, Mapping[str, Mapping[str, Any]]]
    reference: str
    trained_seconds: float
    learning_rate: float
    repeats: int


def split_templates(folder: Path, names: Sequence[str]) -> None:
    """``folder/<name>`` to train in, and ``folder/<name>-held-out`` with the prompts that are kept from it."""
    for name in names:
        rows = (TEMPLATES / name / "train.jsonl").read_text().splitlines(keepends=True)
        parts = {name: rows[:-HELD_OUT], f"{name}-held-out": rows[-HELD_OUT:]}
        for part, mine in parts.items():
            shutil.copytree(TEMPLATES / name, folder / part)
            (folder / part / "train.jsonl").write_text("".join(mine))


def build_config(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> rnow.Config:
    """The template's config with ``settings`` over it, for one core: all in float32 on the CPU, nothing evaluated."""
    import yaml

    values = yaml.safe_load((folder / "config.yml").read_text())
    ours: dict[str, Mapping[str, Any]] = {
        "data": {"val_split": 0.0},
        "model": {"device": "cpu", "dtype": "float32", "quantization": "none"},
        "teacher": {"device": "cpu", "dtype": "float32"},
        "sampler": {"backend": "transformers"},
        "trainer": {
            "num_epochs": ENDLESS,
            "save_step": 1,
            "save_minutes": 1e4,
            "keep_checkpoints": 10**6,
        },
    }
    for layer in (ours, settings):
        for section, keys in layer.items():
            values[section] = {**values.get(section, {}), **keys}
    # YAML 1.1 reads 1e-3 as a text.
    values["trainer"]["learning_rate"] = float(values["trainer"]["learning_rate"])
    return rnow.Config(**values)


# ---- training --------------------------------------------------------------------------------------------------------


class Clock(QuietDisplay):
    """Adds up the steps' own times, and stops the run as Ctrl-C would when they reach ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.points: list[Point] = []

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        last = self.points[-1] if self.points else Point(step=0, tokens=0, seconds=0.0)
        over = last.seconds >= self.seconds
        now = Point(
            step=step,
            tokens=last.tokens + int(metrics.get("tokens/completion", 0)),
            seconds=last.seconds + metrics["time/step"],
        )
        self.points.append(now)
        if now.seconds >= self.seconds and not over:
            signal.raise_signal(signal.SIGINT)


def train(folder: Path, run: Run) -> list[tuple[Point, dict[str, Tensor]]]:
    """The adapters at the marks of a run in the project ``folder``: each that of the step whose end is nearest."""
    clock = Clock(run.seconds)
    with tempfile.TemporaryDirectory() as runs:
        ours = {"trainer": {"learning_rate": run.learning_rate}, "model": {"name": "run"}}
        settings = {key: {**run.settings.get(key, {}), **value} for key, value in ours.items()}
        config = build_config(folder, {**run.settings, **settings})
        config = config.model_copy(update={"seed": run.seed, "output_dir": runs})
        with suppress(StopRequested):  # by the clock
            rnow.run(config, folder=folder, display=clock)
        found = []
        for point in at_marks(clock.points, run.seconds, run.marks):
            saved = Path(runs) / "run" / "checkpoints" / f"step-{point.step:06d}"
            found.append((point, load_file(saved / "adapter_model.safetensors")))
    return found


def at_marks(points: Sequence[Point], seconds: float, marks: int) -> list[Point]:
    """Of the steps' ends, the nearest to each of ``marks`` moments that are evenly spread up to ``seconds``."""
    moments = [seconds * (mark + 1) / marks for mark in range(marks)]
    return [min(points, key=lambda point: abs(point.seconds - moment)) for moment in moments]


# ---- judging ---------------------------------------------------------------------------------------------------------


class Judge:
    """Accuracy and exact KL of a template's student, with any adapter, on prompts that were kept from training.

    Answers are drawn at temperature 1, with the same random numbers for every adapter, and go through the project's own tools
    and rewards. The KL is that of transformers' models in float64 over the whole vocabulary, without anything of rnow's.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.stack = ExitStack()
        config = build_config(folder, {"algorithm": {"kl_estimator": "exact"}})
        self.prepared = prepare(config, folder, weights=True)
        self.prompts = self.prepared.project.dataset.prompts
        self.backends = run_anywhere(
            load_backends(
                self.prepared,
                RunFolder(folder / "runs" / "judge"),
                self.stack,
                poll=lambda: None,
                stage=lambda text: None,
            )
        )
        self.student, self.teacher = (
            AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval()
            for name in MODELS
        )
        self._base = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self.start = {k: v.clone() for k, v in self.backends.policy.adapter().tensors.items()}

    def grade(
        self, adapters: Sequence[Mapping[str, Tensor]], prompts: int
    ) -> list[tuple[float, float]]:
        """(KL per completion token in nats, share of right answers) of each adapter."""
        drawn = run_anywhere(self._draw_all(adapters, prompts))
        found = []
        for adapter, (groups, right) in zip(adapters, drawn, strict=True):
            self._merge(adapter)
            found.append((self.exact_kl(build_samples(groups)), right))
        return found

    async def _draw_all(
        self, adapters: Sequence[Mapping[str, Tensor]], prompts: int
    ) -> list[tuple[list[RolloutGroup], float]]:
        found = []
        success = self.prepared.config.evaluation.success_reward
        async with open_user_code(self.prepared) as code:
            for adapter in adapters:
                groups = await self.draw(code, adapter, prompts, EVALUATION, group_size=1, step=0)
                rewards = await score_rewards(groups, code.rewarder)
                right = sum(reward.total >= success for reward in rewards.values())
                found.append((groups, right / len(groups)))
        return found

    async def draw(
        self,
        code: Any,
        adapter: Mapping[str, Tensor],
        prompts: int,
        purpose: Any,
        *,
        group_size: int,
        step: int,
    ) -> list[RolloutGroup]:
        """Rollouts of the first ``prompts`` prompts. Another ``step`` draws other numbers."""
        config = self.backends.policy.adapter().config
        self.backends.sampler.load_policy(Adapter(tensors=adapter, config=config), version=step)
        settings = rollout_settings(self.prepared, purpose, group_size=group_size)
        environments = build_episodes(self.prepared, code)
        chosen = self.prompts[:prompts]
        return await collect_rollouts(
            chosen, self.backends.sampler, environments, settings, step=step
        )

    @torch.no_grad()
    def _merge(self, adapter: Mapping[str, Tensor]) -> None:
        """W + alpha / rank * B A, in float64."""
        config = self.backends.policy.adapter().config
        scale = config["lora_alpha"] / config["r"]
        weights = dict(self.student.named_parameters())
        for name, weight in weights.items():
            weight.copy_(self._base[name])
        for name, a in adapter.items():
            if name.endswith(".lora_A.weight"):
                b = adapter[name.replace("lora_A", "lora_B")]
                layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weights[f"{layer}.weight"].add_(scale * (b.double() @ a.double()))

    @torch.no_grad()
    def exact_kl(self, samples: Sequence[Sample]) -> float:
        """KL(student || teacher) at the student's own answers, per completion token, in nats."""
        total, count = 0.0, 0
        lengths = [len(sample.token_ids) for sample in samples]
        most = min(EVAL_TOKENS, EVAL_LOGITS // self.prepared.rendered.vocabulary)
        for indices in plan_micro_batches(lengths, most):
            tokens = pad([samples[index] for index in indices], "cpu")
            student, teacher = (self._logprobs(m, tokens) for m in (self.student, self.teacher))
            total += (student.exp() * (student - teacher)).sum().item()
            count += len(tokens.rows)
        return total / count

    def _logprobs(self, model: Any, tokens: Any) -> Tensor:
        logits = model(input_ids=tokens.token_ids).logits.flatten(0, 1)[tokens.rows]
        return torch.log_softmax(logits[:, : self.prepared.rendered.vocabulary], dim=-1)

    # ---- gradients ---------------------------------------------------------------------------------------------------

    def gradients(self, probe: Probe, adapter: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Arm -> ``[repeats, parameters of the adapter]``: the policy's own gradient on each repeat's answers."""
        return run_anywhere(self._gradients(probe, self.start if adapter is None else adapter))

    async def _gradients(self, probe: Probe, adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
        policy: Any = self.backends.policy
        heads = policy._objective.heads
        objectives = {
            name: build_objective(
                replace(
                    self.prepared,
                    config=build_config(self.prepared.project.folder, settings),
                ),
                heads,
            )
            for name, settings in probe.arms.items()
        }
        policy.load_adapter(adapter)
        data = self.prepared.config.data
        rows: dict[str, list[Tensor]] = {name: [] for name in objectives}
        async with open_user_code(self.prepared) as code:
            for repeat in range(probe.repeats):
                groups = await self.draw(
                    code,
                    adapter,
                    data.batch_size,
                    PROBE,
                    group_size=data.group_size,
                    step=repeat,
                )
                samples = build_samples(groups)
                said: dict[TeacherNeeds, Any] = {}
                for name, objective in objectives.items():
                    if objective.needs not in said:
                        assert self.backends.teacher is not None
                        said[objective.needs] = await self.backends.teacher.score(
                            samples, objective.needs
                        )
                    rewards = dict.fromkeys((sample.id for sample in samples), 0.0)
                    training = build_training_samples(samples, rewards, said[objective.needs])
                    policy._objective = objective
                    policy._accumulate(build_batch(training))
                    rows[name].append(
                        torch.cat([p.grad.flatten() for _, p in trainable_parameters(policy.model)])
                    )
        policy.load_adapter(self.start)
        return {name: torch.stack(found) for name, found in rows.items()}


# ---- what a worker is asked -----------------------------------------------------------------------------------------


def begin(cores: Any) -> None:
    """A worker begins: one thread, on one of ``cores`` where the system lets it choose."""
    torch.set_num_threads(1)
    quiet_libraries()
    core = cores.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


@cache
def judge_of(folder: Path) -> Judge:
    """One judge for each template in each worker."""
    return Judge(folder)


def measure(folder: Path, run: Run) -> list[dict[str, Any]]:
    """Train and judge: the points of a run."""
    found = train(folder / run.template, run)
    judge = judge_of(folder / f"{run.template}-held-out")
    grades = judge.grade([adapter for _, adapter in found], run.prompts)
    return [
        asdict(replace(point, kl=kl, accuracy=accuracy))
        for (point, _), (kl, accuracy) in zip(found, grades, strict=True)
    ]


def measure_start(folder: Path, start: Start) -> dict[str, Any]:
    """The student before training, as a point."""
    judge = judge_of(folder / f"{start.template}-held-out")
    ((kl, accuracy),) = judge.grade([judge.start], start.prompts)
    return asdict(Point(step=0, tokens=0, seconds=0.0, kl=kl, accuracy=accuracy))


def measure_gradients(folder: Path, probe: Probe) -> list[dict[str, Any]]:
    """What ``gradient_stats.compare`` says of each arm."""
    from gradient_stats import compare

    adapter = None
    if probe.trained_seconds:
        run = Run(
            template=probe.template,
            arm=probe.reference,
            settings=probe.arms[probe.reference],
            learning_rate=probe.learning_rate,
            seed=0,
            purpose="probe",
            seconds=probe.trained_seconds,
            marks=1,
            prompts=0,
        )
        ((_, adapter),) = train(folder / probe.template, run)
    judge = judge_of(folder / f"{probe.template}-held-out")
    gradients = judge.gradients(probe, adapter)
    reference = gradients[probe.reference]
    return [
        {"arm": name, **compare(mine, reference, same=name == probe.reference)}
        for name, mine in gradients.items()
    ]
