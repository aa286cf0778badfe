"""What a stage really takes of memory: the allocations of torch's CPU allocator, added up as they come and go.

It counts bytes that were asked for, so neither the machine's load nor its allocator changes a figure.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any


def held_bytes() -> int:
    """Bytes of all tensors that Python code holds, in whatever thread; those that share a storage count once."""
    import torch

    # By type alone: isinstance would ask every object for its __class__, which some answer with a warning.
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in found}
    return sum(storages.values())


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that ``work`` held at once beside what was there before."""
    import torch

    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = work()
    del kept
    events = profile.profiler.kineto_results.events()
    moves = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(moves, key=lambda move: move[0]):
        held += size
        most = max(most, held)
    return most
