"""One thread: the tensors here are tiny, and a thread pool only gets in the way of the other tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A busy machine is slow now and then: that is no failure. Loaded while tests are collected, so it holds for all of them.
settings.register_profile("rnow", deadline=None, max_examples=60)
settings.load_profile("rnow")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
