"""What a user's rewards.py and tools.py import: ``from rnow.core import reward, RewardArgs, tool, ToolArgs, ...``.

``reward`` and ``tool`` are both submodules and the decorators inside them. Importing a submodule binds its name in this
package once; the ``from`` import below then rebinds the name to the decorator, and later imports of the submodule come from
``sys.modules`` without binding again. So ``from rnow.core import reward`` is always the decorator, and ``from
rnow.core.reward import ...`` always reads the submodule.
"""

from __future__ import annotations

from rnow.core.judge import JudgeError, JudgeUnavailable, llm_judge
from rnow.core.messages import get_response
from rnow.core.reward import RewardArgs, reward
from rnow.core.tool import ToolArgs, tool

__all__ = [
    "JudgeError",
    "JudgeUnavailable",
    "RewardArgs",
    "ToolArgs",
    "get_response",
    "llm_judge",
    "reward",
    "tool",
]
