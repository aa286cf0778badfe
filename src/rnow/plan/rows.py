"""The rows of sft and midtrain as the student reads them, and what is trained on of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial

from rnow.config import Config
from rnow.errors import MAX_SHOWN, DataError, InputError, ModelError
from rnow.models.refusal import one_line
from rnow.models.tokenizer import (
    encode_texts,
    require_chat_template,
    stop_token_ids,
    vocabulary_size,
)
from rnow.plan.rendered import (
    Rendered,
    ToolSchemas,
    choose_window,
    cut_to_rows,
    date_in,
    dated_tokenizer,
    reasoning_warnings,
    rope_warnings,
    tool_names,
    window_limits,
)
from rnow.plan.roles import STUDENT, Models
from rnow.project.dataset import place_of
from rnow.protocols import Tokenizer
from rnow.rollout.documents import cut_windows, opening_ids
from rnow.rollout.masks import MaskedConversation, MaskFault, mask_conversations
from rnow.rollout.rendering import BROKEN, as_text, local_time
from rnow.rollout.template_process import TemplateFault
from rnow.training.rows import TokenRow
from rnow.types import Prompt, rollout_id

LEAST_WINDOW = 2
"""One token, and one that it predicts."""

AT_ONCE = 1024
"""Rows that are lists of numbers at the same time: forty bytes a token and more, against five of a ``TokenRow``."""

Rows = dict[str, tuple[TokenRow, ...]]


def render_rows(
    config: Config,
    prompts: Sequence[Prompt],
    models: Models,
    tools: ToolSchemas | None = None,
    *,
    now: datetime | None = None,
) -> Rendered:
    """Every row as tokens, with what is trained on of it.

    Args:
        prompts: all rows of the run, training and held out.
        models: the student, with its tokenizer files on this machine.
        tools: what rows show the student, by name.
        now: what chat templates read as the date; None: now.

    Raises:
        ModelError: the student has no chat template, or no token that ends a document.
        DataError: rows that the template refuses, whose answers cannot be told from the rest, or that do not fit the window: up
            to ten with their lines.
        InputError: the window is larger than the model's limit.
    """
    student = models[STUDENT]
    order = [source.name for source in config.data.sources]
    # As in the files: the first line at fault is named.
    prompts = sorted(prompts, key=lambda prompt: (order.index(prompt.dataset), prompt.row))
    tokenizer = dated_tokenizer(student, now or local_time())
    window = choose_window(config.rollout.max_context_window, models)
    if window < LEAST_WINDOW:
        raise InputError(
            "a window of one token leaves nothing to learn",
            where="rollout.max_context_window",
            fix=f"set it to {LEAST_WINDOW} or more, or leave it out",
        )
    stops = stop_token_ids(tokenizer, student.resolved.local_dir)
    warnings = rope_warnings(models, window)
    vocabulary = cut_to_rows(vocabulary_size(tokenizer), models, warnings)
    if config.dataset_type == "midtrain":
        rows = _documents(tokenizer, prompts, window, student.resolved.path, warnings)
        _refuse_empty(prompts, rows)
    else:
        key = f"{student.role.key}.path"
        require_chat_template(tokenizer, path=student.resolved.path, key=key)
        rows = _conversations(config, tokenizer, prompts, tools, stops, warnings)
        warnings += reasoning_warnings(tokenizer, prompts, config.rollout.reasoning_mode)
        _refuse_long(prompts, rows, window, models)
    _refuse_unknown(prompts, rows, vocabulary)
    return Rendered(
        tokenizer=tokenizer,
        stop_ids=stops,
        vocabulary=vocabulary,
        window=window,
        prompt_token_ids={},
        teacher_token_ids={},
        teacher_window=window,
        template_date=date_in(tokenizer),
        dialogues={},
        warnings=tuple(warnings),
        rows=rows,
    )


def _conversations(
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tools: ToolSchemas | None,
    stops: Sequence[int],
    warnings: list[str],
) -> Rows:
    """Rows of sft: each one sequence, with the assistant's tokens as loss tokens."""
    rows: Rows = {}
    altered: list[str] = []
    refused: list[tuple[Prompt, MaskFault | TemplateFault]] = []
    for some in _portions(prompts):
        masked = mask_conversations(
            tokenizer,
            [
                (p.messages, [tools[name] for name in tool_names(p, tools)] if tools else None)
                for p in some
            ],
            partial(encode_texts, tokenizer),
            stop_ids=stops,
            reasoning_mode=config.rollout.reasoning_mode,
        )
        for prompt, one in zip(some, masked, strict=True):
            if not isinstance(one, MaskedConversation):
                refused.append((prompt, one))
                continue
            if one.altered is not None:
                altered.append(f"{place_of(prompt)} spells {one.altered!r}")
            name = rollout_id(prompt.id, 0)
            rows[prompt.id] = (TokenRow.of(name, prompt.dataset, one.token_ids, one.loss_mask),)
    if refused:
        raise _unmasked(refused)
    _tell_altered(altered, warnings)
    return rows


def _documents(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    window: int,
    path: str,
    warnings: list[str],
) -> Rows:
    """Rows of midtrain: each text with an end-of-document token, in as many windows as it needs."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ModelError(
            f"the tokenizer of '{path}' has no end-of-sequence token",
            title="No end of a document",
            where="model.path",
            why="the student would not learn where a text ends",
            fix="give a local copy of it an eos_token in tokenizer_config.json",
        )
    first = opening_ids(tokenizer)
    rows: Rows = {}
    altered: list[str] = []
    for some in _portions(prompts):
        read = [as_text(tokenizer, prompt.text or "") for prompt in some]
        texts = encode_texts(tokenizer, [one.text for one in read])
        for prompt, one, ids in zip(some, read, texts, strict=True):
            if one.altered is not None:
                altered.append(f"{place_of(prompt)} spells {one.altered!r}")
            rows[prompt.id] = tuple(
                TokenRow.of(rollout_id(prompt.id, index), prompt.dataset, piece, mask)
                for index, (piece, mask) in enumerate(cut_windows((*first, *ids, end), window))
            )
    _tell_altered(altered, warnings)
    return rows


def _portions(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), AT_ONCE):
        yield prompts[start : start + AT_ONCE]


def _tell_altered(altered: Sequence[str], warnings: list[str]) -> None:
    if altered:
        noun = "1 row spells" if len(altered) == 1 else f"{len(altered)} rows spell"
        warnings.append(f"{noun} control tokens; {BROKEN} ({altered[0]})")


def _unmasked(refused: Sequence[tuple[Prompt, MaskFault | TemplateFault]]) -> DataError:
    prompt, first = refused[0]
    # Of one kind at a time: they are mended in different places.
    lines = [
        f"{place_of(prompt)}: {one_line(one)}"
        for prompt, one in refused
        if type(one) is type(first)
    ]
    rows = "1 row" if len(lines) == 1 else f"{len(lines)} rows"
    if isinstance(first, TemplateFault):
        return DataError(
            f"the student's chat template refuses {rows}",
            title="Row does not fit the chat template",
            where=place_of(prompt),
            fix="change the rows to what the student's chat template accepts",
            details=lines[:MAX_SHOWN],
            more=lines[MAX_SHOWN:],
        )
    return DataError(
        f"the student's chat template does not tell the answers of {rows} from the rest",
        title="Answers cannot be told",
        where=place_of(prompt),
        why="the loss is on what the student would write itself, token by token",
        fix="give each of these rows one answer, as its last message; set rollout.reasoning_mode: none if it is the thinking that "
        "differs; or, as rows with tool calls need it, put {% generation %} marks around the assistant's text in the chat_template.jinja "
        "of a local copy of the model (docs/how-to/sft.md)",
        details=lines[:MAX_SHOWN],
        more=lines[MAX_SHOWN:],
    )


def _refuse_empty(prompts: Sequence[Prompt], rows: Mapping[str, Sequence[TokenRow]]) -> None:
    """Texts of nothing but letters that the tokenizer drops (zero-width ones)."""
    empty = [p for p in prompts if not any(row.loss_tokens for row in rows[p.id])]
    if empty:
        places = [place_of(prompt) for prompt in empty]
        raise DataError(
            f"the student's tokenizer makes no token of the text of {len(empty)} row{'s' if len(empty) > 1 else ''}",
            title="Empty texts",
            where=places[0],
            fix="remove these rows",
            details=places[:MAX_SHOWN],
            more=places[MAX_SHOWN:],
        )


def _refuse_long(
    prompts: Sequence[Prompt],
    rows: Mapping[str, Sequence[TokenRow]],
    window: int,
    models: Models,
) -> None:
    long = [
        (prompt, tokens)
        for prompt in prompts
        if (tokens := max(len(row.token_ids) for row in rows[prompt.id])) > window
    ]
    if not long:
        return
    longest = max(tokens for _, tokens in long)
    limit = min(window_limits(models).values(), default=longest)
    room = f"raise rollout.max_context_window to {longest}"
    if limit < longest:
        room = f"use a model that reads {longest} tokens"
    lines = [f"{place_of(prompt)}: {tokens} tokens" for prompt, tokens in long]
    raise DataError(
        f"{len(long)} row{'s are' if len(long) > 1 else ' is'} longer than the window of {window} tokens",
        title="Rows too long",
        where=place_of(long[0][0]),
        why="the end of a row that is cut is not learned, where its answer ends least of all",
        fix=f"shorten or remove these rows, or {room}",
        details=lines[:MAX_SHOWN],
        more=lines[MAX_SHOWN:],
    )


def _refuse_unknown(
    prompts: Sequence[Prompt], rows: Mapping[str, Sequence[TokenRow]], vocabulary: int
) -> None:
    for prompt in prompts:
        highest = max(max(row.token_ids) for row in rows[prompt.id])
        if highest >= vocabulary:
            raise DataError(
                f"the row holds the token {highest}, which the model has no embedding for (it knows {vocabulary} tokens)",
                title="Unknown token",
                where=place_of(prompt),
                fix="use the tokenizer that belongs to the model's weights",
            )
