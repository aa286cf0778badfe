"""Small pure pieces of terminal output: safe text, sparklines, bars, and numbers in a few columns."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 (tab and newline excepted), DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069]"  # bidi controls, line separators
)
_SPARKS = {True: "▁▂▃▄▅▆▇█", False: "_.-=+*%#"}
_EIGHTHS = " ▏▎▍▌▋▊▉"


def escape_control(text: str) -> str:
    r"""Make text from a user, a file or a model safe to print: control characters become ``\x1b``-style escapes.

    Tabs and newlines stay. Lone surrogates are escaped too, so that printing cannot fail.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match.group())
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    safe = _UNSAFE.sub(escape, text)
    return safe.encode("utf-8", "backslashreplace").decode("utf-8")


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters of a text and, where some are left out, how many."""
    left_out = len(text) - limit
    return f"{text[:limit]} [... {left_out:,} more characters]" if left_out > 0 else text


def one_line(text: str, limit: int) -> str:
    """A text on one line of at most ``limit`` characters, the last three of a longer one dots."""
    # Of a long text only the beginning is looked at.
    line = " ".join(text[: 4 * limit].split())
    return line if len(line) <= limit and len(text) <= 4 * limit else f"{line[: limit - 3]}..."


def sparkline(
    values: Sequence[float],
    *,
    width: int = 20,
    scale: Sequence[float] = (),
    unicode: bool = True,
) -> str:
    """The last ``width`` values as one character each, scaled to the range of ``scale``, or their own without.

    A value that is not finite shows as a space. A flat series is drawn at the lowest level.
    """
    shown = list(values)[-width:] if width > 0 else []
    finite = [value for value in scale or shown if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    marks = _SPARKS[unicode]

    def mark(value: float) -> str:
        if not math.isfinite(value):
            return " "
        level = (value - low) / (high - low) if high > low else 0.0
        return marks[min(len(marks) - 1, max(0, int(level * len(marks))))]

    return "".join(map(mark, shown))


def bar(fraction: float, width: int, *, unicode: bool = True) -> str:
    """A horizontal bar of at most ``width`` cells; ``fraction`` is clamped to [0, 1], not finite draws nothing."""
    if not math.isfinite(fraction) or width <= 0:
        return ""
    cells = min(1.0, max(0.0, fraction)) * width
    if not unicode:
        return "#" * round(cells)
    whole = int(cells)
    part = _EIGHTHS[int((cells - whole) * 8)].strip()
    return "█" * whole + part


def format_number(value: float) -> str:
    """A metric in at most eight characters: three significant digits that matter, never ``0.000`` for a small value."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 10_000 or size < 0.0005:
        return f"{value:.0e}" if size < 1e-4 or size >= 1e6 else f"{value:.1e}"
    if size >= 100:
        return f"{value:.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.3f}"


def format_rate(value: float) -> str:
    """Tokens per second in at most five characters."""
    if not math.isfinite(value):
        return "-"
    if value >= 99_500:
        return f"{value / 1000:.0f}k"
    if value >= 9_950:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}"


def format_seconds(value: float) -> str:
    """A short duration in seconds, for one stage of one step."""
    if not math.isfinite(value):
        return "-"
    if value >= 100:
        return f"{value:.0f}s"
    return f"{value:.1f}s" if value >= 10 else f"{value:.2f}s"


def format_clock(seconds: float) -> str:
    """A long duration: ``0:42``, ``1:02:03``, ``2d 03:04``."""
    if not math.isfinite(seconds):
        return "-:--"
    whole = max(0, round(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        days, hour = divmod(hours, 24)
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def format_bytes(amount: float) -> str:
    """``1.2 GB``, ``34 MB``: powers of ten, as disks and cards are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= size:
            value = amount / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:,.0f} {unit}"
    return f"{amount:.0f} B"
