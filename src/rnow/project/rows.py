"""What one row of training data must look like, whatever file it came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from rnow.project.json_text import JsonPath
from rnow.project.variables import substitute_message
from rnow.text.suggest import did_you_mean, hint
from rnow.usercode.images import LOCAL
from rnow.usercode.text import escape

ROLES = ("system", "user", "assistant", "tool")
ROW_KEYS = frozenset(
    ("messages", "rewards", "tools", "metadata", "variables", "docker", "docker_env", "text")
)
# What docker accepts as an image reference, so that no value can read as one of its options.
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ROLE_HINTS = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_ROLE_HINTS |= {"developer": "system", "function": "tool"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRules:
    """What the run expects of its rows.

    ``known_rewards`` are the functions of rewards.py; ``known_tools`` those of tools.py, or None when they cannot be
    known before the run (an MCP server lists its own). ``dockerfiles`` are the x of the project's ``Dockerfile.x``.
    """

    dataset_type: str
    known_rewards: Collection[str] = ()
    known_tools: Collection[str] | None = ()
    dockerfiles: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A valid row, its variables substituted. ``line`` is 1-based, None where the source has no lines."""

    messages: Sequence[Mapping[str, object]]
    rewards: tuple[str, ...]
    tools: tuple[str, ...] | None
    metadata: Mapping[str, object]
    variables: Mapping[str, object]
    docker: str | None = None
    docker_env: Mapping[str, str] = field(default_factory=dict)
    line: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFault:
    """One thing wrong with a row, and the path of the value at fault inside it."""

    path: JsonPath
    message: str
    fix: str | None = None
    unsupported: bool = False


@dataclass(slots=True)
class _Checker:
    rules: RowRules
    faults: list[RowFault] = field(default_factory=list)

    def fault(
        self, path: JsonPath, message: str, *, fix: str | None = None, unsupported: bool = False
    ) -> None:
        self.faults.append(RowFault(path=path, message=message, fix=fix, unsupported=unsupported))


def check_row(value: object, rules: RowRules, *, line: int | None = None) -> Row | list[RowFault]:
    """The row in its normal form, or everything that is wrong with it.

    ``null`` stands for an absent key. A null or missing ``content`` is read as "" beside ``tool_calls``. Keys of messages
    are kept; unknown keys of rows are left to the caller (``unknown_keys``).
    """
    if not isinstance(value, dict):
        return [RowFault(path=(), message=f"a row is an object {{...}}, not {_kind(value)}")]
    check = _Checker(rules)
    messages = _messages(value, check)
    metadata = _object(value, "metadata", check)
    variables = _object(value, "variables", check)
    rewards = _rewards(value, check)
    tools = _tools(value, check)
    docker = _docker(value, check)
    docker_env = _docker_env(value, check)
    if check.faults:
        return check.faults
    return Row(
        messages=tuple(substitute_message(message, variables) for message in messages),
        rewards=rewards,
        tools=tools,
        metadata=metadata,
        variables=variables,
        docker=docker,
        docker_env=docker_env,
        line=line,
    )


def unknown_keys(value: Mapping[str, object]) -> set[str]:
    """Keys of a row that mean nothing here."""
    return set(value) - ROW_KEYS if value.keys() - ROW_KEYS else set()


def _messages(row: Mapping[str, object], check: _Checker) -> list[dict[str, object]]:
    value = row.get("messages")
    if value is None:
        near = ""
        if "messages" not in row:
            near = hint("messages", [key for key in row if key not in ROW_KEYS])
            near = near.replace("did you mean", "is it")
        check.fault((), f'the row has no "messages"{near}', fix='give every row "messages": [...]')
        return []
    if not isinstance(value, list):
        check.fault(("messages",), f'"messages" is a list, not {_kind(value)}')
        return []
    if not value:
        check.fault(("messages",), '"messages" is empty', fix="give every row at least one message")
        return []
    before = len(check.faults)
    messages = [_message(item, ("messages", index), check) for index, item in enumerate(value)]
    if len(check.faults) > before:
        return []
    last = messages[-1]["role"]
    kind = check.rules.dataset_type
    if last == "assistant" and kind in ("distill", "rl"):
        check.fault(
            ("messages", len(messages) - 1),
            f"the row ends with an assistant message; in {kind} the student writes it",
            fix="remove the last assistant message of these rows, or train on it with dataset_type: sft",
        )
    if kind == "sft" and all(message["role"] != "assistant" for message in messages):
        check.fault(("messages",), "the row has no assistant message to train on")
    return messages


def _message(value: object, path: JsonPath, check: _Checker) -> dict[str, object]:
    if not isinstance(value, dict):
        check.fault(path, f"a message is an object with role and content, not {_kind(value)}")
        return {}
    role = value.get("role")
    if role not in ROLES:
        if not isinstance(role, str):
            problem = "the message has no role" if role is None else f"role is {_kind(role)}"
        else:
            better = _ROLE_HINTS.get(role.lower())
            near = f" ({did_you_mean([better])})" if better else hint(role, ROLES)
            problem = f'unknown role "{_short(role)}"{near}'
        check.fault((*path, "role"), problem, fix="a role is system, user, assistant or tool")
    message = dict(value)
    if value.get("tool_calls") is not None and not isinstance(value["tool_calls"], list):
        check.fault(
            (*path, "tool_calls"), f"tool_calls is a list, not {_kind(value['tool_calls'])}"
        )
    content = value.get("content")
    if content is None:
        if value.get("tool_calls"):
            message["content"] = ""
        else:
            word = "null content" if "content" in value else "no content"
            check.fault(
                (*path, "content"),
                f'the message has {word}; "" is allowed, null only beside tool_calls',
            )
    elif isinstance(content, list):
        for index, part in enumerate(content):
            _part(part, (*path, "content", index), check)
    elif not isinstance(content, str):
        check.fault(
            (*path, "content"), f"content is a string or a list of parts, not {_kind(content)}"
        )
    return message


def _part(part: object, path: JsonPath, check: _Checker) -> None:
    if not isinstance(part, dict):
        check.fault(
            path, f'a part is an object like {{"type": "text", "text": "..."}}, not {_kind(part)}'
        )
    elif part.get("type") == "text":
        if not isinstance(part.get("text"), str):
            check.fault((*path, "text"), 'a text part has a string under "text"')
    elif isinstance(part.get("type"), str):
        check.fault(
            (*path, "type"),
            f'parts of type "{_short(part["type"])}" are not supported yet, only text',
            fix="remove these parts, or the rows that need them",
            unsupported=True,
        )
    else:
        check.fault(path, 'the part has no "type"')


def _object(row: Mapping[str, object], key: str, check: _Checker) -> Mapping[str, object]:
    value = row.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        check.fault((key,), f'"{key}" is an object {{...}}, not {_kind(value)}')
        return {}
    return value


def _names(row: Mapping[str, object], key: str, check: _Checker) -> dict[str, int] | None:
    """The names in a list of the row, each with its index."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, list):
        check.fault((key,), f'"{key}" is a list of names, not {_kind(value)}')
        return None
    names: dict[str, int] = {}
    for index, name in enumerate(value):
        if not isinstance(name, str):
            check.fault((key, index), f'"{key}" is a list of names; this one is {_kind(name)}')
        elif name in names:
            check.fault((key, index), f'"{_short(name)}" is listed twice in "{key}"')
        else:
            names[name] = index
    return names


def _rewards(row: Mapping[str, object], check: _Checker) -> tuple[str, ...]:
    names = _names(row, "rewards", check)
    known = check.rules.known_rewards
    for name, index in (names or {}).items():
        if name in known:
            continue
        path = ("rewards", index)
        if known:
            check.fault(
                path,
                f'unknown reward "{_short(name)}"{hint(name, known)}',
                fix=f"rewards.py has: {', '.join(sorted(known))}",
            )
        else:
            check.fault(
                path,
                f'unknown reward "{_short(name)}": there is no @reward function',
                fix="write it in rewards.py beside config.yml, decorated with @reward",
            )
    if (
        check.rules.dataset_type == "rl"
        and not names
        and isinstance(row.get("rewards"), list | None)
    ):
        check.fault(
            ("rewards",), "the row names no reward", fix='in rl every row needs "rewards": ["name"]'
        )
    return tuple(names or ())


def _tools(row: Mapping[str, object], check: _Checker) -> tuple[str, ...] | None:
    names = _names(row, "tools", check)
    known = check.rules.known_tools
    for name, index in (names or {}).items():
        if known is None or name in known:
            continue
        path = ("tools", index)
        if known:
            near, fix = hint(name, known), f"the tools are: {', '.join(sorted(known))}"
        else:
            near, fix = ": the project has no tools", 'remove "tools" from these rows'
        check.fault(path, f'unknown tool "{_short(name)}"{near}', fix=fix)
    return None if names is None else tuple(names)


def _docker(row: Mapping[str, object], check: _Checker) -> str | None:
    image = row.get("docker")
    if image is None:
        return None
    if not isinstance(image, str) or not _IMAGE.fullmatch(image):
        shown = f'"{_short(image)}"' if isinstance(image, str) else _kind(image)
        check.fault(("docker",), f'"docker" is the name of an image, not {shown}')
        return None
    local = image.removeprefix(LOCAL)
    if local != image and local not in check.rules.dockerfiles:
        known = check.rules.dockerfiles
        check.fault(
            ("docker",),
            f'"{_short(image)}" needs a Dockerfile.{_short(local)} beside config.yml{hint(local, known)}',
            fix="write it, or name an image of a registry",
        )
    return image


def _docker_env(row: Mapping[str, object], check: _Checker) -> Mapping[str, str]:
    value = _object(row, "docker_env", check)
    if value and row.get("docker") is None:
        check.fault(
            ("docker_env",), '"docker_env" needs "docker"', fix='add "docker", or remove it'
        )
    for name, text in value.items():
        if not isinstance(text, str):
            check.fault(
                ("docker_env", name),
                f'"docker_env" holds texts; {_short(name)} is {_kind(text)}',
                fix="write it in quotes",
            )
        elif not _VARIABLE.fullmatch(name):
            check.fault(("docker_env",), f'"{_short(name)}" is no name of a variable')
    return {name: text for name, text in value.items() if isinstance(text, str)}


_KINDS: Sequence[tuple[Callable[[object], bool], str]] = (
    (lambda value: value is None, "null"),
    (lambda value: isinstance(value, bool), "true or false"),
    (lambda value: isinstance(value, int | float), "a number"),
    (lambda value: isinstance(value, str), "a string"),
    (lambda value: isinstance(value, list), "a list"),
    (lambda value: isinstance(value, dict), "an object"),
)


def _kind(value: object) -> str:
    return next((word for test, word in _KINDS if test(value)), type(value).__name__)


def _short(text: str) -> str:
    return escape(text if len(text) <= 40 else text[:37] + "...")
