"""From a config to a running program."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from rnow.config import Config, dump_yaml, to_dict
from rnow.config.keys import Reader
from rnow.config.schema import KEYS
from rnow.config.teachers import control_of
from rnow.disk.answers import AnswerFiles
from rnow.disk.checkpoints import (
    Checkpoint,
    CheckpointStore,
    export_adapter,
    folder_name,
    is_adapter,
    is_exported,
)
from rnow.disk.files import read_json_object, readable_json, replace_file, to_json, unused
from rnow.disk.folder import RunFolder
from rnow.disk.journal import JournalFolder
from rnow.disk.run_log import RunLog
from rnow.disk.sinks import JsonlSink, Sink, read_rows
from rnow.disk.transcripts import TranscriptWriter
from rnow.display.display import (
    Both,
    Display,
    QuietDisplay,
    RedactingDisplay,
    build_display,
)
from rnow.errors import (
    SAME_COMMAND,
    ConfigError,
    InputError,
    ModelError,
    RnowError,
    StopRequested,
    TemporaryError,
    no_memory,
    ran_out_of_memory,
)
from rnow.export.card import read_record, write_card
from rnow.export.files import copy_tokenizer
from rnow.models.loading import quiet_libraries
from rnow.plan import changes
from rnow.plan.choices import control_warning, sampler_backend, scores_early, slow_paths
from rnow.plan.plan import Plan, build_plan, may_take_turns, measure
from rnow.plan.prepare import Prepared, prepare
from rnow.plan.roles import Models, teachers_of
from rnow.plan.unread import find_readers, unread_settings
from rnow.project.secrets import load_secrets, writing_redactor
from rnow.report.sink import ReportSink
from rnow.rewards.watch import RewardWatch
from rnow.rollout.rendering import tell_of_alterations
from rnow.serving.http import LOOK_AT_SERVER
from rnow.setup.addresses import check_addresses
from rnow.setup.backends import Backends, load_backends
from rnow.setup.evaluations import build_evaluations, build_held_out
from rnow.setup.facts import (
    RunSummary,
    answer_lines,
    build_facts,
    build_values,
    closing_lines,
    header_lines,
    redacted_config,
    repeat,
)
from rnow.setup.objective import build_objective
from rnow.setup.trackers import build_trackers
from rnow.setup.usercode import (
    UserCode,
    build_episodes,
    open_user_code,
    rollout_settings,
    single_turns,
)
from rnow.tasks import run_anywhere
from rnow.teacher.control import controlled
from rnow.teacher.cross import CrossTeacher
from rnow.teacher.served import CHECK_SECONDS, ServedTeacher
from rnow.training.loop import Parts, Schedule, Workers, train
from rnow.training.recorder import Recorder
from rnow.training.saver import Saver
from rnow.training.selfcheck import PROMPTS, check_rows, run_selfcheck
from rnow.training.signals import StopFlag
from rnow.training.watchdog import Watchdog

SELFCHECK_TOKENS = 64
MAX_IN_NAME = 3
CLOSE_SECONDS, CLOSE_AT_STOP = 30.0, 5.0
"""How long a sink may take to send what is left, at the end of a run and after a stop."""

DISK_FAULTS = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EPERM, errno.EACCES,
        errno.ENXIO, errno.ENODEV, errno.ESTALE,
    }
)  # fmt: skip


def check(config: Config, folder: str | Path = ".") -> Plan:
    """Everything a run would refuse, and a plan of what it would do. Reads no weights and writes nothing.

    Raises:
        InputError: what is wrong.
    """
    _refuse_other(config)
    quiet_libraries()
    with writing_redactor(load_secrets(Path(folder)), config).errors():
        prepared = prepare(config, Path(folder), weights=False)
        run_folder = prepared.run_folder()
        run_folder.check_writable()
        plan = build_plan(prepared, run_dir=run_folder.path)
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
    prepared = prepare(config, folder, weights=True, fresh=fresh, watch=display.download)
    log = RunLog(prepared.project.redact)
    display = Both(display, log.display)
    prepared = replace(prepared, warn=display.warn, note=display.note)
    _tell(prepared, display)
    may_take_turns(prepared)  # refused before anything is written, as what follows
    measure(prepared)
    run_folder = prepared.run_folder(fresh=fresh)
    if fresh:
        display.note(f"a new run: {run_folder.path.name}")
    facts = build_facts(prepared)
    if (finished := _finished(run_folder, prepared, facts)) is not None:
        steps = (
            f" after {finished['steps']} steps" if finished["steps"] > prepared.num_steps else ""
        )
        display.note(
            f"this run is finished already{steps} ({run_folder.path}); --fresh starts over"
        )
        repeat(finished, display)
        return RunSummary(values=finished)
    run_folder.check_writable()
    try:
        with log.kept():
            return _train_in(run_folder, prepared, facts, display, log)
    except RnowError as error:
        if fresh and error.fix:
            by_name = f"repeat the command with -n {run_folder.path.name} instead of --fresh"
            error.fix = error.fix.replace(SAME_COMMAND, by_name)
        raise


def _tell(prepared: Prepared, display: Display) -> None:
    """What was found that is no fault."""
    found = (
        control_warning(prepared.config),
        prepared.warnings,
        prepared.project.dataset.warnings,
        prepared.rendered.warnings,
        unread_settings(prepared.config, agentic=prepared.project.agentic),
        slow_paths(prepared.config),
    )
    for warning in chain.from_iterable(found):
        display.warn(warning)
    for notice in prepared.notices:
        display.note(notice)
    tell_of_alterations(prepared.rendered.tokenizer, display.warn)


def _train_in(
    folder: RunFolder, prepared: Prepared, facts: dict[str, object], display: Display, log: RunLog
) -> RunSummary:
    stop = StopFlag()
    with stop.watch(), ExitStack() as stack:
        locked = folder.path.exists()
        if locked:
            stack.enter_context(folder.lock(steps=prepared.num_steps))
        try:
            work = _Run(prepared, folder, facts, display, log, stack, stop, locked=locked)
            return run_anywhere(work.load_and_train())
        except Exception as error:
            if (fault := _fault_outside(error, folder)) is None:
                raise
            raise fault from error


def _fault_outside(error: Exception, folder: RunFolder) -> TemporaryError | None:
    """What memory or a disk refused, for the user; None for an error of another kind."""
    if ran_out_of_memory(error):
        return no_memory(error)
    return _disk_fault(error, folder) if isinstance(error, OSError) else None


def _teacher_fault(error: TemporaryError, models: Models) -> ModelError | None:
    """What a teacher's server did wrong before the first step: a fault of the input. None for another fault, and where the
    server is our own."""
    roles = [model.role for model in teachers_of(models)]
    if error.where not in [f"{role.key}.url" for role in roles if role.serving.url is not None]:
        return None
    return ModelError(
        error.message,
        title=error.title,
        where=error.where,
        why=error.why,
        fix=error.fix or LOOK_AT_SERVER,
        details=error.details,
    )


def _disk_fault(error: OSError, folder: RunFolder) -> TemporaryError | None:
    """What a disk refused, for the user; None for an error that is none of a disk's."""
    path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
    try:
        inside = path is not None and path.absolute().is_relative_to(folder.path.absolute())
    except FileNotFoundError:  # the working directory is gone, and with it what is named from there
        inside = True
    if not inside and error.errno not in DISK_FAULTS:
        return None
    where = str(path or folder.path)
    if not folder.path.exists():
        return TemporaryError(
            "the run folder is gone: what was not saved elsewhere is lost",
            where=where,
            fix=f"if it is on a disk that was unmounted, mount it and {SAME_COMMAND}",
        )
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"the disk does not take it ({error.strerror})"
    return TemporaryError(
        f"{what}; the run continues from its last checkpoint",
        where=where,
        fix=f"{'free some space' if full else 'mend that'}, then {SAME_COMMAND}",
    )


def _finished(folder: RunFolder, prepared: Prepared, facts: changes.Facts) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do; None where there is something, its last writing included.

    Raises:
        ConfigError: it is finished, and what shapes its result is another now.
    """
    summary, earlier = read_json_object(folder.summary), read_json_object(folder.facts)
    steps = summary.get("steps")
    if not isinstance(steps, int) or steps < prepared.num_steps:
        return None
    if not is_exported(folder.adapter, checkpoint=folder.checkpoints / folder_name(steps)):
        return None  # it is written anew, from the last checkpoint
    same = summary.get("config_hash") == facts["config_hash"]
    if not earlier:
        return summary if same else None
    if same:
        earlier["config"] = facts["config"]  # another start may have gone on from here
    _refuse_another_label(_compare(earlier, facts, prepared), folder, prepared.run_name)
    # With other settings, though none that shapes it, it is told again, from its last checkpoint.
    return summary if same or steps > prepared.num_steps else None


def _compare(earlier: changes.Facts, facts: changes.Facts, prepared: Prepared) -> changes.Changes:
    # Through JSON, as the earlier ones were read.
    return changes.compare(earlier, json.loads(to_json(facts)), _readers(prepared))


def _readers(prepared: Prepared) -> frozenset[Reader]:
    return find_readers(prepared.config, agentic=prepared.project.agentic)


def _refuse_another_label(found: changes.Changes, folder: RunFolder, name: str) -> None:
    """Where nothing is left to train new settings would only be written beside the old adapter."""
    shaping = (*found.refused, *found.warned, *found.measured)
    if not shaping:
        return
    keys = [key for key, _, value in (line.partition(": ") for line in shaping) if key in KEYS]
    by_value = "".join(f"-{{{key}}}" for key in keys[:MAX_IN_NAME])
    suggested = f"-n '{name}{by_value}' (any -n NAME)" if keys else "-n NAME"
    raise ConfigError(
        "this run is finished: what shapes or measures its result cannot be changed any more",
        title="Changed run",
        details=shaping,
        where=str(folder.path),
        fix=f"give the new settings a run of their own with {suggested}, or start over with --fresh",
    )


class _Run:
    """One run from its checked input to its summary, in the order in which a fault costs least."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunFolder,
        facts: dict[str, object],
        display: Display,
        log: RunLog,
        stack: ExitStack,
        stop: StopFlag,
        *,
        locked: bool,
    ) -> None:
        self._prepared = prepared
        self._config = prepared.config
        self._folder = folder
        self._display = display
        self._log = log
        self._stack = stack
        self._locked = locked
        self._stop = stop
        self._earlier = read_json_object(folder.facts)
        known = self._earlier.get("run")
        self._store = CheckpointStore(
            folder.checkpoints,
            keep=self._config.trainer.keep_checkpoints,
            warn=display.warn,
            run=known if isinstance(known, str) else None,
        )
        self._facts = facts
        self._written: dict[str, object] = {}
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
            self._make_folder()  # from here on the run writes
            self._log.open(self._folder.log)
            self._keep_changed_adapter(checkpoint)
            if not self._config.on_policy:
                return await self._train(backends, checkpoint, None)
            taught = self._config.algorithm.reward_coef > 0
            async with open_user_code(self._prepared, self._folder.path, waits=taught) as code:
                return await self._train(backends, checkpoint, code)

    async def _load(self) -> Backends:
        """The models, checked against each other. A fault of the input leaves no folder behind."""
        await check_addresses(self._prepared)
        made = not self._folder.path.exists()
        if any(model.role.backend == "vllm" for model in self._prepared.models.values()):
            self._make_folder()  # the engines log there
        try:
            backends = await load_backends(
                self._prepared,
                self._folder,
                self._stack,
                poll=self._stop.poll,
                stage=self._display.stage,
            )
            self._stop.from_here(self._stopping)
            self._display.stage("checking the models against each other")
            await self._selfcheck(backends)
        except TemporaryError as error:
            if (fault := _teacher_fault(error, self._prepared.models)) is None:
                raise
            self._unmake_folder(made)
            raise fault from error
        except InputError:
            self._unmake_folder(made)
            raise
        return backends

    def _stopping(self) -> None:
        self._display.note("stopping at the next safe point ...")
        if self._locked:
            self._folder.tell_stopping()

    def _unmake_folder(self, made: bool) -> None:
        if made:
            self._folder.remove_if_bare()

    def _make_folder(self) -> None:
        self._folder.make()
        if self._locked:
            return
        self._stack.enter_context(self._folder.lock(steps=self._prepared.num_steps))
        self._locked = True
        if self._folder.checkpoints.exists():
            raise InputError(
                "another rnow process made this run folder while this one was loading",
                where=str(self._folder.path),
                fix="run the same command again to continue that run, or use --fresh",
            )

    async def _train(
        self, backends: Backends, checkpoint: Checkpoint | None, code: UserCode | None
    ) -> RunSummary:
        """``code`` is None where none is called: what is learned are the rows."""
        journals = self._build_journals()
        self._forget_outdated(journals, checkpoint)
        self._write_facts(saved=checkpoint is not None)
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
            settle=recorder.settle,
            committed=self._committed,
        )
        async with backends.gpu.only("trainer"):
            done = saver.restore(checkpoint)
        self._save = saver.rescue_finished
        recorder.forget_after(done)
        if checkpoint is not None:
            saved = checkpoint.state.get("counters", {})
            recorder.count_on(saved)
            self._started -= float(saved.get("seconds", 0.0))
        replace_file(self._folder.config, dump_yaml(redacted_config(self._prepared)).encode())
        if backends.plan:
            plan = self._prepared.project.redact.data(backends.plan)
            replace_file(self._folder.plan, readable_json(plan))
        self._display.start(header_lines(self._prepared, backends, self._folder.path, done))
        try:
            await train(self._build_parts(backends, recorder, saver, journals, code), done)
        except (StopRequested, TemporaryError) as stop:
            stop.where = stop.where or str(self._folder.path)
            stop.fix = stop.fix or f"{SAME_COMMAND} to continue"
            raise
        return self._finish(backends, recorder, max(done, self._prepared.num_steps))

    def _finish(self, backends: Backends, recorder: Recorder, steps: int) -> RunSummary:
        self._display.stage("writing the adapter")
        export_adapter(backends.policy.adapter(), self._folder.adapter)
        copy_tokenizer(
            self._prepared.student.resolved.local_dir,
            self._prepared.rendered.tokenizer,
            self._folder.adapter,
        )
        values = build_values(
            self._folder,
            steps=steps,
            counters=self._counters(recorder),
            evaluations=recorder.evaluations(),
            facts=self._facts,
            device=backends.student.device,
            sampler=backends.sampler_facts,
            control=control_of(self._config),
            on_policy=self._config.on_policy,
        )
        write_card(self._folder.adapter, read_record(self._folder, summary=values))
        replace_file(self._folder.summary, readable_json(values))
        self._stop.result_is_there(
            lambda: self._display.note("the run is done; Ctrl-C once more leaves at once")
        )
        answers = answer_lines(self._folder, self._answers(), recorder.evaluations())
        closing = closing_lines(self._folder.adapter.resolve())
        if self._config.report:
            closing.append(f"report: {self._folder.report.resolve()}")
        self._display.finish([*answers, *closing])
        return RunSummary(values=values)

    def _answers(self) -> AnswerFiles:
        return AnswerFiles(self._folder.answers, self._prepared.project.redact)

    def _counters(self, recorder: Recorder) -> dict[str, float]:
        """Totals of the whole run, earlier attempts included."""
        seconds = time.monotonic() - self._started
        return {**recorder.counters, "seconds": seconds}

    def _find_checkpoint(self) -> Checkpoint | None:
        checkpoint = self._store.latest()
        if checkpoint is None:
            self._refuse_to_begin_over()
            return None
        found = _compare(checkpoint.state, self._facts, self._prepared)
        written = self._folder.summary.exists() or self._folder.adapter.exists()
        if written and checkpoint.step >= self._prepared.num_steps:
            _refuse_another_label(found, self._folder, self._prepared.run_name)
        changes.refuse(found, where=str(self._folder.path))
        for line in found.free:
            self._display.note(f"changed since the checkpoint: {line}")
        for line in found.warned:
            self._display.warn(
                f"changed since the checkpoint, and training goes on with it: {line}"
            )
        for line in found.measured:
            self._display.warn(
                f"changed since the checkpoint, for evaluations from here on: {line}"
            )
        self._display.note(f"continuing after step {checkpoint.step} ({checkpoint.folder})")
        if (more := checkpoint.step - self._prepared.num_steps) > 0:
            self._display.warn(f"that is {more} more than the settings ask for: the run ends here")
        return checkpoint

    def _refuse_to_begin_over(self) -> None:
        """Without a checkpoint a run begins at step 1: not over one that had some, or came to its end."""
        ended = [kept for kept in (self._folder.summary, self._folder.adapter) if kept.exists()]
        if ended or self._earlier.get("saved"):
            what = "came to its end and its" if ended else "was saved and its"
            raise InputError(
                f"this run {what} checkpoints are gone: it cannot be continued",
                where=str((*ended, self._folder.checkpoints)[0]),
                fix="put them back, or start over in a new folder with --fresh or -n NAME",
            )
        if done := len(read_rows(self._folder.metrics)):
            self._display.warn(
                f"no checkpoint was saved before this run ended: it begins again, and writes its first {done} steps anew"
            )

    def _committed(self, step: int) -> None:
        self._write_facts(saved=True)
        self._display.saved(step, str(self._folder.checkpoints / folder_name(step)))

    def _write_facts(self, *, saved: bool) -> None:
        """run.json: the facts, which run this is, and whether it has had a checkpoint."""
        if self._store.run is None:
            self._store.run = uuid.uuid4().hex[:16]
        name = {"run": self._store.run, "name": self._prepared.run_name, "saved": saved}
        if name != {key: self._written.get(key) for key in name}:
            self._written = {**name, **self._facts}
            replace_file(self._folder.facts, readable_json(self._written))

    def _keep_changed_adapter(self, checkpoint: Checkpoint | None) -> None:
        """Move an adapter aside that no longer is what this run wrote: another one will be written in its place."""
        steps = read_json_object(self._folder.summary).get("steps")
        if checkpoint is None or not isinstance(steps, int) or not is_adapter(self._folder.adapter):
            return
        written = (self._folder.checkpoints / folder_name(steps), checkpoint.folder)
        if any(is_exported(self._folder.adapter, checkpoint=folder) for folder in written):
            return
        aside = unused(self._folder.path / "damaged-adapter")
        self._folder.adapter.rename(aside)
        self._display.warn(
            f"{self._folder.adapter} was changed since this run wrote it: it is kept as {aside.name}, and the run writes "
            "its own again"
        )

    def _forget_outdated(self, journals: JournalFolder, checkpoint: Checkpoint | None) -> None:
        """Delete what an earlier start sampled and measured, and this one would not."""
        found = _compare(self._earlier, self._facts, self._prepared)
        if not found.rollouts_hold:
            journals.forget(keep=set())
        # With a checkpoint they are its history, and could not be made again.
        if checkpoint is None and not found.evaluations_hold:
            self._folder.evaluations.unlink(missing_ok=True)

    async def _selfcheck(self, backends: Backends) -> None:
        if not self._config.on_policy:
            await self._check_rows(backends)
            return
        async with backends.gpu.only("trainer"):
            backends.sampler.load_policy(backends.policy.adapter(), version=0)
        settings = rollout_settings(self._prepared, "test", group_size=1)
        teacher = backends.teacher
        if isinstance(teacher, ServedTeacher | CrossTeacher):
            teacher = teacher.hurried(CHECK_SECONDS)
        found = await run_selfcheck(
            self._prepared.project.dataset.prompts,
            backends.sampler,
            backends.trainer_as_teacher,
            teacher,
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

    async def _check_rows(self, backends: Backends) -> None:
        rows, dataset = self._prepared.rendered.rows, self._prepared.project.dataset
        loss = await check_rows(
            [rows[prompt.id][0].sample() for prompt in dataset.prompts[:PROMPTS]],
            backends.trainer_as_teacher,
            backends.student.vocabulary,
            backends.gpu,
        )
        self._display.note(f"the loss of the first rows is {loss:.3f} before training")

    def _build_recorder(self) -> Recorder:
        folder, note = self._folder, self._display.note
        redact, redact_names = self._prepared.project.redact, self._prepared.project.redact_read
        settings = changes.measurement(json.loads(to_json(self._facts)), _readers(self._prepared))
        sinks: list[Sink] = [
            JsonlSink(
                folder.metrics,
                folder.evaluations,
                warn=note,
                settings=settings,
                redact=redact_names,
            ),
        ]
        if self._config.report:
            # After the sink whose files it reads, before trackers, which may send the page.
            sinks.append(ReportSink(folder, warn=note))
        if names := self._config.tracked_by:
            assert self._store.run is not None, "the facts are written"
            trackers = build_trackers(
                names,
                folder,
                home=self._prepared.project.folder,
                run_id=self._store.run,
                config=redacted_config(self._prepared),
                labels=to_dict(self._config),
                warn=self._display.warn,
                note=note,
                redact=redact_names,
            )
            sinks.append(trackers)
        decode = self._prepared.rendered.tokenizer.decode
        return Recorder(
            folder,
            display=self._display,
            transcripts=TranscriptWriter(folder.transcripts, decode=decode, redact=redact),
            answers=self._answers(),
            sinks=sinks,
            num_steps=self._prepared.num_steps,
            agentic=self._prepared.project.agentic,
            by_dataset=len(self._config.data.sources) > 1,
            by_teacher=self._prepared.several_teachers,
            settings=settings,
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
        code: UserCode | None,
    ) -> Parts:
        source = self._prepared.source
        assert source is not None, "prepared for training"
        workers: Workers | None = None
        evaluations: Schedule
        if code is None:
            evaluations = build_held_out(self._prepared, backends, recorder)
        else:
            watch = RewardWatch(recorder.warn, teaching=self._config.algorithm.reward_coef > 0)
            workers = self._workers(backends, journals, code, watch)
            evaluations = build_evaluations(self._prepared, backends, recorder, code, watch)
        return Parts(
            num_steps=self._prepared.num_steps,
            source=source.open(workers),
            policy=backends.policy,
            sampler=backends.sampler,
            gpu=backends.gpu,
            evaluations=evaluations,
            recorder=recorder,
            saver=saver,
        )

    def _workers(
        self, backends: Backends, journals: JournalFolder, code: UserCode, watch: RewardWatch
    ) -> Workers:
        group_size = self._config.data.group_size
        return Workers(
            environments=build_episodes(self._prepared, code),
            settings=replace(
                rollout_settings(self._prepared, "train", group_size=group_size),
                poll=self._stop.poll,
            ),
            journal=journals.open,
            sampler=backends.sampler,
            rewarder=code.rewarder,
            reward_watch=watch,
            teacher=controlled(backends.teacher, control_of(self._config)),
            needs=build_objective(self._prepared).needs,
            scores_early=scores_early(self._config),
            gpu=backends.gpu,
        )
