"""The modules of the project folder that a user's file imports, found in its text: nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def imported_modules(file: Path) -> list[Path]:
    """The files beside ``file`` that it imports, directly or through another, inside functions too. What is imported by a
    name that is made up at run time is not found."""
    folder = file.parent
    seen: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current in seen or not current.is_file():
            continue
        seen[current] = None
        for name in _imported(current, folder):
            waiting += _files_of(name, folder)
    return sorted(path for path in seen if path != file)


def _imported(file: Path, folder: Path) -> Iterator[tuple[str, ...]]:
    """Full names of the modules that a file may import; those of functions among them do no harm."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # importing it is refused elsewhere
    package = file.parent.relative_to(folder).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            outer = package[: len(package) - node.level + 1] if node.level else ()
            base = (*outer, *(node.module.split(".") if node.module else ()))
            yield from ((*base, alias.name) for alias in node.names)


def _files_of(name: tuple[str, ...], folder: Path) -> Iterator[Path]:
    """``a.b.c`` -> whatever there is of a.py, a/__init__.py, a/b.py, ..."""
    for length in range(1, len(name) + 1):
        path = folder.joinpath(*name[:length])
        yield path.with_suffix(".py")
        yield path / "__init__.py"
