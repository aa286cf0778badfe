"""The counter, held to what can be counted by hand, and the benchmark that uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.benchmarks.scripts import BENCHMARKS, load_benchmark
from torch import nn


@pytest.fixture(scope="module")
def operations() -> Any:
    return load_benchmark("operations")


def test_a_linear_layer_and_its_backward_pass(operations: Any) -> None:
    x = torch.randn(6, 4, requires_grad=True)
    weight, gradient = nn.Parameter(torch.randn(5, 4), requires_grad=False), torch.randn(6, 5)
    with operations.Count() as count:
        torch.nn.functional.linear(x, weight).backward(gradient)
    products = count.found["products"]
    assert products.calls == 2, "the weight is frozen"
    assert products.flops == 2 * (2 * 6 * 4 * 5)
    assert products.bytes == 2 * 4 * (6 * 4 + 4 * 5 + 6 * 5)


@pytest.mark.parametrize("inference", [True, False])
def test_passes_read_and_write(operations: Any, inference: bool) -> None:
    x, y = torch.randn(10, 8), torch.randn(8)
    with torch.inference_mode(inference), operations.Count() as count:
        x + y.expand(10, 8)  # what is expanded is read once
        x.view(8, 10).t()  # free
        torch.empty(5)  # free
        x.mul_(2.0)
    assert count.total.calls == 2
    assert count.total.bytes == 4 * (80 + 8 + 80) + 4 * (80 + 80)
    assert count.total.flops == 0


def test_a_table_is_not_read_as_a_whole(operations: Any) -> None:
    table, ids = torch.randn(1000, 8), torch.tensor([3, 4])
    with operations.Count() as count:
        torch.nn.functional.embedding(ids, table)
    assert count.total.bytes == 2 * (2 * 8 * 4) + 2 * 8


@pytest.mark.parametrize("inference", [True, False])
def test_attention_counts_what_it_sees(operations: Any, inference: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    for causal, share in ((True, 0.5), (False, 1.0)):
        with torch.inference_mode(inference), operations.Count() as count:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert count.found["attention"].flops == share * 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_least_seconds_are_the_longer_of_both(operations: Any) -> None:
    left, right = torch.ones(2, 100), torch.ones(100, 2)
    rates = operations.Rates(product=1e3, cached=1e2, streamed=1.0)
    with operations.Count(rates) as count:
        torch.mm(left, right)
    assert count.total.least_seconds == pytest.approx(4 * (200 + 200 + 4) / 1e2)
    rates = operations.Rates(product=1.0, cached=1e2, streamed=1.0)
    with operations.Count(rates) as count:
        torch.mm(left, right)
    assert count.total.least_seconds == 800.0


def test_the_whole_step_and_what_each_part_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    count = load_benchmark("count")
    torch.manual_seed(0)
    rates = load_benchmark("operations").Rates(product=1e9, cached=1e9, streamed=1e9)
    rows = {(row["stage"], row["form"]): row for row in count.count_size("tiny", "sampled", rates)}
    assert {stage for stage, _ in rows} == {"sample", "teacher", "update", "sync"}

    def total(stage: str, form: str, what: str = "flops") -> float:
        return rows[stage, form]["total"][what]

    for stage in ("teacher", "update"):
        assert total(stage, count.AS_IT_IS) < 0.8 * total(stage, "a row for each sample")
    passes = [
        rows["update", form]["by_kind"]["passes"]["bytes"]
        for form in (count.AS_IT_IS, "PEFT's LoRA layers")
    ]
    assert passes[0] < passes[1]
    assert rows["sync", count.AS_IT_IS]["by_kind"]["products"]["flops"] > 0


def test_a_layer_of_a_card_by_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    count = load_benchmark("count")
    rows = list(count.count_layers(tokens=1024))
    fused, pefts = [row["by_kind"] for row in rows if row["stage"] == "update"]
    shape = count.QWEN3_8B
    hidden, wide, narrow = shape["hidden_size"], shape["intermediate_size"], 8 * 128
    linear = 2 * (2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * wide)
    per_token = fused["products"]["flops"] / 1024
    assert 3.0 * linear < per_token < 3.1 * linear, "forward, again, and backward; and the adapter"
    assert fused["attention"]["flops"] == pefts["attention"]["flops"] > 0
    assert fused["passes"]["bytes"] < 0.75 * pefts["passes"]["bytes"]
