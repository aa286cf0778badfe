"""What one row of training data must look like, whatever file it came from."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TypeVar

from rnow.config.schema import DatasetSource
from rnow.config.teachers import Teachers
from rnow.project.variables import substitute, substitute_message
from rnow.text.json_values import NoJsonValue, read_arguments, to_json_value
from rnow.text.strict_json import JsonPath
from rnow.text.suggest import did_you_mean, hint
from rnow.types import Message, Prompt
from rnow.usercode.images import LOCAL
from rnow.usercode.text import escape

_T = TypeVar("_T")

ROLES = ("system", "user", "assistant", "tool")
PRIVILEGED_KEYS = ("privileged_context", "teacher_messages")
DOCUMENT_KEYS = frozenset(("text", "metadata"))
ROW_KEYS = frozenset(
    (
        "messages", "rewards", "tools", "metadata", "variables", "docker", "docker_env", "text", "teacher",
        *PRIVILEGED_KEYS,
    )
)  # fmt: skip
# What docker accepts as an image reference, so that no value can read as one of its options.
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ROLE_HINTS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLE_HINTS |= {"developer": "system", "function": "tool"}
_KINDS = {
    NoneType: "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """What the run expects of its rows.

    ``dataset_type`` decides what a row must hold: a text in ``midtrain``, else messages, and what those must end with.
    ``known_rewards`` are the functions of rewards.py; ``known_tools`` those of tools.py, or None when they cannot be
    known before the run (an MCP server lists its own). ``dockerfiles`` are the x of the project's ``Dockerfile.x``.
    ``teachers`` judge the rows; None where nobody does, or nobody asks.
    """

    dataset_type: str
    known_rewards: Collection[str] = ()
    known_tools: Collection[str] | None = ()
    dockerfiles: Collection[str] = ()
    teachers: Teachers | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Those of a row that mean something."""
        if self.documents:
            return DOCUMENT_KEYS
        if self.taught:
            return ROW_KEYS
        # Rows to be trained on say who answered.
        unread = PRIVILEGED_KEYS if self.dataset_type == "sft" else ("teacher", *PRIVILEGED_KEYS)
        return ROW_KEYS - {*unread}

    @property
    def taught(self) -> bool:
        """Whether a teacher judges the rows."""
        return self.dataset_type == "distill"

    @property
    def documents(self) -> bool:
        """Whether the rows are texts, rather than conversations."""
        return self.dataset_type == "midtrain"

    @property
    def example(self) -> str:
        """A row as it should be."""
        if self.documents:
            return '{"text": "Once upon a time ..."}'
        asked = '{"role": "user", "content": "Hi"}'
        answered = ', {"role": "assistant", "content": "Hello"}'
        return f'{{"messages": [{asked}{answered if self.dataset_type == "sft" else ""}]}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFault:
    """One thing wrong with a row, and the path of the value at fault inside it."""

    path: JsonPath
    message: str
    fix: str | None = None
    unsupported: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Privileged:
    """What a row tells its teacher alone: a text to read beside the prompt, or messages to read in its place. Nothing that
    samples, judges or writes is given it."""

    context: str | None = field(default=None, repr=False)
    messages: tuple[Message, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row that passed its checks. ``privileged`` is kept out of ``prompt``, which user code and files see."""

    prompt: Prompt
    privileged: Privileged | None = None


def check_row(
    value: object, rules: RowRules, source: DatasetSource, *, number: int, line: int | None = None
) -> Row | list[RowFault]:
    """The row, its variables substituted, or everything that is wrong with it.

    ``null`` stands for an absent key, at every depth and in every format; what a table holds beyond JSON becomes JSON (see
    ``to_json_value``). A null or missing ``content`` is read as "" beside ``tool_calls``. Keys of messages
    are kept, unknown keys of rows are not.

    Args:
        number: of the row in its dataset, from 0.
        line: 1-based, None where the source has no lines.
    """
    if not isinstance(value, dict):
        return [RowFault(path=(), message=f"a row must be an object {{...}}, but {_is(value)}")]
    check = _Checker(value, rules)
    if rules.documents:
        document = _document(check, source, number, line)
        return check.faults or Row(prompt=document)
    messages = check.messages()
    metadata = check.object("metadata")
    variables = check.object("variables")
    prompt = Prompt(
        id=f"{source.name}/{number}",
        dataset=source.name,
        row=number,
        messages=tuple(substitute_message(message, variables) for message in messages),
        rewards=check.rewards(),
        tools=check.tools(),
        metadata=metadata,
        variables=variables,
        docker=check.docker(),
        docker_env=check.docker_env(),
        source=source.path,
        line=line,
        teacher=check.teacher(source.name),
    )
    privileged = check.privileged(messages, variables) if rules.taught else None
    return check.faults or Row(prompt=prompt, privileged=privileged)


def _document(check: _Checker, source: DatasetSource, number: int, line: int | None) -> Prompt:
    """A row of midtrain."""
    return Prompt(
        id=f"{source.name}/{number}",
        dataset=source.name,
        row=number,
        messages=(),
        text=check.text(),
        metadata=check.object("metadata"),
        source=source.path,
        line=line,
    )


@dataclass(slots=True)
class _Checker:
    row: Mapping[str, object]
    rules: RowRules
    faults: list[RowFault] = field(default_factory=list)

    def fault(
        self, path: JsonPath, message: str, *, fix: str | None = None, unsupported: bool = False
    ) -> None:
        self.faults.append(RowFault(path=path, message=message, fix=fix, unsupported=unsupported))

    def optional(self, key: str, kind: type[_T], said: str) -> _T | None:
        """The value of a key that may be absent."""
        value = self.row.get(key)
        if value is None or isinstance(value, kind):
            return value
        self.fault((key,), f'"{key}" must be {said}, but {_is(value)}')
        return None

    def object(self, key: str) -> dict[str, object]:
        """The object under a key that may be absent, as JSON holds it."""
        value = self.optional(key, dict, "an object {...}") or {}
        return self.plain(value, (key,))

    def plain(self, value: dict[str, object], path: JsonPath) -> dict[str, object]:
        try:
            plain = to_json_value(value, path)
        except NoJsonValue as error:
            self.fault(error.path, f"{dotted(error.path)}: {error.what}", fix=error.fix)
            return {}
        assert isinstance(plain, dict)
        return plain

    def text(self) -> str | None:
        """What a row of midtrain is."""
        value = self.optional("text", str, "a string")
        if self.row.get("text") is None:
            near = hint("text", [key for key in self.row if key not in DOCUMENT_KEYS])
            fix = 'give every row "text": "..."'
            if "messages" in self.row:
                fix += ", or train on the answers in its messages with dataset_type: sft"
            self.fault((), f'the row has no "text"{near.replace("did you mean", "is it")}', fix=fix)
        elif value is not None and not value.strip():
            self.fault(("text",), '"text" is empty', fix="remove these rows")
        return value

    def messages(self) -> list[dict[str, object]]:
        if self.row.get("messages") is None:
            near = ""
            if "messages" not in self.row:
                near = hint("messages", [key for key in self.row if key not in ROW_KEYS])
                near = near.replace("did you mean", "is it")
            fix = 'give every row "messages": [...]'
            if self.row.get("text") is not None:
                fix += ', or train on its "text" with dataset_type: midtrain'
            self.fault((), f'the row has no "messages"{near}', fix=fix)
            return []
        items = self.optional("messages", list, "a list")
        if items == []:
            fix = "give every row at least one message"
            self.fault(("messages",), '"messages" is empty', fix=fix)
        messages = [
            self.message(item, ("messages", index)) for index, item in enumerate(items or ())
        ]
        if self.faults:
            return []
        kind, last = self.rules.dataset_type, messages[-1]["role"]
        if last == "assistant" and kind in ("distill", "rl"):
            self.fault(
                ("messages", len(messages) - 1),
                f"the row ends with an assistant message; in {kind} the student writes it",
                fix="remove the last assistant message of these rows, or train on it with dataset_type: sft",
            )
        if kind == "sft" and all(message["role"] != "assistant" for message in messages):
            self.fault(
                ("messages",),
                "the row has no assistant message to train on",
                fix="give the row an answer, or let the student write one with dataset_type: distill or rl",
            )
        return messages

    def privileged(
        self, messages: Sequence[Message], variables: Mapping[str, object]
    ) -> Privileged | None:
        context = self.optional("privileged_context", str, "a text")
        given = self.optional("teacher_messages", list, "a list")
        if context is None and given is None:
            return None
        if context is not None and given is not None:
            fix = "teacher_messages is all that the teacher reads: write the context into it"
            problem = 'the row has both "privileged_context" and "teacher_messages"'
            self.fault(("teacher_messages",), problem, fix=fix)
        if context is not None and not context.strip():
            problem, fix = '"privileged_context" is empty', "leave it out of rows that have none"
            self.fault(("privileged_context",), problem, fix=fix)
        if context is not None and messages and all(m["role"] != "user" for m in messages):
            problem = 'the row has no user message that its "privileged_context" could be put into'
            fix = 'give the row the teacher\'s whole prompt as "teacher_messages" instead'
            self.fault(("privileged_context",), problem, fix=fix)
        if given == []:
            self.fault(("teacher_messages",), '"teacher_messages" is empty')
        told = [
            self.message(item, ("teacher_messages", index))
            for index, item in enumerate(given or ())
        ]
        if told and told[-1].get("role") == "assistant":
            self.fault(
                ("teacher_messages", len(told) - 1),
                '"teacher_messages" ends with an assistant message; what follows is the student\'s answer',
                fix="remove the last assistant message of these rows",
            )
        return Privileged(
            context=None if context is None else substitute(context, variables),
            messages=tuple(substitute_message(message, variables) for message in told),
        )

    def message(self, value: object, path: JsonPath) -> dict[str, object]:
        if not isinstance(value, dict):
            wanted = "a message must be an object with role and content"
            self.fault(path, f"{wanted}, but this one is {_kind(value)}")
            return {}
        role, content, calls = value.get("role"), value.get("content"), value.get("tool_calls")
        if role not in ROLES:
            if not isinstance(role, str):
                problem = "the message has no role" if role is None else f"role is {_kind(role)}"
            else:
                better = _ROLE_HINTS.get(role.lower())
                near = f" ({did_you_mean([better])})" if better else hint(role, ROLES)
                problem = f'unknown role "{_short(role)}"{near}'
            self.fault((*path, "role"), problem, fix="a role is system, user, assistant or tool")
        self.calls(calls, (*path, "tool_calls"))
        problem = f"content must be a string or a list of parts, but {_is(content)}"
        if content is None:
            if calls:
                return {**self.plain(value, path), "content": ""}
            word = "null content" if "content" in value else "no content"
            problem = f'the message has {word}; "" is allowed, null only beside tool_calls'
        if isinstance(content, list):
            for index, part in enumerate(content):
                self.part(part, (*path, "content", index))
        elif not isinstance(content, str):
            self.fault((*path, "content"), problem)
        return self.plain(value, path)

    def calls(self, calls: object, path: JsonPath) -> None:
        if not isinstance(calls, list | None):
            self.fault(path, f"tool_calls must be a list, but {_is(calls)}")
            return
        for index, call in enumerate(calls or ()):
            function = call.get("function", call) if isinstance(call, dict) else None
            if not isinstance(function, dict):
                example = '{"function": {"name": "...", "arguments": {...}}}'
                self.fault((*path, index), f"a tool call must be an object like {example}")
            elif (given := function.get("arguments")) is not None and read_arguments(given) is None:
                self.fault(
                    (*path, index, *(("function",) if "function" in call else ()), "arguments"),
                    "the arguments of a tool call must be an object, or JSON text of one",
                )

    def part(self, part: object, path: JsonPath) -> None:
        if not isinstance(part, dict):
            example = '{"type": "text", "text": "..."}'
            self.fault(
                path, f"a part must be an object like {example}, but this one is {_kind(part)}"
            )
        elif part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                self.fault((*path, "text"), 'a text part has a string under "text"')
        elif isinstance(part.get("type"), str):
            self.fault(
                (*path, "type"),
                f'parts of type "{_short(part["type"])}" are not supported yet, only text',
                fix="remove these parts, or the rows that need them",
                unsupported=True,
            )
        else:
            self.fault(path, 'the part has no "type"')

    def names(
        self, key: str, known: Collection[str] | None, *, listed: str, absent: str, remedy: str
    ) -> tuple[str, ...] | None:
        """The names in a list of the row.

        Args:
            known: those that exist; None = any may.
            listed, absent, remedy: what errors say before the known ones, and where there is none.
        """
        names: dict[str, int] = {}
        values = self.optional(key, list, "a list of names")
        for index, name in enumerate(values or ()):
            if not isinstance(name, str):
                problem = f'"{key}" must be a list of names, but this one is {_kind(name)}'
                self.fault((key, index), problem)
            elif name in names:
                self.fault((key, index), f'"{_short(name)}" is listed twice in "{key}"')
            else:
                names[name] = index
        for name, index in names.items():
            if known is None or name in known:
                continue
            near, fix = f": {absent}", remedy
            if known:
                near, fix = hint(name, known), f"{listed}: {', '.join(sorted(known))}"
            self.fault((key, index), f'unknown {key[:-1]} "{_short(name)}"{near}', fix=fix)
        return None if values is None else tuple(names)

    def rewards(self) -> tuple[str, ...]:
        names = self.names(
            "rewards",
            self.rules.known_rewards,
            listed="rewards.py has",
            absent="there is no @reward function",
            remedy="write it in rewards.py beside config.yml, decorated with @reward",
        )
        wanted = self.rules.dataset_type == "rl" and isinstance(
            self.row.get("rewards"), list | None
        )
        if wanted and not names:
            fix = 'in rl every row needs "rewards": ["name"]'
            self.fault(("rewards",), "the row names no reward", fix=fix)
        return names or ()

    def tools(self) -> tuple[str, ...] | None:
        return self.names(
            "tools",
            self.rules.known_tools,
            listed="the tools are",
            absent="the project has no tools",
            remedy='remove "tools" from these rows',
        )

    def teacher(self, dataset: str) -> str | None:
        """The role of the model that judges the row: the teacher it names, else that of its dataset."""
        known = self.rules.teachers
        if known is None or self.rules.dataset_type != "distill":
            return None
        listed = ", ".join(known.named)
        if self.row.get("teacher") is None:
            role = known.of_dataset[dataset]
            if role is None:
                self.fault(
                    (),
                    "the row names no teacher, and its dataset has none",
                    fix=f'give it "teacher": "..." ({listed}), or all others one: data.train_file[].teacher, or teacher.path',
                )
            return role
        name = self.optional("teacher", str, "the name of a teacher")
        if name is not None and name not in known.named:
            near = hint(name, known.named) if listed else ": config.yml has no teachers"
            fix = (
                f"teachers in config.yml has {listed}"
                if listed
                else 'write it under teachers in config.yml, or remove "teacher"'
            )
            self.fault(("teacher",), f'unknown teacher "{_short(name)}"{near}', fix=fix)
        return None if name is None else known.named.get(name)

    def docker(self) -> str | None:
        image, known = self.row.get("docker"), self.rules.dockerfiles
        if image is None:
            return None
        if not isinstance(image, str) or not _IMAGE.fullmatch(image):
            shown = f'"{_short(image)}"' if isinstance(image, str) else _kind(image)
            self.fault(("docker",), f'"docker" must be the name of an image, but it is {shown}')
            return None
        local = image.removeprefix(LOCAL)
        if local != image and local not in known:
            self.fault(
                ("docker",),
                f'"{_short(image)}" needs a Dockerfile.{_short(local)} beside config.yml{hint(local, known)}',
                fix="write it, or name an image of a registry",
            )
        return image

    def docker_env(self) -> dict[str, str]:
        value = self.object("docker_env")
        if value and self.row.get("docker") is None:
            fix = 'add "docker", or remove it'
            self.fault(("docker_env",), '"docker_env" needs "docker"', fix=fix)
        for name, text in value.items():
            if not isinstance(text, str):
                problem = f'"docker_env" must hold strings, but {_short(name)} is {_kind(text)}'
                self.fault(("docker_env", name), problem, fix="write it in quotes")
            elif not _VARIABLE.fullmatch(name):
                self.fault(("docker_env",), f'"{_short(name)}" is no name of a variable')
        return {name: text for name, text in value.items() if isinstance(text, str)}


def dotted(path: JsonPath) -> str:
    """``metadata.scores[2]``."""
    steps = (f"[{step}]" if isinstance(step, int) else f".{_short(step)}" for step in path)
    return "".join(steps).removeprefix(".")


def _is(value: object) -> str:
    return f"it is {_kind(value)}"


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def _short(text: str) -> str:
    return escape(text if len(text) <= 40 else text[:37] + "...")
