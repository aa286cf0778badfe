"""Where exports are written: beside their name first, and under it when they are whole."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rnow.disk.files import sync_folder
from rnow.disk.folder import check_place, nearest
from rnow.errors import SAME_COMMAND, InputError, TemporaryError

MARGIN = 1.05
"""Of the bytes that an export takes: headers, and small files."""

_ASIDE, _REPLACED = ".tmp-", ".old-"
_OURS = re.compile(r"\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d+)")


def refuse_existing(targets: Iterable[Path], *, force: bool) -> None:
    """
    Raises:
        InputError: one of ``targets`` is there, and may not be replaced.
    """
    for target in targets:
        if os.path.lexists(target) and not force:
            raise InputError(
                f"{target.name} is there already, and nothing is overwritten",
                where=str(target),
                fix="add --force to replace it, or name another folder with -o",
            )


def check_room(folder: Path, needed: int) -> None:
    """Whether ``needed`` bytes can be written to a folder, which may not be there yet.

    Raises:
        InputError: it cannot be written to, or its disk is too small.
    """
    check_place(folder, what="the export", fix="name another folder with -o")
    place = nearest(folder)
    free, least = shutil.disk_usage(place).free, int(needed * MARGIN)
    if free < least:
        raise InputError(
            f"the export takes {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            title="No space left",
            where=str(place),
            fix="free some space, or name a folder on a larger disk with -o",
        )


@contextmanager
def written_aside(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A path to write a file or a folder to. It takes the name ``target`` when the block has ended, and goes when the block is left
    otherwise: what has the name is whole.

    Raises:
        InputError: as ``refuse_existing``.
        TemporaryError: the disk is full.
    """
    refuse_existing([target], force=force)
    with scratch(target) as aside:
        yield aside
        _sync(aside)
        _rename(aside, target)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that is gone when the block is left.

    Raises:
        TemporaryError: the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    aside = target.with_name(f"{_ASIDE}{target.name}-{os.getpid()}")
    _remove(aside)
    try:
        yield aside
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TemporaryError(
            f"the disk is full: {target.name} was not written",
            where=str(target.parent),
            fix=f"free some space, then {SAME_COMMAND}",
        ) from error
    finally:
        _remove(aside)


def remove_leftovers(folder: Path) -> None:
    """Take away what exports that were killed left in a folder, and put back what one of them was about to replace."""
    for path in folder.glob(".*-*"):
        found = _OURS.fullmatch(path.name)
        if found is None or _lives(int(found["pid"])):
            continue
        target = path.with_name(found["name"])
        if found["kind"] == "old" and not os.path.lexists(target):
            path.rename(target)
        else:
            _remove(path)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _rename(aside: Path, target: Path) -> None:
    if not os.path.lexists(target):
        aside.rename(target)
    elif aside.is_file() and not target.is_dir():
        aside.replace(target)
    else:
        replaced = target.with_name(f"{_REPLACED}{target.name}-{os.getpid()}")
        _remove(replaced)
        target.rename(replaced)
        aside.rename(target)
        _remove(replaced)
    sync_folder(target.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or all of a folder, is on the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _sync(entry)
        sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
