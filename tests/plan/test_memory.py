from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rnow.config import Config
from rnow.models.shape import ModelShape, shape_of
from rnow.plan.memory import (
    ENGINE_ASLEEP,
    ENGINE_CONTEXT,
    ENGINE_WORK,
    MemorySettings,
    ModelMemory,
    engine_least,
    least,
    memory_parts,
    peak,
    peak_in_turns,
    savings,
)
from rnow.plan.roles import roles_of

GB = 10**9
LAYER_8B = [
    (4096, 4096),
    (4096, 1024),
    (4096, 1024),
    (4096, 4096),
    (4096, 12288),
    (4096, 12288),
    (12288, 4096),
]
QWEN3_8B = ModelShape(
    architecture="Qwen3ForCausalLM",
    parameters=8_190_735_360,
    linear=tuple(LAYER_8B * 36),
    layers=36,
    hidden=4096,
    kv_width=1024,
    vocabulary_rows=151936,
)


ROLES = roles_of(Config(dataset_type="distill", model={"path": "s"}, teacher={"path": "t"}))
STUDENT = ModelMemory(
    role=ROLES["student"],
    shape=QWEN3_8B,
    width=2,
    quantization="nf4",
)
TEACHER = replace(STUDENT, role=ROLES["teacher"], quantization="none")


def settings_of(
    student: ModelMemory = STUDENT, teacher: ModelMemory | None = TEACHER, **changes: Any
) -> MemorySettings:
    models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    base = MemorySettings(
        models=models,
        rank=32,
        adapter_parameters=87_293_952,  # what PEFT prints for Qwen3-8B at rank 32
        rollouts=16,
        prompts=4,
        prompt_tokens=1000,
        completion_tokens=4096,
        window=32768,
        micro_batch_tokens=16384,
        scoring_tokens=16384,
        recomputed_layers=36,
        cache_budget=20 * GB,
        head_tile=256 * 2**20,
        head_kept=256 * 2**20,
    )
    return replace(base, **changes)


def sizes(settings: MemorySettings) -> dict[str, int]:
    return {f"{part.model} {part.name}": part.bytes for part in memory_parts(settings)}


def test_weights_adapter_and_optimizer_of_a_known_model() -> None:
    found = sizes(settings_of())
    lora = 87_293_952
    assert found["teacher weights"] == 2 * 8_190_735_360
    assert found["student weights"] == pytest.approx(6.1 * GB, rel=0.02)
    assert found["student adapter"] == found["student gradients"] == 4 * lora
    assert found["student optimizer"] == 8 * lora
    # 36 layers x 2 x 1024 values x 2 bytes a token
    cache = 16 * (5096 * 147_456 + 32 * 151_936) + 16 * 5096 * 147_456 // 36
    assert found["student sampling cache"] == cache


def test_caches_stay_within_their_budget_but_for_a_single_row() -> None:
    row, layer = 5096 * 147_456 + 32 * 151_936, 5096 * 147_456 // 36
    # Of one layer, the cache of a step and of the one before it are there at the same time.
    rows = 2 * GB // row
    assert (
        sizes(settings_of(cache_budget=2 * GB))["student sampling cache"] == 2 * GB + rows * layer
    )
    assert sizes(settings_of(cache_budget=1))["student sampling cache"] == row + layer


def test_many_long_prompts_need_more_than_their_cache() -> None:
    few = sizes(settings_of(prompt_tokens=8000, completion_tokens=64, prompts=1))
    many = sizes(settings_of(prompt_tokens=8000, completion_tokens=64, prompts=16))
    assert many["student sampling cache"] > 1.2 * few["student sampling cache"]


def test_a_float32_base_has_a_merged_copy() -> None:
    student = replace(STUDENT, width=4, quantization="none")
    found = sizes(settings_of(student=student))
    assert found["student merged copy"] == 4 * QWEN3_8B.linear_parameters
    assert "student merged copy" not in sizes(settings_of())
    on_cpu = memory_parts(settings_of(replace(student, device="cpu")))
    (copy,) = (part for part in on_cpu if part.name == "merged copy")
    assert copy.stage == "until the update"
    others = [part for part in on_cpu if part is not copy]
    by_stage = {
        s: sum(p.bytes for p in others if p.stage == s)
        for s in ("always", "sampling", "teacher", "update")
    }
    lasting = by_stage["always"]
    assert least(on_cpu) == lasting + copy.bytes
    assert peak(on_cpu)[0] == lasting + max(
        by_stage["update"], copy.bytes + max(by_stage["sampling"], by_stage["teacher"])
    )


def test_the_head_is_there_once_more_while_answers_are_drawn_on_a_cpu() -> None:
    plain = replace(STUDENT, quantization="none", width=4)
    head = 4 * QWEN3_8B.vocabulary_rows * QWEN3_8B.hidden
    assert sizes(settings_of(plain))["student packed head"] == head
    small = replace(plain, shape=replace(QWEN3_8B, vocabulary_rows=32))
    for student in (STUDENT, replace(plain, device="cuda:0"), small):
        assert "student packed head" not in sizes(settings_of(student))


def test_sequences_end_at_the_window_and_passes_hold_at_least_one() -> None:
    assert settings_of(window=2000).sequence_tokens == 2000
    assert settings_of(micro_batch_tokens=10).update_pass.tokens == 5096
    assert settings_of(micro_batch_tokens=10**9).update_pass.tokens == 16 * 5096


def test_the_peak_is_what_one_stage_holds_beside_the_rest() -> None:
    parts = memory_parts(settings_of())
    always = sum(part.bytes for part in parts if part.stage == "always")
    update = sum(part.bytes for part in parts if part.stage == "update")
    assert peak(parts) == (always + update, "update")
    sampling = memory_parts(
        settings_of(micro_batch_tokens=1, window=2000, rollouts=1000, cache_budget=60 * GB)
    )
    assert peak(sampling)[1] == "sampling"


def on_vllm(engine: int = round(0.5 * 24 * GB), **changes: Any) -> MemorySettings:
    """A 4-bit student and teacher of 8 B on a card of 24 GB, the student sampled by vLLM."""
    student = replace(STUDENT, engine=engine)
    return settings_of(student, replace(TEACHER, quantization="nf4"), window=4096, **changes)


def test_a_vllm_is_weights_cache_and_buffers() -> None:
    found = sizes(on_vllm())
    engine = [size for name, size in found.items() if name.startswith("student vLLM")]
    assert sum(engine) == 12 * GB + ENGINE_CONTEXT
    assert found["student vLLM weights"] == found["student weights"]
    assert found["student vLLM KV cache"] == 12 * GB - found["student weights"] - ENGINE_WORK
    assert "student sampling cache" not in found
    owners = {part.owner for part in memory_parts(on_vllm()) if part.name.startswith("vLLM")}
    assert owners == {"sampler"}
    assert not any("vLLM" in name for name in sizes(on_vllm(engine=0))), "on another machine"


def test_a_vllm_needs_one_longest_sequence_at_least() -> None:
    settings = on_vllm(rollouts=1)
    one = 4096 * 147_456  # 36 layers x 2 x 1024 values x 2 bytes a token
    weights = round(settings.student.weight_bytes)
    assert engine_least(settings.student, settings) == weights + one + ENGINE_WORK
    assert sizes(on_vllm(engine=1, rollouts=1))["student vLLM KV cache"] == one


def test_in_turns_only_the_largest_counts() -> None:
    parts = memory_parts(on_vllm())
    by_owner = {
        owner: [part for part in parts if part.owner == owner]
        for owner in ("sampler", "teacher", "trainer")
    }
    most, stage = peak_in_turns(parts, ["sampler", "teacher", "trainer"])
    alone = {owner: peak(own)[0] for owner, own in by_owner.items()}
    assert most == max(
        alone["sampler"], alone["teacher"] + ENGINE_ASLEEP, alone["trainer"] + ENGINE_ASLEEP
    )
    assert stage in ("sampling", "update", "teacher")
    assert most < peak(parts)[0]
    assert peak_in_turns(parts, []) == peak(parts)
    always = [part for part in parts if part.owner == "teacher"]
    two = peak_in_turns(parts, ["sampler", "trainer"])[0]
    assert two == max(
        peak([*always, *by_owner["sampler"]])[0],
        peak([*always, *by_owner["trainer"]])[0] + ENGINE_ASLEEP,
    )


def test_the_least_leaves_out_what_long_answers_need() -> None:
    parts = memory_parts(on_vllm())
    assert least(parts) == sum(part.bytes for part in parts if part.stage == "always")
    turns = ["sampler", "teacher", "trainer"]
    assert least(parts, turns) == 12 * GB + ENGINE_CONTEXT
    assert least(parts, turns) <= peak_in_turns(parts, turns)[0]


def test_no_head_buffer_grows_with_the_tokens_times_vocabulary() -> None:
    few, many = settings_of(micro_batch_tokens=8192), settings_of(micro_batch_tokens=65536)
    growth = sizes(many)["student head buffers"] - sizes(few)["student head buffers"]
    assert growth == (many.update_pass.tokens - few.update_pass.tokens) * 4096 * (2 + 4)


def test_advice_is_sorted_and_true() -> None:
    settings = settings_of(recomputed_layers=0)
    advice = savings(settings, "cpu")
    before = peak(memory_parts(settings))[0]
    peaks = [after for _, after in advice]
    assert peaks == sorted(peaks)
    assert all(after < before for after in peaks)
    named = dict(advice)
    checkpointed = replace(settings, recomputed_layers=36)
    assert named["trainer.gradient_checkpointing: true"] == peak(memory_parts(checkpointed))[0]
    assert "teacher.quantization: nf4" in named
    assert "model.quantization: nf4" not in named


def test_advice_is_about_the_models_on_the_device() -> None:
    elsewhere = settings_of(teacher=replace(TEACHER, device="cuda:1"))
    advice = dict(savings(elsewhere, "cuda:1"))
    assert "teacher.quantization: nf4" in advice
    assert not any(text.startswith("sampler") for text in advice)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_cover_what_autograd_keeps(
    tiny_model_dir: Callable[..., Path], checkpointing: bool
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tokens, layers = 256, 4
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir(num_hidden_layers=layers))
    shape = shape_of(model)
    adapted = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    if checkpointing:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()
    weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ids = torch.zeros(2, tokens // 2, dtype=torch.long)
        adapted.get_base_model().get_decoder()(input_ids=ids, use_cache=False)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in kept)}
    measured = sum(size for pointer, size in storages.items() if pointer not in weights)

    settings = settings_of(
        student=replace(STUDENT, shape=shape, width=4, quantization="none"),
        teacher=None,
        rank=16,
        rollouts=2,
        prompt_tokens=64,
        completion_tokens=64,
        micro_batch_tokens=tokens,
        scoring_tokens=tokens,
        recomputed_layers=layers if checkpointing else 0,
    )
    estimate = sizes(settings)["student activations"]
    if checkpointing:  # one layer is recomputed at a time, on top of what the whole pass keeps
        whole = sizes(replace(settings, recomputed_layers=0))["student activations"]
        measured += whole / layers / 1.3
    assert measured <= estimate <= 1.7 * measured


def test_a_second_teacher_is_one_more_of_the_same() -> None:
    one = settings_of()
    code = replace(TEACHER, role=replace(ROLES["teacher"], name="teacher/code"))
    two = replace(one, models={**one.models, "teacher/code": code})
    added = memory_parts(two)[len(memory_parts(one)) :]
    assert [part.model for part in added] == ["teacher/code"] * 2
    alone = [part for part in memory_parts(one) if part.model == "teacher"]
    assert [part.bytes for part in added] == [part.bytes for part in alone]


def test_of_several_teachers_one_scores_at_a_time_and_in_turns_one_is_there() -> None:
    alone = settings_of()
    own = {
        name: replace(TEACHER, role=replace(ROLES["teacher"], name=name, part=name))
        for name in ("teacher/math", "teacher/code")
    }
    parts = memory_parts(replace(alone, models={"student": STUDENT, **own}))
    weights, activations = TEACHER.weight_bytes, sizes(alone)["teacher activations"]
    of_teachers = [part for part in parts if part.owner in own]
    assert peak(of_teachers) == (round(2 * weights + activations), "teacher")
    assert peak_in_turns(of_teachers, [*own, "trainer"]) == (
        round(weights + activations),
        "teacher",
    )
    assert peak_in_turns(parts, [*own, "trainer"]) == peak_in_turns(
        memory_parts(alone), ["teacher", "trainer"]
    )


def test_a_step_has_the_hidden_states_of_one_teacher_for_each_token() -> None:
    one = settings_of(hidden_states=True)
    code = replace(TEACHER, role=replace(ROLES["teacher"], name="teacher/code"))
    two = replace(one, models={**one.models, "teacher/code": code})
    most, stage = peak(memory_parts(two))
    assert stage == "update"
    assert most == peak(memory_parts(one))[0] + round(code.weight_bytes)
