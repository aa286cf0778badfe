"""State that tools keep in their module: what is found in the text, and that the id of a rollout mends it."""

from __future__ import annotations

import asyncio
import textwrap
from pathlib import Path

import pytest

from rnow.config import Config
from rnow.tools.build import build_toolbox, context_of
from rnow.types import Prompt, ToolCall
from rnow.usercode.state import kept_state

HEAD = "from rnow.core import ToolArgs, tool\nNOTES = {}\nCOUNT = 0\nPRICES = {'tea': 3}\n"
SYNC = "@tool\ndef put(key: str, args: ToolArgs) -> str:\n"
ASYNC = f"@tool\nasync {SYNC.removeprefix('@tool')[1:]}"


def found(folder: Path, code: str) -> list[tuple[str, str, int, bool]]:
    file = folder / "tools.py"
    file.write_text(HEAD + textwrap.dedent(code))
    return [
        (state.name, state.function, int(state.place.removeprefix("tools.py:")), state.is_async)
        for state in kept_state(file)
    ]


CHANGES = [
    "NOTES[key] = 1",
    "NOTES[key]['a'] += 1",
    "del NOTES[key]",
    "NOTES.setdefault(key, []).append(1)",
    "NOTES.update(a=1)",
    "NOTES[key].append(1)",
    "NOTES.kept = key",
    "[NOTES.pop(k) for k in [key]]",
]


@pytest.mark.parametrize("line", CHANGES)
def test_what_changes_a_variable_of_the_module_is_found(tmp_path: Path, line: str) -> None:
    assert found(tmp_path, f"{SYNC}    {line}\n") == [("NOTES", "put", 7, False)]
    assert found(tmp_path, f"{ASYNC}    {line}\n") == [("NOTES", "put", 7, True)]


def test_a_rebound_global_and_the_state_of_a_helper_are_found(tmp_path: Path) -> None:
    assert found(tmp_path, f"{SYNC}    global COUNT\n    COUNT = COUNT + 1\n") == [
        ("COUNT", "put", 8, False)
    ]
    helper = "def store(key):\n    NOTES[key] = 1\n"
    assert found(tmp_path, f"{helper}{SYNC}    store(key)\n") == [("NOTES", "store", 6, False)]
    (tmp_path / "notes.py").write_text("SEEN = set()\ndef see(key):\n    SEEN.add(key)\n")
    (tmp_path / "tools.py").write_text(f"from notes import see\n{HEAD}{ASYNC}    see(key)\n")
    (state,) = kept_state(tmp_path / "tools.py")
    assert (state.name, state.place, state.is_async) == ("SEEN", "notes.py:3", True)


@pytest.mark.parametrize(
    "code",
    [
        f"{SYNC}    return str(PRICES[key])\n",
        f"{SYNC}    return str(NOTES.get(key)) + str(COUNT)\n",
        f"{SYNC}    NOTES = {{}}\n    NOTES[key] = 1\n",
        "@tool\ndef put(NOTES: list[str]) -> str:\n    NOTES.append('x')\n",
        f"{SYNC}    found = []\n    found.append(key)\n    COUNT = 2\n",
        f"{ASYNC}    NOTES.setdefault(args.rollout_id, {{}})[key] = 1\n",
        f"def store(args, key):\n    NOTES[args.rollout_id] = key\n{ASYNC}    store(args, key)\n",
        "NOTES['a'] = 1\nNOTES.update(b=2)\n",
    ],
)
def test_what_keeps_nothing_or_keeps_it_per_rollout_is_left_alone(
    tmp_path: Path, code: str
) -> None:
    assert found(tmp_path, code) == []


def test_a_file_that_is_no_python_is_somebody_elses_to_report(tmp_path: Path) -> None:
    assert found(tmp_path, "def (:\n") == []
    assert kept_state(tmp_path / "missing.py") == []


KEPT = """
@tool
async def put(value: str, args: ToolArgs) -> str:
    \"\"\"Store a note.

    Args:
        value: its text.
    \"\"\"
    assert args.rollout_id.isalnum()
    NOTES[args.rollout_id] = value
    return "stored"

@tool
async def get(args: ToolArgs) -> str:
    \"\"\"Read the note.\"\"\"
    return NOTES.get(args.rollout_id, "MISSING")
"""


def read_by_each(folder: Path, told: list[str]) -> list[str]:
    """What eight rollouts at once, two epochs of one prompt among them, read after storing their own number."""
    prompt = Prompt(id="d/0", dataset="d", row=0, messages=())
    config = Config(dataset_type="rl", model={"path": "student"})

    async def rollout(box: object, number: int) -> str:
        context = context_of(prompt, number % 4)

        async def call(name: str, **arguments: str) -> str:
            made = ToolCall(id="c", name=name, arguments=arguments)
            return (await box.run(made, context=context)).content  # type: ignore[attr-defined]

        await call("put", value=str(number))
        return await call("get")

    async def all_of_them() -> list[str]:
        async with build_toolbox(config, folder, {}, warn=told.append) as box:
            return await asyncio.gather(*(rollout(box, number) for number in range(8)))

    return asyncio.run(all_of_them())


def test_each_rollout_reads_what_it_stored_itself(tmp_path: Path) -> None:
    told: list[str] = []
    (tmp_path / "tools.py").write_text(HEAD + KEPT)
    assert read_by_each(tmp_path, told) == [str(number) for number in range(8)]
    assert told == []


def test_one_dict_for_all_is_told_of_with_its_line(tmp_path: Path) -> None:
    told: list[str] = []
    shared = KEPT.replace("NOTES[args.rollout_id]", "NOTES['note']")
    shared = shared.replace("NOTES.get(args.rollout_id,", "NOTES.get('note',")
    shared = shared.replace("    assert args.rollout_id.isalnum()\n", "")
    (tmp_path / "tools.py").write_text(HEAD + shared)
    assert len(set(read_by_each(tmp_path, told))) < 8
    (line,) = told
    assert line.startswith("tools.py:13: put keeps NOTES between calls")
    assert "args.rollout_id" in line
