"""What a teacher with another tokenizer reads, and whether it can judge the student at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from rnow.core.messages import message_text
from rnow.errors import ConfigError, InputError, ModelError
from rnow.models.tokenizer import (
    config_value,
    encode_texts,
    end_of_turn_id,
    vocabulary_size,
)
from rnow.plan.roles import Role, RunModel
from rnow.project.dataset import place_of
from rnow.protocols import Tokenizer
from rnow.rollout.crossing import Crossing, measure_coverage
from rnow.rollout.token_bytes import TokenBytes, encode_plain, read_token_bytes
from rnow.types import Prompt

SAME_FIX = "use a teacher with the student's tokenizer"
WINDOWS = 2
"""How many of the student's windows the teacher reads, where it can: it may need more tokens for the same text."""
LOOKED_AT, LONGEST_LOOK = 256, 2000
"""Texts of prompts on which tokenizers are compared, and the letters of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """How a teacher with another tokenizer reads the run.

    Attributes:
        vocabulary: ids of its tokenizer that it has rows for.
        window: the most tokens it will read at once.
        prompt_token_ids: prompt id -> its ids, rendered by the teacher's chat template.
        crossing: from the student's tokens to its own.
        notes: what the user should know, each one sentence.
    """

    vocabulary: int
    window: int
    prompt_token_ids: Mapping[str, tuple[int, ...]]
    crossing: Crossing
    notes: tuple[str, ...]


def refuse_tools(roles: Iterable[Role], *, agentic: bool) -> None:
    """
    Raises:
        ConfigError: one of the models crosses tokenizers, in a run with tools.
    """
    for role in roles:
        if agentic and role.crosses:
            raise ConfigError(
                "a teacher with another tokenizer cannot judge a student that calls tools",
                where=f"{role.key}.tokenizer",
                why="calls and results are written as the student's chat template wants them; the teacher's has other forms",
                fix=f"set teacher.agentic: false to leave the tools out, or {SAME_FIX}",
            )


def cross_tokenizers(
    student: RunModel,
    teacher: RunModel,
    tokenizers: tuple[Tokenizer, Tokenizer],
    prompts: Sequence[Prompt],
    texts: tuple[Mapping[str, str], Mapping[str, str]],
    *,
    stop_ids: Sequence[int],
    window: int,
    limit: int | None,
) -> Crossed:
    """Read the run's prompts as the teacher does, and compare what both make of their texts.

    Args:
        tokenizers: the student's, the teacher's.
        texts: prompt id -> its text, rendered by the student's chat template and by the teacher's.
        stop_ids: all that end the student's turn.
        window: tokens of a whole conversation in the student's tokens.
        limit: tokens that the teacher reads at most, where its config says.

    Raises:
        ModelError: tokens that cannot be mapped to bytes, a teacher that ends no turn, or one template alone that opens the
            model's thinking.
        InputError: prompts that the teacher's window does not hold, or of which it can judge less than half.
    """
    ours, theirs = tokenizers
    said = [*_texts_of(prompts)]
    vocabulary = _rows(teacher, theirs)
    crossing = Crossing(
        student=_bytes_of(student, ours, said),
        teacher=_bytes_of(teacher, theirs, said).below(vocabulary),
        tokenizer=theirs,
        stop_ids=frozenset(stop_ids),
        end_id=_end_of(teacher, theirs, vocabulary),
    )
    _compare_thinking(teacher, *texts)
    ids = encode_texts(theirs, list(texts[1].values()))
    found = {name: tuple(row) for name, row in zip(texts[1], ids, strict=True)}
    reads = min(WINDOWS * window, limit or WINDOWS * window)
    _check_window(teacher, prompts, found, reads)
    return Crossed(
        vocabulary=vocabulary,
        window=reads,
        prompt_token_ids=found,
        crossing=crossing,
        notes=(_report(teacher, crossing, ours, said),),
    )


def _texts_of(prompts: Sequence[Prompt]) -> Iterable[str]:
    """What the first prompts say, without anything of a template."""
    said = (
        message_text(message.get("content"))[:LONGEST_LOOK]
        for prompt in prompts
        for message in prompt.messages
    )
    return dict.fromkeys(islice(filter(None, said), LOOKED_AT))


def _rows(model: RunModel, tokenizer: Tokenizer) -> int:
    """Ids that the model has rows for: a token added to a tokenizer alone has none."""
    size = vocabulary_size(tokenizer)
    return min(size, config_value(model.resolved.local_dir, "vocab_size") or size)


def _bytes_of(model: RunModel, tokenizer: Tokenizer, texts: Iterable[str]) -> TokenBytes:
    found = read_token_bytes(tokenizer, texts)
    if found is None:
        raise ModelError(
            f"the tokens of '{model.resolved.path}' cannot be mapped to bytes",
            title="Tokenizer that cannot be crossed",
            where=f"{model.role.key}.path",
            why="its pieces do not give back the text they were made from; tokens of two models are compared by their bytes",
            fix=f"use a model with a byte-level or SentencePiece tokenizer, or {SAME_FIX}",
        )
    return found


def _end_of(teacher: RunModel, tokenizer: Tokenizer, vocabulary: int) -> int:
    """What ends the teacher's turn."""
    closing = end_of_turn_id(tokenizer)
    end = tokenizer.eos_token_id if closing is None else closing
    if end is None or end >= vocabulary:
        raise ModelError(
            f"'{teacher.resolved.path}' has no token that ends its turn",
            title="No end of turn",
            where=f"{teacher.role.key}.path",
            why="the end of the student's answer is judged by the probability that the teacher ends there",
            fix="set eos_token in its tokenizer_config.json, or use the instruct variant of the model",
        )
    return end


def _compare_thinking(
    teacher: RunModel, ours: Mapping[str, str], theirs: Mapping[str, str]
) -> None:
    for name, text in theirs.items():
        opened = [shown.rstrip().endswith("<think>") for shown in (ours[name], text)]
        if opened[0] != opened[1]:
            whose = ("teacher's", "student's") if opened[1] else ("student's", "teacher's")
            raise ModelError(
                f"the {whose[0]} chat template opens <think> before an answer, the {whose[1]} does not",
                title="Thinking on one side only",
                where=f"{teacher.role.key}.path",
                why="the teacher would read an answer as thoughts, or thoughts as an answer",
                fix=f"set rollout.reasoning_mode: disabled, change one chat_template.jinja in a local copy, or {SAME_FIX}",
            )


def _check_window(
    teacher: RunModel,
    prompts: Sequence[Prompt],
    token_ids: Mapping[str, tuple[int, ...]],
    window: int,
) -> None:
    for prompt in prompts:
        if (length := len(token_ids[prompt.id])) >= window:
            raise InputError(
                f"the prompt has {length} tokens of the teacher's, which reads at most {window} with the answer",
                title="Prompt too long for the teacher",
                where=place_of(prompt),
                fix=f"shorten the row, raise rollout.max_context_window, or use a teacher that reads more than '{teacher.resolved.path}'",
            )


def _report(
    teacher: RunModel, crossing: Crossing, tokenizer: Tokenizer, texts: Iterable[str]
) -> str:
    """How the tokens of both fit together on the prompts' own texts."""
    found = measure_coverage(crossing.align(encode_plain(tokenizer, text)) for text in texts)
    if not found.suffices:
        raise InputError(
            f"the {teacher.role.name} can judge {found.covered} of {found.tokens} tokens of the prompts' own texts",
            title="Too little can be judged across these tokenizers",
            where=f"{teacher.role.key}.tokenizer",
            why="its tokenizer has no tokens for the rest",
            fix=f"use a teacher whose tokenizer writes any text, or {SAME_FIX}",
        )
    alone = found.one_to_one / max(1, found.tokens)
    return (
        f"the {teacher.role.name} has its own tokenizer: on the prompts' texts {alone:.0%} of the student's tokens are one "
        f"token of the teacher's, and the longest chunk has {found.longest} of them; a chunk is judged as the teacher's "
        "tokenizer cuts it, so teacher_kl is too high by what other cuts would add"
    )
