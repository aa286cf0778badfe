"""On-policy distillation on your own machine.

``from rnow import Config, run`` is the Python entrance. Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnow.config import Config
    from rnow.core import RewardArgs, ToolArgs, get_response, llm_judge, reward, tool
    from rnow.setup.build import run
    from rnow.teacher import load_teacher

__version__ = "0.1.0"

__all__ = [
    "Config",
    "RewardArgs",
    "ToolArgs",
    "__version__",
    "get_response",
    "llm_judge",
    "load_teacher",
    "reward",
    "run",
    "tool",
]

_FOR_USER_CODE = ("RewardArgs", "ToolArgs", "get_response", "llm_judge", "reward", "tool")
_HOMES = {
    "Config": "rnow.config",
    "load_teacher": "rnow.teacher",
    "run": "rnow.setup.build",
} | dict.fromkeys(_FOR_USER_CODE, "rnow.core")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rnow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
