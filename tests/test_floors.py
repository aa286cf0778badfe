"""Imports only point down. The floors of the house, held by reading every module's syntax tree.

The rule: a module may import from lower floors, and on its own floor from its own room only (floors 0 and 5 are one room
each: words that everybody uses, and the loop with its stages). Imports inside functions count too; those under ``if TYPE_CHECKING`` do not, since nothing runs. A module that is not in the map
fails, so a new room is placed on purpose. Why the same floor is closed between rooms: docs/adr/0002.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "rnow"

# The longest matching name decides. Rooms that span floors (rollout, models, run) list their modules one by one.
FLOORS: dict[str, float] = {
    "types": 0,
    "protocols": 0,
    "errors": 0,
    "config": 1,
    "core": 1,
    "web": 1,
    "hosting": 1.5,  # processes for user code: what project (to read it) and floor 4 (to run it) stand on
    "serving.__init__": 1.25,
    "serving.leash": 1.25,
    "serving.process": 1.25,
    "project": 2,
    "rollout.__init__": 2,
    "rollout.rendering": 2,
    "rollout.environment": 2,
    "rollout.observation": 2,
    "rollout.probe": 2,
    "rollout.strict_json": 2,
    "rollout.tool_calls": 2,
    "rollout.samples": 2,
    "models.__init__": 2,
    "models.ids": 2,
    "algorithm": 3,
    # What every room of floor 4 that holds a model stands on, since those may not import each other.
    "models": 3.5,
    "sampling": 4,
    "teacher": 4,
    "policy": 4,
    "tools": 4,
    "rewards": 4,
    "report": 4,
    "run.changes": 4,
    "run.checkpoints": 4,
    "run.clock": 4,
    "run.console": 4,
    "run.files": 2,  # standard library only; adapters are written with it on floor 4
    "run.folder": 4,
    "run.journal": 4,
    "run.live_table": 4,
    "run.memory": 4,
    "run.metrics": 4,
    "run.models": 4,
    "run.plain_lines": 4,
    "run.recorder": 4,
    "run.residency": 4,
    "run.result_table": 4,
    "run.signals": 4,
    "run.sinks": 4,
    "run.step_history": 4,
    "run.terminal": 4,
    "run.transcripts": 4,
    "rollout.collect": 5,
    "run.evaluate": 5,
    "run.evaluations": 5,
    "run.loop": 5,
    "run.saver": 5,
    "run.__init__": 6,
    "run.agents": 6,
    "run.build": 6,
    "run.backends": 6,
    "run.choices": 6,
    "run.facts": 6,
    "run.parts": 6,
    "run.schedule": 6,
    "run.plan": 6,
    "run.plan_view": 6,
    "run.preflight": 6,
    "run.prepare": 6,
    "run.rehearse": 6,
    "run.selfcheck": 6,
    "run.summary": 6,
    "serving": 3.5,
    "cli": 7,
    "__init__": 8,  # the entrances: `from rnow import ...` and `python -m rnow`
    "__main__": 8,
}

HEAVY = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "datasets",
        "pandas",
        "peft",
        "pyarrow",
        "tokenizers",
        "torch",
        "transformers",
        "vllm",
        "wandb",
    }
)
HEAVY_FLOORS = frozenset({3, 3.5, 4})
OPEN_FLOORS = frozenset({0, 5})
SHARED_NAMES = frozenset({"__version__"})  # `from rnow import __version__` is open to every floor


@dataclass(frozen=True)
class Import:
    """One imported module (``rnow.run.loop``), the line, and whether it happens when the module is loaded."""

    target: str
    names: tuple[str, ...]
    line: int
    at_load: bool


def find_violations(source: Path, floors: dict[str, float]) -> list[str]:
    """Everything in the package folder ``source`` that breaks the rule, one line each."""
    modules = {_module_name(source, path): path for path in sorted(source.rglob("*.py"))}
    found = []
    for module, path in modules.items():
        floor = _floor(module, floors)
        if floor is None:
            found.append(f"{module}: not on any floor; add it to the map in tests/test_floors.py")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for item in _imports(tree, module):
            place = f"{module}:{item.line}"
            top = item.target.partition(".")[0]
            if top in HEAVY and item.at_load and floor not in HEAVY_FLOORS:
                found.append(f"{place}: imports {top} at module level on floor {floor}")
            if top == "rnow":
                for target in _targets(item, modules):
                    found += _check(module, floor, target, place, floors)
    return found


def _check(
    module: str, floor: float, target: str, place: str, floors: dict[str, float]
) -> list[str]:
    other = _floor(target, floors)
    if other is None:
        return [f"{place}: imports {target}, which is not on any floor"]
    same_room = _room(module) == _room(target) or floor in OPEN_FLOORS
    if other > floor or (other == floor and not same_room):
        return [f"{place}: floor {floor} imports {target} of floor {other}"]
    return []


def _module_name(source: Path, path: Path) -> str:
    """``run/loop.py`` -> ``run.loop``; a package keeps its ``__init__``."""
    return ".".join(path.relative_to(source).with_suffix("").parts)


def _floor(module: str, floors: dict[str, float]) -> float | None:
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        if (name := ".".join(parts[:count])) in floors:
            return floors[name]
    return None


def _room(module: str) -> str:
    return module.partition(".")[0]


def _imports(tree: ast.AST, module: str, *, at_load: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for other in node.orelse:
                yield from _imports(ast.Module([other], []), module, at_load=at_load)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(_absolute(node, module), names, node.lineno, at_load)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).rpartition(".")[2] in {"import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(str(node.args[0].value), (), node.lineno, at_load)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(node, module, at_load=at_load and not inside)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test).rpartition(".")[2] == "TYPE_CHECKING"


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parts = ["rnow", *module.split(".")][: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _targets(item: Import, modules: dict[str, Path]) -> list[str]:
    """The modules an import of ours reaches, without the leading ``rnow``."""
    base = item.target.partition(".")[2]

    def module_of(name: str) -> str:
        package = f"{name}.__init__" if name else "__init__"
        return package if package in modules or name not in modules else name

    if not item.names:
        return [module_of(base)]
    targets = []
    for name in item.names:
        if not base and name in SHARED_NAMES:
            continue
        full = f"{base}.{name}" if base else name
        known = full in modules or f"{full}.__init__" in modules
        targets.append(module_of(full if known else base))
    return sorted(set(targets))


def test_every_import_points_down() -> None:
    assert find_violations(SOURCE, FLOORS) == []


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        ("config.schema", "from rnow.policy.lora import attach", "floor 1 imports policy.lora"),
        ("config.schema", "import rnow.policy.lora", "floor 1 imports policy.lora"),
        ("config.schema", "from rnow.policy import lora", "floor 1 imports policy.lora"),
        ("config.schema", "from ..policy import lora", "floor 1 imports policy.lora"),
        ("config.schema", "def f():\n    from rnow.policy import lora", "floor 1 imports policy"),
        ("config.schema", "import importlib\nimportlib.import_module('rnow.policy')", "floor 1"),
        ("policy.lora", "from rnow.teacher import score", "floor 4 imports teacher.__init__"),
        ("policy.lora", "from rnow import Config", "floor 4 imports __init__ of floor 8"),
        ("config.schema", "import torch", "imports torch at module level on floor 1"),
        ("config.schema", "try:\n    import torch.nn\nexcept ImportError: ...", "imports torch"),
        ("run.loop", "import torch", "imports torch at module level on floor 5"),
        ("attic.old", "", "attic.old: not on any floor"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, module: str, text: str, complaint: str) -> None:
    found = find_violations(_tree(tmp_path, {module: text}), FLOORS)
    assert len(found) == 1, found
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("policy.lora", "import torch\nfrom rnow.config.schema import Config"),
        ("policy.lora", "from rnow import __version__"),
        ("policy.lora", "from rnow.policy import student"),
        ("config.schema", "def f():\n    import torch"),
        (
            "config.schema",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rnow.policy.lora\n    import torch",
        ),
        ("run.build", "from rnow.run import loop"),
        ("cli.main", "def f():\n    from rnow.run import build"),
        ("protocols", "from rnow.types import Prompt"),
        ("run.loop", "from rnow.rollout.collect import collect_rollouts"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, module: str, text: str) -> None:
    assert find_violations(_tree(tmp_path, {module: text}), FLOORS) == []


def _tree(root: Path, texts: dict[str, str]) -> Path:
    """A small package with empty modules on several floors, and the given texts in some."""
    empty = [
        "__init__",
        "types",
        "protocols",
        "config.__init__",
        "config.schema",
        "policy.__init__",
    ]
    empty += ["policy.lora", "policy.student", "teacher.__init__", "run.__init__", "run.loop"]
    empty += ["run.build", "cli.__init__", "cli.main", "rollout.collect"]
    for module, text in (dict.fromkeys(empty, "") | texts).items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
