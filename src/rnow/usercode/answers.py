"""What a user's function gave, as something that can be sent: text for a tool, a number for a reward, or what went wrong."""

from __future__ import annotations

import json
import math
import traceback
from pathlib import Path
from types import TracebackType
from typing import SupportsFloat

from rnow.core.judge import JudgeUnavailable
from rnow.usercode.user_file import fix_of, missing_module, relative, safe_text

_MAX_TRACEBACK = 16_000
_OURS = "/rnow/usercode/"


def tool_answer(value: object, limit: int) -> dict[str, object]:
    """``value`` (the text) and ``omitted`` (bytes cut off so that at most ``limit`` remain)."""
    raw = _tool_text(value).encode("utf-8", "replace")  # what UTF-8 cannot carry becomes "?"
    kept = raw[:limit].decode("utf-8", "ignore")
    return {"value": kept, "omitted": len(raw) - len(kept.encode())}


def _tool_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, dict | list | tuple):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that JSON has not, or a circle
            return str(value)
    return str(value)


def reward_answer(value: object) -> dict[str, object]:
    """``value``, a finite float, or ``bad`` with what is wrong with it.

    True and False are 1 and 0; numpy and torch scalars count; text, None and NaN do not.
    """
    if type(value) is not float:
        if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
            return {"bad": f"returned {_shown(value)}, not a number"}
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            return {"bad": f"returned {_shown(value)}, not one number"}
    if not math.isfinite(value):
        return {"bad": f"returned {value}, not a finite number"}
    return {"value": value}


def _shown(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, str | bytes):
        return f"{type(value).__name__} {value[:40]!r}"
    return f"a {type(value).__name__}"


def error_answer(error: BaseException, file: str, folder: Path) -> dict[str, object]:
    """``error`` with type, message, the place in the function's own file, the traceback without our frames, and whether it may
    pass by itself (``passing``)."""
    trace = error.__traceback__
    while trace is not None and _OURS in trace.tb_frame.f_code.co_filename:
        trace = trace.tb_next
    lines = [
        line
        for frame, line in traceback.walk_tb(trace)
        if frame.f_code.co_filename == file
    ]  # fmt: skip
    return {
        "error": {
            "type": type(error).__name__,
            "message": safe_text(error),
            "place": f"{relative(file, folder)}:{lines[-1]}" if lines else None,
            "traceback": _traceback(error, trace),
            "module": missing_module(error),
            "fix": fix_of(error),
            "passing": isinstance(error, JudgeUnavailable),
        }
    }


def _traceback(error: BaseException, trace: TracebackType | None) -> str:
    try:
        text = "".join(traceback.format_exception(type(error), error, trace))
    except BaseException:
        return ""
    if len(text) > _MAX_TRACEBACK:
        half = _MAX_TRACEBACK // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return text.encode("utf-8", "replace").decode()
