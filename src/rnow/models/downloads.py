"""How far the download of a model is, read from the hub's cache while it comes.

The files themselves are looked at, not what a client says of them: so a download of another process, which ours waits for, is
seen to grow too, and whatever fetches (plain HTTP, Xet) is measured alike.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rnow.display.downloads import Download
from rnow.models.resolved import HubFile
from rnow.text.redact import without_user_info

LOOK_SECONDS = 0.25
"""How often is looked."""

PACE_SECONDS = 20.0
"""Over how long the speed is measured."""

_BLOCK = 512
"""Bytes of ``st_blocks``."""

Watch = Callable[[Download], None]


def unwatched(download: Download) -> None:
    """A ``Watch`` that nobody looks at."""


def cache_folder() -> Path:
    """Where the hub's client keeps what it fetched."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def hub_address() -> str:
    """Where models come from: the hub, or the mirror of HF_ENDPOINT."""
    from huggingface_hub import constants

    return without_user_info(constants.ENDPOINT)


def missing_bytes(path: str, commit: str, files: Sequence[HubFile]) -> int:
    """What of these files of the model ``path`` is not whole in the cache."""
    return sum(file.size for file in _missing(path, commit, files))


def remember(path: str, revision: str | None, commit: str) -> None:
    """Let the commit be found by the name it was asked for, where no hub is: the client keeps a name only if it resolves it itself,
    and what is listed here is fetched by its commit."""
    name = revision or "main"
    refs = _repository(path) / "refs"
    place = refs / name
    if name == commit or not place.resolve().is_relative_to(refs.resolve()):
        return
    with suppress(OSError):  # a cache that cannot be written holds what it holds
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = place.with_name(f".{place.name}.{os.getpid()}")
        aside.write_text(commit, encoding="utf-8")
        aside.replace(place)


@contextmanager
def watched(path: str, commit: str, files: Sequence[HubFile], watch: Watch) -> Iterator[None]:
    """Tell ``watch`` from a thread of its own, until the block ends, how much of the files is there. Nothing is told where
    nothing is missing.

    Args:
        path, commit: the repository, and what of it is fetched.
    """
    missing = _missing(path, commit, files)
    if watch is unwatched or not missing:
        yield
        return
    look = _Look(path, commit, missing)
    ended = threading.Event()

    def work() -> None:
        watch(look.now())
        while not ended.wait(LOOK_SECONDS):
            watch(look.now())

    thread = threading.Thread(target=work, name="download", daemon=True)
    # A system that allows no more threads shows nothing, and fetches all the same.
    with suppress(RuntimeError):
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
    watch(look.whole())


class _Look:
    """What is there of files that were missing, and how fast it grows."""

    def __init__(self, path: str, commit: str, missing: Sequence[HubFile]) -> None:
        self._path = path
        self._commit = commit
        self._missing = missing
        self._total = sum(file.size for file in missing)
        self._began = time.time()
        self._seen: deque[tuple[float, int]] = deque()

    def now(self) -> Download:
        """As it is."""
        at, done = time.monotonic(), sum(map(self._size, self._missing))
        self._seen.append((at, done))
        while at - self._seen[0][0] > PACE_SECONDS:
            self._seen.popleft()
        since, before = self._seen[0]
        rate = (done - before) / (at - since) if at > since else math.nan
        return Download(name=self._path, done=done, total=self._total, rate=rate)

    def whole(self) -> Download:
        """When all of it is there."""
        return Download(name=self._path, done=self._total, total=self._total, rate=math.nan)

    def _size(self, file: HubFile) -> int:
        """Bytes of a file on the disk so far; of one that is being written, those that were written since this began: what an
        earlier attempt left half done is not gone on with by every client."""
        folder, found = _repository(self._path), [0]
        # In the order in which a file moves on, so that it is never between two looks.
        for part in (folder / "blobs").glob(f"{file.blob}*.incomplete") if file.blob else ():
            with suppress(OSError):
                state = part.stat()
                if state.st_mtime >= self._began:
                    # Parts may be written out of order: a hole in the file is not there yet.
                    found.append(min(state.st_size, state.st_blocks * _BLOCK))
        for place in (
            folder / "blobs" / file.blob,
            folder / "snapshots" / self._commit / file.name,
        ):
            with suppress(OSError):
                if place.is_file():
                    found.append(place.stat().st_size)
        return min(max(found), file.size)


def _missing(path: str, commit: str, files: Sequence[HubFile]) -> list[HubFile]:
    folder = _repository(path)
    places = ((file, folder / "snapshots" / commit / file.name) for file in files)
    return [
        file
        for file, place in places
        if not (place.is_file() or (file.blob and (folder / "blobs" / file.blob).is_file()))
    ]


def _repository(path: str) -> Path:
    return cache_folder() / "--".join(("models", *path.split("/")))
