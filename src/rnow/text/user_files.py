"""Files that a user names or puts into a project: read only where they are regular files. A named pipe or a device would
be waited on for ever, or never end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from rnow.errors import InputError

_SHOWN = 80
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def place_of(
    path: str | Path, base: Path, *, where: str, fault: type[InputError] = InputError
) -> Path:
    """Where a path that a user wrote leads: ``~`` stands for a home, a relative one starts at ``base``.

    Args:
        where: the setting or option that names it.
        fault: the kind of error.

    Raises:
        InputError: there is no such home, or no disk can hold such a name.
    """
    shown = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[: _SHOWN - 3]}..."
    try:
        place = base / Path(path).expanduser()
    except RuntimeError:
        raise fault(
            f"{shown} leads to no home folder",
            where=where,
            why="~ stands for your own home, ~name for that of the user name, and there is none",
            fix="write the path from / on, or from the project folder",
        ) from None
    try:
        place.stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise fault(
                f"{shown} cannot be read", where=where, why=error.strerror, fix="name another path"
            ) from None
    except ValueError:  # a zero byte, of which those say more who know what it should be
        pass
    return place


def is_present(path: Path) -> bool:
    """Whether there is a file at ``path``, links followed; a folder is none.

    Raises:
        InputError: what is there is a named pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode):
        return False
    _refuse_irregular(mode, path)
    return True


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened for reading bytes.

    Raises:
        InputError: it is no regular file.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait; on a regular file it changes nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_irregular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """The bytes of ``path``. Raises as ``open_regular``."""
    with open_regular(path) as file:
        return file.read()


def _refuse_irregular(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
    raise InputError(
        f"{path.name} is {kind}, not a file",
        where=str(path),
        why="only a regular file can be read more than once, and has an end",
        fix="put a file there, or name another",
    )
