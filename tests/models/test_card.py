"""What is missing of a card while everybody sleeps."""

from __future__ import annotations

import pytest
import torch

from rnow.errors import EXIT_TEMPORARY, TemporaryError
from rnow.models.card import CardWatch

GB = 10**9
CARD = torch.device("cuda:1")


def test_what_is_missing_is_measured_and_more_than_a_gigabyte_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = [20 * GB]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 24 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GB)
    watch = CardWatch(CARD, allowed=1.5e9)
    free.append(18 * GB)
    assert watch.check() == {"memory/asleep_gb": 0.5}
    free.append(20 * GB)
    assert watch.check() == {"memory/asleep_gb": 0.0}
    free.append(17 * GB)
    with pytest.raises(TemporaryError, match=r"1\.5 GB of cuda:1 are not free") as caught:
        watch.check()
    assert caught.value.exit_code == EXIT_TEMPORARY
    assert "2.0 GB are still this process's" in str(caught.value.why)


def test_torch_has_the_switch_for_segments() -> None:
    """``ready_card`` sets it on a card; here it is taken and changes nothing."""
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
