"""From a config to a running program."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rnow.config import Config, config_hash, dump_yaml
from rnow.disk.checkpoints import Checkpoint, CheckpointStore, export_adapter
from rnow.disk.files import read_json_object, readable_json, replace_file, to_json
from rnow.disk.folder import RunFolder
from rnow.disk.journal import JournalFolder
from rnow.disk.sinks import JsonlSink, Sink, WandbSink
from rnow.disk.transcripts import TranscriptWriter
from rnow.display.display import Display, QuietDisplay, RedactingDisplay, build_display
from rnow.errors import ConfigError, InputError, StopRequested, TemporaryError
from rnow.models.loading import quiet_libraries
from rnow.plan import changes
from rnow.plan.choices import sampler_backend, uses_vllm
from rnow.plan.plan import Plan, build_plan, may_take_turns
from rnow.plan.prepare import Prepared, prepare
from rnow.plan.unread import find_readers, unread_settings
from rnow.project.secrets import load_secrets, writing_redactor
from rnow.rollout.rendering import tell_of_alterations
from rnow.setup.addresses import check_addresses
from rnow.setup.backends import Backends, load_backends
from rnow.setup.evaluations import build_evaluations
from rnow.setup.facts import (
    RunSummary,
    build_facts,
    build_values,
    closing_lines,
    header_lines,
    redacted_config,
    repeat,
)
from rnow.setup.usercode import (
    UserCode,
    build_episodes,
    open_user_code,
    rollout_settings,
    single_turns,
)
from rnow.tasks import run_anywhere
from rnow.training.loop import Parts, Workers, train
from rnow.training.recorder import Recorder
from rnow.training.saver import Saver
from rnow.training.selfcheck import run_selfcheck
from rnow.training.signals import StopFlag
from rnow.training.watchdog import Watchdog

SELFCHECK_TOKENS = 64
CLOSE_SECONDS, CLOSE_AT_STOP = 30.0, 5.0
"""How long a sink may take to send what is left, at the end of a run and after a stop."""

DISK_FAULTS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EPERM, errno.EACCES}
)


def check(config: Config, folder: str | Path = ".") -> Plan:
    """Everything a run would refuse, and a plan of what it would do. Reads no weights and writes nothing.

    Raises:
        InputError: what is wrong.
    """
    _refuse_other(config)
    with writing_redactor(load_secrets(Path(folder)), config).errors():
        prepared = prepare(config, Path(folder), weights=False)
        plan = build_plan(prepared, run_dir=prepared.run_folder().path)
    return prepared.project.redact.data(plan)


def run(
    config: Config,
    *,
    folder: str | Path = ".",
    fresh: bool = False,
    display: Display | Literal["auto"] | None = None,
) -> RunSummary:
    """Train, or continue training, the project in ``folder``.

    Args:
        fresh: start over in a new run folder instead of continuing.
        display: told what happens; ``"auto"`` shows what `rnow run` shows. Nothing is shown by default.

    Raises:
        InputError: bad input, before training; nothing was written.
        StopRequested: Ctrl-C, SIGTERM or SIGHUP; the state is saved.
        TemporaryError: a fault outside the run; the state is saved.
    """
    _refuse_other(config)
    redact = writing_redactor(load_secrets(Path(folder)), config)
    with redact.errors():
        if display != "auto":
            shown = RedactingDisplay(display or QuietDisplay(), redact)
            return _run(config, folder=Path(folder), fresh=fresh, display=shown)
        own = RedactingDisplay(build_display(Console()), redact)
        try:
            return _run(config, folder=Path(folder), fresh=fresh, display=own)
        finally:
            own.close()


def _refuse_other(config: object) -> None:
    if not isinstance(config, Config):
        given = f"the text {config!r}" if isinstance(config, str) else type(config).__name__
        path = repr(config) if isinstance(config, str) else "'config.yml'"
        raise ConfigError(
            f"a run takes a Config, not {given}",
            title="Not a config",
            fix=f"from rnow import Config, run; run(Config.from_file({path}))",
        )


def _run(config: Config, *, folder: Path, fresh: bool, display: Display) -> RunSummary:
    quiet_libraries()
    display.stage("checking")
    prepared = replace(
        prepare(config, folder, weights=True, fresh=fresh),
        warn=display.warn,
    )
    found = (
        prepared.project.dataset.warnings,
        prepared.rendered.warnings,
        unread_settings(config, agentic=prepared.project.agentic),
    )
    for warning in chain.from_iterable(found):
        display.warn(warning)
    for notice in prepared.notices:
        display.note(notice)
    tell_of_alterations(prepared.rendered.tokenizer, display.warn)
    may_take_turns(config)  # refused before anything is written
    run_folder = prepared.run_folder(fresh=fresh)
    if (finished := _finished(run_folder, prepared)) is not None:
        display.note(f"this run is finished already ({run_folder.path}); --fresh starts over")
        repeat(finished, display)
        return RunSummary(values=finished)
    run_folder.check_writable()
    stop = StopFlag()
    with stop.watch(), ExitStack() as stack:
        locked = run_folder.path.exists()
        if locked:
            stack.enter_context(run_folder.lock())
        try:
            work = _Run(prepared, run_folder, display, stack, stop, locked=locked)
            return run_anywhere(work.load_and_train())
        except OSError as error:
            if error.errno not in DISK_FAULTS:
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "the disk is full" if full else f"the disk does not take it ({error.strerror})"
            raise TemporaryError(
                f"{what}; the run continues from its last checkpoint",
                where=str(error.filename or run_folder.path),
                fix=f"{'free some space' if full else 'mend that'}, then run the same command again",
            ) from error


def _finished(run_folder: RunFolder, prepared: Prepared) -> dict[str, Any] | None:
    summary = read_json_object(run_folder.summary)
    same = summary.get("config_hash") == config_hash(prepared.config)
    return summary if same and summary.get("steps", 0) >= prepared.num_steps else None


class _Run:
    """One run from its checked input to its summary, in the order in which a fault costs least."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        display: Display,
        stack: ExitStack,
        stop: StopFlag,
        *,
        locked: bool,
    ) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._folder = folder
        self._display = display
        self._stack = stack
        self._locked = locked
        self._stop = stop
        self._facts = build_facts(prepared)
        self._store = CheckpointStore(
            folder.checkpoints, keep=self._config.trainer.keep_checkpoints, warn=display.warn
        )
        # Of a run that continues: so long before now as its earlier attempts took.
        self._started = time.monotonic()
        self._save: Callable[[], None] = lambda: None

    async def load_and_train(self) -> RunSummary:
        self._stop.hear_callbacks(asyncio.get_running_loop())
        watchdog = Watchdog(
            self._stop,
            self._folder.path / "stacks.txt",
            self._config.trainer.watchdog_minutes * 60,
            save=lambda: self._save(),
        )
        with watchdog.watch():
            checkpoint = self._find_checkpoint()
            backends = await self._load()
            self._stop.from_here(lambda: self._display.note("stopping at the next safe point ..."))
            self._display.stage("checking the models against each other")
            await self._selfcheck(backends)
            self._make_folder()  # from here on the run writes
            async with open_user_code(self._prepared, self._folder.path) as code:
                return await self._train(backends, checkpoint, code)

    async def _load(self) -> Backends:
        await check_addresses(self._prepared)
        made = not self._folder.path.exists()
        if uses_vllm(self._config):
            self._make_folder()  # the engines log there
        try:
            return await load_backends(
                self._prepared,
                self._folder,
                self._stack,
                poll=self._stop.poll,
                stage=self._display.stage,
            )
        except InputError:
            if made:
                self._folder.remove_if_bare()
            raise

    def _make_folder(self) -> None:
        self._folder.make()
        if self._locked:
            return
        self._stack.enter_context(self._folder.lock())
        self._locked = True
        if self._folder.checkpoints.exists():
            raise InputError(
                "another rnow process made this run folder while this one was loading",
                where=str(self._folder.path),
                fix="run the same command again to continue that run, or use --fresh",
            )

    async def _train(
        self, backends: Backends, checkpoint: Checkpoint | None, code: UserCode
    ) -> RunSummary:
        journals = self._build_journals()
        self._forget_outdated(journals, checkpoint)
        replace_file(self._folder.facts, readable_json(self._facts))
        recorder = self._build_recorder()
        self._stack.callback(
            lambda: recorder.close(CLOSE_SECONDS if self._stop.asked_at is None else CLOSE_AT_STOP)
        )
        saver = Saver(
            self._store,
            journals,
            backends.policy,
            every_steps=self._config.trainer.save_step,
            every_minutes=self._config.trainer.save_minutes,
            facts=self._facts,
            counters=partial(self._counters, recorder),
        )
        async with backends.gpu.only("trainer"):
            done = saver.restore(checkpoint)
        self._save = saver.rescue_finished
        recorder.forget_after(done)
        if checkpoint is not None:
            saved = checkpoint.state.get("counters", {})
            recorder.completion_tokens = int(saved.get("completion_tokens", 0))
            self._started -= float(saved.get("seconds", 0.0))
        replace_file(self._folder.config, dump_yaml(redacted_config(self._prepared)).encode())
        self._display.start(header_lines(self._prepared, backends, self._folder.path, done))
        try:
            await train(self._build_parts(backends, recorder, saver, journals, code), done)
        except (StopRequested, TemporaryError) as stop:
            stop.where = stop.where or str(self._folder.path)
            stop.fix = stop.fix or "run the same command again to continue"
            raise
        return self._finish(backends, recorder, max(done, self._prepared.num_steps))

    def _finish(self, backends: Backends, recorder: Recorder, steps: int) -> RunSummary:
        self._display.stage("writing the adapter")
        export_adapter(backends.policy.adapter(), self._folder.adapter)
        self._prepared.rendered.tokenizer.save_pretrained(str(self._folder.adapter))
        values = build_values(
            self._folder,
            steps=steps,
            counters=self._counters(recorder),
            evaluations=recorder.evaluations(),
            facts=self._facts,
            device=backends.student.device,
            sampler=backends.sampler_facts,
        )
        replace_file(self._folder.summary, readable_json(values))
        self._stop.result_is_there(
            lambda: self._display.note("the run is done; Ctrl-C once more leaves at once")
        )
        self._display.finish(closing_lines(self._folder.adapter.resolve()))
        return RunSummary(values=values)

    def _counters(self, recorder: Recorder) -> dict[str, float]:
        """Totals of the whole run, earlier attempts included."""
        seconds = time.monotonic() - self._started
        return {"completion_tokens": recorder.completion_tokens, "seconds": seconds}

    def _find_checkpoint(self) -> Checkpoint | None:
        checkpoint = self._store.latest()
        if checkpoint is None:
            self._refuse_to_begin_over()
            return None
        found = self._compare(checkpoint.state)
        changes.refuse(found, where=str(self._folder.path))
        if (
            found.warned
            and checkpoint.step >= self._prepared.num_steps
            and self._folder.summary.exists()
        ):
            # Nothing is left to train: the new settings would only be written beside the old adapter.
            raise ConfigError(
                "this run is finished: what shapes its result cannot be changed any more",
                title="Changed run",
                details=found.warned,
                where=str(self._folder.path),
                fix="give the new settings a run of their own with -n NAME, or start over with --fresh",
            )
        for line in found.free:
            self._display.note(f"changed since the checkpoint: {line}")
        for line in found.warned:
            self._display.warn(f"changed since the checkpoint, and it shapes the result: {line}")
        self._display.note(f"continuing after step {checkpoint.step} ({checkpoint.folder})")
        return checkpoint

    def _refuse_to_begin_over(self) -> None:
        """Without a checkpoint a run begins at step 1: not over the result of one that came to its end."""
        for kept in (self._folder.summary, self._folder.adapter):
            if kept.exists():
                raise InputError(
                    "this run came to its end and its checkpoints are gone: it cannot be continued",
                    where=str(kept),
                    fix="start over in a new folder with --fresh or -n NAME",
                )

    def _forget_outdated(self, journals: JournalFolder, checkpoint: Checkpoint | None) -> None:
        """Delete what an earlier start sampled and measured, and this one would not."""
        found = self._compare(read_json_object(self._folder.facts))
        if not found.rollouts_hold:
            journals.forget(keep=set())
        # With a checkpoint they are its history, and could not be made again.
        if checkpoint is None and not found.evaluations_hold:
            self._folder.evaluations.unlink(missing_ok=True)

    def _compare(self, earlier: Mapping[str, object]) -> changes.Changes:
        readers = find_readers(self._config, agentic=self._prepared.project.agentic)
        facts = json.loads(to_json(self._facts))  # as the earlier ones were read
        return changes.compare(earlier, facts, readers)

    async def _selfcheck(self, backends: Backends) -> None:
        async with backends.gpu.only("trainer"):
            backends.sampler.load_policy(backends.policy.adapter(), version=0)
        settings = rollout_settings(self._prepared, "test", group_size=1)
        found = await run_selfcheck(
            self._prepared.project.dataset.prompts,
            backends.sampler,
            backends.trainer_as_teacher,
            backends.teacher,
            # One turn tells; the tools are for the run.
            single_turns(self._prepared),
            # A truncated distribution is another than the trainer's, as it should be.
            replace(
                settings,
                top_p=1.0,
                top_k=0,
                max_tokens=min(settings.max_tokens, SELFCHECK_TOKENS),
                poll=self._stop.poll,
            ),
            backends.student.vocabulary,
            backends.gpu,
        )
        for note in found.notes:
            self._display.warn(note)
        gap = f"sampler and trainer agree to {found.max_gap:.1e} nats"
        kl = "" if found.teacher_kl is None else f"; teacher_kl now {found.teacher_kl:.3f}"
        self._display.note(gap + kl)

    def _build_recorder(self) -> Recorder:
        folder, note = self._folder, self._display.note
        redact, redact_names = self._prepared.project.redact, self._prepared.project.redact_read
        sinks: list[Sink] = [
            JsonlSink(folder.metrics, folder.evaluations, warn=note, redact=redact_names)
        ]
        if self._config.wandb_project is not None:
            sinks.append(
                WandbSink(
                    redact_names(self._config.wandb_project),
                    redact_names(self._config.wandb_name or folder.path.name),
                    redacted_config(self._prepared),
                    folder.path,
                    run_id=folder.wandb_id(),
                    warn=note,
                    redact=redact_names,
                )
            )
        decode = self._prepared.rendered.tokenizer.decode
        return Recorder(
            folder,
            display=self._display,
            transcripts=TranscriptWriter(folder.transcripts, decode=decode, redact=redact),
            sinks=sinks,
            num_steps=self._prepared.num_steps,
            agentic=self._prepared.project.agentic,
        )

    def _build_journals(self) -> JournalFolder:
        data = self._config.data
        embedded = sampler_backend(self._config) == "transformers"
        in_company = self._prepared.project.agentic and embedded
        whole = data.batch_size * data.group_size if in_company else None
        redact = self._prepared.project.redact_read
        return JournalFolder(self._folder.journal, whole=whole, redact=redact)

    def _build_parts(
        self,
        backends: Backends,
        recorder: Recorder,
        saver: Saver,
        journals: JournalFolder,
        code: UserCode,
    ) -> Parts:
        assert self._prepared.source is not None, "prepared for training"
        group_size = self._config.data.group_size
        workers = Workers(
            environments=build_episodes(self._prepared, code),
            settings=replace(
                rollout_settings(self._prepared, "train", group_size=group_size),
                poll=self._stop.poll,
            ),
            journal=journals.open,
            sampler=backends.sampler,
            rewarder=code.rewarder,
            teacher=backends.teacher,
            gpu=backends.gpu,
        )
        return Parts(
            num_steps=self._prepared.num_steps,
            source=self._prepared.source.open(workers),
            policy=backends.policy,
            sampler=backends.sampler,
            gpu=backends.gpu,
            evaluations=build_evaluations(self._prepared, backends, recorder, code),
            recorder=recorder,
            saver=saver,
        )
