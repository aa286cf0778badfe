"""Many tensors into main memory at once."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save

from rnow.disk import tensors as module
from rnow.disk.tensors import gather


@pytest.fixture(params=[True, False], ids=["from main memory", "as from a card"])
def transfers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors came with each transfer."""
    counts: list[int] = []
    if not request.param:
        monkeypatch.setattr(module, "_is_here", lambda tensor: False)
    whole = module._in_one_transfer

    def counted(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        counts.append(len(parts))
        return whole(parts)

    monkeypatch.setattr(module, "_in_one_transfer", counted)
    return counts


GIVEN = {
    "b": torch.arange(6.0).view(2, 3).T.requires_grad_(),
    "step": torch.tensor(3.0, dtype=torch.float64),
    "a": torch.tensor([1 / 3, 2.0]),
    "empty": torch.zeros(0, 4),
}


def test_the_same_numbers_in_the_same_order(transfers: list[int]) -> None:
    found = gather(GIVEN)
    assert [*found] == [*GIVEN]
    for name, tensor in GIVEN.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
        assert found[name].is_contiguous()
        assert not found[name].requires_grad
    assert transfers in ([], [3, 1]), "one for each number format"
    # Neighbours in one storage are no tensors that share numbers.
    assert torch.equal(load(save(found))["a"], GIVEN["a"])


def test_rounded_on_the_way(transfers: list[int]) -> None:
    found = gather(GIVEN, dtype=torch.bfloat16)
    for name, tensor in GIVEN.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16))
    assert transfers in ([], [4])


def test_nothing() -> None:
    assert gather({}) == {}


@pytest.mark.gpu
def test_an_adapter_comes_from_a_card_in_one_transfer() -> None:
    given = {str(i): torch.randn(4, i + 1, device="cuda") for i in range(50)}
    with torch.profiler.profile() as profile:
        found = gather(given, dtype=torch.bfloat16)
    copies = [e for e in profile.events() if "Memcpy DtoH" in e.name]
    assert len(copies) == 1
    for name, tensor in given.items():
        assert torch.equal(found[name], tensor.cpu().to(torch.bfloat16))
