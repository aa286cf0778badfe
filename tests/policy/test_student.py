"""Updates, state and weights of the policy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes import FakePolicy
from tests.policy.batches import (
    MASKS,
    VOCABULARY,
    assert_equal,
    assert_same_gradients,
    gradients,
    grouped,
    keep_apart,
    make_batch,
    weights,
)
from tests.policy.conftest import MakePolicy
from transformers import AutoConfig, AutoModelForCausalLM

from rnow.algorithm.batching import build_batch
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.algorithm.records import Batch, MicroBatch, SampledEvidence
from rnow.algorithm.value import Valued, ValueHead
from rnow.disk.checkpoints import CheckpointStore, export_adapter
from rnow.errors import RnowError
from rnow.models import activations
from rnow.models.loading import take_apart
from rnow.models.shape import shape_of
from rnow.policy import student
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.protocols import Policy

TEACHER_ONLY: dict[str, Any] = {"kl_penalty_coef": 1.0}


def _base(policy: LoraPolicy) -> dict[str, torch.Tensor]:
    return {
        name: value.clone()
        for name, value in policy.model.state_dict().items()
        if "lora_" not in name
    }


def _moments(policy: LoraPolicy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict()["moments"].items()}


# ---- learning ---------------------------------------------------------------------------------------------------


def test_a_new_adapter_is_the_identity_and_depends_on_the_seed_alone(
    make_policy: MakePolicy,
) -> None:
    torch.manual_seed(1)
    one = make_policy(started=False)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = make_policy(started=False)
    assert torch.equal(torch.get_rng_state(), before), "the global random state was touched"
    assert_equal(weights(one), weights(two))
    for name, tensor in weights(one).items():
        assert tensor.dtype == torch.float32
        assert tensor.any() == ("lora_A" in name)


def test_every_linear_layer_but_the_head_is_adapted(make_policy: MakePolicy) -> None:
    names = weights(make_policy()).keys()
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 2 * len(layers)  # two layers, A and B each


def test_after_two_updates_every_lora_parameter_changed_and_no_base_parameter(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(started=False, objective=TEACHER_ONLY)
    base, start = _base(policy), weights(policy)
    policy.update(make_batch())
    for name, tensor in weights(policy).items():
        # B starts at 0, so the first gradient of A is 0 and only B moves.
        assert torch.equal(tensor, start[name]) == ("lora_A" in name), name
    policy.update(make_batch())
    for name, tensor in weights(policy).items():
        assert not torch.equal(tensor, start[name]), name
    assert_equal(_base(policy), base)
    assert policy.updates == 2


@pytest.mark.parametrize("loss_fn", ["ppo", "importance_sampling"])
def test_updates_bring_the_student_to_its_teacher(make_policy: MakePolicy, loss_fn: str) -> None:
    """On answers it would have given itself (ratio 1), better-judged tokens gain and worse-judged ones lose."""
    policy = make_policy(
        objective=TEACHER_ONLY | {"loss_fn": loss_fn}, optimizer={"learning_rate": 1e-3}
    )
    batch = _on_policy(policy, make_batch())
    before = policy._accumulate(batch).by_sample()["logprobs"]
    policy.update(batch)
    after = policy._accumulate(batch).by_sample()["logprobs"]
    pull = 0.0
    for item in batch.samples:
        assert item.evidence is not None
        gap = item.evidence.teacher_logprobs - before[item.sample.id]
        pull += float((gap * (after[item.sample.id] - before[item.sample.id])).sum())
    assert pull > 1.0


def _on_policy(policy: LoraPolicy, batch: Batch) -> Batch:
    """The same batch as if the policy had sampled it just now."""
    live = policy._accumulate(batch).by_sample()["logprobs"]
    samples = []
    for item in batch.samples:
        values = torch.zeros(len(item.sample.token_ids))
        values[torch.tensor(item.sample.loss_mask)] = live[item.sample.id]
        sample = replace(item.sample, sampler_logprobs=tuple(values.tolist()))
        samples.append(replace(item, sample=sample))
    return build_batch(samples)


def test_several_updates_per_batch_are_as_many_updates_of_that_batch(
    make_policy: MakePolicy,
) -> None:
    batch = make_batch()
    twice = make_policy(objective=TEACHER_ONLY, optimizer={"updates_per_batch": 2})
    result = twice.update(batch)
    singly = make_policy(objective=TEACHER_ONLY)
    first, second = singly.update(batch), singly.update(batch)

    assert_equal(weights(twice), weights(singly))
    assert twice.updates == 2
    # What the batch was like is told from before the first update; how far it was pushed, from the worst pass.
    for name in ("loss", "teacher_kl", "sampler_trainer_kl", "entropy"):
        assert result.metrics[name] == first.metrics[name]
    assert_equal(result.streams["logprobs"], first.streams["logprobs"])
    assert not torch.equal(
        first.streams["logprobs"]["dataset_0/0#0"], second.streams["logprobs"]["dataset_0/0#0"]
    )
    for name in ("ratio/max", "clip_fraction", "kl_clamp_fraction"):
        assert result.metrics[name] == max(first.metrics[name], second.metrics[name])


def test_the_second_update_of_an_on_policy_batch_is_the_first_with_a_ratio(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(objective=TEACHER_ONLY)
    batch = _on_policy(policy, make_batch())
    first = policy.update(batch)
    assert first.metrics["ratio/max"] == pytest.approx(1.0, abs=1e-5)
    assert first.metrics["clip_fraction"] == 0.0
    second = policy.update(batch)
    assert second.metrics["ratio/max"] > 1.05
    assert second.metrics["teacher_kl"] != first.metrics["teacher_kl"]


def test_the_learning_rate_follows_the_schedule(make_policy: MakePolicy) -> None:
    optimizer = {
        "warmup_updates": 2,
        "schedule": "linear",
        "total_updates": 4,
        "learning_rate": 0.01,
    }
    policy = make_policy(objective=TEACHER_ONLY, optimizer=optimizer)
    rates = [policy.update(make_batch()).metrics["lr"] for _ in range(4)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])
    before = weights(policy)
    assert policy.update(make_batch()).metrics["lr"] == 0.0
    assert_equal(weights(policy), before)


def test_the_optimizer_uses_the_rate_that_is_reported(make_policy: MakePolicy) -> None:
    """Adam's first step is the learning rate times g / (|g| + 1e-8)."""
    whole = make_policy(objective=TEACHER_ONLY)
    warming = make_policy(objective=TEACHER_ONLY, optimizer={"warmup_updates": 4})
    start = weights(whole)
    for policy in (whole, warming):
        policy.update(make_batch())
    for name, tensor in weights(warming).items():
        torch.testing.assert_close(
            tensor - start[name], (weights(whole)[name] - start[name]) / 4, rtol=0, atol=1e-6
        )


def test_the_gradient_is_clipped_to_the_norm_and_reported_before(make_policy: MakePolicy) -> None:
    loose = make_policy(objective=TEACHER_ONLY, optimizer={"max_grad_norm": 1e9})
    tight = make_policy(objective=TEACHER_ONLY, optimizer={"max_grad_norm": 1e-3})
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients(loose, make_batch()).values()))
    assert norm > 0.01
    for policy in (loose, tight):
        assert policy.update(make_batch()).metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    moments = _moments(loose)
    for name, tensor in _moments(tight).items():
        power = 2 if name.endswith("exp_avg_sq") else 1
        torch.testing.assert_close(
            tensor, moments[name] * (1e-3 / norm) ** power, rtol=1e-3, atol=1e-12
        )


# ---- metrics ----------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_the_loss_tokens_of_the_batch(make_policy: MakePolicy) -> None:
    objective = {"kl_penalty_coef": 0.5, "kl_clamp": 1.0, "reward_coef": 0.3}
    policy = make_policy(objective=objective, micro_batch_tokens=30)
    batch = make_batch()
    result = policy.update(batch)
    kls: dict[str, list[float]] = {"dataset_0": [], "dataset_1": []}
    ratios, gaps, advantages, losses = [], [], [], []
    for item in batch.samples:
        on = torch.tensor(item.sample.loss_mask)
        live = result.streams["logprobs"][item.sample.id].double()
        assert item.evidence is not None
        kl = live - item.evidence.teacher_logprobs.double()
        gap = torch.tensor(item.sample.sampler_logprobs).double()[on] - live
        advantage = 0.3 * item.reward_advantage - 0.5 * kl.clamp(-1, 1)
        ratio = torch.exp(-gap)
        kls[item.sample.dataset] += kl.tolist()
        gaps += gap.tolist()
        advantages += advantage.tolist()
        ratios += ratio.tolist()
        capped = ratio.clamp(max=10.0)
        losses += (-torch.minimum(capped * advantage, ratio.clamp(0.8, 1.2) * advantage)).tolist()
    both = torch.tensor(kls["dataset_0"] + kls["dataset_1"])
    expected = {
        "teacher_kl": both.mean(),
        "teacher_kl/dataset_0": torch.tensor(kls["dataset_0"]).mean(),
        "teacher_kl/dataset_1": torch.tensor(kls["dataset_1"]).mean(),
        "teacher_kl/k3": (torch.exp(-both) - 1 + both).mean(),
        "kl_clamp_fraction": (both.abs() > 1.0).double().mean(),
        "sampler_trainer_kl": torch.tensor(gaps).mean(),
        "ratio/mean": torch.tensor(ratios).mean(),
        "ratio/max": torch.tensor(ratios).max(),
        "advantage/mean": torch.tensor(advantages).mean(),
        "advantage/std": torch.tensor(advantages).std(correction=0),
        "loss": torch.tensor(losses).mean(),
    }
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value.item(), rel=1e-4), name
    assert 0 < result.metrics["kl_clamp_fraction"] < 1
    assert 0 < result.metrics["entropy"] < math.log(100)
    assert 0 < result.metrics["clip_fraction"] < 1


def test_without_a_teacher_there_is_no_kl_metric(make_policy: MakePolicy) -> None:
    policy = make_policy(objective={"reward_coef": 1.0, "kl_penalty_coef": 0.0})
    metrics = policy.update(make_batch(teacher=False)).metrics
    assert not [name for name in metrics if "kl" in name and name != "sampler_trainer_kl"]


# ---- things that go wrong ---------------------------------------------------------------------------------------


def _with_nan_evidence(batch: Batch) -> Batch:
    first = batch.samples[0]
    assert first.evidence is not None
    scores = torch.full_like(first.evidence.teacher_logprobs, float("nan"))
    broken = replace(first, evidence=SampledEvidence(teacher_logprobs=scores))
    return build_batch([broken, *batch.samples[1:]])


def test_a_non_finite_loss_leaves_no_trace(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=TEACHER_ONLY)
    untouched = make_policy(objective=TEACHER_ONLY)
    for each in (policy, untouched):
        each.update(make_batch())
    before, moments = weights(policy), _moments(policy)

    result = policy.update(_with_nan_evidence(make_batch()))
    assert result.skipped
    assert policy.updates == 1
    assert_equal(weights(policy), before)
    assert_equal(_moments(policy), moments)

    assert not policy.update(make_batch()).skipped
    untouched.update(make_batch())
    assert_equal(weights(policy), weights(untouched))


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped_too(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=TEACHER_ONLY)
    parameter = next(iter(policy._parameters.values()))
    handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(policy)
    result = policy.update(make_batch())
    assert result.skipped
    assert math.isfinite(result.metrics["loss"])
    assert_equal(weights(policy), before)
    assert _moments(policy) == {}
    handle.remove()
    assert not policy.update(make_batch()).skipped


def test_a_fault_in_the_second_update_keeps_the_first(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=TEACHER_ONLY, optimizer={"updates_per_batch": 3})
    calls = [0]

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return gradient * (float("nan") if calls[0] == 2 else 1.0)

    next(iter(policy._parameters.values())).register_hook(spoil)
    result = policy.update(make_batch())
    once = make_policy(objective=TEACHER_ONLY)
    once.update(make_batch())
    assert result.skipped
    assert policy.updates == 1
    assert_equal(weights(policy), weights(once))


@pytest.mark.parametrize("masks", [(), ("...", "..")], ids=["no_sample", "no_loss_token"])
def test_a_batch_without_a_loss_token_is_skipped(
    make_policy: MakePolicy, masks: tuple[str, ...]
) -> None:
    policy = make_policy()
    before = weights(policy)
    result = policy.update(make_batch(masks))
    assert result.skipped
    assert dict(result.metrics) == {}
    assert policy.updates == 0
    assert_equal(weights(policy), before)


def _run_out_of_memory_above(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    fault: type[Exception] = torch.OutOfMemoryError,
) -> list[int]:
    """Refuse micro-batches of more padded tokens; the list fills with the size of each try."""
    tries: list[int] = []
    original: Callable[..., torch.Tensor] = student.hidden_rows

    def limited(lm: Any, micro: MicroBatch) -> torch.Tensor:
        tries.append(micro.token_ids.numel())
        if tries[-1] > tokens:
            raise fault(f"DefaultCPUAllocator: {tries[-1]} tokens\nsecond line")
        return original(lm, micro)

    monkeypatch.setattr(student, "hidden_rows", limited)
    return tries


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_gradient(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, fault: type[Exception]
) -> None:
    expected = gradients(make_policy(objective=TEACHER_ONLY), make_batch())
    policy = keep_apart(make_policy(objective=TEACHER_ONLY))
    tries = _run_out_of_memory_above(monkeypatch, 30, fault)
    assert_same_gradients(gradients(policy, make_batch()), expected)
    assert tries[0] == len(MASKS) * max(map(len, MASKS))
    assert tries[1] <= tries[0] // 2

    tries.clear()
    policy.update(make_batch())
    assert max(tries) <= 30, "the size that did not fit is tried again at every step"


def test_out_of_memory_halves_a_row_that_a_group_shares(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = grouped(make_batch((".........XXXX",) * 4))
    expected = gradients(keep_apart(make_policy(objective=TEACHER_ONLY)), group)
    policy = make_policy(objective=TEACHER_ONLY)
    tries = _run_out_of_memory_above(monkeypatch, 15)
    assert_same_gradients(gradients(policy, group), expected)
    assert tries == [9 + 4 * 3, 12, 12, 12, 12]  # what two share does not fit half of 21


def test_out_of_memory_half_way_keeps_nothing_of_the_first_half(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make_policy(objective=TEACHER_ONLY).update(make_batch())
    policy = make_policy(objective=TEACHER_ONLY, micro_batch_tokens=52)
    original = student.hidden_rows
    calls = [0]

    def once(lm: Any, micro: MicroBatch) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("fragmented")
        return original(lm, micro)

    monkeypatch.setattr(student, "hidden_rows", once)
    result = policy.update(make_batch())
    assert calls[0] > 3
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert result.streams["logprobs"].keys() == expected.streams["logprobs"].keys()


def test_one_sequence_that_does_not_fit_is_a_clear_error(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(objective=TEACHER_ONLY)
    before = weights(policy)
    _run_out_of_memory_above(monkeypatch, 5)
    with pytest.raises(RnowError) as caught:
        policy.update(make_batch())
    error = caught.value
    assert error.title == "Out of memory"
    assert f"one sequence of {max(map(len, MASKS))} tokens" in error.message
    assert error.why is not None
    assert "second line" not in error.why
    assert error.fix is not None
    assert "gradient_checkpointing" in error.fix
    assert_equal(weights(policy), before)
    assert policy.updates == 0


def test_a_stop_between_micro_batches_leaves_weights_and_optimizer_alone(
    make_policy: MakePolicy,
) -> None:
    polls = [0]

    def poll() -> None:
        polls[0] += 1
        if polls[0] == 3:
            raise KeyboardInterrupt

    policy = make_policy(objective=TEACHER_ONLY, micro_batch_tokens=1, poll=poll)
    untouched = make_policy(objective=TEACHER_ONLY, micro_batch_tokens=1)
    before = weights(policy)
    with pytest.raises(KeyboardInterrupt):
        policy.update(make_batch())
    assert_equal(weights(policy), before)
    assert not policy.model.training
    policy.update(make_batch())
    untouched.update(make_batch())
    assert_equal(weights(policy), weights(untouched))


# ---- state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [0, 2])
def test_a_restored_policy_continues_bit_for_bit(
    make_policy: MakePolicy, tmp_path: Path, finished: int
) -> None:
    arguments: dict[str, Any] = {
        "objective": TEACHER_ONLY,
        "optimizer": {"schedule": "cosine", "total_updates": 6, "weight_decay": 0.1},
    }
    batches = [make_batch(MASKS[i : i + 4]) for i in range(4)]
    policy = make_policy(**arguments)
    for batch in batches[:finished]:
        policy.update(batch)
    store = CheckpointStore(tmp_path, keep=2, warn=pytest.fail)
    state = policy.state_dict()
    store.save(
        finished,
        adapter=policy.adapter(),
        moments=state["moments"],
        state={"updates": state["updates"]},
    )
    checkpoint = store.latest()
    assert checkpoint is not None

    # Restored over a policy that has been elsewhere: nothing of that may stay.
    restored = make_policy(started=False, **arguments)
    restored.update(batches[3])
    restored.load_adapter(checkpoint.adapter)
    restored.load_state_dict(
        {"updates": checkpoint.state["updates"], "moments": checkpoint.moments}
    )
    assert_equal(weights(restored), weights(policy))
    for batch in batches[finished:]:
        ours, theirs = policy.update(batch), restored.update(batch)
        assert dict(ours.metrics) == dict(theirs.metrics)
    assert_equal(weights(restored), weights(policy))
    assert_equal(_moments(restored), _moments(policy))
    assert restored.updates == policy.updates == 4


def test_an_adapter_of_another_shape_is_refused(make_policy: MakePolicy) -> None:
    policy = make_policy()
    before = weights(policy)
    name = next(iter(before))
    with pytest.raises(ValueError, match="other layers"):
        policy.load_adapter({key: value for key, value in before.items() if key != name})
    with pytest.raises(ValueError, match="shape"):
        policy.load_adapter(before | {name: torch.ones(1, 1)})
    assert_equal(weights(policy), before)


def test_the_exported_adapter_loads_in_peft_and_gives_the_same_logits(
    make_policy: MakePolicy, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = make_policy(objective=TEACHER_ONLY)
    policy.update(make_batch())
    export_adapter(policy.adapter(), tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir(), dtype=torch.float32)
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        theirs = loaded(input_ids=ids).logits
        ours = policy.model(input_ids=ids).logits
    assert (ours - plain).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    config = loaded.peft_config["default"]
    assert config.base_model_name_or_path == str(tiny_model_dir())
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.0)


def test_the_adapter_s_config_is_plain_json_in_a_fixed_order(make_policy: MakePolicy) -> None:
    config = make_policy().adapter().config
    assert json.loads(json.dumps(config)) == config
    # PEFT keeps a set here, whose order changes with every process.
    assert config["target_modules"] == sorted(config["target_modules"])


def test_the_adapter_is_a_view_not_a_copy(make_policy: MakePolicy) -> None:
    policy = make_policy(objective=TEACHER_ONLY)
    adapter = policy.adapter()
    policy.update(make_batch())
    assert_equal(dict(adapter.tensors), weights(policy))
    assert not any(tensor.requires_grad for tensor in adapter.tensors.values())


@pytest.mark.parametrize("kind", ["lora", "fake"])
def test_conforms_to_the_policy_protocol(make_policy: MakePolicy, kind: str) -> None:
    policy: Policy = make_policy(objective=TEACHER_ONLY) if kind == "lora" else FakePolicy()
    assert isinstance(policy, Policy)
    before = {name: tensor.clone() for name, tensor in policy.adapter().tensors.items()}
    batch = make_batch()
    result = policy.update(batch)
    assert not result.skipped
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert result.streams["logprobs"].keys() == {item.sample.id for item in batch.samples}
    for item in batch.samples:
        assert result.streams["logprobs"][item.sample.id].shape == (sum(item.sample.loss_mask),)
    after = policy.adapter().tensors
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    state = policy.state_dict()
    assert state["updates"] == 1
    policy.load_state_dict(state)
    assert policy.state_dict()["updates"] == 1


def test_after_running_out_the_largest_pass_is_half_as_large(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = keep_apart(make_policy(micro_batch_tokens=10_000))
    batch = make_batch()
    longest = max(len(item.sample.token_ids) for item in batch.samples)
    whole = longest * len(batch.samples)
    tries = _run_out_of_memory_above(monkeypatch, whole - 1)
    policy.update(batch)
    assert tries[0] == whole
    assert max(tries[1:]) <= whole // 2, "10,000 halved would be tried in vain eight times"
    assert sum(tries[1:]) >= sum(len(item.sample.token_ids) for item in batch.samples)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_checkpoints_is_in_training_mode(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    policy = make_policy(recomputed_layers=None if checkpointing else 0)
    seen: dict[str, bool] = {}
    original = student.hidden_rows

    def watched(lm: Any, micro: MicroBatch) -> torch.Tensor:
        seen.update((name, module.training) for name, module in policy.model.named_modules())
        return original(lm, micro)

    monkeypatch.setattr(student, "hidden_rows", watched)
    policy.update(make_batch())
    training = {name for name, on in seen.items() if on}
    assert bool(training) is checkpointing
    assert not any("attn" in name or "mlp" in name or "lora" in name for name in training)
    assert not any(module.training for module in policy.model.modules()), "and none afterwards"


# ---- what is trained beside the adapter -----------------------------------------------------------------------------


def valued_policy(make_policy: MakePolicy, **optimizer: Any) -> LoraPolicy:
    plain = make_policy()
    hidden = plain.lm.head.weight.shape[1]
    inner = PolicyGradient(reward_coef=1.0, kl_penalty_coef=0.0)
    objective = Valued(objective=inner, head=ValueHead(hidden, "cpu"))
    lm = take_apart(plain.model.unload(), vocabulary=VOCABULARY)
    settings = OptimizerSettings(learning_rate=1e-3, value_learning_rate=1e-2, **optimizer)
    return LoraPolicy(
        lm, rank=4, alpha=8, seed=0, base_name="tiny", objective=objective, optimizer=settings
    )


def rewarded_batch(reward: float = 0.7) -> Batch:
    batch = make_batch()
    samples = [replace(item, reward_advantage=reward, evidence=None) for item in batch.samples]
    return build_batch(samples)


def test_a_value_head_learns_what_to_expect(make_policy: MakePolicy) -> None:
    policy = valued_policy(make_policy)
    batch = rewarded_batch()
    first = policy.update(batch).metrics
    for _ in range(60):
        last = policy.update(batch).metrics
    assert first["value/mean"] == 0.0
    assert last["value/mean"] == pytest.approx(0.7, abs=0.1)
    assert last["value/loss"] < 0.05 * first["value/loss"]


def test_it_is_saved_with_the_optimizer_and_not_in_the_adapter(make_policy: MakePolicy) -> None:
    policy = valued_policy(make_policy)
    batch = rewarded_batch()
    policy.update(batch)
    assert not any("value" in name for name in policy.adapter().tensors)
    state = {
        "updates": policy.updates,
        "moments": {name: t.clone() for name, t in policy.state_dict()["moments"].items()},
    }
    adapter = {name: t.clone() for name, t in policy.adapter().tensors.items()}
    assert state["moments"]["value_head.weight"].any()
    expected = policy.update(batch).metrics
    again = valued_policy(make_policy)
    again.load_adapter(adapter)
    again.load_state_dict(state)
    assert again.update(batch).metrics == expected
    assert_equal(weights(again), weights(policy))
    del state["moments"]["value_head.weight"]
    with pytest.raises(ValueError, match=r"no value_head\.weight"):
        again.load_state_dict(state)


def test_it_takes_as_many_tokens_as_the_plan_expects(
    make_policy: MakePolicy, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same sizes, whether weights and adapter are there or not."""
    monkeypatch.setattr(activations, "CPU_ACTIVATION_BYTES", 10**6)
    monkeypatch.setattr(activations, "LEAST_MICRO_BATCH_TOKENS", 1)
    config = AutoConfig.from_pretrained(tiny_model_dir())
    with torch.device("meta"):
        empty = shape_of(AutoModelForCausalLM.from_config(config))
    expected = activations.update_tokens(empty, width=4, rank=4, on_gpu=False)
    assert 1 < expected < activations.CPU_MICRO_BATCH_TOKENS
    assert make_policy()._micro_batch_tokens == expected
    assert make_policy(micro_batch_tokens=7)._micro_batch_tokens == 7
