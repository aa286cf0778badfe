"""What a run renders and counts without loading a weight: tokenizers, stop ids, window, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from rnow.config import Config
from rnow.errors import InputError
from rnow.models.refusal import one_line
from rnow.models.rope import rope_switch
from rnow.models.tokenizer import (
    TokenizerAgreement,
    compare_tokenizers,
    config_value,
    encode_texts,
    load_tokenizer,
    require_chat_template,
    stop_token_ids,
    vocabulary_size,
)
from rnow.plan.choices import DEFAULT_MAX_TOKENS
from rnow.plan.crossed import Crossed, cross_tokenizers, refuse_told
from rnow.plan.privileged import fit_windows, own_base_warnings, teacher_conversations
from rnow.plan.roles import STUDENT, Models, RunModel, teachers_of
from rnow.project.dataset import oversized_rows_error, place_of
from rnow.project.rows import Privileged
from rnow.protocols import Tokenizer
from rnow.rollout.environment import Dialogue
from rnow.rollout.rendering import (
    BROKEN,
    THINKING_OFF,
    ToolDescription,
    local_time,
    render,
    render_text,
    set_template_date,
    template_date,
)
from rnow.rollout.template_process import TemplateFault
from rnow.training.rows import TokenRow
from rnow.types import Message, Prompt

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
class Rendered:
    """The run's prompts as the student reads them, used by the plan and by the run itself.

    Attributes:
        tokenizer: the student's HuggingFace tokenizer.
        stop_ids: every id that ends the student's turn.
        vocabulary: ids that all models know; at or above it are padding rows.
        window: tokens of a whole conversation.
        prompt_token_ids: prompt id -> its rendered ids, so that the run need not render again.
        teacher_token_ids: prompt id -> what the teacher reads in its place, where that is something else.
        teacher_window: tokens of a whole conversation after the teacher's prompt.
        template_date: the date that chat templates wrote into the prompts; None when none reads it.
        dialogues: the tools a prompt may use, by name -> how they are shown and called; empty without tools.
        warnings: what the user should know, each one sentence.
        crossed: by role, how a teacher with another tokenizer reads them. ``vocabulary`` and ``window`` are not its.
        rows: prompt id -> what is trained on of a row of sft or midtrain, one sequence or several; such a run has no prompts.
    """

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    vocabulary: int
    window: int
    prompt_token_ids: Mapping[str, tuple[int, ...]]
    teacher_token_ids: Mapping[str, tuple[int, ...]] = field(repr=False)
    teacher_window: int
    template_date: datetime | None
    dialogues: Mapping[tuple[str, ...], Dialogue]
    warnings: tuple[str, ...]
    crossed: Mapping[str, Crossed] = field(default_factory=dict)
    rows: Mapping[str, Sequence[TokenRow]] = field(default_factory=dict, repr=False)

    def tokenizer_of(self, role: str) -> Tokenizer:
        """What a model reads with."""
        return self.crossed[role].crossing.tokenizer if role in self.crossed else self.tokenizer

    def vocabulary_of(self, role: str) -> int:
        """Ids of a model that count: above are padding rows."""
        return self.crossed[role].vocabulary if role in self.crossed else self.vocabulary

    def window_of(self, role: str) -> int:
        """The most tokens that a model reads at once."""
        if role in self.crossed:
            return self.crossed[role].window
        return self.window if role == STUDENT else self.teacher_window

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompt_token_ids.values()), default=0)

    @property
    def longest_told(self) -> int:
        """Tokens of the longest prompt that is the teacher's alone."""
        return max(map(len, self.teacher_token_ids.values()), default=0)

    @property
    def teacher_extra(self) -> int:
        """By how many tokens a prompt of the teacher may be longer than the student's."""
        own = self.prompt_token_ids
        more = (len(ids) - len(own[name]) for name, ids in self.teacher_token_ids.items())
        return max(0, max(more, default=0))


def render_prompts(
    config: Config,
    prompts: Sequence[Prompt],
    models: Models,
    tools: ToolSchemas | None = None,
    *,
    now: datetime | None = None,
    privileged: Mapping[str, Privileged] | None = None,
) -> Rendered:
    """Render and encode every prompt, and check the models against each other and the prompts against the window.

    Args:
        prompts: all prompts of the run, training and held out.
        models: with their tokenizer files on this machine; weights are not read.
        tools: what the student can call, by name; None for a run without tools.
        now: what chat templates read as the date; None: now.
        privileged: what rows tell their teacher alone, by prompt id.

    Raises:
        ModelError: the tokenizers or end-of-turn ids differ, or the student has no chat template.
        DataError: prompts that do not fit the window, up to ten with their lines.
        InputError: the window is larger than a model's limit, a prompt does not fit the chat template, or that template
            cannot show or answer tools.
    """
    student = models[STUDENT]
    now = now or local_time()
    tokenizer = dated_tokenizer(student, now)
    require_chat_template(tokenizer, path=student.resolved.path, key=f"{student.role.key}.path")
    alike = {name: model for name, model in models.items() if not model.role.crosses}
    mode = config.rollout.reasoning_mode
    own = _read(tokenizer, [(prompt, prompt.messages) for prompt in prompts], mode, tools)
    others = teacher_conversations(models, prompts, privileged or {})
    told = _read(tokenizer, others, mode, tools, whose="the teacher's ")
    refuse_told(models, told.ids)
    window, teacher_window = _fit_windows(config, alike, prompts, own, told, tools=bool(tools))

    found = _compare(tokenizer, alike, prompts, own, told, mode, tools, now)
    warnings = [*own.warnings, *told.warnings, *rope_warnings(alike, window), *found.warnings]
    vocabulary = cut_to_rows(found.vocabulary, alike, warnings)
    crossed = _cross(tokenizer, models, prompts, own.texts, found.stop_token_ids, mode, window, now)
    warnings += [note for view in crossed.values() for note in view.notes]
    dialogues = _load_dialogues(tokenizer, prompts, tools or {}, found.stop_token_ids, mode)
    _check_known(prompts, [own, told], vocabulary)
    warnings += _check_window(config.rollout.max_tokens, prompts, own.ids, window, alike)
    warnings += reasoning_warnings(tokenizer, prompts, mode)
    thinks = bool(prompts) and mode not in THINKING_OFF and _thinks(tokenizer, prompts[0])
    warnings += own_base_warnings(config, models, prompts, told.ids, thinks=thinks)
    return Rendered(
        tokenizer=tokenizer,
        stop_ids=found.stop_token_ids,
        vocabulary=vocabulary,
        window=window,
        prompt_token_ids=own.ids,
        teacher_token_ids=told.ids,
        teacher_window=teacher_window,
        template_date=date_in(tokenizer, *(view.crossing.tokenizer for view in crossed.values())),
        dialogues=dialogues,
        warnings=tuple(warnings),
        crossed=crossed,
    )


def dated_tokenizer(model: RunModel, now: datetime) -> Tokenizer:
    """A model's tokenizer, whose chat template reads ``now`` as the date."""
    trust = model.role.section.trust_remote_code
    tokenizer = load_tokenizer(model.resolved, trust_remote_code=trust)
    set_template_date(tokenizer, now)
    return tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prompts:
    """Prompts by id as text and as tokens, and what to say of those that could not stay as they are."""

    texts: Mapping[str, str]
    ids: Mapping[str, tuple[int, ...]]
    warnings: tuple[str, ...]


def _read(
    tokenizer: Tokenizer,
    conversations: Sequence[tuple[Prompt, Sequence[Message]]],
    mode: str | None,
    tools: ToolSchemas | None,
    *,
    whose: str = "",
) -> _Prompts:
    """What a model reads. ``whose``: said of it in errors."""
    texts, warnings = _render(tokenizer, conversations, mode, tools, whose=whose)
    ids = encode_texts(tokenizer, list(texts.values()))
    by_id = {name: tuple(row) for name, row in zip(texts, ids, strict=True)}
    return _Prompts(texts=texts, ids=by_id, warnings=tuple(warnings))


def _fit_windows(
    config: Config,
    models: Models,
    prompts: Sequence[Prompt],
    own: _Prompts,
    told: _Prompts,
    *,
    tools: bool,
) -> tuple[int, int]:
    """See ``fit_windows``."""
    asked = config.rollout.max_context_window
    window = choose_window(asked, models)
    readers = teachers_of(models) or [models[STUDENT]]
    limits = [model_limit(model.resolved.local_dir) for model in readers]
    cap = None if tools else config.rollout.max_tokens or DEFAULT_MAX_TOKENS
    limit = min((limit for limit in limits if limit is not None), default=None)
    return fit_windows(asked, window, limit, prompts, own.ids, told.ids, cap=cap)


def _compare(
    tokenizer: Tokenizer,
    models: Models,
    prompts: Sequence[Prompt],
    own: _Prompts,
    told: _Prompts,
    mode: str | None,
    tools: ToolSchemas | None,
    now: datetime,
) -> TokenizerAgreement:
    """What the student and all its teachers agree on; the student's own where there is no teacher."""
    student_dir = models[STUDENT].resolved.local_dir
    vocabulary, stops = vocabulary_size(tokenizer), {*stop_token_ids(tokenizer, student_dir)}
    warnings: list[str] = []
    teachers_own = {f"{name}, as the teacher reads it": text for name, text in told.texts.items()}
    for teacher in (model for model in teachers_of(models) if not model.own_base):
        agreement = compare_tokenizers(
            tokenizer,
            dated_tokenizer(teacher, now),
            {**own.texts, **teachers_own},
            student_dir=student_dir,
            teacher_dir=teacher.resolved.local_dir,
            conversations=[prompt.messages for prompt in prompts[:TEMPLATE_SAMPLES]],
            student_ids=[*own.ids.values(), *told.ids.values()],
            reasoning_mode=mode,
            tools=None if tools is None else list(tools.values()),
            where=f"{teacher.role.key}.path",
        )
        vocabulary = min(vocabulary, agreement.vocabulary)
        stops.update(agreement.stop_token_ids)
        warnings += agreement.warnings
    return TokenizerAgreement(
        vocabulary=vocabulary, stop_token_ids=tuple(sorted(stops)), warnings=tuple(warnings)
    )


def _cross(
    tokenizer: Tokenizer,
    models: Models,
    prompts: Sequence[Prompt],
    texts: Mapping[str, str],
    stops: Sequence[int],
    mode: str | None,
    window: int,
    now: datetime,
) -> dict[str, Crossed]:
    """How the teachers with tokenizers of their own read the prompts, by role."""
    crossed = {}
    for teacher in teachers_of(models):
        if not teacher.role.crosses:
            continue
        own, key = dated_tokenizer(teacher, now), f"{teacher.role.key}.path"
        require_chat_template(own, path=teacher.resolved.path, key=key)
        asked = [(prompt, prompt.messages) for prompt in prompts]
        theirs, _ = _render(own, asked, mode, None, reader=teacher.role.name)
        crossed[teacher.role.name] = cross_tokenizers(
            models[STUDENT],
            teacher,
            (tokenizer, own),
            prompts,
            (texts, theirs),
            stop_ids=stops,
            window=window,
            limit=model_limit(teacher.resolved.local_dir),
        )
    return crossed


def date_in(*tokenizers: Tokenizer) -> datetime | None:
    """The date that one of their templates wrote."""
    dates = map(template_date, tokenizers)
    return next((date for date in dates if date is not None), None)


def _load_dialogues(
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    tools: ToolSchemas,
    stops: tuple[int, ...],
    mode: str | None,
) -> dict[tuple[str, ...], Dialogue]:
    """One for each set of tools that prompts may use."""
    used = dict.fromkeys(tool_names(prompt, tools) for prompt in prompts)
    return {
        names: Dialogue(
            tokenizer,
            [tools[name] for name in names],
            stop_token_ids=stops,
            reasoning_mode=mode,
        )
        for names in used
        if names
    }


def tool_names(prompt: Prompt, tools: ToolSchemas | None) -> tuple[str, ...]:
    """The tools that this prompt may use: those its row names, else all, in the order of ``tools``."""
    allowed = prompt.tools
    return tuple(name for name in tools or () if allowed is None or name in allowed)


def reasoning_warnings(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], mode: str | None
) -> list[str]:
    """That the template has no switch for ``rollout.reasoning_mode``; empty where it has, or none is asked for."""
    if mode is None or not prompts or not _ignores_reasoning(tokenizer, prompts[0]):
        return []
    return [
        f"rollout.reasoning_mode {mode} has no effect: the student's chat template knows no such switch"
    ]


def _thinks(tokenizer: Tokenizer, prompt: Prompt) -> bool:
    """Whether the template knows a switch for thinking."""
    try:
        on, off = (
            render_text(tokenizer, prompt.messages, reasoning_mode=m) for m in ("medium", "none")
        )
    except TemplateFault:
        return False
    return on != off


def _ignores_reasoning(tokenizer: Tokenizer, prompt: Prompt) -> bool:
    """Whether the template renders the same text with thinking on, off, and unsaid."""
    modes = (None, "none", "low", "high")
    try:
        texts = {render_text(tokenizer, prompt.messages, reasoning_mode=m) for m in modes}
    except TemplateFault:  # it knows these words, and not all of them
        return False
    return len(texts) == 1


def choose_window(asked: int | None, models: Models) -> int:
    """Tokens of a whole conversation: the configured window, or the smallest of 32768 and the models' limits.

    Raises:
        InputError: the configured window is larger than a model's limit.
    """
    known = window_limits(models)
    if asked is None:
        return min([DEFAULT_WINDOW, *known.values()])
    for name, limit in known.items():
        if asked > limit:
            raise InputError(
                f"rollout.max_context_window is {asked}, but the {name} reads at most {limit} tokens",
                where="rollout.max_context_window",
                fix=f"set it to {min(known.values())} or less, or leave it out",
            )
    return asked


def window_limits(models: Models) -> dict[str, int]:
    """What each model reads at most, of those that say."""
    limits = {name: model_limit(model.resolved.local_dir) for name, model in models.items()}
    return {name: limit for name, limit in limits.items() if limit is not None}


def rope_warnings(models: Models, window: int) -> list[str]:
    """What a window beyond the switch of a longrope model means for short sequences."""
    return [
        f"the {name} has other rotary factors beyond {switch} tokens (longrope): in a window of {window} every sequence is "
        f"read with the long ones, as vLLM does; rollout.max_context_window: {switch} uses the short ones"
        for name, model in models.items()
        if not model.own_base
        and (switch := rope_switch(model.resolved.local_dir)) is not None
        and window > switch
    ]


def model_limit(local_dir: Path) -> int | None:
    """The longest sequence a model was made for, from its config.json; None when that does not say."""
    return config_value(local_dir, *_LIMIT_KEYS)


def _render(
    tokenizer: Tokenizer,
    conversations: Sequence[tuple[Prompt, Sequence[Message]]],
    mode: str | None,
    tools: ToolSchemas | None,
    *,
    whose: str = "",
    reader: str = STUDENT,
) -> tuple[dict[str, str], list[str]]:
    """The prompts as text by id, and what to say of those that could not stay as they are."""
    texts: dict[str, str] = {}
    altered: list[str] = []
    shown = [
        (messages, [tools[name] for name in tool_names(prompt, tools)] if tools else None)
        for prompt, messages in conversations
    ]
    written = render(tokenizer, shown, reasoning_mode=mode)
    for (prompt, messages), found in zip(conversations, written, strict=True):
        if isinstance(found, TemplateFault):
            raise InputError(
                f"the {reader}'s chat template refuses this conversation{whose and ' of the teacher'}: {one_line(found)}",
                title="Prompt does not fit the chat template",
                where=place_of(prompt),
                details=[f"roles: {', '.join(str(m.get('role')) for m in messages)}"],
                fix=f"change {whose and 'what the teacher is told in '}the row to what the {reader}'s chat template accepts",
            )
        texts[prompt.id] = found.text
        if found.altered is not None:
            altered.append(f"{place_of(prompt)} spells {found.altered!r}")
    if not altered:
        return texts, []
    noun = "prompt spells" if len(altered) == 1 else "prompts spell"
    count = ("" if whose else "a ") if len(altered) == 1 else f"{len(altered)} "
    return texts, [f"{whose}{count}{noun} control tokens; {BROKEN} ({altered[0]})"]


def cut_to_rows(vocabulary: int, models: Models, warnings: list[str]) -> int:
    """Never more ids than each model has rows for: a token added to a tokenizer alone has no embedding."""
    for model in models.values():
        rows = config_value(model.resolved.local_dir, "vocab_size")
        if rows is not None and rows < vocabulary:
            warnings.append(
                f"'{model.resolved.path}' has {rows} embedding rows for {vocabulary} tokens; ids from {rows} on are never "
                "sampled"
            )
            vocabulary = rows
    return vocabulary


def _check_known(prompts: Sequence[Prompt], read: Sequence[_Prompts], vocabulary: int) -> None:
    for prompt in prompts:
        ids = [token for one in read for token in one.ids.get(prompt.id, ())]
        if ids and max(ids) >= vocabulary:
            raise InputError(
                f"the prompt holds the token {max(ids)}, which a model has no embedding for "
                f"(it knows {vocabulary} tokens)",
                title="Unknown token",
                where=place_of(prompt),
                fix="use the tokenizer that belongs to the model's weights",
            )


def _check_window(
    cap: int | None,
    prompts: Sequence[Prompt],
    token_ids: Mapping[str, tuple[int, ...]],
    window: int,
    models: Models,
) -> list[str]:
    too_long = [(p, len(token_ids[p.id])) for p in prompts if len(token_ids[p.id]) + 1 > window]
    if too_long:
        raise oversized_rows_error(too_long, window - 1, reading=window_limits(models))
    tight = [p for p in prompts if cap is not None and len(token_ids[p.id]) + cap > window]
    if not tight:
        return []
    longest = max(tight, key=lambda prompt: len(token_ids[prompt.id]))
    room = window - len(token_ids[longest.id])
    return [
        f"{len(tight)} prompts leave less than rollout.max_tokens ({cap}) in the window of {window} tokens; "
        f"the longest ({place_of(longest)}) leaves {room}"
    ]
