"""NF4 on vLLM: what its bitsandbytes support needs, and the error before vLLM's own, which does not say what to install.

Up to 0.31 the support is part of vLLM, from 0.32 on of a plugin package. Either quantises while it loads, to nf4 with double
quantisation, which is what ``rnow.models.loading`` does for the trainer; there is nothing to set.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from rnow.errors import ModelError

PLUGIN = "vllm-bnb-plugin"
ARGUMENT = "bitsandbytes"
"""vLLM's word for it, and the name under which the plugin registers."""

_IN_TREE = "model_executor/layers/quantization/bitsandbytes.py"
_ALLOWED = "VLLM_PLUGINS"


def require_nf4(where: str, *, dtype: str = "auto") -> None:
    """
    Args:
        where: the setting that asks for nf4.
        dtype: the number format beside it.

    Raises:
        ModelError: this environment's vLLM cannot load nf4, or not in this dtype.
    """
    if dtype == "float32":
        raise ModelError(
            "vLLM loads nf4 weights in bfloat16 and float16 only, not in float32",
            where=where,
            fix="set the dtype to bfloat16, the quantization to none, or the backend to transformers",
        )
    if _in_tree():
        return
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name=ARGUMENT):
        raise ModelError(
            "this vLLM cannot load nf4 weights: its bitsandbytes support is a package of its own, and it is not installed",
            where=where,
            fix=f"pip install {PLUGIN}, set the quantization to none, or the backend to transformers",
        )
    allowed = os.environ.get(_ALLOWED)
    if allowed is not None and ARGUMENT not in allowed.split(","):
        raise ModelError(
            f"this vLLM cannot load nf4 weights: {_ALLOWED} keeps it from its {ARGUMENT} plugin",
            where=where,
            fix=f"add {ARGUMENT} to {_ALLOWED}, or unset it",
        )


def _in_tree() -> bool:
    spec = importlib.util.find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    return any((Path(place) / _IN_TREE).is_file() for place in places or ())
