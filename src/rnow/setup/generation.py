"""``rnow generate``: let a teacher answer prompts, and write its answers as rows for ``dataset_type: sft``."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rnow.config import Config
from rnow.config.schema import DatasetSource
from rnow.disk.folder import RunFolder
from rnow.errors import (
    EXIT_INTERRUPTED,
    SAME_COMMAND,
    RnowError,
    StopRequested,
    TemporaryError,
)
from rnow.generation.answered import Job
from rnow.generation.asking import ask_endpoint, ask_model, missing
from rnow.generation.budget import Budget
from rnow.generation.chat import ChatSettings, ChatTeacher
from rnow.generation.desk import Desk, Tally, judge
from rnow.generation.endpoint import check_endpoint, client_of, endpoint_key
from rnow.generation.keep import Condition
from rnow.generation.reader import Reader, reader_of
from rnow.generation.store import Answer, AnswerStore, TrainingFile, answers_path
from rnow.generation.view import Progress, Summary, summary_lines
from rnow.generation.wanted import (
    AT_ONCE,
    AT_ONCE_HERE,
    Wanted,
    as_student,
    check_teacher,
    conditions_of,
    keyed,
    output_of,
    prompts_of,
    refuse_unrewarded,
)
from rnow.models.loading import quiet_libraries
from rnow.plan.choices import DEFAULT_MAX_TOKENS
from rnow.plan.engines import check_engines
from rnow.plan.prepare import Prepared
from rnow.plan.rendered import tool_names
from rnow.plan.roles import STUDENT
from rnow.project.secrets import load_secrets, reading_redactor, writing_redactor
from rnow.protocols import Sampler
from rnow.rewards.watch import failures
from rnow.serving.http import BadAnswer, Refused, ServerDown
from rnow.setup.answering import prepare_told, student_answers, tell
from rnow.setup.usercode import UserCode, build_episodes, open_user_code, rollout_settings
from rnow.tasks import run_anywhere
from rnow.training.signals import StopFlag
from rnow.types import Prompt

if TYPE_CHECKING:
    from rich.console import Console

WORK = ".generate"
"""Where, beside the runs, a vLLM that this starts keeps its log."""


def generate(
    config: Config, wanted: Wanted, *, folder: str | Path = ".", console: Console | None = None
) -> Summary:
    """Ask a teacher for answers that are not there yet, and write those that are kept as rows.

    Rows go to ``wanted.output``, every answer to ``<output>.answers.jsonl`` beside it, first; called again, only what is missing
    is asked. Conversations go through the project's tools and ``rollout`` settings, answers through its rewards.

    Raises:
        InputError: what is wrong, before anything is asked.
        StopRequested: Ctrl-C or SIGTERM. What was under way with an endpoint is finished first.
        TemporaryError: the endpoint, or the disk, failed; what was answered is kept.
        RnowError: rewards failed, or no answer is kept.
    """
    from rich.console import Console

    shown = console or Console()
    with writing_redactor(load_secrets(Path(folder)), config).errors():
        return _generate(config, wanted, Path(folder), shown)


def _generate(config: Config, wanted: Wanted, folder: Path, console: Console) -> Summary:
    quiet_libraries()
    name = check_teacher(config, wanted, folder)
    sources = prompts_of(config, wanted, folder)
    output = output_of(wanted, folder, sources)
    told: set[str] = set()
    prepared = _prepare(config, sources, folder, console, told)
    reader = reader_of(prepared)
    if wanted.url is None:
        prepared = _prepare(config, sources, folder, console, told, local=name)
    conditions = conditions_of(wanted, prepared)
    prompts = keyed(prepared)
    refuse_unrewarded(conditions, [prompt for prompt, _ in prompts])
    key = endpoint_key(prepared, wanted)
    if wanted.url is not None:
        client = client_of(wanted, key)
        name = run_anywhere(check_endpoint(client, wanted, prepared.warn))
    work = _Generation(
        prepared=prepared,
        wanted=wanted,
        console=console,
        name=name,
        prompts=prompts,
        conditions=conditions,
        output=output,
        key=key,
        reader=reader,
        stop=StopFlag(),
    )
    with AnswerStore(answers_path(output)) as store:
        return work.run(store)


def _prepare(
    config: Config,
    sources: tuple[DatasetSource, ...],
    folder: Path,
    console: Console,
    told: set[str],
    *,
    local: str | None = None,
) -> Prepared:
    """The prompts as the student reads them, or the model ``local`` that answers here."""
    asked = as_student(config, sources, local=local)
    try:
        return prepare_told(asked, folder, console, weights=local is not None, told=told)
    except RnowError as error:
        places = {"data.train_file": "--prompts"}
        if local is not None:
            places["model.path"] = "--teacher"
        error.where = places.get(error.where or "", error.where)
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generation:
    """One call, checked. ``name``: the teacher's; ``prompts``: each with its ``prompt_key``; ``key``: the variable that holds the
    endpoint's key, and the key; ``reader``: the student that is to learn the rows."""

    prepared: Prepared
    wanted: Wanted
    console: Console
    name: str
    prompts: Sequence[tuple[Prompt, str]]
    conditions: Sequence[Condition]
    output: Path
    key: tuple[str, str] | None
    reader: Reader
    stop: StopFlag

    def run(self, store: AnswerStore) -> Summary:
        if store.skipped:
            self.prepared.warn(f"{store.path.name}: lines that cannot be read: {store.skipped}")
        places = {key: index for index, (_, key) in enumerate(self.prompts)}
        training = TrainingFile(
            self.output,
            keep=lambda answer: judge(answer, self.conditions) is None,
            place=lambda answer: (places[answer.key[0]],) if answer.key[0] in places else None,
        )
        training.check(store.seen)
        wanted = self.wanted
        budget = Budget(
            max_tokens=wanted.max_tokens,
            max_cost=wanted.max_cost,
            prices=wanted.prices,
            spent=store.spent,
        )
        chosen = self.prompts[: wanted.limit]
        jobs = missing(chosen, self.name, wanted.samples, store.answers)
        tally, desk = Tally(), None
        with (
            self.stop.watch(),
            Progress(self.console, total=len(jobs), budget=budget) as progress,
        ):
            try:
                desk = run_anywhere(self._work(store, training, tally, budget, jobs, progress.told))
            except (StopRequested, KeyboardInterrupt):
                if self.stop.exit_code is None:
                    raise
            finally:
                self.stop.from_here(lambda: None)  # this is soon over
                if store.answers:
                    training.finish(store.answers.values())
        capped = desk is not None and desk.capped
        summary = self._summary(store, training, tally, budget, len(jobs), capped=capped)
        for line in summary_lines(summary):
            tell(self.console, self.prepared.project.redact(line))
        if desk is None or self.stop.exit_code is not None:
            raise _stopped(self.stop)
        self._raise_what_is_left(desk, store, summary)
        return summary

    def _answers(self, store: AnswerStore) -> list[Answer]:
        """Those to the prompts of this call."""
        keys = {key for _, key in self.prompts}
        return [answer for key, answer in store.answers.items() if key[0] in keys]

    async def _work(
        self,
        store: AnswerStore,
        training: TrainingFile,
        tally: Tally,
        budget: Budget,
        jobs: Sequence[Job],
        told: Callable[[Tally], None],
    ) -> Desk:
        prepared, secrets = self.prepared, dict(self.prepared.project.secrets)
        if self.key is not None:
            secrets[self.key[0]] = self.key[1]
        async with open_user_code(prepared) as code:
            desk = Desk(
                store,
                training,
                tally,
                code.rewarder,
                self.conditions,
                teacher=self.name,
                redact=reading_redactor(secrets, prepared.config),
                reader=self.reader,
                told=told,
            )
            known = {key: prompt for prompt, key in self.prompts}
            there = [
                Job(prompt=known[key[0]], sample=key[2], key=key)
                for key in list(store.answers)
                if key[0] in known
            ]
            await desk.bring_up_to_date(there, everything=self.wanted.rescore)
            training.open(store.answers.values())
            if jobs:
                self._warn_of_template(jobs[0].prompt)
                await self._ask(jobs, desk, budget, code)
        return desk

    def _warn_of_template(self, prompt: Prompt) -> None:
        """Before anything is paid for."""
        answer = {"role": "assistant", "content": "4"}
        if why := self.reader.refuses([*prompt.messages, answer], prompt.tools):
            self.prepared.warn(
                f"an answer of one word to the first prompt would be left out: {why}"
            )

    async def _ask(self, jobs: Sequence[Job], desk: Desk, budget: Budget, code: UserCode) -> None:
        prepared, wanted = self.prepared, self.wanted
        episodes = build_episodes(prepared, code)
        settings = rollout_settings(prepared, "test", group_size=max(j.sample for j in jobs) + 1)
        if wanted.url is None:
            if wanted.temperature is not None:
                settings = replace(settings, temperature=wanted.temperature)
            settings = replace(settings, poll=self.stop.poll)
            async with self._load() as sampler:
                self.stop.from_here(lambda: tell(self.console, "stopping ..."))
                at_once = wanted.at_once or AT_ONCE_HERE
                await ask_model(jobs, sampler, episodes, settings, desk, budget, at_once=at_once)
            return
        teacher = ChatTeacher(
            client_of(wanted, self.key),
            episodes,
            {
                prompt.id: [prepared.tools[name] for name in tool_names(prompt, prepared.tools)]
                for prompt, _ in self.prompts
            },
            budget,
            ChatSettings(
                model=self.name,
                max_tokens=prepared.config.rollout.max_tokens or DEFAULT_MAX_TOKENS,
                temperature=wanted.temperature,
                timeout=prepared.config.rollout.rollout_timeout,
                thinking=wanted.thinking,
            ),
        )
        self.stop.from_here(
            lambda: tell(
                self.console,
                "no new conversations; those under way are finished. Again: leave them now",
            )
        )
        most = min(wanted.at_once or AT_ONCE, settings.max_live or len(jobs), len(jobs))
        await ask_endpoint(
            jobs, teacher, desk, at_once=most, stopping=lambda: self.stop.exit_code is not None
        )

    @asynccontextmanager
    async def _load(self) -> AsyncIterator[Sampler]:
        """The teacher, in this process or in a vLLM of ours; with its adapter, where a run or an adapter was named."""
        prepared, role = self.prepared, self.prepared.student.role
        folder = RunFolder(prepared.project.folder / prepared.config.output_dir / WORK)
        by_vllm = role.backend == "vllm"
        if by_vllm:
            check_engines({STUDENT: role})
            folder.path.mkdir(parents=True, exist_ok=True)
        tell(self.console, f"{'starting vLLM for' if by_vllm else 'loading'} the teacher")
        async with student_answers(prepared, folder, self.stop.poll) as (answering,):
            yield answering.sampler

    def _summary(
        self,
        store: AnswerStore,
        training: TrainingFile,
        tally: Tally,
        budget: Budget,
        jobs: int,
        *,
        capped: bool,
    ) -> Summary:
        answers = self._answers(store)
        reasons = (judge(answer, self.conditions) for answer in answers)
        return Summary(
            output=self.output,
            teacher=self.name,
            rows=training.rows,
            answers=len(answers),
            gone=len(store.answers) - len(answers),
            rejected=Counter(reason for reason in reasons if reason is not None),
            faults=tally.faults,
            asked=tally.done,
            unasked=jobs - tally.done,
            capped=capped,
            spent=budget.spent,
            cost=None if self.wanted.prices is None else budget.cost,
        )

    def _raise_what_is_left(self, desk: Desk, store: AnswerStore, summary: Summary) -> None:
        """What ended the call early, or is to be mended; nothing where all is well."""
        if desk.failure is not None:
            raise _ended_early(desk.failure)
        scored = (answer.reward for answer in self._answers(store))
        if failing := failures(reward for reward in scored if reward is not None):
            raise RnowError(
                "rewards failed on some of the answers",
                title="Rewards fail",
                details=[self.prepared.project.redact(failure.line()) for failure in failing],
                where="rewards.py",
                fix=f"mend it, then {SAME_COMMAND}: these answers are scored again, and nothing is asked again",
            )
        if summary.faults:
            count = summary.faults.total()
            raise TemporaryError(
                f"{count} conversation{'s' if count > 1 else ''} came to nothing",
                title="Not all is answered",
                details=[f"{number} x {text}" for text, number in summary.faults.most_common(5)],
                fix=f"{SAME_COMMAND}: it asks these again, and nothing else",
            )
        if not summary.rows:
            fix = f"look at the answers in {answers_path(self.output).name}, or loosen --keep-if"
            if not summary.answers:
                fix = "raise the limit: the first request may cost more (rollout.max_tokens, a token per byte of the prompt)"
            raise RnowError(
                "no answer is kept, so there is nothing to train on",
                title="No rows",
                where=str(self.output),
                details=[f"{number} x {text}" for text, number in summary.rejected.most_common(5)],
                fix=fix,
            )


def _stopped(stop: StopFlag) -> StopRequested:
    error = StopRequested(exit_code=stop.exit_code or EXIT_INTERRUPTED)
    error.why = "what was answered is kept"
    error.fix = f"{SAME_COMMAND}: only what is missing is asked"
    return error


def _ended_early(failure: RnowError) -> RnowError:
    """What ended it, for the user."""
    again = f"{SAME_COMMAND}: what was answered is kept, and not asked again"
    if isinstance(failure, BadAnswer | Refused | ServerDown):
        failure.where = failure.where or "--url"
    failure.fix = f"{failure.fix}; then {again}" if failure.fix else again
    return failure
