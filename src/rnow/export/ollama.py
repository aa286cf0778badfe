"""A Modelfile whose template writes what the tokenizer's does.

What a chat template writes before each message is found by rendering conversations of marks, and becomes a Go template that tells the
pieces apart by who spoke before. It is executed as Ollama executes it, on conversations of every form, and compared with the tokenizer's
own: where one differs there is no Modelfile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rnow.errors import InputError
from rnow.export.go_template import TemplateError, parse
from rnow.protocols import Tokenizer
from rnow.rollout.probe import new_mark
from rnow.rollout.rendering import decode_all, render_text
from rnow.rollout.template_process import TemplateFault
from rnow.types import Message

PARAMETERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repeat_penalty",
    "min_p": "min_p",
}
"""Of generation_config.json, by Ollama's names."""

SYSTEM, USER, ASSISTANT, START = "system", "user", "assistant", ""

_LONG: tuple[str, ...] = (USER, ASSISTANT, USER, ASSISTANT, USER)
_TEXTS = (
    "Why is the sky blue?\nAnd the sea?",
    'Light is scattered: {{ .System }} <b>&amp;</b>, "quoted" and `code`.',
    "Größe, 数学, 🙂 and 100 % of {x}",
    "a = {'b': [1, 2]}",
    "Thank you!",
    "You are terse.",
)
_SHOWN = 60
"""Letters of two prompts that are shown from where they differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Modelfile:
    """Attributes:
    template: for Ollama, in Go's language.
    stops: texts at which an answer ends.
    parameters: by Ollama's names.
    conversations: how many were compared.
    notes: what Ollama cannot do as the tokenizer's template does it, each one sentence.
    """

    template: str
    stops: tuple[str, ...]
    parameters: Mapping[str, float]
    conversations: int
    notes: tuple[str, ...]

    def text(self, model: str) -> str:
        """The file, for the GGUF file ``model`` beside it."""
        lines = [f"FROM ./{model}", f'TEMPLATE """{self.template}"""']
        lines += [f"PARAMETER stop {_quoted(stop)}" for stop in self.stops]
        lines += [f"PARAMETER {name} {value}" for name, value in self.parameters.items()]
        return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """What a chat template writes.

    Attributes:
        before: a message, by who spoke before and who speaks.
        opening: at the end, for the answer.
        system: whether it takes a system message.
    """

    before: Mapping[tuple[str, str], str]
    opening: str
    system: bool


def build_modelfile(
    tokenizer: Tokenizer,
    *,
    stop_ids: Sequence[int],
    adds_bos: bool,
    reasoning_mode: str | None = None,
    generation: Mapping[str, object] | None = None,
    context: int | None = None,
) -> Modelfile:
    """A Modelfile of this tokenizer.

    Args:
        stop_ids: that end an answer.
        adds_bos: whether llama.cpp puts the tokenizer's first token before what the template writes.
        reasoning_mode: with which the student was trained.
        generation: the content of generation_config.json, for how answers are drawn.
        context: tokens of a conversation; Ollama's own default when None.

    Raises:
        InputError: no template that Ollama could execute writes the same.
    """
    if not tokenizer.chat_template:
        raise _unknown(
            "the tokenizer has no chat template",
            why="Ollama would have to be told of one that was never trained on",
        )
    bos = _bos(tokenizer)
    pieces = _find_pieces(tokenizer, reasoning_mode)
    pieces = _without_bos(pieces, bos) if adds_bos else pieces
    template = _write_template(pieces)
    _refuse_unquotable(template)
    render = _Renderer(tokenizer, template, bos if adds_bos else "", reasoning_mode)
    conversations = [*_conversations(system=pieces.system)]
    for messages in conversations:
        render.check(messages)
    controls = {*tokenizer.get_added_vocab().values()}
    stops = [decode_all(tokenizer, [stop]) for stop in stop_ids if stop in controls]
    return Modelfile(
        template=template,
        stops=tuple(dict.fromkeys(stops)),
        parameters=_parameters(generation or {}, context),
        conversations=len(conversations),
        notes=tuple(_differences(render, pieces)),
    )


def as_ollama(template: str, messages: Sequence[Message]) -> str:
    """What Ollama gives the model for a conversation: messages of one role that follow each other are one, and the template is
    executed with them (``Template.Execute`` in its template/template.go).

    Raises:
        TemplateError: the template is none that is understood here.
    """
    joined: list[dict[str, str]] = []
    for message in messages:
        role, content = str(message["role"]), str(message["content"])
        if joined and joined[-1]["Role"] == role:
            joined[-1]["Content"] += f"\n\n{content}"
        else:
            joined.append({"Role": role, "Content": content})
    system = "\n\n".join(one["Content"] for one in joined if one["Role"] == SYSTEM)
    return parse(template).execute({"Messages": joined, "System": system})


def _find_pieces(tokenizer: Tokenizer, reasoning_mode: str | None) -> _Pieces:
    plain, opening = _cut(tokenizer, _LONG, reasoning_mode)
    try:
        led, also = _cut(tokenizer, (SYSTEM, *_LONG), reasoning_mode)
    except TemplateFault:
        return _Pieces(before=plain, opening=opening, system=False)
    if also != opening or any(led.get(key, text) != text for key, text in plain.items() if key[0]):
        raise _unknown("the tokenizer's template writes turns otherwise after a system message")
    return _Pieces(before=plain | led, opening=opening, system=True)


def _cut(
    tokenizer: Tokenizer, roles: Sequence[str], reasoning_mode: str | None
) -> tuple[dict[tuple[str, str], str], str]:
    """The pieces between the messages of one conversation, and the last. Raises TemplateFault where the template refuses it."""
    marks = [new_mark() for _ in roles]
    messages: list[Message] = [
        {"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)
    ]
    try:
        rest = render_text(tokenizer, messages, reasoning_mode=reasoning_mode)
    except TemplateFault as fault:
        if SYSTEM in roles:
            raise
        raise _unknown(
            "the tokenizer's template refuses a plain conversation", why=str(fault)
        ) from None
    found: dict[tuple[str, str], str] = {}
    before = START
    for role, mark in zip(roles, marks, strict=True):
        if role == SYSTEM and mark not in rest:
            raise TemplateFault("it leaves the system message out")
        if rest.count(mark) != 1:
            raise _unknown(
                f"the tokenizer's template writes what the {role} said elsewhere than in its turn, or not at all"
            )
        piece, _, rest = rest.partition(mark)
        if found.setdefault((before, role), piece) != piece:
            raise _unknown(
                "the tokenizer's template writes a turn otherwise, depending on how many came before"
            )
        before = role
    return found, rest


def _without_bos(pieces: _Pieces, bos: str) -> _Pieces:
    """llama.cpp writes it."""
    before = dict(pieces.before)
    for (spoke, role), text in pieces.before.items():
        if spoke == START:
            if not bos or not text.startswith(bos):
                raise _unknown(
                    f"llama.cpp puts {bos or 'a first token'} before every prompt of this model, and the tokenizer's template writes none",
                    fix='set "add_bos_token": false in tokenizer_config.json of a copy of the base, and export with --base COPY',
                )
            before[spoke, role] = text.removeprefix(bos)
    return _Pieces(before=before, opening=pieces.opening, system=pieces.system)


def _write_template(pieces: _Pieces) -> str:
    """The pieces as a Go template. An answer that is begun already (a last message of the assistant) is not opened again."""
    roles = [
        role for role in (SYSTEM, USER, ASSISTANT) if any(key[1] == role for key in pieces.before)
    ]
    cases = "{{ else ".join(
        f'if eq .Role "{role}" }}}}{_choice(role, pieces.before)}{{{{ .Content }}}}{{{{ $before = .Role }}}}'
        for role in roles
    )
    opening = f'{{{{ if ne $before "{ASSISTANT}" }}}}{_literal(pieces.opening)}{{{{ end }}}}'
    start = '{{ $before := "" }}{{ range .Messages }}{{ '
    return f"{start}{cases}{{{{ end }}}}{{{{ end }}}}{opening}"


def _choice(role: str, before: Mapping[tuple[str, str], str]) -> str:
    """What is written before a message of this role, by who spoke before."""
    pieces = {spoke: text for (spoke, whose), text in before.items() if whose == role}
    if len({*pieces.values()}) == 1:
        return _literal(next(iter(pieces.values())))
    *first, (_, last) = pieces.items()
    tests = "{{ else ".join(
        f'if eq $before "{spoke}" }}}}{_literal(text)}' for spoke, text in first
    )
    return f"{{{{ {tests}{{{{ else }}}}{_literal(last)}{{{{ end }}}}"


def _literal(text: str) -> str:
    """Text as a Go template writes it. Braces would begin an action."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if "{" in text else text


def _refuse_unquotable(template: str) -> None:
    """Ollama reads a text up to three quotes, and drops what cannot be printed."""
    odd = [letter for letter in template if not (letter.isprintable() or letter in "\n\t")]
    if odd or '"""' in template:
        what = f"the letter {odd[0]!a}" if odd else "three quotes in a row"
        raise _unknown(f"the tokenizer's template writes {what}, which a Modelfile cannot hold")


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Both ways to a prompt; ``first`` is what llama.cpp puts before Ollama's."""

    tokenizer: Tokenizer
    template: str
    first: str
    reasoning_mode: str | None

    def both(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The tokenizer's prompt, and Ollama's. Raises TemplateFault where the template refuses the conversation."""
        ours = render_text(self.tokenizer, messages, reasoning_mode=self.reasoning_mode)
        return ours, self.first + as_ollama(self.template, messages)

    def check(self, messages: Sequence[Message]) -> None:
        """
        Raises:
            InputError: they differ.
        """
        try:
            ours, theirs = self.both(messages)
        except (TemplateFault, TemplateError) as fault:
            raise _unknown("a conversation cannot be rendered", why=str(fault)) from None
        if ours == theirs:
            return
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
            min(len(ours), len(theirs)),
        )
        raise _unknown(
            f"of a conversation of {', '.join(str(m['role']) for m in messages)} no template of Ollama's writes the same prompt",
            details=[
                f"the tokenizer's: {ours[max(0, at - 20) : at + _SHOWN]!r}",
                f"Ollama's:        {theirs[max(0, at - 20) : at + _SHOWN]!r}",
            ],
        )


def _conversations(*, system: bool) -> Iterator[list[Message]]:
    """Of every form that ends with a question: one to five turns, led by a system message or not."""
    for turns in (1, 3, 5):
        for led in (False, True) if system else (False,):
            roles = (*((SYSTEM,) if led else ()), *_LONG[:turns])
            for shift in (0, 2):
                texts = [_TEXTS[(shift + index) % len(_TEXTS)] for index in range(len(roles))]
                yield [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


def _differences(render: _Renderer, pieces: _Pieces) -> Iterator[str]:
    """What a Go template cannot do."""
    asked: dict[str, list[Message]] = {
        "the tokenizer's template strips blanks around what is said; Ollama passes them on": [
            {"role": USER, "content": "  blanks around  "}
        ],
        "the tokenizer's template leaves the thinking of earlier answers out; Ollama passes on what a client sends back": [
            {"role": USER, "content": "2 + 2?"},
            {"role": ASSISTANT, "content": "<think>\nEasy.\n</think>\n\n4"},
            {"role": USER, "content": "And 3 + 3?"},
        ],
    }
    for note, messages in asked.items():
        try:
            ours, theirs = render.both(messages)
        except TemplateFault:
            continue
        if ours != theirs:
            yield note
    if not pieces.system:
        yield "the tokenizer's template takes no system message: Ollama leaves one out"


def _parameters(generation: Mapping[str, object], context: int | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, name in PARAMETERS.items():
        value = generation.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found | ({} if context is None else {"num_ctx": context})


def _bos(tokenizer: Tokenizer) -> str:
    found = getattr(tokenizer, "bos_token", None)
    return found if isinstance(found, str) else ""


def _quoted(text: str) -> str:
    """A value of a Modelfile: it has no escapes."""
    return f'"""{text}"""' if '"' in text else f'"{text}"'


def _unknown(
    message: str,
    *,
    why: str | None = None,
    details: Sequence[str] = (),
    fix: str = "serve the GGUF file with llama-server --jinja, or the run with rnow serve: both use the tokenizer's own template",
) -> InputError:
    return InputError(
        message,
        title="No faithful Ollama template",
        where="--ollama",
        why=why
        or "with another prompt than it was trained on, the student answers badly and nothing says so",
        details=details,
        fix=fix,
    )
