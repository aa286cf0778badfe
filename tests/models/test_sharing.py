"""Several samples in a row give the numbers and gradients of each alone, or a model is left out by name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.families import VOCABULARY, every_family, tiny_config, tiny_model
from tests.models.test_families import batch_of, build_policy, gradient

from rnow.algorithm.batching import pad
from rnow.algorithm.records import sampled_logprobs
from rnow.errors import TemporaryError
from rnow.models.families import SEPARATE_ROWS, SHARES_ROWS, UNUSABLE
from rnow.models.loading import CausalLM, take_apart, with_sharing
from rnow.models.scoring import hidden_rows, plan_samples
from rnow.models.sharing import attention_mask, find_sharing, why_separate
from rnow.policy.student import LoraPolicy
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Sample

TOLERANCE = 1e-5
WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "grouped queries": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "softcap and windows": ("gemma2", {"attn_logit_softcapping": 3.0}),
    "windows": ("mistral", {"num_attention_heads": 4}),
    "windows by layer": ("qwen2", WINDOWS | {"use_sliding_window": True, "sliding_window": 8}),
    "eager": ("gpt_oss", {}),
    "learned positions": ("gpt2", {}),
}
"""Windows are of 8 tokens, shorter than any prompt below."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loaded(family: str, **changes: Any) -> CausalLM:
    model = tiny_model(family, **changes).requires_grad_(False)
    return with_sharing(take_apart(model, vocabulary=VOCABULARY))


@cache
def policy_of(kind: str) -> LoraPolicy:
    family, changes = KINDS[kind]
    return build_policy(loaded(family, **changes))


def draw_group(draw: random.Random, name: str) -> list[Sample]:
    """Some answers to a prompt, of one or two turns; the first turn may be the same in several."""
    prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(9, 20))]
    turns = [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 6))] for _ in range(2)]
    samples = []
    for number in range(draw.randint(1, 5)):
        shown, written = [*prompt], draw.choice(turns)
        mask = [False] * len(shown) + [True] * len(written)
        ids = shown + written
        if draw.random() < 0.5:
            result, more = draw.choice(turns), [draw.randrange(3, VOCABULARY)] * draw.randint(1, 9)
            ids, mask = ids + result + more, mask + [False] * len(result) + [True] * len(more)
        samples.append(
            Sample(
                id=f"{name}#{number}",
                dataset="d",
                token_ids=tuple(ids),
                loss_mask=tuple(mask),
                sampler_logprobs=(-4.0,) * len(ids),
            )
        )
    return samples


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), budget=st.sampled_from([64, 4096]))
def test_shared_rows_give_the_numbers_and_gradients_of_separate_ones(
    kind: str, seed: int, budget: int
) -> None:
    draw = random.Random(seed)
    samples = [s for name in range(draw.randint(1, 4)) for s in draw_group(draw, f"p/{name}")]
    policy = policy_of(kind)
    policy._micro_batch_tokens = budget
    together = policy.lm
    assert together.sharing is not None, together.separate
    apart = replace(together, sharing=None)

    def score(lm: CausalLM) -> list[torch.Tensor]:
        found = TransformersTeacher(lm, micro_batch_tokens=budget).score_now(samples)
        return [sampled_logprobs(found[sample.id]) for sample in samples]

    for shared, alone in zip(score(together), score(apart), strict=True):
        torch.testing.assert_close(shared, alone, atol=TOLERANCE, rtol=0)

    batch, gradients = batch_of(samples), []
    for lm in (together, apart):
        policy.lm = lm
        policy._accumulate(batch)
        gradients.append(gradient(policy).clone())
    policy.lm = together
    # Of the whole vector: a single component may be what is left of sums that cancel.
    apart_norm = gradients[1].norm().item()
    assert apart_norm > 0
    assert (gradients[0] - gradients[1]).norm().item() < TOLERANCE * apart_norm


def test_in_float64_nothing_but_rounding_differs() -> None:
    lm = loaded("gemma2", attn_logit_softcapping=3.0)
    lm = take_apart(lm.model.double(), vocabulary=VOCABULARY)
    lm = with_sharing(lm)
    draw = random.Random(4)
    samples = [s for name in range(4) for s in draw_group(draw, f"p/{name}")]
    plan = plan_samples(lm, samples, 4096)
    assert any(part.per_row and max(part.per_row) > 1 for part in plan)
    hidden = TransformersTeacher(lm).score_now(samples)
    apart = TransformersTeacher(replace(lm, sharing=None)).score_now(samples)
    for sample in samples:
        found, expected = (sampled_logprobs(e[sample.id]) for e in (hidden, apart))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)  # float32 is what is kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits_it_is_tried_with_their_rounding(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3").to(dtype).requires_grad_(False)
    lm = with_sharing(take_apart(model, vocabulary=VOCABULARY))
    assert lm.sharing is not None
    found, alone = (
        TransformersTeacher(each).score_now(draw_group(random.Random(2), "p"))
        for each in (lm, replace(lm, sharing=None))
    )
    for name, evidence in found.items():
        gap = sampled_logprobs(evidence) - sampled_logprobs(alone[name])
        assert gap.abs().max() < 0.2


# ---- left out by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_packed_together_have_the_logits_of_each_alone(kind: str) -> None:
    """Rows of sft: other prompts, other lengths, several turns; none sees another."""
    draw = random.Random(3)
    samples = [draw_group(draw, f"row{number}")[0] for number in range(9)]
    family, changes = KINDS[kind]
    lm = loaded(family, **changes)
    assert lm.sharing is not None, lm.separate
    passes = plan_samples(lm, samples, 4096)
    assert any(max(part.per_row or (1,)) > 1 for part in passes), "nothing is packed"
    with torch.no_grad():
        for part in passes:
            own = [samples[index] for index in part.indices]
            packed = lm.head.logits(hidden_rows(lm, pad(own, "cpu", part.per_row)))
            alone = [lm.head.logits(hidden_rows(lm, pad([sample], "cpu"))) for sample in own]
            assert (packed - torch.cat(alone)).abs().max() < TOLERANCE


def test_every_family_is_shared_or_separate_with_a_reason() -> None:
    assert not SHARES_ROWS & SEPARATE_ROWS.keys()
    assert {*SHARES_ROWS, *SEPARATE_ROWS} <= {*every_family()} - {*UNUSABLE}


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("mamba2", {}, "left to right"),
        ("jamba", {}, "left to right"),
        ("bloom", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "alibi"),
        ("llama4_text", {}, "chunks"),
        ("gpt_neo", {}, "windows by the place"),
        ("deepseek_v32", {}, "some of the tokens"),
        ("llama", {"model_type": "strange"}, "nobody has tried"),
        ("qwen2", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    ],
)
def test_what_cannot_share_is_named(family: str, changes: dict[str, Any], why: str) -> None:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    assert why in (why_separate(config) or "")


def test_an_attention_that_takes_no_mask_is_named() -> None:
    config = tiny_config("llama")
    config._attn_implementation_internal = "flash_attention_2"
    assert why_separate(config) == "its attention (flash_attention_2) takes no mask of ours"


def test_int8_is_kept_apart() -> None:
    model = tiny_model("llama")
    model.is_loaded_in_8bit = True
    lm = with_sharing(take_apart(model, vocabulary=VOCABULARY))
    assert lm.sharing is None
    assert "LLM.int8" in lm.separate


def test_a_model_that_passes_the_mask_over_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaAttention.forward

    def blind(self: Any, hidden_states: Any, **given: Any) -> Any:
        return plain(self, hidden_states, **given | {"attention_mask": None})

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", blind)
    lm = loaded("llama")
    assert lm.sharing is None
    assert "other numbers" in lm.separate


def test_a_model_that_counts_positions_itself_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaRotaryEmbedding.forward

    def counting(self: Any, x: Any, position_ids: torch.Tensor) -> Any:
        return plain(self, x, torch.arange(position_ids.shape[1]).expand_as(position_ids))

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", counting)
    assert loaded("llama").sharing is None


def test_a_window_that_cannot_be_tried_keeps_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral import modeling_mistral

    made = modeling_mistral.create_sliding_window_causal_mask

    def fixed(config: Any, **given: Any) -> Any:
        other = tiny_config("mistral", sliding_window=6)
        other._attn_implementation = config._attn_implementation
        return made(config=other, **given)

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", fixed)
    assert loaded("mistral").sharing is None


@pytest.mark.parametrize(
    "fault", [MemoryError("no room"), TemporaryError("the weights cannot be read any more")]
)
def test_what_says_nothing_of_the_model_is_no_reason_to_keep_rows_apart(fault: Exception) -> None:
    lm = loaded("llama")

    def fail(passes: Any) -> Any:
        raise fault

    with pytest.raises(type(fault)):
        find_sharing(lm.model, lm.body, lm.device, fail)


def test_the_try_leaves_the_config_as_it_was() -> None:
    lm = loaded("gemma2")
    assert lm.model.config.sliding_window == 8
    assert lm.sharing is not None
    assert lm.sharing.windows == {"sliding_attention": 8, "full_attention": None}


def test_rows_of_several_are_refused_where_they_would_be_wrong() -> None:
    from rnow.algorithm.batching import pad

    lm = loaded("bloom")
    tokens = pad(draw_group(random.Random(1), "p")[:2] * 2, "cpu", (4,))
    with pytest.raises(ValueError, match="one sample a row"):
        hidden_rows(lm, tokens)


def test_a_mask_has_an_entry_for_each_pair_of_a_row() -> None:
    from rnow.algorithm.batching import pad

    lm = loaded("gemma2")
    tokens = pad(draw_group(random.Random(3), "p"), "cpu", None)
    assert tokens.branches is None, "nothing is masked where each row is one sample"
    samples = draw_group(random.Random(3), "p") + draw_group(random.Random(5), "q")
    tokens = pad(samples, "cpu", (len(samples),))
    assert tokens.branches is not None
    assert lm.sharing is not None
    masks = attention_mask(lm.body, tokens.branches, torch.float32, lm.sharing)
    length = tokens.token_ids.shape[1]
    assert {kind: tuple(mask.shape) for kind, mask in masks.items()} == dict.fromkeys(
        lm.sharing.windows, (1, 1, length, length)
    )
