"""4. vLLM's fixtures in bfloat16, sampler and teacher; needs vLLM. The gaps that probes find are in the rows' messages."""

from __future__ import annotations

import importlib.util
from typing import Any

from common_gpu import main, pytest_rows


def work(dry: bool) -> list[dict[str, Any]]:
    """One row per test."""
    if not dry and importlib.util.find_spec("vllm") is None:
        return [{"skipped": "vLLM is not installed"}]
    return pytest_rows(
        "tests/gpu/test_sampler_conformance.py", "tests/gpu/test_teacher_conformance.py", dry=dry
    )


if __name__ == "__main__":
    main("s4_vllm_tests", __doc__ or "", work)
