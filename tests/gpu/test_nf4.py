"""QLoRA on a GPU: what ``tests/policy/test_nf4.py`` says of the CPU, with the GPU's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.gpu.device import CUDA, needs_cuda
from tests.policy import test_nf4 as suite

pytestmark = [pytest.mark.gpu, needs_cuda]


@pytest.fixture(scope="module")
def story(tiny_model_dir: Callable[..., Path]) -> suite.Story:
    return suite.tell_story(tiny_model_dir, CUDA)


globals().update({name: test for name, test in vars(suite).items() if name.startswith("test_")})
