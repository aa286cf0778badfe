"""From the config to the arguments of vLLM's engine; nothing is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.setup.projects import Project

from rnow.plan.prepare import prepare
from rnow.sampling.vllm_engine import engine_arguments
from rnow.setup.vllm import sampler_settings


@pytest.mark.parametrize(
    ("key", "value", "argument"),
    [
        ("tensor_parallel_size", 2, "tensor_parallel_size"),
        ("enable_prefix_caching", False, "enable_prefix_caching"),
        ("max_num_seqs", 7, "max_num_seqs"),
        ("gpu_memory_utilization", 0.25, "gpu_memory_utilization"),
        ("dtype", "bfloat16", "dtype"),
        ("quantization", "nf4", None),
    ],
)
def test_a_key_reaches_the_engine(
    tmp_path: Path,
    tiny_model_dir: Callable[..., Path],
    key: str,
    value: Any,
    argument: str | None,
) -> None:
    project = Project(tmp_path, tiny_model_dir)
    prepared = prepare(project.config(sampler={key: value}), tmp_path, weights=False)
    settings = sampler_settings(prepared, prepared.run_folder(), time_shared=False)
    arguments = engine_arguments(settings)
    if argument is None:
        assert arguments["quantization"] == "bitsandbytes"
    else:
        assert arguments[argument] == value
    assert arguments["enforce_eager"] is True, "a CPU has no graphs"
