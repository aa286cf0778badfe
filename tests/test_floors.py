"""Imports only point down. The floors of the house, held by reading every module's syntax tree.

The rule: a module may import from lower floors, and on its own floor from its own room only (the lowest floor, the words
that everybody uses, is one room). Imports inside functions count too; those under ``if TYPE_CHECKING`` do not, since nothing
runs. A room that is not in the map fails, so a new one is placed on purpose. Why the same floor is closed between rooms:
docs/adr/0002.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "rnow"

# From the top: a line is a floor, a name a room (or a module beside the rooms).
HOUSE = (
    ("__init__", "__main__"),  # the entrances: `from rnow import ...` and `python -m rnow`
    ("cli",),
    ("setup",),
    ("generation", "comparing"),
    ("plan",),
    ("report",),
    ("training", "export"),
    ("sampling", "teacher", "policy", "rewards", "tools"),
    ("models", "trackers"),
    ("disk",),
    ("rollout", "project"),
    ("usercode", "serving"),
    ("algorithm", "web", "config", "processes"),
    ("core", "display", "text"),
    ("types", "protocols", "errors", "tasks", "progress"),
)
FLOORS = {room: floor for floor, rooms in enumerate(reversed(HOUSE)) for room in rooms}

HEAVY = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "datasets",
        "mlflow",
        "pandas",
        "peft",
        "pyarrow",
        "tensorboard",
        "tokenizers",
        "torch",
        "trackio",
        "transformers",
        "vllm",
        "wandb",
    }
)
HEAVY_ROOMS = frozenset({"export", "sampling", "teacher", "policy", "models", "disk", "algorithm"})
OPEN_FLOOR = 0
LONGEST_FUNCTION = 60
SHARED_NAMES = frozenset({"__version__"})  # `from rnow import __version__` is open to every floor


@dataclass(frozen=True)
class Import:
    """One imported module (``rnow.training.loop``), the line, and whether it happens when the module is loaded."""

    target: str
    names: tuple[str, ...]
    line: int
    at_load: bool


def find_violations(source: Path, floors: dict[str, int]) -> list[str]:
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
            if top in HEAVY and item.at_load and _room(module) not in HEAVY_ROOMS:
                found.append(f"{place}: {_room(module)} imports {top} at module level")
            if top == "rnow":
                for target in _targets(item, modules):
                    found += _check(module, floor, target, place, floors)
    return found


def find_cycles(source: Path) -> list[list[str]]:
    """The modules of each import cycle in the package folder ``source``."""
    modules = {_module_name(source, path): path for path in sorted(source.rglob("*.py"))}
    imports = {
        module: {
            target
            for item in _imports(ast.parse(path.read_text(encoding="utf-8")), module)
            if item.target.partition(".")[0] == "rnow"
            for target in _targets(item, modules)
            if target in modules and target != module
        }
        for module, path in modules.items()
    }
    reached = {module: _reached(module, imports) for module in imports}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in imports
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def _reached(start: str, imports: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    ahead = [start]
    while ahead:
        for target in imports[ahead.pop()] - found:
            found.add(target)
            ahead.append(target)
    return found


def find_long_functions(source: Path) -> list[str]:
    """Functions of more than ``LONGEST_FUNCTION`` lines, docstring included."""
    return [
        f"{_module_name(source, path)}.{node.name}: {length} lines"
        for path in sorted(source.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]


def _check(module: str, floor: int, target: str, place: str, floors: dict[str, int]) -> list[str]:
    other = _floor(target, floors)
    if other is None:
        return [f"{place}: imports {target}, which is not on any floor"]
    same_room = _room(module) == _room(target) or floor == OPEN_FLOOR
    if other > floor or (other == floor and not same_room):
        return [f"{place}: {_room(module)} imports {target}, which is not below it"]
    return []


def _module_name(source: Path, path: Path) -> str:
    """``run/loop.py`` -> ``run.loop``; a package keeps its ``__init__``."""
    return ".".join(path.relative_to(source).with_suffix("").parts)


def _floor(module: str, floors: dict[str, int]) -> int | None:
    return floors.get(_room(module))


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
        ("config.schema", "from rnow.policy.lora import attach", "config imports policy.lora"),
        ("config.schema", "import rnow.policy.lora", "config imports policy.lora"),
        ("config.schema", "from rnow.policy import lora", "config imports policy.lora"),
        ("config.schema", "from ..policy import lora", "config imports policy.lora"),
        ("config.schema", "def f():\n    from rnow.policy import lora", "config imports policy"),
        (
            "config.schema",
            "import importlib\nimportlib.import_module('rnow.policy')",
            "config imports policy",
        ),
        ("policy.lora", "from rnow.teacher import score", "policy imports teacher.__init__"),
        ("policy.lora", "from rnow import Config", "policy imports __init__"),
        ("config.schema", "import torch", "config imports torch at module level"),
        ("config.schema", "try:\n    import torch.nn\nexcept ImportError: ...", "imports torch"),
        ("training.loop", "import torch", "training imports torch at module level"),
        ("training.loop", "from rnow.setup import build", "training imports setup.build"),
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
        ("setup.build", "from rnow.training import loop"),
        ("cli.main", "def f():\n    from rnow.setup import build"),
        ("protocols", "from rnow.types import Prompt"),
        ("training.loop", "from rnow.rollout.collect import collect_rollouts"),
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
    empty += [
        "policy.lora",
        "policy.student",
        "teacher.__init__",
        "training.__init__",
        "training.loop",
    ]
    empty += ["setup.__init__", "setup.build", "cli.__init__", "cli.main", "rollout.collect"]
    for module, text in (dict.fromkeys(empty, "") | texts).items():
        path = root.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_no_import_cycle() -> None:
    """Imports inside functions count: a cycle that a lazy import dodges is a cycle."""
    assert find_cycles(SOURCE) == []


def test_a_cycle_is_found(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "policy.lora": "def f():\n    from rnow.policy import student",
            "policy.student": "from rnow.policy.lora import f",
        },
    )
    assert find_cycles(root) == [["policy.lora", "policy.student"]]


def test_no_function_is_longer_than_a_screen() -> None:
    assert find_long_functions(SOURCE) == []


def test_a_long_function_is_found(tmp_path: Path) -> None:
    body = "\n".join(["    x = 1"] * LONGEST_FUNCTION)
    root = _tree(tmp_path, {"config.schema": f"class A:\n  async def f():\n{body}\n"})
    assert find_long_functions(root) == [f"config.schema.f: {LONGEST_FUNCTION + 1} lines"]
