"""Which paths of this machine a sandbox shows, and what in them it hides."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rnow.errors import InputError

PACKAGE = Path(__file__).absolute().parents[1]
"""rnow itself."""

HIDDEN_FILES = (".env", ".env.*", ".netrc", ".git-credentials")
HIDDEN_FOLDERS = (".git", "runs", "rollouts")
"""In a project: secrets, at every depth, and the answers of earlier runs."""

_PACKAGES = frozenset({"site-packages", "dist-packages", "node_modules"})
_STANDARD_LIBRARY = sysconfig.get_path("stdlib") + os.sep


@dataclass(frozen=True, slots=True)
class Hidden:
    """What lies in shown folders and must not be seen: files that read as empty, folders that look empty."""

    files: tuple[Path, ...]
    folders: tuple[Path, ...]


def check_project(folder: Path) -> None:
    """Raises InputError when showing the project would show a whole home folder or machine."""
    if _too_wide(folder.resolve()):
        raise InputError(
            f"a sandbox that shows the project would show all of {folder}",
            title="No sandbox",
            fix="move the project to a folder of its own",
        )


def hidden_in(folders: Iterable[Path], shown: Sequence[Path]) -> Hidden:
    """What to hide of ``folders``, wherever one of the ``shown`` paths would let it be seen. Links are followed: what they
    point to is hidden too."""
    files: set[Path] = set()
    hidden: set[Path] = set()
    for root in folders:
        hidden.update((root / name).resolve() for name in HIDDEN_FOLDERS if (root / name).is_dir())
        for place, inner, names in os.walk(root):
            inner[:] = [name for name in inner if _worth_searching(Path(place, name), hidden)]
            files.update(Path(place, name).resolve() for name in names if _holds_secrets(name))
    files = {path for path in files if path.is_file()}
    return Hidden(_seen(files, shown), _seen(hidden, shown))


def _worth_searching(folder: Path, hidden: Collection[Path]) -> bool:
    """Whether secrets of a project may lie below: not in installed packages, nor in what is hidden as a whole. Both may be
    large."""
    installed = not _PACKAGES.isdisjoint(folder.parts) or str(folder).startswith(_STANDARD_LIBRARY)
    return not (installed or folder.resolve() in hidden or (folder / "pyvenv.cfg").exists())


def _holds_secrets(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in HIDDEN_FILES)


def _seen(real: Iterable[Path], shown: Sequence[Path]) -> tuple[Path, ...]:
    """The paths, as shown, under which these real ones can be reached."""
    found: set[Path] = set()
    for place in shown:
        base = place.resolve()
        found.update(place / path.relative_to(base) for path in real if path.is_relative_to(base))
    return tuple(sorted(found))


def python_folders() -> list[Path]:
    """The interpreter's own folders."""
    places = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    return [path for path in dict.fromkeys(map(Path, places)) if not _too_wide(path)]


def python_links() -> list[Path]:
    """The links from ``sys.executable`` to the program, itself included; each must be there for the next to be found."""
    path, links = Path(sys.executable), []
    for _ in range(16):
        links.append(path)
        if not path.is_symlink():
            break
        path = Path(os.path.normpath(path.parent / path.readlink()))
    return links


def import_path(folder: Path) -> list[str]:
    """Where this process imports from, as far as a sandbox may show it. Home folders and their parents are left out."""
    kept = []
    for entry in sys.path:
        path = Path(entry)
        if path.is_absolute() and path.exists():
            real = path.resolve()
            if real != folder.resolve() and not _too_wide(real):
                kept.append(entry)
    return kept


def outermost(paths: Sequence[Path]) -> list[Path]:
    """``paths`` without those that lie in another of them, parents first."""
    kept: list[Path] = []
    for path in sorted(dict.fromkeys(paths), key=lambda path: len(path.parts)):
        if not any(path.is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _too_wide(path: Path) -> bool:
    homes = {Path.home().resolve(), Path("/home"), Path("/tmp"), Path("/var"), Path("/etc")}
    return any(home.is_relative_to(path) for home in homes)
