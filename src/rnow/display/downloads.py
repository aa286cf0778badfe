"""A model on its way to this machine, as one line."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from rnow.display.terminal import format_bytes, format_clock

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """How far the download of the model ``name`` is: ``done`` of ``total`` bytes; ``rate`` is bytes per second, NaN while
    nothing is known of it."""

    name: str
    done: int
    total: int
    rate: float

    @property
    def seconds_left(self) -> float:
        """Estimated; NaN while nothing comes."""
        return (self.total - self.done) / self.rate if self.rate > 0 else math.nan

    def line(self) -> str:
        """``downloading org/name: 3.2 of 16.4 GB, 95.0 MB/s, ETA 2:19``."""
        whole = format_bytes(self.total)
        if self.done >= self.total:
            return f"downloaded {self.name}: {whole}"
        parts = [f"downloading {self.name}: {format_bytes(self.done)} of {whole}"]
        if self.rate > 0:
            parts += [f"{format_bytes(self.rate)}/s", f"ETA {format_clock(self.seconds_left)}"]
        return ", ".join(parts)


class DownloadLines:
    """When a download is worth a line where nothing is redrawn: as it begins, every so many seconds, and when it is done."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, float] = {}

    def due(self, download: Download) -> bool:
        """Whether to print it now; asked once for each that comes."""
        last, now = self._told.get(download.name, -math.inf), self._clock()
        if download.done >= download.total:
            # One that was over at once is not worth a line.
            return self._told.pop(download.name, None) is not None
        if now - last < SECONDS_BETWEEN_LINES:
            return False
        self._told[download.name] = now
        return True
