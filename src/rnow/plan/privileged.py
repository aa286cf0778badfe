"""What a teacher reads in place of the student's prompt: the same with something more in it, or another one.

The student answers its own prompt, and the teacher, perhaps the same model, scores that answer after a prompt that says
more: distillation of a context (Snell et al. 2022, https://arxiv.org/abs/2209.15189), on the student's own samples.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from rnow.config import Config, TeacherSection
from rnow.config.teachers import TEACHER, find_teachers
from rnow.core.messages import message_text
from rnow.errors import MAX_SHOWN, DataError, InputError
from rnow.plan.roles import Models, RunModel, teachers_of
from rnow.project.dataset import place_of
from rnow.project.rows import PRIVILEGED_KEYS, Privileged
from rnow.types import Message, Prompt

Ids = Mapping[str, Sequence[int]]
"""Prompt id -> token ids."""

_NOTHING = Privileged()
_PLACEHOLDER = re.compile(r"\{(prompt|context)\}")


def teacher_conversations(
    models: Models, prompts: Sequence[Prompt], privileged: Mapping[str, Privileged]
) -> list[tuple[Prompt, tuple[Message, ...]]]:
    """The prompts that their teacher reads in other words than the student, with those words."""
    sections = {model.role.name: model.role.section for model in teachers_of(models)}
    told = [
        (prompt, teacher_messages(section, prompt, privileged.get(prompt.id, _NOTHING)))
        for prompt in prompts
        if isinstance(section := sections.get(prompt.teacher or TEACHER), TeacherSection)
    ]
    return [(prompt, messages) for prompt, messages in told if messages != tuple(prompt.messages)]


def teacher_messages(
    section: TeacherSection, prompt: Prompt, privileged: Privileged
) -> tuple[Message, ...]:
    """The teacher's prompt: ``teacher_messages`` of the row, or the student's messages with ``teacher.template`` in place of
    the last user message. ``teacher.system_prompt`` takes the place of the row's own system message, but not of one in
    ``teacher_messages``."""
    messages = [*(privileged.messages or prompt.messages)]
    if privileged.context is not None:
        at = max(index for index, message in enumerate(messages) if message.get("role") == "user")
        values = {
            "prompt": message_text(messages[at].get("content")),
            "context": privileged.context,
        }
        text = _PLACEHOLDER.sub(lambda match: values[match[1]], section.template)
        messages[at] = {**messages[at], "content": text}
    if section.system_prompt is None:
        return tuple(messages)
    given = messages[0].get("role") == "system"
    if given and privileged.messages:
        return tuple(messages)
    system = {"role": "system", "content": section.system_prompt}
    return (system, *messages[given:])


def fit_windows(
    asked: int | None,
    window: int,
    limit: int | None,
    prompts: Sequence[Prompt],
    own: Ids,
    told: Ids,
    *,
    cap: int | None,
) -> tuple[int, int]:
    """The window of the student's conversations, and that of the teacher's, which holds the same answers after its own
    prompts.

    Args:
        asked: ``rollout.max_context_window``.
        window: of the student, as far as it alone is concerned.
        limit: the longest sequence that the teacher reads; None where nobody knows.
        own, told: the prompts of both.
        cap: tokens of the longest answer; None where turns may fill the window.

    Raises:
        DataError: prompts of the teacher leave no room for an answer, with their lines.
        InputError: the longest answers that the settings allow do not fit the teacher.
    """
    longer = max((len(ids) - len(own[name]) for name, ids in told.items()), default=0)
    if longer <= 0:
        return window, window
    if limit is None:
        return window, window + longer
    _refuse_oversized([(p, len(told[p.id])) for p in prompts if p.id in told], limit)
    longest = max(
        len(ids) + min(window - len(own[name]), cap or window) for name, ids in told.items()
    )
    if longest > limit:
        if asked is not None:
            raise InputError(
                f"the teacher reads at most {limit} tokens: its prompts are up to {longer} tokens longer than the student's, "
                f"whose conversations may have {window}",
                where="rollout.max_context_window",
                fix=f"set it to {limit - longer} or less, leave it out, or shorten what the teacher is told",
            )
        window = limit - longer
    return window, min(window + longer, limit)


def _refuse_oversized(rows: Sequence[tuple[Prompt, int]], limit: int) -> None:
    too_long = [(prompt, tokens) for prompt, tokens in rows if tokens >= limit]
    if not too_long:
        return
    lines = [f"{place_of(prompt)}: {tokens} tokens" for prompt, tokens in too_long]
    prompts = (
        "1 prompt of the teacher does"
        if len(lines) == 1
        else f"{len(lines)} prompts of the teacher do"
    )
    raise DataError(
        f"{prompts} not fit it: at most {limit - 1} tokens leave room for an answer",
        title="Prompts too long",
        where=place_of(too_long[0][0]),
        fix=f"shorten {' or '.join(PRIVILEGED_KEYS)} of these rows",
        details=lines[:MAX_SHOWN],
        more=lines[MAX_SHOWN:],
    )


def own_base_warnings(
    config: Config, models: Models, prompts: Sequence[Prompt], told: Ids, *, thinks: bool
) -> Iterator[str]:
    """What to know where a teacher is the student's own base.

    Args:
        told: the prompts that their teacher reads in other words.
        thinks: the chat template has a switch for thinking, and it is not off.

    Raises:
        InputError: ``path: self`` that would teach nothing.
    """
    own = [model for model in teachers_of(models) if model.own_base]
    for teacher in own:
        yield from _without_context(config, teacher, prompts, told)
    if not own:
        return
    if told and thinks:
        yield (
            "the chat template knows thinking: self-distillation with privileged context was seen to make thinking models up "
            "to 17% worse, so compare the evaluations before and after; rollout.reasoning_mode: none trains answers without"
        )
    if config.evaluation.teacher is True:
        why = "its answers without what it is told are those of the evaluation `before`"
        if config.model.adapter is not None:
            why = "the base without the adapter that the run starts from is not evaluated"
        yield f"evaluation.teacher has no effect: the teacher is the student's own base, and {why}"


def _without_context(
    config: Config, teacher: RunModel, prompts: Sequence[Prompt], told: Ids
) -> Iterator[str]:
    """Rows whose teacher is the student's own base and is told nothing more."""
    name, key = teacher.role.name, teacher.role.key
    judged = [prompt for prompt in prompts if (prompt.teacher or TEACHER) == name]
    without = sum(prompt.id not in told for prompt in judged)
    as_before = "it scores as the student's base does, which holds the student near that"
    if 0 < without < len(judged):
        yield f"{without} of {len(judged)} rows tell the {name} nothing more than the student: on these {as_before}"
    if without < len(judged):
        return
    _, section = find_teachers(config).sections[name]
    if section.own_base and config.algorithm.reward_coef == 0:
        raise InputError(
            f"the {name} is the student's own base and is told nothing more, so nothing would be learned",
            where=f"{key}.path",
            why="it sees the prompts that the student sees, and scores them as the student did before training",
            fix=f'give its rows "privileged_context" or "teacher_messages", or set {key}.system_prompt',
        )
    yield f"the {name} is the student's own base and is told nothing that the student does not see: {as_before}"
