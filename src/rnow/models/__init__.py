"""Models as files: which ids can be used, where their weights are, their tokenizers, their sizes, loading them.

The hosted client has its ``RewardArgs``, ``ToolArgs`` and ``get_response`` in a module of this name, and files written for it
import them from here. They need nothing but the standard library, as ``rnow.core`` does.
"""

from __future__ import annotations

from rnow.core import RewardArgs, ToolArgs, get_response

__all__ = ["RewardArgs", "ToolArgs", "get_response"]
