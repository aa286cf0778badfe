"""Where answers arrive: kept first, then scored, judged, and written as rows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rnow.errors import RnowError, TemporaryError
from rnow.generation.answered import Answered, Job
from rnow.generation.keep import Condition, Judged, why_rejected
from rnow.generation.reader import OF_THE_STUDENT, Reader
from rnow.generation.rows import answered_by, training_row, why_unfit
from rnow.generation.store import Answer, AnswerStore, TrainingFile, row_hash, scoring_key
from rnow.protocols import Rewarder
from rnow.rewards.score import MAX_CONCURRENT
from rnow.serving.http import BadAnswer, Refused
from rnow.tasks import first_cause
from rnow.text.redact import Redactor
from rnow.types import RewardResult, Rollout

MAX_FAULTS = 8
"""Conversations in a row that come to nothing before the rest is not tried."""
_HOPELESS = frozenset({301, 302, 303, 307, 308, 401, 402, 404, 405, 429})
"""Statuses that say something of the endpoint, the key or the model's name, not of one request. A 429 that is no more waited for
is an exhausted quota. A 403 may be either: OpenRouter says it of a prompt that was flagged."""


@dataclass(slots=True)
class Tally:
    """What this start has done so far.

    Attributes:
        done: conversations that are over, those that came to nothing included.
        kept: rows that were written.
        rejected: by reason.
        faults: why conversations came to nothing, by their first words.
    """

    done: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)


def judge(answer: Answer, conditions: Sequence[Condition]) -> str | None:
    """Why an answer is no row, in words; None for one that is."""
    if answer.unfit is not None:
        return answer.unfit
    reward = answer.reward
    if reward is None and answer.row.get("rewards") and any(c.of_rewards for c in conditions):
        return "not scored"
    judged = Judged(
        tokens=answer.spent.completion_tokens,
        turns=answer.turns,
        total=None if reward is None else reward.total,
        rewards=None if reward is None else reward.breakdown,
        failed=() if reward is None else tuple(reward.errors),
    )
    return why_rejected(judged, conditions)


class Desk:
    """Takes what a teacher answered.

    Args:
        store, training: open already.
        tally: counts what is taken.
        rewarder: scores the rows that name rewards.
        conditions: of ``--keep-if``.
        teacher: its name, in every row.
        redact: takes secrets out of what is kept.
        reader: asked of every row; of those that are there, once it is another.
        told: called after each conversation.
    """

    def __init__(
        self,
        store: AnswerStore,
        training: TrainingFile,
        tally: Tally,
        rewarder: Rewarder,
        conditions: Sequence[Condition],
        *,
        teacher: str,
        redact: Redactor,
        reader: Reader,
        told: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self.tally = tally
        self.capped = False
        self.failure: RnowError | None = None
        self._store = store
        self._training = training
        self._rewarder = rewarder
        self._conditions = conditions
        self._teacher = teacher
        self._redact = redact
        self._reader = reader
        self._told = told
        self._in_a_row = 0

    @property
    def closed(self) -> bool:
        """Nothing new should be asked."""
        return self.capped or self.failure is not None

    async def take(self, job: Job, answered: Answered) -> None:
        """Keep an answer; then have it scored and write its row, if it becomes one.

        Raises:
            TemporaryError: the disk does not take it.
        """
        if answered.capped:
            self.capped = True
            self._pay(job, answered, "a limit was reached")
            return
        if answered.fault is not None:
            self._came_to_nothing(job, answered, answered.fault)
        else:
            self._in_a_row = 0
            answer = self._kept(job, answered)
            self._store.read_by(self._reader.digest)
            self._store.add(answer)
            answer = self._read_by_student(answer)
            if answer.unfit is None:
                answer = await self._score(job, answer, answered.rollout)
            self._count(answer)
        self.tally.done += 1
        self._told(self.tally)

    async def bring_up_to_date(self, jobs: Iterable[Job], *, everything: bool) -> None:
        """Write the rows of the store's answers as their prompts are now, have them read where the student is another, and score
        those that nobody scored to the end, or for other metadata.

        Args:
            jobs: those that are answered.
            everything: score all others too.
        """
        anew = self._store.reader != self._reader.digest
        waiting = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(job: Job) -> None:
            async with waiting:
                await self._bring_up_to_date(job, anew=anew, everything=everything)

        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(one(job))
        except BaseExceptionGroup as errors:
            raise first_cause(errors) from errors
        if self._store.answers:
            self._store.read_by(self._reader.digest)

    async def _bring_up_to_date(self, job: Job, *, anew: bool, everything: bool) -> None:
        answer = self._store.answers[job.key]
        rollout = Rollout(
            prompt_id=job.prompt.id,
            index=job.sample,
            turns=(),
            messages=answered_by(answer.row, job.prompt),
            status="completed",
            end_reason="answer",
        )
        teacher = job.key[1]
        row = self._redact.data(training_row(job.prompt, rollout, teacher))
        if row_hash(row) != row_hash(answer.row):
            answer = self._store.rewrite(job.key, row)
        if anew or answer.scored is None:
            answer = self._read_by_student(answer)
        if answer.unfit is not None:
            return
        failed = answer.reward is not None and answer.reward.errors
        if everything or failed or answer.scored != scoring_key(job.prompt):
            await self._score(job, answer, rollout)

    def _kept(self, job: Job, answered: Answered) -> Answer:
        rollout = answered.rollout
        return Answer(
            key=job.key,
            row=self._redact.data(training_row(job.prompt, rollout, self._teacher)),
            end=rollout.end_reason,
            turns=sum(message.get("role") == "assistant" for message in rollout.messages),
            unfit=answered.unfit or why_unfit(rollout),
            spent=answered.spent,
        )

    def _read_by_student(self, answer: Answer) -> Answer:
        """The answer with what the student says of it, where nothing else is wrong with it."""
        if answer.unfit is not None and answer.unfit not in OF_THE_STUDENT:
            return answer
        unfit = self._reader.refuses(answer.row["messages"], answer.row.get("tools"))
        return answer if unfit == answer.unfit else self._store.mark(answer.key, unfit)

    async def _score(self, job: Job, answer: Answer, rollout: Rollout) -> Answer:
        """The answer with what its rewards say; of one without rewards, that nothing is left to be done."""
        reward: RewardResult | None = await self._rewarder.score(job.prompt, rollout)
        if reward is not None and reward.errors:
            reward = self._redact.data(reward)
        return self._store.score(answer.key, scoring_key(job.prompt), reward)

    def _count(self, answer: Answer) -> None:
        if self._training.add(answer):
            self.tally.kept += 1
        elif (why := judge(answer, self._conditions)) is not None:
            self.tally.rejected[why] += 1

    def _pay(self, job: Job, answered: Answered, fault: str) -> None:
        """Keep what was spent for nothing."""
        if answered.spent.tokens:
            self._store.fail(job.key, self._redact(fault), answered.spent)

    def _came_to_nothing(self, job: Job, answered: Answered, fault: RnowError) -> None:
        self._pay(job, answered, fault.message)
        self.tally.faults[fault.message] += 1
        self._in_a_row += 1
        # What is neither the endpoint's nor passing is ours: the next conversation would meet it, too.
        ours = not isinstance(fault, Refused | BadAnswer | TemporaryError)
        hopeless = ours or (isinstance(fault, Refused) and fault.status in _HOPELESS)
        if self.failure is None and (hopeless or self._in_a_row >= MAX_FAULTS):
            self.failure = fault
