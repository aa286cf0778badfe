"""From a config to a running program: the only module that picks implementations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rnow.config import Config, config_hash, to_dict, to_yaml
from rnow.errors import RnowError, StopRequested
from rnow.models.loading import CausalLM
from rnow.models.resolve import tokenizer_hash
from rnow.policy.student import LoraPolicy, Objective, OptimizerSettings
from rnow.rewards.advantages import rollout_advantages
from rnow.run import changes
from rnow.run.checkpoints import Checkpoint, CheckpointStore, export_adapter
from rnow.run.console import Display, QuietDisplay
from rnow.run.evaluate import PASS_AT, Evaluator
from rnow.run.evaluations import Evaluations, Scheduled
from rnow.run.files import replace_file, replace_json
from rnow.run.folder import RunFolder
from rnow.run.journal import JournalFolder
from rnow.run.loop import Parts, train
from rnow.run.models import load_student, load_teacher_model, quiet_libraries
from rnow.run.parts import (
    batch_bytes,
    build_rewarder,
    environment_maker,
    redactor,
    rollout_settings,
)
from rnow.run.plan import Plan, build_plan
from rnow.run.prepare import Prepared, prepare
from rnow.run.recorder import Recorder
from rnow.run.saver import Saver
from rnow.run.selfcheck import run_selfcheck
from rnow.run.signals import StopFlag
from rnow.run.sinks import JsonlMetrics, Sink, WandbSink
from rnow.run.summary import RunSummary, build_values, device_name, versions
from rnow.run.transcripts import TranscriptWriter
from rnow.sampling.transformers import TransformersSampler
from rnow.teacher.transformers import TransformersTeacher


def check(config: Config, folder: str | Path = ".") -> Plan:
    """Everything a run would refuse, and a plan of what it would do. Reads no weights and writes nothing.

    Raises:
        InputError: what is wrong.
    """
    prepared = prepare(config, Path(folder), weights=False)
    return build_plan(
        config,
        prepared.project.dataset,
        prepared.student,
        prepared.teacher,
        prepared.preflight,
        run_dir=prepared.run_folder().path,
    )


def run(
    config: Config,
    *,
    folder: str | Path = ".",
    fresh: bool = False,
    display: Display | None = None,
) -> RunSummary:
    """Train, or continue training, the project in ``folder``.

    Args:
        fresh: start over in a new run folder instead of continuing.
        display: told what happens; nothing is shown by default.

    Raises:
        InputError: bad input, before training; nothing was written.
        StopRequested: Ctrl-C or SIGTERM; the state is saved.
        TemporaryError: a fault outside the run; the state is saved.
    """
    display = display or QuietDisplay()
    quiet_libraries()
    display.stage("checking")
    prepared = prepare(config, Path(folder), weights=True)
    for warning in (*prepared.project.warnings, *prepared.preflight.warnings):
        display.note(f"warning: {warning}")
    run_folder = prepared.run_folder(fresh=fresh)
    if (finished := _finished(run_folder, prepared)) is not None:
        display.note(f"this run is finished already ({run_folder.path}); --fresh starts over")
        return RunSummary(values=finished)
    with ExitStack() as stack:
        if run_folder.path.exists():
            stack.enter_context(run_folder.lock())
        return _Builder(prepared, run_folder, display, stack).run()


def _finished(run_folder: RunFolder, prepared: Prepared) -> dict[str, Any] | None:
    summary = run_folder.finished_summary()
    if summary is None or summary.get("config_hash") != config_hash(prepared.config):
        return None
    return summary if summary.get("steps", 0) >= prepared.num_steps else None


class _Builder:
    """Makes the parts of one run, in the order in which a fault costs least."""

    def __init__(
        self, prepared: Prepared, run_folder: RunFolder, display: Display, stack: ExitStack
    ) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._folder = run_folder
        self._display = display
        self._stack = stack
        self._stop = StopFlag()
        self._redact = redactor(prepared)
        self._environments = environment_maker(prepared)
        self._facts = self._build_facts()
        self._seconds_before = 0.0

    def run(self) -> RunSummary:
        checkpoint = self._find_checkpoint()
        self._display.stage("loading the student")
        student = load_student(
            self._config, self._prepared.student, self._prepared.preflight.vocabulary
        )
        # The sampler first: in merged mode it copies the base as it is before PEFT wraps it.
        sampler = TransformersSampler.for_student(
            student, batch_bytes=batch_bytes(self._prepared), poll=self._stop.poll
        )
        policy = self._build_policy(student)
        self._display.stage("loading the teacher")
        teacher, teacher_sampler = self._build_teacher()
        with self._stop.watch(lambda: self._display.note("stopping at the next safe point ...")):
            self._display.stage("checking the models against each other")
            asyncio.run(self._selfcheck(student, sampler, policy, teacher))
            return self._train(checkpoint, student, sampler, policy, teacher, teacher_sampler)

    def _train(
        self,
        checkpoint: Checkpoint | None,
        student: CausalLM,
        sampler: TransformersSampler,
        policy: LoraPolicy,
        teacher: TransformersTeacher | None,
        teacher_sampler: TransformersSampler | None,
    ) -> RunSummary:
        started = time.monotonic()
        if not self._folder.path.exists():
            self._folder.make()
            self._stack.enter_context(self._folder.lock())
        self._folder.make()
        recorder = self._build_recorder()
        self._stack.callback(recorder.close)

        def counters() -> dict[str, float]:
            seconds = self._seconds_before + time.monotonic() - started
            return {"completion_tokens": recorder.completion_tokens, "seconds": seconds}

        saver = self._build_saver(policy, counters)
        done = saver.restore(checkpoint)
        recorder.forget_after(done)
        if checkpoint is not None:
            saved = checkpoint.state.get("counters", {})
            recorder.completion_tokens = int(saved.get("completion_tokens", 0))
            self._seconds_before = float(saved.get("seconds", 0.0))
        replace_file(self._folder.config, self._redact(to_yaml(self._config)).encode())
        evaluations = self._build_evaluations(sampler, teacher, teacher_sampler, recorder)
        parts = self._build_parts(sampler, teacher, policy, evaluations, recorder, saver)
        self._display.start(self._header(student, sampler, done))
        try:
            asyncio.run(train(parts, done))
        except StopRequested as stop:
            raise self._with_resume_hint(stop) from None
        self._display.stage("writing the adapter")
        export_adapter(policy.adapter(), self._folder.adapter)
        self._prepared.preflight.tokenizer.save_pretrained(str(self._folder.adapter))
        summary = build_values(
            run_dir=self._folder.path,
            adapter=self._folder.adapter,
            steps=parts.num_steps,
            seconds=counters()["seconds"],
            counters=counters(),
            metrics_file=self._folder.metrics,
            evaluations=recorder.evaluations(),
            facts=self._facts,
            device=device_name(student.device),
            sampler={"backend": "transformers", "mode": sampler.mode},
        )
        replace_json(self._folder.summary, summary)
        self._display.finish(self._closing_lines())
        return RunSummary(values=summary)

    # ---- before training --------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> Checkpoint | None:
        if not self._folder.checkpoints.is_dir():
            return None
        store = self._build_store()
        checkpoint = store.latest()
        if checkpoint is None:
            return None
        found = changes.compare(
            checkpoint.state["config"], self._facts["config"], checkpoint.state, self._facts
        )
        changes.refuse(found, where=str(self._folder.path))
        for line in found.free:
            self._display.note(f"changed since the checkpoint: {line}")
        for line in found.warned:
            self._display.note(
                f"warning: changed since the checkpoint, and it shapes the result: {line}"
            )
        self._display.note(f"continuing after step {checkpoint.step} ({checkpoint.folder})")
        return checkpoint

    async def _selfcheck(
        self,
        student: CausalLM,
        sampler: TransformersSampler,
        policy: LoraPolicy,
        teacher: TransformersTeacher | None,
    ) -> None:
        sampler.load_policy(policy.adapter(), version=0)
        found = await run_selfcheck(
            self._prepared.project.dataset.prompts,
            sampler,
            self._as_teacher(student),
            teacher,
            self._environments,
            rollout_settings(self._prepared, "test", group_size=1),
            student.head.vocabulary,
        )
        for note in found.notes:
            self._display.note(f"warning: {note}")
        gap = f"sampler and trainer agree to {found.max_gap:.1e} nats"
        kl = "" if found.teacher_kl is None else f"; teacher_kl now {found.teacher_kl:.3f}"
        self._display.note(gap + kl)

    # ---- parts ------------------------------------------------------------------------------------------------

    def _build_policy(self, student: CausalLM) -> LoraPolicy:
        algorithm, trainer = self._config.algorithm, self._config.trainer
        model = self._config.model
        checkpointing = trainer.gradient_checkpointing
        local = self._prepared.student.source == "local"
        return LoraPolicy(
            student,
            rank=model.qlora_rank,
            alpha=model.qlora_alpha or 2 * model.qlora_rank,
            seed=self._config.seed,
            base_name=str(self._prepared.student.local_dir.resolve()) if local else model.path,
            objective=Objective(
                loss_fn=algorithm.loss_fn,
                kl_penalty_coef=algorithm.kl_penalty_coef,
                reward_coef=algorithm.reward_coef,
                kl_clamp=algorithm.kl_clamp,
                clip_ratio_low=algorithm.clip_ratio_low,
                clip_ratio_high=algorithm.clip_ratio_high,
                ratio_cap=algorithm.ratio_cap,
                temperature=self._config.rollout.temperature,
            ),
            optimizer=OptimizerSettings(
                learning_rate=trainer.learning_rate,
                weight_decay=trainer.weight_decay,
                betas=(trainer.adam_beta1, trainer.adam_beta2),
                max_grad_norm=trainer.max_grad_norm,
                warmup_steps=trainer.warmup_steps,
                schedule=trainer.lr_schedule,
                total_updates=self._prepared.num_steps * trainer.updates_per_batch,
                updates_per_batch=trainer.updates_per_batch,
            ),
            micro_batch_tokens=trainer.micro_batch_tokens,
            gradient_checkpointing=(
                student.device.type == "cuda" if checkpointing == "auto" else bool(checkpointing)
            ),
            poll=self._stop.poll,
        )

    def _build_teacher(self) -> tuple[TransformersTeacher | None, TransformersSampler | None]:
        resolved, section = self._prepared.teacher, self._config.teacher
        if resolved is None or section is None:
            return None, None
        model = load_teacher_model(section, resolved, self._prepared.preflight.vocabulary)
        sampler = None
        if self._config.evaluation.teacher:
            sampler = TransformersSampler(
                model, mode=None, batch_bytes=batch_bytes(self._prepared), poll=self._stop.poll
            )
        return self._as_teacher(model), sampler

    def _as_teacher(self, model: CausalLM) -> TransformersTeacher:
        return TransformersTeacher(
            model,
            temperature=self._config.rollout.temperature,
            micro_batch_tokens=self._config.trainer.micro_batch_tokens,
            poll=self._stop.poll,
        )

    def _build_recorder(self) -> Recorder:
        tokenizer = self._prepared.preflight.tokenizer
        sinks: list[Sink] = []
        if self._config.wandb_project is not None:
            sinks.append(
                WandbSink(
                    self._config.wandb_project,
                    self._config.wandb_name or self._folder.path.name,
                    self._redacted_config(),
                    self._folder.path,
                    warn=self._display.note,
                )
            )
        return Recorder(
            self._folder,
            display=self._display,
            transcripts=TranscriptWriter(
                self._folder.transcripts,
                token_text=lambda token_id: tokenizer.decode([token_id]),
                redact=self._redact,
            ),
            metrics=JsonlMetrics(self._folder.metrics, warn=self._display.note),
            sinks=sinks,
            num_steps=self._prepared.num_steps,
        )

    def _build_store(self) -> CheckpointStore:
        return CheckpointStore(
            self._folder.checkpoints,
            keep=self._config.trainer.keep_checkpoints,
            warn=lambda text: self._display.note(f"warning: {text}"),
        )

    def _build_saver(
        self, policy: LoraPolicy, counters: Callable[[], Mapping[str, float]]
    ) -> Saver:
        return Saver(
            self._build_store(),
            JournalFolder(self._folder.journal),
            policy,
            every_steps=self._config.trainer.save_step,
            every_minutes=self._config.trainer.save_minutes,
            facts=self._facts,
            counters=counters,
        )

    def _build_parts(
        self,
        sampler: TransformersSampler,
        teacher: TransformersTeacher | None,
        policy: LoraPolicy,
        evaluations: Evaluations,
        recorder: Recorder,
        saver: Saver,
    ) -> Parts:
        config, dataset = self._config, self._prepared.project.dataset
        estimator = config.algorithm.adv_estimator
        assert estimator != "gae", "refused by refuse_reserved"
        return Parts(
            num_steps=self._prepared.num_steps,
            prompts_of=lambda step: dataset.batch(step - 1, config.data.batch_size, config.seed),
            environments=self._environments,
            settings=rollout_settings(self._prepared, "train", group_size=config.data.group_size),
            sampler=sampler,
            rewarder=build_rewarder(self._prepared),
            advantages=partial(
                rollout_advantages, estimator=estimator, scale=config.algorithm.scale_rewards
            ),
            teacher=teacher,
            policy=policy,
            evaluations=evaluations,
            recorder=recorder,
            saver=saver,
        )

    def _build_evaluations(
        self,
        sampler: TransformersSampler,
        teacher: TransformersTeacher | None,
        teacher_sampler: TransformersSampler | None,
        recorder: Recorder,
    ) -> Evaluations:
        section, dataset = self._config.evaluation, self._prepared.project.dataset
        held_out = dataset.held_out[: section.max_prompts]
        rewarder = build_rewarder(self._prepared)

        def evaluator(samples: int, temperature: float, pass_at: tuple[int, ...]) -> Evaluator:
            settings = replace(
                rollout_settings(self._prepared, "eval", group_size=samples),
                temperature=temperature,
                top_p=1.0,
                top_k=0,
            )
            return Evaluator(
                prompts=held_out,
                environments=self._environments,
                settings=settings,
                rewarder=rewarder,
                success_reward=section.success_reward,
                pass_at=pass_at,
            )

        scheduled = []
        for index, entry in enumerate(self._config.evals):
            by_temperature: dict[float, list[int]] = {}
            for k in PASS_AT:
                if getattr(entry, f"pass{k}"):
                    chosen = getattr(entry, f"pass{k}_temp")
                    temperature = section.temperature if chosen is None else chosen
                    by_temperature.setdefault(temperature, []).append(k)
            samples = entry.num_samples or section.num_samples
            scheduled.append(
                Scheduled(
                    name=entry.name or f"eval_{index}",
                    every=entry.step,
                    evaluators=[
                        evaluator(max(samples, *ks, 1), temperature, tuple(ks))
                        for temperature, ks in by_temperature.items()
                    ],
                )
            )
        return Evaluations(
            main=evaluator(section.num_samples, section.temperature, PASS_AT) if held_out else None,
            scheduled=scheduled,
            sampler=sampler,
            teacher=teacher,
            teacher_sampler=teacher_sampler,
            recorder=recorder,
        )

    # ---- words ------------------------------------------------------------------------------------------------

    def _build_facts(self) -> dict[str, Any]:
        student, teacher = self._prepared.student, self._prepared.teacher
        return {
            "config": self._redacted_config(),
            "config_hash": config_hash(self._config),
            "seed": self._config.seed,
            "student": student.path,
            "student_revision": student.revision,
            "teacher": None if teacher is None else teacher.path,
            "teacher_revision": None if teacher is None else teacher.revision,
            "tokenizer_hash": tokenizer_hash(student.local_dir),
            "dataset_hash": self._prepared.project.dataset.content_hash,
            "versions": versions(),
        }

    def _redacted_config(self) -> dict[str, Any]:
        return _map_text(to_dict(self._config), self._redact)

    def _header(self, student: CausalLM, sampler: TransformersSampler, done: int) -> list[str]:
        config, prepared = self._config, self._prepared
        data, algorithm = config.data, config.algorithm
        teacher = "none" if prepared.teacher is None else prepared.teacher.name
        lines = [
            f"student: {prepared.student.name}, LoRA rank {config.model.qlora_rank}, base {student.quantization}"
            f" {str(student.head.weight.dtype).removeprefix('torch.')}",
            f"teacher: {teacher}",
            f"objective: {algorithm.loss_fn}, kl_penalty_coef {algorithm.kl_penalty_coef:g}, "
            f"learning rate {config.trainer.learning_rate:g}",
            f"data: {len(prepared.project.dataset.prompts)} prompts, {data.batch_size} x {data.group_size} rollouts per step"
            f", {prepared.num_steps} steps",
            f"sampler: transformers, {sampler.mode} weights",
            f"device: {device_name(student.device)}",
            f"run folder: {self._folder.path}",
        ]
        if done:
            lines.append(f"continues: after step {done}")
        return lines

    def _closing_lines(self) -> list[str]:
        return [
            f"adapter: {self._folder.adapter}",
            "load it with:",
            "    from peft import AutoPeftModelForCausalLM",
            f'    model = AutoPeftModelForCausalLM.from_pretrained("{self._folder.adapter}")',
        ]

    def _with_resume_hint(self, stop: StopRequested) -> RnowError:
        stop.where = str(self._folder.path)
        stop.fix = "run the same command again to continue"
        return stop


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_text(item, change) for item in value]
    return value
