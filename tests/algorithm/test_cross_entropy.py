"""The cross-entropy of rows against its formula in float64: values and gradients."""

from __future__ import annotations

import pytest
import torch
from tests.algorithm import reference

from rnow.algorithm import head as head_module
from rnow.algorithm.batching import build_batch, collate
from rnow.algorithm.cross_entropy import CrossEntropy
from rnow.algorithm.head import Head
from rnow.algorithm.records import MicroBatch, TrainingSample
from rnow.types import Sample

ROWS = (
    ((3, 1, 4, 1, 5), (False, False, True, True, True)),
    ((2, 7, 1), (False, True, False)),
    ((6, 6, 2, 8, 3, 1, 8), (False, True, True, False, False, True, True)),
)
WIDTH, VOCABULARY = 5, 9


def micro_batch() -> MicroBatch:
    training = [
        TrainingSample(
            sample=Sample(
                id=f"rows/{number}#0",
                dataset="rows",
                token_ids=ids,
                loss_mask=mask,
                sampler_logprobs=(0.0,) * len(ids),
            ),
            reward_advantage=0.0,
            evidence=None,
        )
        for number, (ids, mask) in enumerate(ROWS)
    ]
    assert build_batch(training).num_loss_tokens == 8
    return collate(training, "cpu")


def head_of(dtype: torch.dtype, *, softcap: float | None, scale: float) -> Head:
    draw = torch.Generator().manual_seed(1)
    return Head(
        weight=torch.randn(VOCABULARY, WIDTH, generator=draw, dtype=torch.float64).to(dtype),
        bias=torch.randn(VOCABULARY, generator=draw, dtype=torch.float64).to(dtype),
        softcap=softcap,
        scale=scale,
    )


@pytest.mark.parametrize("tiled", [False, True], ids=["one tile", "tiles of two columns"])
@pytest.mark.parametrize(
    ("softcap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.5)], ids=["plain", "softcap", "scaled"]
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=["64", "32"]
)
def test_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
    tiled: bool,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """-log p_x of each loss token, and p - e_x pulled back through the head."""
    if tiled:
        tiling = head_module.Tiling(rows=3, width=2)
        monkeypatch.setattr(head_module, "tiling_for", lambda head, kept=False: tiling)
    micro, head = micro_batch(), head_of(dtype, softcap=softcap, scale=scale)
    draw = torch.Generator().manual_seed(2)
    exact = torch.randn(8, WIDTH, generator=draw, dtype=torch.float64)
    hidden = exact.to(dtype).requires_grad_()
    terms = CrossEntropy().terms(hidden, head, micro)
    terms.losses.sum().backward()

    naive = hidden.detach().double().requires_grad_()
    assert head.bias is not None
    logits = reference.logits(
        naive,
        head.weight.double(),
        head.bias.double(),
        scale=scale,
        softcap=softcap,
        temperature=1.0,
        vocabulary=VOCABULARY,
    )
    logprobs = reference.log_softmax(logits)
    targets = torch.tensor([4, 1, 5, 7, 6, 2, 1, 8])
    expected = -logprobs.gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    assert naive.grad is not None
    assert hidden.grad is not None
    assert torch.allclose(terms.losses.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.allclose(hidden.grad.double(), naive.grad, atol=tolerance, rtol=tolerance)
    assert torch.allclose(
        terms.streams["entropy"].double(),
        reference.entropy(logits.detach()),
        atol=10 * tolerance,
    )
