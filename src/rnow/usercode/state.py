"""What the functions of tools.py keep in their module between calls, found in its text; nothing is run.

All rollouts call the same functions: async ones in one process, sync ones in whichever of several is free. What one call
stores in the module is read by other rollouts, or not found again by its own.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rnow.usercode.environment import source_files

_CHANGING = frozenset(
    """
    add append appendleft clear difference_update discard extend extendleft insert intersection_update pop popitem popleft
    remove reverse rotate setdefault sort subtract symmetric_difference_update update
    """.split()  # noqa: SIM905
)
_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptState:
    """A module's variable that a function changes, and where."""

    name: str
    function: str
    place: str
    is_async: bool

    def line(self) -> str:
        """The same as a warning."""
        processes = (
            "" if self.is_async else " or, as sync functions run in several processes, not at all"
        )
        return (
            f"{self.place}: {self.function} keeps {self.name} between calls: what one rollout stores there another reads"
            f"{processes}; keep it per args.rollout_id (args: ToolArgs) in an async function"
        )


def kept_state(file: Path) -> list[KeptState]:
    """The state that ``file`` and the modules of its folder that it imports keep unprotected: without ``rollout_id`` in sight
    or, where the function is a sync tool, in whichever process it happens to run. One entry for each variable."""
    trees: dict[str, ast.Module] = {}
    for path in source_files(file):
        # One that cannot be parsed is told of where it is imported.
        with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError):
            trees[path.name] = ast.parse(path.read_bytes())
    functions = {
        name: [node for node in ast.walk(tree) if isinstance(node, _FUNCTION)]
        for name, tree in trees.items()
    }
    tools = [function for some in functions.values() for function in some if _is_tool(function)]
    all_async = all(isinstance(tool, ast.AsyncFunctionDef) for tool in tools)
    known_anywhere = any(map(_knows_rollout, trees.values()))
    found: dict[tuple[str, str], KeptState] = {}
    for file_name, tree in trees.items():
        top = [node for node in tree.body if not isinstance(node, (*_FUNCTION, ast.ClassDef))]
        module = {name for node in top for name in _bound(node)}
        for function in functions[file_name]:
            # Of a helper it is not known here which tools call it.
            own = _is_tool(function)
            is_async = isinstance(function, ast.AsyncFunctionDef) if own else all_async
            if is_async and (_knows_rollout(function) if own else known_anywhere):
                continue
            for name, line in _changed(function):
                if name in module:
                    state = KeptState(
                        name=name,
                        function=function.name,
                        place=f"{file_name}:{line}",
                        is_async=is_async,
                    )
                    found.setdefault((file_name, name), state)
    return list(found.values())


def _changed(function: _Function) -> Iterator[tuple[str, int]]:
    """Names from outside the function that it rebinds or whose content it changes, with the line."""
    nodes = list(ast.walk(function))
    declared = {name for node in nodes if isinstance(node, ast.Global) for name in node.names}
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    stored = {n.id: n for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
    local = (arguments | set(stored)) - declared
    yield from ((name, node.lineno) for name, node in stored.items() if name in declared)
    for node in nodes:
        base: ast.expr | None = None
        if isinstance(node, ast.Subscript | ast.Attribute) and not isinstance(node.ctx, ast.Load):
            base = node.value
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in _CHANGING
        ):
            base = node.func.value
        while isinstance(base, ast.Subscript | ast.Attribute):
            base = base.value
        if isinstance(node, ast.expr) and isinstance(base, ast.Name) and base.id not in local:
            yield base.id, node.lineno


def _bound(node: ast.stmt) -> list[str]:
    """Names that a statement assigns."""
    return [
        inner.id
        for inner in ast.walk(node)
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
    ]


def _is_tool(function: _Function) -> bool:
    for decorator in function.decorator_list:
        target = decorator.func if isinstance(decorator, ast.Call) else decorator
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if name == "tool":
            return True
    return False


def _knows_rollout(tree: ast.AST) -> bool:
    return any(isinstance(n, ast.Attribute) and n.attr == "rollout_id" for n in ast.walk(tree))
