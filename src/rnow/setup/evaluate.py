"""``rnow eval``: pass@k of several subjects on the same prompts, with the same seeds, kept and compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from rnow.config import Config
from rnow.config.schema import DatasetSource
from rnow.config.teachers import TEACHER
from rnow.disk.evals import EVALS, EvalFile
from rnow.disk.files import to_json
from rnow.disk.folder import RunFolder, check_place, saved_steps
from rnow.display.terminal import escape_control
from rnow.errors import SAME_COMMAND, InputError, ModelError, RnowError, StopRequested
from rnow.models.adapter import TrainedAdapter, check_base
from rnow.models.loading import quiet_libraries
from rnow.plan.prepare import Prepared, find_own_run
from rnow.plan.roles import STUDENT, RunModel, dtype_name, teachers_of
from rnow.project.secrets import load_secrets, writing_redactor
from rnow.rewards.watch import RewardWatch, failures
from rnow.setup.addresses import check_addresses
from rnow.setup.answering import (
    as_trained,
    free_memory,
    prepare_told,
    refuse_unable,
    student_answers,
    teachers_answer,
    tell,
    with_base,
)
from rnow.setup.eval_report import EvalReport, Evaluated
from rnow.setup.evaluations import build_evaluator, by_temperature
from rnow.setup.facts import build_facts, redacted_config
from rnow.setup.subjects import BASE, ROLES, Subject, find_subject, refuse_seen
from rnow.setup.usercode import UserCode, open_user_code
from rnow.tasks import run_anywhere
from rnow.text.redact import Redactor
from rnow.training.evaluations import Answering, count_passed
from rnow.training.residency import Residency
from rnow.training.signals import StopFlag
from rnow.types import Prompt, RewardResult, Rollout, RolloutGroup

TEMPERATURES: Mapping[int, float] = {1: 0.2, 4: 0.6, 8: 0.8}
"""k of pass@k -> the temperature at which the hosted service draws for it."""

PROMPTS = "prompts"
"""Name of the dataset that ``--prompts`` makes."""

_DEPENDS_ON = (
    "tokenizer_hash", "stop_ids", "rewards_hash", "rewards_modules", "tools_hash", "tools_modules", "tools",
)  # fmt: skip
"""Facts of a run (``build_facts``) that the answers and their rewards depend on; the models' own come besides."""
_NOT_ON = ("temperature", "top_p", "top_k", "reward_timeout")
"""Keys of ``rollout`` that an evaluation has of its own, or that change no number."""

Sampling = tuple[float, int, tuple[int, ...]]
"""A temperature, the rollouts per prompt at it, and the k that they serve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is measured.

    Attributes:
        temperatures: k of pass@k -> the temperature at which its samples are drawn.
        samples: rollouts per prompt at each temperature, at least k; None: ``evaluation.num_samples``.
        most: at most so many prompts, the first; None: ``evaluation.max_prompts``, and of a file all.
        prompts: a file of rows as train.jsonl has them; None: the held-out prompts.
        seed: of the samples; None: the config's. Which prompts are held out does not depend on it.
        again: measure what was measured already, too.
    """

    temperatures: Mapping[int, float] = field(default_factory=lambda: TEMPERATURES)
    samples: int | None = None
    most: int | None = None
    prompts: Path | None = None
    seed: int | None = None
    again: bool = False


def hosted_temperatures(ks: Sequence[int]) -> dict[int, float]:
    """Those of the hosted service; for a k that it does not have, that of the next smaller one: more samples want more variety."""
    return {k: TEMPERATURES[max(known for known in TEMPERATURES if known <= k)] for k in ks}


def evaluate(
    config: Config,
    subjects: Sequence[str] = (),
    *,
    folder: str | Path = ".",
    step: int | None = None,
    asked: Asked | None = None,
    console: Console | None = None,
) -> EvalReport:
    """Measure each subject, or read back what was measured of it in the same way.

    Args:
        subjects: see ``find_subject``; none: ``student`` and the project's own run, if it has one.
        step: of the only subject, a run.

    Raises:
        InputError: a subject, the prompts or a model cannot be used; nothing was measured.
        RnowError: every rollout or every reward of a subject failed; those before it are kept.
        StopRequested: Ctrl-C or SIGTERM; the subjects that were done are kept.
    """
    with writing_redactor(load_secrets(Path(folder)), config).errors():
        shown = console or Console()
        return _evaluate(config, subjects, Path(folder), step, asked or Asked(), shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One subject, checked: its project as it is prepared for it, the prompts that it is asked, what its numbers depend on and where
    they go."""

    subject: Subject
    prepared: Prepared
    prompts: Sequence[Prompt]
    depends: Mapping[str, object]
    file: EvalFile


def _evaluate(
    config: Config,
    names: Sequence[str],
    folder: Path,
    step: int | None,
    asked: Asked,
    console: Console,
) -> EvalReport:
    quiet_libraries()
    subjects = _find(config, names, folder, step)
    tasks = _prepare(config, subjects, folder, asked, console)
    # By file: two subjects may be one, a run and the last of its steps.
    found = {task.file.path: None if asked.again else task.file.read() for task in tasks}
    missing = {task.file.path: task for task in tasks if found[task.file.path] is None}
    for task in missing.values():
        refuse_unable(task.prepared, teachers=task.subject.kind == TEACHER)
        check_place(task.subject.place, what="what is measured", fix="change the permissions")
    stop = StopFlag()
    try:
        with stop.watch(lambda: console.print("stopping ...")):
            for path, task in missing.items():
                found[path] = run_anywhere(_measure(task, asked, console, stop))
                free_memory()
    except StopRequested as stopped:
        stopped.why = stopped.why or "the subjects that were done are kept"
        stopped.fix = stopped.fix or "the same command measures the others"
        raise
    rows = [
        Evaluated(
            subject=task.subject,
            kept=task.file.path,
            fresh=task.file.path in missing,
            values=found[task.file.path] or {},
        )
        for task in tasks
    ]
    held_out = "held-out prompts" if asked.prompts is None else f"prompts of {asked.prompts.name}"
    count = len(tasks[0].prompts)
    return EvalReport(rows=rows, prompts=f"{count} {held_out}", count=count)


def _find(config: Config, names: Sequence[str], folder: Path, step: int | None) -> list[Subject]:
    names = [*dict.fromkeys(names)] or _own(config, folder, step)
    if step is not None and len(names) != 1:
        raise InputError(
            "--step is for one run",
            where="--step",
            fix="name the steps of several as RUN@STEP",
        )
    return [find_subject(name, config, folder, step=step) for name in names]


def _own(config: Config, folder: Path, step: int | None) -> list[str]:
    """What the project has to compare: its student before training and, once there is one, its run."""
    run = find_own_run(config, folder)
    name = str(run.path.resolve()) if run.path.name in ROLES else run.path.name
    if step is not None:
        return [name]
    trained = run.adapter.exists() or saved_steps(run.checkpoints)
    return [STUDENT, name] if trained else [STUDENT]


def _prepare(
    config: Config, subjects: Sequence[Subject], folder: Path, asked: Asked, console: Console
) -> list[_Task]:
    """Every subject with its project, which is prepared once for each base and kind of adapter."""
    config = _with_prompts(config, asked.prompts)
    if asked.most is not None:
        section = config.evaluation.model_copy(update={"max_prompts": asked.most})
        config = config.model_copy(update={"evaluation": section})
    teachers = any(subject.kind == TEACHER for subject in subjects)
    ready: dict[object, Prepared] = {}
    told: set[str] = set()
    tasks = []
    for subject in subjects:
        started = subject.trained and subject.trained.adapter
        if subject.kind == BASE:
            subject = replace(subject, trained=None)
        wanted, alike = _student_of(config, subject, started)
        if alike not in ready:
            ready[alike] = prepare_told(wanted, folder, console, teachers=teachers, told=told)
        prepared = _starting(ready[alike], subject)
        prompts = _prompts(prepared, asked)
        if asked.prompts is None:
            refuse_seen(subject, prepared)
        redact = prepared.project.redact
        depends = _depends_on(subject, prepared, prompts, asked, adapter=_adapter_of(subject))
        tasks.append(
            _Task(
                subject=subject,
                prepared=prepared,
                prompts=prompts,
                depends=depends,
                file=EvalFile(subject.place, subject.label, depends, redact),
            )
        )
    return tasks


def _adapter_of(subject: Subject) -> str | None:
    """Its content. Raises ModelError when it cannot be read."""
    return subject.trained and subject.trained.adapter.content_hash()


def _student_of(
    config: Config, subject: Subject, started: TrainedAdapter | None
) -> tuple[Config, object]:
    """The config whose student answers, or is the teacher's, and what two must share to be prepared alike.

    Args:
        started: the adapter of the subject, or what the config would go on from.
    """
    if subject.trained is not None:
        one = subject.trained.adapter
        return as_trained(config, one), (one.base, one.rank, one.alpha, one.targets)
    bare = config if started is None else with_base(config, started)
    return bare, (bare.model.path, bare.model.adapter)


def _starting(prepared: Prepared, subject: Subject) -> Prepared:
    """The same with the subject's own adapter, which is of the same size on the same base."""
    if subject.trained is None or prepared.start == subject.trained.adapter:
        return prepared
    start = subject.trained.adapter
    for text in check_base(start, prepared.student.resolved):
        prepared.warn(text)
    return replace(prepared, start=start)


def _with_prompts(config: Config, file: Path | None) -> Config:
    """The config with the rows of a file as its prompts; for None as it is, where rows of sft are asked as questions."""
    if file is None:
        if config.dataset_type == "midtrain":
            raise InputError(
                "rows of dataset_type: midtrain are texts: they are no prompts to evaluate",
                where="dataset_type",
                fix="give prompts with --prompts FILE, in rows as dataset_type: rl has them",
            )
        return config
    if not file.is_file():
        raise InputError(
            f"there is no file {file}",
            where="--prompts",
            fix="name a file of rows as train.jsonl has them",
        )
    source = DatasetSource(path=str(file.resolve()), name=PROMPTS)
    data = config.data.model_copy(update={"train_file": (source,), "val_split": 0.0})
    # Rows to be answered, which those of the other types are not.
    kind = config.dataset_type if config.on_policy else "rl"
    return config.model_copy(update={"data": data, "dataset_type": kind})


def _prompts(prepared: Prepared, asked: Asked) -> list[Prompt]:
    """Those that name a reward: of the others nobody can say whether an answer is right."""
    dataset = prepared.project.dataset
    found = prepared.evaluated if asked.prompts is None else dataset.prompts[: asked.most]
    if not found:
        raise InputError(
            "no prompts are held out to evaluate",
            where="data.val_split",
            why="without them a student would be asked what it was trained on",
            fix="give some with --prompts FILE, or set data.val_split before the run is trained",
        )
    judged = [prompt for prompt in found if prompt.rewards]
    if not judged:
        raise InputError(
            f"none of the {len(found)} prompts names a reward, so nothing says which answers are right",
            where=found[0].source or None,
            fix='write one into rewards.py (@reward) and name it in the rows: "rewards": ["NAME"]',
        )
    if left := len(found) - len(judged):
        prepared.note(f"{left} of {len(found)} prompts name no reward and are left out")
    return judged


def _depends_on(
    subject: Subject,
    prepared: Prepared,
    prompts: Sequence[Prompt],
    asked: Asked,
    *,
    adapter: object,
) -> dict[str, object]:
    """All that the numbers depend on: another evaluation with the same gives the same. ``adapter``: ``_adapter_of`` the subject."""
    # Of the adapter its content is told apart: its file may be gone by now.
    facts, config = build_facts(replace(prepared, start=None)), prepared.config
    models: Sequence[RunModel] = (prepared.student,)
    names = ("student_weights", "student_config")
    if subject.kind == TEACHER:
        models = teachers_of(prepared.models)
        # The path of one behind a server is all that is known of it.
        names = ("teacher", "teacher_weights", "teacher_config", "teachers")
    rollout = redacted_config(prepared)["rollout"]
    assert isinstance(rollout, dict)
    ids = prepared.rendered.prompt_token_ids
    text = to_json(
        [
            [p.id, ids[p.id], p.messages, p.rewards, p.tools, p.metadata, p.variables, p.docker,
             p.docker_env, p.teacher if subject.kind == TEACHER else None]
            for p in prompts
        ]
    )  # fmt: skip
    return {
        **{name: facts.get(name) for name in (*names, *_DEPENDS_ON)},
        "adapter": adapter,
        "held_as": [
            [m.role.backend, dtype_name(m.role.dtype), m.quantization, m.role.serving.served_model]
            for m in models
        ],
        "template_day": str(facts["template_date"])[:10],
        "vocabulary": prepared.rendered.vocabulary,
        "window": prepared.rendered.window,
        "rollout": {key: value for key, value in rollout.items() if key not in _NOT_ON},
        "prompts": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "samplings": _samplings(config, asked),
        "seed": config.seed if asked.seed is None else asked.seed,
        "success_reward": config.evaluation.success_reward,
    }


def _samplings(config: Config, asked: Asked) -> list[Sampling]:
    least = asked.samples or config.evaluation.num_samples
    return [
        (temperature, max(least, *ks), ks)
        for temperature, ks in by_temperature(asked.temperatures).items()
    ]


async def _measure(task: _Task, asked: Asked, console: Console, stop: StopFlag) -> dict[str, Any]:
    """Load a subject, let it answer, and keep what came of it, which is given back."""
    prepared, subject = task.prepared, task.subject
    await check_addresses(prepared)
    work = RunFolder(prepared.project.folder / EVALS)
    name = prepared.project.redact(subject.name)
    with console.status("") as status:
        show = partial(_show, status)
        show(f"loading {name} ...")
        answers = (
            teachers_answer(prepared, work, stop.poll)
            if subject.kind == TEACHER
            else student_answers(prepared, work, stop.poll)
        )
        async with answers as answering, open_user_code(prepared, waits=True) as code:
            sampled = [
                await _sample(task, asked, sampling, answering, code, stop.poll, show)
                for sampling in _samplings(prepared.config, asked)
            ]
    _refuse_changed(task, asked)
    values = {"subject": subject.to_dict(), "prompts": len(task.prompts), "samplings": sampled}
    kept = task.file.write(values)
    tell(console, prepared.project.redact(f"measured {subject.name}: {task.file.path}"))
    return kept


def _refuse_changed(task: _Task, asked: Asked) -> None:
    """An adapter or a rewards.py that was written anew while the answers were drawn may be in the numbers or not.

    Raises:
        RnowError: something that they depend on is another than before.
    """
    known = task.depends
    adapter = known["adapter"]
    with suppress(ModelError):  # training removes old checkpoints; this one was loaded
        adapter = _adapter_of(task.subject)
    now = _depends_on(task.subject, task.prepared, task.prompts, asked, adapter=adapter)
    if changed := [name for name, value in known.items() if now[name] != value]:
        raise RnowError(
            f"what {task.subject.name} was measured with changed meanwhile: {', '.join(changed)}",
            title="Changed meanwhile",
            why="its numbers may be of the one or the other, and are not kept",
            fix=SAME_COMMAND,
        )


async def _sample(
    task: _Task,
    asked: Asked,
    sampling: Sampling,
    answering: Sequence[Answering],
    code: UserCode,
    poll: Callable[[], None],
    show: Callable[[str], None],
) -> dict[str, object]:
    """The answers at one temperature: how many of each prompt's passed, and the evaluation's metrics."""
    temperature, samples, ks = sampling
    prepared, wanted = task.prepared, samples * len(task.prompts)
    name = prepared.project.redact(task.subject.name)
    evaluator = build_evaluator(
        prepared,
        code,
        task.prompts,
        reward_watch=RewardWatch(prepared.warn, teaching=False),
        poll=poll,
        warn=prepared.warn,
        samples=samples,
        temperature=temperature,
        pass_at=ks,
    )
    settings = evaluator.settings
    if asked.seed is not None:
        settings = replace(settings, run_seed=asked.seed)

    done = count(1)

    def finished(prompt: Prompt, rollout: Rollout) -> None:
        show(f"{name} at temperature {temperature:g}: {next(done):,} of {wanted:,} answers")

    evaluator = replace(evaluator, settings=settings, finished=finished)
    passed: dict[str, int] = {}

    def keep(groups: Sequence[RolloutGroup], rewards: Mapping[str, RewardResult]) -> None:
        _refuse_failed(groups, rewards, prepared.project.redact)
        counts = count_passed(groups, rewards, evaluator.success_reward)
        passed.update({prompt: right for prompt, (_, right) in counts.items()})
        answers = task.file.answers_name(temperature)
        step = task.subject.trained.step if task.subject.trained else None
        task.file.answers.write(answers, step or 0, groups, rewards)

    metrics = await evaluator.evaluate(answering, None, Residency(), keep=keep)
    return {
        "temperature": temperature,
        "samples": samples,
        "pass_at": ks,
        "passed": passed,
        "metrics": metrics,
    }


def _show(status: Status, text: str) -> None:
    status.update(escape(escape_control(text)))


def _refuse_failed(
    groups: Sequence[RolloutGroup], rewards: Mapping[str, RewardResult], redact: Redactor
) -> None:
    """Where nothing worked, a pass rate of 0 would be no word about the student.

    Raises:
        RnowError: every rollout failed, or every reward of every rollout.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    if all(rollout.status == "failed" for rollout in rollouts):
        raise RnowError(
            f"every one of the {len(rollouts)} rollouts failed, and nothing was measured",
            title="No rollout succeeds",
            details=[redact(str(rollouts[0].error))],
            fix="mend that, then try it with `rnow test`",
        )
    judged = [result for result in rewards.values() if result.breakdown]
    if judged and not any(result.worked for result in judged):
        raise RnowError(
            "every reward of every rollout failed, and nothing was measured",
            title="Rewards fail",
            details=[redact(failure.line()) for failure in failures(judged)],
            where="rewards.py",
            fix="mend it at the line above and try it with `rnow test`",
        )
