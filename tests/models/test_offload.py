"""Moving weights away and back. The same code on a CPU and a card: here both places are main memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rnow.errors import RnowError
from rnow.models import offload as module
from rnow.models.offload import Offload, tensors_of
from rnow.models.scoring import check_present


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7))
    model[1].weight = model[0].weight  # type: ignore[assignment]  # tied, as in many small models
    return model


def stored(tensors: Any) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def test_what_sleeps_holds_nothing_and_comes_back_bit_for_bit() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    held = stored(tensors_of(model))
    offload = Offload(frozen=lambda: tensors_of(model), what="it")
    objects = [id(tensor) for tensor in tensors_of(model)]
    for _ in range(2):
        offload.sleep()
        assert offload.asleep
        assert held > 0
        assert stored(tensors_of(model)) == 0
        offload.wake()
        assert not offload.asleep
        assert stored(tensors_of(model)) == held
    assert [id(tensor) for tensor in tensors_of(model)] == objects
    assert model[1].weight is model[0].weight  # type: ignore[index]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_views_follow_without_being_known() -> None:
    model = small()
    weight: Tensor = model[0].weight  # type: ignore[assignment,index]
    head = weight.detach()[:5]
    expected = head.clone()
    offload = Offload(frozen=lambda: tensors_of(model), what="it")
    offload.sleep()
    with pytest.raises(RuntimeError, match="sleep"):
        check_present(head)
    offload.wake()
    check_present(head)
    assert torch.equal(head, expected)
    with torch.no_grad():
        weight += 1
    assert torch.equal(head, expected + 1), "still a view"


def test_live_tensors_can_be_read_meanwhile() -> None:
    parameter = nn.Parameter(torch.arange(3.0))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state[parameter]
    values = parameter.detach().clone(), state["exp_avg"].clone()
    moment = state["exp_avg"]

    offload = Offload(
        frozen=tuple, live=lambda: [parameter, *optimizer.state[parameter].values()], what="it"
    )
    pointer = parameter.data_ptr()
    offload.sleep()
    offload.sleep()
    assert parameter.data_ptr() != pointer, "it did move"
    assert torch.equal(parameter, values[0])
    assert torch.equal(moment, values[1])
    offload.wake()
    offload.wake()
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert optimizer.state[parameter]["exp_avg"] is moment
    assert torch.equal(parameter, values[0])
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(parameter, values[0]), "the optimizer still moves it"


def test_what_is_added_later_and_what_is_new_comes_along() -> None:
    own, other = torch.ones(3), [torch.full((2,), 2.0)]
    offload = Offload(frozen=lambda: [own], what="it")
    offload.take_along(lambda: other)
    offload.sleep()
    other.append(torch.full((2,), 3.0))
    offload.sleep()
    assert stored([own, *other]) == 0
    offload.wake()
    assert [tensor.tolist() for tensor in other] == [[2.0, 2.0], [3.0, 3.0]]


def test_a_card_without_room_is_told_of_and_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = [torch.full((4,), float(i)) for i in range(3)]
    offload = Offload(frozen=lambda: tensors, what="the trainer")
    offload.sleep()
    fill = type(offload._emptied[0]).fill
    left = [1]

    def full(self: Any) -> None:
        if not left:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...")
        left.pop()
        fill(self)

    monkeypatch.setattr(type(offload._emptied[0]), "fill", full)
    with pytest.raises(RnowError, match="no room for the trainer") as failure:
        offload.wake()
    assert failure.value.why == "CUDA out of memory. Tried ..."
    assert offload.asleep
    left += [1, 1, 1]
    offload.wake()
    assert not offload.asleep
    assert [tensor[0].item() for tensor in tensors] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("quantized", ["nf4", "int8"])
def test_quantised_weights_take_their_scales_along(quantized: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear: Any
    if quantized == "nf4":
        linear = bnb.nn.Linear4bit(
            64, 64, bias=False, quant_type="nf4", compress_statistics=True,
            compute_dtype=torch.float32,
        )  # fmt: skip
        linear.support_avx512bf16_for_cpu = False
    else:
        linear = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False)
    torch.manual_seed(0)
    linear.load_state_dict({"weight": torch.randn(64, 64)})
    model = nn.Sequential(linear).to("cpu")
    inputs = torch.randn(2, 64)
    with torch.no_grad():
        expected = model(inputs)
        if quantized == "nf4":
            state = linear.weight.quant_state
            scales = [state.absmax, state.offset, state.code, state.state2.absmax]
            assert linear.weight.dtype == torch.uint8
        else:
            scales = [linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB]
            assert linear.weight.dtype == torch.int8
        offload = Offload(frozen=lambda: tensors_of(model), what="it")
        offload.sleep()
        assert stored([linear.weight, *scales]) == 0
        offload.wake()
        assert torch.equal(model(inputs), expected)


class Traffic:
    """Bytes that were copied out, and how much main memory was taken for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = self.taken = 0
        update, take = module._Copy.update, module.host_bytes

        def counted(copy: Any, storage: Any, versions: Any) -> None:
            before = copy._bytes
            copy._bytes = Counted(self, before)
            update(copy, storage, versions)
            copy._bytes = before

        def taken(size: int, *, pinned: bool) -> Tensor:
            self.taken += size
            return take(size, pinned=pinned)

        monkeypatch.setattr(module._Copy, "update", counted)
        monkeypatch.setattr(module, "host_bytes", taken)

    def moved(self) -> tuple[int, int]:
        found = self.out, self.taken
        self.out = self.taken = 0
        return found


class Counted:
    def __init__(self, traffic: Traffic, held: Tensor) -> None:
        self._traffic, self._held = traffic, held

    def copy_(self, source: Tensor) -> None:
        self._traffic.out += source.nbytes
        self._held.copy_(source)


def turn(offload: Offload) -> None:
    offload.sleep()
    offload.wake()


def test_what_does_not_change_is_copied_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, traffic = small(), Traffic(monkeypatch)
    before = copy.deepcopy(model.state_dict())
    offload = Offload(frozen=lambda: tensors_of(model), what="it")
    turn(offload)
    held = stored(tensors_of(model))
    assert traffic.moved() == (held, held)
    for _ in range(3):
        model[1](torch.randn(2, 4))
        turn(offload)
        assert traffic.moved() == (0, 0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("inference", [False, True])
def test_a_frozen_tensor_that_torch_changed_is_copied_again(
    monkeypatch: pytest.MonkeyPatch, inference: bool
) -> None:
    model, traffic = small(), Traffic(monkeypatch)
    offload = Offload(frozen=lambda: tensors_of(model), what="it")
    turn(offload)
    traffic.moved()
    weight: Tensor = model[0].weight  # type: ignore[assignment,index]
    with torch.inference_mode(inference), torch.no_grad():
        weight[:2].mul_(3.0)  # by a view
    expected = weight.clone()
    turn(offload)
    assert torch.equal(weight, expected)
    assert traffic.moved() == (weight.nbytes, 0), "into the memory that was there, and nothing else"
    turn(offload)
    assert traffic.moved() == (0, 0)


def test_a_tensor_with_other_storage_is_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, traffic = small(), Traffic(monkeypatch)
    offload = Offload(frozen=lambda: tensors_of(model), what="it")
    turn(offload)
    weight: Any = model[0].weight
    for number in range(20):  # an allocator likes to give the address that it got back last
        traffic.moved()
        weight.data = torch.full((7, 4), float(number))
        turn(offload)
        assert torch.equal(weight, torch.full((7, 4), float(number)))
        assert traffic.moved() == (weight.nbytes, weight.nbytes)
    assert len(offload._copies) == len({t.data_ptr() for t in tensors_of(model)}), "old ones go"


def test_what_is_taken_along_may_change_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    own, merged, traffic = torch.ones(3), torch.ones(5), Traffic(monkeypatch)
    offload = Offload(frozen=lambda: [own], what="it")
    offload.take_along(lambda: [own, merged])  # a merged model shares what it did not change
    turn(offload)
    traffic.moved()
    for number in range(3):
        torch.add(torch.zeros(5), number, out=merged.data)  # no counter tells of it
        turn(offload)
        assert merged.tolist() == [number] * 5
        assert traffic.moved() == (merged.nbytes, 0)


def test_a_tensor_of_inference_mode_is_copied_each_time() -> None:
    with torch.inference_mode():
        scale = torch.ones(3)
    offload = Offload(frozen=lambda: [scale], what="it")
    turn(offload)
    with torch.inference_mode():
        scale.mul_(2.0)
    turn(offload)
    assert scale.tolist() == [2.0, 2.0, 2.0]


def test_a_failed_copy_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.ones(4)
    offload = Offload(frozen=lambda: [weight], what="it")
    turn(offload)
    weight.mul_(2.0)
    with monkeypatch.context() as patched:
        patched.setattr(module, "_bytes_of", lambda storage: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            offload.sleep()
    turn(offload)
    assert weight.tolist() == [2.0] * 4
