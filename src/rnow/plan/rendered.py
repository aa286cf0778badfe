"""What can be found out about a run without loading a weight: tokenizers, stop ids, window, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnow.errors import InputError
from rnow.models.refusal import one_line
from rnow.models.resolve import ResolvedModel
from rnow.models.tokenizer import (
    compare_tokenizers,
    encode_texts,
    load_tokenizer,
    read_config,
    require_chat_template,
    stop_token_ids,
    vocabulary_size,
)
from rnow.project.dataset import oversized_rows_error
from rnow.rollout.environment import Dialogue, load_dialogue
from rnow.rollout.rendering import ToolDescription, render_text
from rnow.types import Prompt

if TYPE_CHECKING:
    from rnow.config import Config

ToolSchemas = Mapping[str, ToolDescription]
"""Name of a tool -> its description as chat templates take it, in the order in which they are shown."""

DEFAULT_WINDOW = 32768
TEMPLATE_SAMPLES = 8

_LIMIT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """The findings, used by the plan and by the run itself.

    Attributes:
        tokenizer: the student's HuggingFace tokenizer.
        stop_ids: every id that ends the student's turn.
        vocabulary: ids that both models know; at or above it are padding rows.
        window: tokens of a whole conversation.
        prompt_token_ids: prompt id -> its rendered ids, so that the run need not render again.
        dialogues: the tools a prompt may use, by name -> how they are shown and called; empty without tools.
        warnings: what the user should know, each one sentence.
    """

    tokenizer: Any
    stop_ids: tuple[int, ...]
    vocabulary: int
    window: int
    prompt_token_ids: Mapping[str, tuple[int, ...]]
    dialogues: Mapping[tuple[str, ...], Dialogue]
    warnings: tuple[str, ...]

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_token_ids.values()), default=0)


def run_preflight(
    config: Config,
    prompts: Sequence[Prompt],
    student: ResolvedModel,
    teacher: ResolvedModel | None,
    tools: ToolSchemas | None = None,
) -> Preflight:
    """Check the models against each other and every prompt against the window.

    Args:
        prompts: all prompts of the run, training and held out.
        tools: what the student can call, by name; None for a run without tools.
        student, teacher: with their tokenizer files on this machine; weights are not read.

    Raises:
        ModelError: the tokenizers or end-of-turn ids differ, or the student has no chat template.
        DataError: prompts that do not fit the window, up to ten with their lines.
        InputError: the window is larger than a model's limit, a prompt does not fit the chat template, or that template
            cannot show or answer tools.
    """
    tokenizer = load_tokenizer(student, trust_remote_code=config.model.trust_remote_code)
    require_chat_template(tokenizer, path=student.path, key="model.path")
    window = choose_window(config, student, teacher)
    mode = config.rollout.reasoning_mode
    texts = _render(tokenizer, prompts, mode, tools)
    ids = encode_texts(tokenizer, list(texts.values()))
    warnings: list[str] = []

    if teacher is None or config.teacher is None:
        vocabulary = vocabulary_size(tokenizer)
        stops = stop_token_ids(tokenizer, student.local_dir)
    else:
        agreement = compare_tokenizers(
            tokenizer,
            load_tokenizer(teacher, trust_remote_code=config.teacher.trust_remote_code),
            texts,
            student_dir=student.local_dir,
            teacher_dir=teacher.local_dir,
            conversations=[prompt.messages for prompt in prompts[:TEMPLATE_SAMPLES]],
            student_ids=ids,
            reasoning_mode=mode,
            tools=None if tools is None else list(tools.values()),
        )
        vocabulary, stops = agreement.vocabulary, agreement.stop_token_ids
        warnings += agreement.warnings

    vocabulary = _cut_to_rows(vocabulary, student, teacher, warnings)
    dialogues = {
        names: load_dialogue(
            tokenizer,
            [tools[name] for name in names],
            stop_token_ids=stops,
            reasoning_mode=mode,
        )
        for names in dict.fromkeys(tool_names(prompt, tools) for prompt in prompts)
        if tools is not None and names
    }
    token_ids = {name: tuple(row) for name, row in zip(texts, ids, strict=True)}
    _check_known(prompts, token_ids, vocabulary)
    warnings += _check_window(config, prompts, token_ids, window)
    if mode is not None and prompts and _ignores_reasoning(tokenizer, prompts[0]):
        warnings.append(
            f"rollout.reasoning_mode {mode} has no effect: the student's chat template knows no such switch"
        )
    return Preflight(
        tokenizer=tokenizer,
        stop_ids=stops,
        vocabulary=vocabulary,
        window=window,
        prompt_token_ids=token_ids,
        dialogues=dialogues,
        warnings=tuple(warnings),
    )


def tool_names(prompt: Prompt, tools: ToolSchemas | None) -> tuple[str, ...]:
    """The tools that this prompt may use: those its row names, else all, in the order of ``tools``."""
    allowed = prompt.tools
    return tuple(name for name in tools or () if allowed is None or name in allowed)


def _ignores_reasoning(tokenizer: Any, prompt: Prompt) -> bool:
    """Whether the template renders the same text with thinking on, off, and unsaid."""
    modes = (None, "none", "low", "high")
    return len({render_text(tokenizer, prompt.messages, reasoning_mode=m) for m in modes}) == 1


def choose_window(config: Config, student: ResolvedModel, teacher: ResolvedModel | None) -> int:
    """Tokens of a whole conversation: the configured window, or the smallest of 32768 and both models' limits.

    Raises:
        InputError: the configured window is larger than a model's limit.
    """
    limits = {"the student": model_limit(student.local_dir)}
    if teacher is not None:
        limits["the teacher"] = model_limit(teacher.local_dir)
    known = {role: limit for role, limit in limits.items() if limit is not None}
    asked = config.rollout.max_context_window
    if asked is None:
        return min([DEFAULT_WINDOW, *known.values()])
    for role, limit in known.items():
        if asked > limit:
            raise InputError(
                f"rollout.max_context_window is {asked}, but {role} reads at most {limit} tokens",
                where="rollout.max_context_window",
                fix=f"set it to {min(known.values())} or less, or leave it out",
            )
    return asked


def model_limit(local_dir: Path) -> int | None:
    """The longest sequence a model was made for, from its config.json; None when that does not say."""
    config = read_config(local_dir / "config.json")
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping):
            for key in _LIMIT_KEYS:
                if isinstance(section.get(key), int):
                    return section[key]
    return None


def place_of(prompt: Prompt) -> str:
    """``train.jsonl:57``, or the prompt's id when it has no line."""
    if prompt.source and prompt.line is not None:
        return f"{prompt.source}:{prompt.line}"
    return f"{prompt.source}, row {prompt.row + 1}" if prompt.source else prompt.id


def _render(
    tokenizer: Any, prompts: Sequence[Prompt], mode: str | None, tools: ToolSchemas | None
) -> dict[str, str]:
    texts: dict[str, str] = {}
    for prompt in prompts:
        shown = [tools[name] for name in tool_names(prompt, tools)] if tools is not None else None
        try:
            texts[prompt.id] = render_text(
                tokenizer, prompt.messages, reasoning_mode=mode, tools=shown
            )
        except Exception as error:  # a template raises jinja's errors, or Python's on odd messages
            raise InputError(
                f"the chat template refuses this conversation: {one_line(error)}",
                title="Prompt does not fit the chat template",
                where=place_of(prompt),
                details=[f"roles: {', '.join(str(m.get('role')) for m in prompt.messages)}"],
                fix="change the row to what the student's chat template accepts",
            ) from error
    return texts


def _cut_to_rows(
    vocabulary: int, student: ResolvedModel, teacher: ResolvedModel | None, warnings: list[str]
) -> int:
    """Never more ids than either model has rows for: a token added to a tokenizer alone has no embedding."""
    for model in (student, teacher):
        if model is None:
            continue
        config = read_config(model.local_dir / "config.json")
        rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        if isinstance(rows, int) and rows < vocabulary:
            warnings.append(
                f"'{model.path}' has {rows} embedding rows for {vocabulary} tokens; ids from {rows} on are never sampled"
            )
            vocabulary = rows
    return vocabulary


def _check_known(
    prompts: Sequence[Prompt], token_ids: Mapping[str, tuple[int, ...]], vocabulary: int
) -> None:
    for prompt in prompts:
        ids = token_ids[prompt.id]
        if ids and max(ids) >= vocabulary:
            raise InputError(
                f"the prompt holds the token {max(ids)}, which a model has no embedding for "
                f"(it knows {vocabulary} tokens)",
                title="Unknown token",
                where=place_of(prompt),
                fix="use the tokenizer that belongs to the model's weights",
            )


def _check_window(
    config: Config,
    prompts: Sequence[Prompt],
    token_ids: Mapping[str, tuple[int, ...]],
    window: int,
) -> list[str]:
    too_long = [(p, len(token_ids[p.id])) for p in prompts if len(token_ids[p.id]) + 1 > window]
    if too_long:
        raise oversized_rows_error(too_long, window - 1)
    cap = config.rollout.max_tokens
    tight = [p for p in prompts if cap is not None and len(token_ids[p.id]) + cap > window]
    if not tight:
        return []
    longest = max(tight, key=lambda prompt: len(token_ids[prompt.id]))
    room = window - len(token_ids[longest.id])
    return [
        f"{len(tight)} prompts leave less than rollout.max_tokens ({cap}) in the window of {window} tokens; "
        f"the longest ({place_of(longest)}) leaves {room}"
    ]
