"""Loading a tokenizer, and whether two models read and end text alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rnow.errors import ModelError
from rnow.models.ids import role_of
from rnow.models.refusal import Refusal, one_line, read_json
from rnow.models.resolved import ResolvedModel
from rnow.protocols import Tokenizer
from rnow.rollout.rendering import ToolDescription, render_text
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

MISMATCH_TITLE = "Student and teacher tokenizers differ"
ENCODE_BATCH = 1024
_PROBE = "rnow probe"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerAgreement:
    """What ``compare_tokenizers`` found when nothing stands in the way.

    Attributes:
        vocabulary: how many ids both models know; ids at or above it are never sampled or counted.
        stop_token_ids: every id that ends the student's turn.
        warnings: differences that a run survives, each one sentence.
    """

    vocabulary: int
    stop_token_ids: tuple[int, ...]
    warnings: tuple[str, ...]


def load_tokenizer(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Tokenizer:
    """The HuggingFace tokenizer of a model on this machine.

    Raises:
        ModelError: its files do not load.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(resolved.local_dir), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(
            f"the tokenizer of '{resolved.path}' does not load",
            why=one_line(error),
            fix="check the folder with AutoTokenizer.from_pretrained",
        ) from error
    if not tokenizer.chat_template:
        tokenizer.chat_template = _processor_template(resolved)
    return tokenizer


def _processor_template(resolved: ResolvedModel) -> str | None:
    """The template in chat_template.json, where models with a processor keep it (Gemma 3, Mistral Small 3.1)."""
    file = resolved.local_dir / "chat_template.json"
    if not file.is_file():
        return None
    template = read_json(file, Refusal(path=resolved.path, key="model.path")).get("chat_template")
    return template if isinstance(template, str) else None


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """How many ids the tokenizer can produce. Rows of an embedding or head at or above it are padding."""
    # A vocabulary with holes has ids above its count.
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def stop_token_ids(tokenizer: Tokenizer, local_dir: Path) -> tuple[int, ...]:
    """Every id that ends a turn: from generation_config.json, config.json, the tokenizer and its chat template, sorted."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        for section in _sections(local_dir / name):
            found.update(_as_ids(section.get("eos_token_id")))
    found.update(_as_ids(tokenizer.eos_token_id))
    end_of_turn = end_of_turn_id(tokenizer)
    if end_of_turn is not None:
        found.add(end_of_turn)
    return tuple(sorted(found))


def end_of_turn_id(tokenizer: Tokenizer) -> int | None:
    """The control token that the chat template writes right after an assistant's text, or None if it writes none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = render_text(tokenizer, messages, generation_prompt=False)
    except TemplateFault:  # a template that refuses this conversation tells nothing
        return None
    after = text.rpartition(_PROBE)[2].lstrip()
    ids = tokenizer.encode(after, add_special_tokens=False) if after else []
    controls = set(tokenizer.get_added_vocab().values())
    return ids[0] if ids and ids[0] in controls else None


def require_chat_template(tokenizer: Tokenizer, *, path: str, key: str) -> None:
    """Refuse a model without a chat template. ``key`` names it in the config.

    Raises:
        ModelError: with the two ways to get one.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"'{path}' has no chat template",
            title="No chat template",
            where=key,
            why=f"the template turns the messages of train.jsonl into the {role_of(key)}'s prompt",
            fix="use the instruct variant of the model, or put its chat_template.jinja into a local copy of the folder",
        )


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered conversations, in batches. Equal to encoding each alone without special tokens."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), ENCODE_BATCH):
        batch = tokenizer(
            list(texts[start : start + ENCODE_BATCH]),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        ids.extend(batch["input_ids"])
    return ids


def compare_tokenizers(
    student: Tokenizer,
    teacher: Tokenizer,
    texts: Mapping[str, str],
    *,
    student_dir: Path,
    teacher_dir: Path,
    conversations: Sequence[Sequence[Message]] = (),
    student_ids: Sequence[Sequence[int]] | None = None,
    reasoning_mode: str | None = None,
    tools: Sequence[ToolDescription] | None = None,
    where: str = "teacher.path",
) -> TokenizerAgreement:
    """Whether the teacher would read the student's tokens as the student means them.

    Four things are compared: the ids of the run's own rendered prompts, the text behind each id, the ids that end a
    turn, and what each chat template makes of the first conversations (the student's is used for both models, so a
    difference there is a warning). Different numbers of padding rows are no difference.

    Args:
        texts: prompt name -> rendered prompt (the student's template).
        conversations: messages of the first prompts, for the comparison of the templates.
        tools: shown with them.
        student_ids: the student's ids of ``texts``, in order, if known already.
        where: the setting to name in errors.

    Raises:
        ModelError: "Student and teacher tokenizers differ" with the first differing token, or "... end their turns
            differently".
    """
    pair = _Pair(student=student, teacher=teacher, where=where)
    identical = _same_file(student_dir, teacher_dir, "tokenizer.json") and (
        student.get_added_vocab() == teacher.get_added_vocab()
    )
    vocabulary = vocabulary_size(student)
    if not identical:
        rendered = list(texts.values())
        ours = student_ids if student_ids is not None else encode_texts(student, rendered)
        pair.compare_prompts(texts, ours, encode_texts(teacher, rendered))
        vocabulary = pair.compare_vocabularies()
    stops = pair.compare_stops(
        stop_token_ids(student, student_dir), stop_token_ids(teacher, teacher_dir), vocabulary
    )
    pair.compare_templates(conversations, reasoning_mode, tools)
    return TokenizerAgreement(
        vocabulary=vocabulary, stop_token_ids=stops, warnings=tuple(pair.warnings)
    )


def describe_ids(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """``151643 '<|endoftext|>', 151645 '<|im_end|>'``."""
    return ", ".join(f"{i} {_token_text(tokenizer, i)!r}" for i in ids) or "none"


def config_value(local_dir: Path, *keys: str) -> int | None:
    """The first of ``keys`` that config.json gives as a number, its ``text_config`` included; None without any."""
    for section in _sections(local_dir / "config.json"):
        for key in keys:
            value = section.get(key)
            if isinstance(value, int):
                return value
    return None


def _sections(file: Path) -> Iterator[Mapping[str, object]]:
    """The object in a JSON file and its ``text_config``, where a model of several kinds of input describes its language
    model; nothing when there is no such file or it holds something else."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for section in (config, config.get("text_config")) if isinstance(config, dict) else ():
        if isinstance(section, Mapping):
            yield section


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """Two tokenizers under comparison; what a run survives gathers in ``warnings``."""

    student: Tokenizer
    teacher: Tokenizer
    where: str
    warnings: list[str] = field(default_factory=list)

    def compare_prompts(
        self,
        names: Iterable[str],
        ours: Sequence[Sequence[int]],
        theirs: Sequence[Sequence[int]],
    ) -> None:
        """The ids of the same rendered prompts."""
        for name, left, right in zip(names, ours, theirs, strict=True):
            if list(left) != list(right):
                position = _first_difference(left, right)
                before = self.student.decode(list(left[max(0, position - 8) : position]))
                raise self._mismatch(
                    f"the prompt {name} reads differently from token {position} on",
                    f"student: {_token_at(self.student, left, position)}",
                    f"teacher: {_token_at(self.teacher, right, position)}",
                    f"after:   {before!r}",
                )

    def compare_vocabularies(self) -> int:
        """How many ids mean the same to both; an ordinary token that differs is an error, a control token a warning."""
        student, teacher = self.student, self.teacher
        ours, theirs = _texts_by_id(student), _texts_by_id(teacher)
        controls = {*student.get_added_vocab().values(), *teacher.get_added_vocab().values()}
        shared = min(vocabulary_size(student), vocabulary_size(teacher))
        differing = [i for i in range(shared) if ours.get(i) != theirs.get(i)]
        ordinary = next((i for i in differing if i not in controls), None)
        if ordinary is not None:
            raise self._mismatch(
                f"the id {ordinary} stands for different text",
                f"student: {ordinary} {ours.get(ordinary)!r}",
                f"teacher: {ordinary} {theirs.get(ordinary)!r}",
                f"{len(differing):,} of {shared:,} ids differ",
            )
        if differing:
            first = differing[0]
            self.warnings.append(
                f"control tokens that no prompt uses differ between student and teacher ({len(differing)}); the first is "
                f"{first}: {ours.get(first)!r} and {theirs.get(first)!r}"
            )
        extra = vocabulary_size(student) - shared
        if extra:
            self.warnings.append(
                f"the teacher does not know the student's ids from {shared} on "
                f"({describe_ids(student, range(shared, shared + min(extra, 3)))}{' ...' if extra > 3 else ''}); "
                "they are never sampled"
            )
        return shared

    def compare_stops(
        self, ours: Sequence[int], theirs: Sequence[int], vocabulary: int
    ) -> tuple[int, ...]:
        """The student's stop ids, after checking that the teacher ends its turns with one of them.

        The token that matters is the one the student's template closes a turn with: a teacher that does not end there (a
        base model beside an instruct student) gives it no probability, and answers grow without end. Other stop ids that
        only one side has do no harm, as long as the student stops wherever the teacher would.
        """
        closing = end_of_turn_id(self.student)
        agreed = closing in theirs if closing is not None else bool(set(ours) & set(theirs))
        if not agreed:
            raise ModelError(
                "the teacher does not end its turns where the student does",
                title="Student and teacher end their turns differently",
                where=self.where,
                details=[
                    f"student: {describe_ids(self.student, ours)}",
                    f"teacher: {describe_ids(self.teacher, theirs)}",
                ],
                why="the student would unlearn to stop, and its answers would grow to the length limit",
                fix="use models of one kind: both instruct, or both base",
            )
        added = tuple(i for i in theirs if i not in ours and i < vocabulary)
        if added:
            self.warnings.append(
                f"the teacher also ends its turns with {describe_ids(self.teacher, added)}; the student stops there too"
            )
        only_ours = tuple(i for i in ours if i not in theirs)
        if only_ours:
            self.warnings.append(
                f"only the student ends its turns with {describe_ids(self.student, only_ours)}"
            )
        return tuple(sorted({*ours, *added}))

    def compare_templates(
        self,
        conversations: Sequence[Sequence[Message]],
        reasoning_mode: str | None,
        tools: Sequence[ToolDescription] | None,
    ) -> None:
        """What both templates make of the same messages; the first difference is told."""
        student, teacher = self.student, self.teacher
        if student.chat_template == teacher.chat_template or not conversations:
            return
        if not teacher.chat_template:
            self.warnings.append("the teacher has no chat template; the student's is used for both")
            return
        for messages in conversations:
            ours = render_text(student, messages, reasoning_mode=reasoning_mode, tools=tools)
            try:
                theirs = render_text(teacher, messages, reasoning_mode=reasoning_mode, tools=tools)
            except TemplateFault as error:
                self.warnings.append(
                    f"the teacher's chat template refuses a prompt ({one_line(error)}); the student's is used for both"
                )
                return
            if ours != theirs:
                position = _first_difference(ours, theirs)
                self.warnings.append(
                    "the chat templates differ; the student's is used for both models: "
                    f"student {_around(ours, position)!r}, teacher {_around(theirs, position)!r}"
                )
                return

    def _mismatch(self, message: str, *details: str) -> ModelError:
        return ModelError(
            message,
            title=MISMATCH_TITLE,
            where=self.where,
            details=details,
            why="the teacher scores the student's token ids, so every id must mean the same to both",
            fix="use a teacher of the student's family (Qwen/Qwen3-32B for Qwen/Qwen3-8B), or let it read with its own "
            "tokenizer: teacher.tokenizer: cross",
        )


def _first_difference(ours: Sequence[object], theirs: Sequence[object]) -> int:
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _around(text: str, position: int) -> str:
    return text[max(0, position - 20) : position + 40]


def _token_at(tokenizer: Tokenizer, ids: Sequence[int], position: int) -> str:
    if position >= len(ids):
        return "the prompt ends here"
    return f"{ids[position]} {_token_text(tokenizer, ids[position])!r}"


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    return tokenizer.decode([token_id], clean_up_tokenization_spaces=False)


def _texts_by_id(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: text for text, i in tokenizer.get_vocab().items()}


def _same_file(left: Path, right: Path, name: str) -> bool:
    a, b = left / name, right / name
    if not (a.is_file() and b.is_file()) or a.stat().st_size != b.stat().st_size:
        return False
    return a.read_bytes() == b.read_bytes()


def _as_ids(value: object) -> tuple[int, ...]:
    """``eos_token_id`` is an id, a list of ids, or absent; some configs write -1 for none."""
    values = value if isinstance(value, list | tuple) else (value,)
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0)
