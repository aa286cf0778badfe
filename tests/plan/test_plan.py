from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.models.folders import model_folder
from tests.plan.test_rendered import make_config, prompts_of

from rnow.config import Config
from rnow.errors import ConfigError, DataError, ModelError
from rnow.models.activations import CPU_MICRO_BATCH_TOKENS
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel
from rnow.models.shape import ModelShape
from rnow.plan import choices as choices_module
from rnow.plan import plan as plan_module
from rnow.plan.choices import teacher_answers
from rnow.plan.devices import MARGIN, DeviceInfo, describe_device
from rnow.plan.plan import Plan, build_plan, choose_residencies
from rnow.plan.prepare import Prepared
from rnow.plan.rendered import render_prompts
from rnow.plan.roles import RunModel, roles_of
from rnow.plan.sources import plan_source
from rnow.plan.view import plan_view
from rnow.project.dataset import Dataset
from rnow.project.project import Project
from rnow.types import Prompt

ROOMY = DeviceInfo(device="cpu", name="CPU, 2 cores", total_bytes=16 * 10**9, free_bytes=12 * 10**9)
CRAMPED = replace(ROOMY, free_bytes=10**6)


@pytest.fixture
def models(tmp_path: Path) -> tuple[ResolvedModel, ResolvedModel]:
    model_folder(tmp_path / "student")
    model_folder(tmp_path / "teacher", num_hidden_layers=3)
    return tuple(  # type: ignore[return-value]
        resolve_model(name, key=f"{name}.path", base_dir=tmp_path)
        for name in ("student", "teacher")
    )


def prepared_of(
    config: Config,
    dataset: Dataset,
    models: tuple[ResolvedModel, ResolvedModel],
    tools: dict[str, Any] | None = None,
) -> Prepared:
    found = {
        name: RunModel(role=role, resolved=resolved)
        for (name, role), resolved in zip(roles_of(config).items(), models, strict=True)
    }
    project = Project(folder=models[0].local_dir.parent, dataset=dataset)
    return Prepared(
        config=config,
        project=project,
        models=found,
        rendered=render_prompts(config, dataset.prompts, found),
        source=plan_source(config, project),
        tools=tools or {},
    )


def plan_of(
    models: tuple[ResolvedModel, ResolvedModel],
    prompts: list[Prompt] | None = None,
    device: DeviceInfo | None = ROOMY,
    run_dir: Path | None = None,
    **sections: Any,
) -> Plan:
    cpu = {"device": "cpu"}
    sections["model"] = {"path": "student"} | cpu | sections.get("model", {})
    sections["teacher"] = {"path": "teacher"} | cpu | sections.get("teacher", {})
    config = make_config(**sections)
    dataset = Dataset(
        prompts=tuple(prompts or prompts_of(*["reverse: cat"] * 10)), warnings=("odd rows",)
    )
    return build_plan(
        prepared_of(config, dataset, models),
        run_dir=run_dir or models[0].local_dir.parent / "runs" / "first",
        devices={"cpu": device} if device else None,
    )


def test_counts(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    plan = plan_of(
        models,
        data={"batch_size": 4, "group_size": 3},
        trainer={"num_epochs": 2, "updates_per_batch": 2},
        rollout={"max_tokens": 50},
    )
    assert (plan.prompts, plan.steps, plan.rollouts, plan.updates) == (10, 4, 48, 8)
    assert (plan.completion_tokens, plan.max_total_tokens) == (50, 2400)
    assert plan.warnings == ("odd rows",)
    assert plan.stop_ids == (98,)
    assert plan_of(models, trainer={"max_steps": 1}).steps == 1
    assert plan_of(models, trainer={"max_steps": 99}).steps == 2


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [
        ({}, 2),
        ({"num_epochs": 3}, 6),
        ({"num_epochs": 3, "max_steps": 5}, 5),
        ({"max_steps": 9}, 2),
    ],
)
def test_the_plan_counts_steps_as_the_run_does(
    models: tuple[ResolvedModel, ResolvedModel], trainer: dict[str, Any], steps: int
) -> None:
    dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 10)))
    config = make_config(trainer=trainer, data={"batch_size": 4})
    project = Project(folder=models[0].local_dir.parent, dataset=dataset)
    assert plan_source(config, project).num_steps == steps
    assert plan_of(models, trainer=trainer, data={"batch_size": 4}).steps == steps


def test_an_answer_is_never_longer_than_the_window_leaves(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    plan = plan_of(models, prompts_of("cat", "a longer prompt"), data={"batch_size": 2})
    shortest = plan.longest_prompt - len("a longer prompt") + len("cat")
    assert plan.completion_tokens == 512 - shortest


def test_sizes(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    plan = plan_of(models, model={"qlora_rank": 4}, trainer={"keep_checkpoints": 3})
    # q 64->64, k and v 64->32, o 64->64, gate and up 64->128, down 128->64, in two layers
    lora = 2 * 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192)
    assert plan.trainable_parameters == lora
    assert plan.checkpoint_bytes == 3 * 4 * lora
    assert plan.checkpoints_bytes == 4 * plan.checkpoint_bytes
    assert plan.disk_free_bytes > 0
    student, teacher = plan.models.values()
    assert teacher.parameters > student.parameters
    assert (student.dtype, student.quantization) == ("float32", "none")
    names = [f"{part.model} {part.name}" for part in plan.devices[0].parts]
    assert "teacher weights" in names
    assert "student merged copy" in names
    quantised = plan_of(models, model={"quantization": "nf4", "dtype": "bfloat16"})
    student = quantised.models["student"]
    assert (student.dtype, student.quantization) == ("bfloat16", "nf4")
    assert "student merged copy" not in [f"{p.model} {p.name}" for p in quantised.devices[0].parts]


def test_settings_change_the_parts_they_name(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    def sizes(**sections: Any) -> dict[str, int]:
        plan = plan_of(models, **sections)
        return {f"{part.model} {part.name}": part.bytes for part in plan.devices[0].parts}

    base = sizes()
    for name, sections in {
        "student activations": {"trainer": {"gradient_checkpointing": True}},
        "teacher activations": {"trainer": {"micro_batch_tokens": 600}},
        "student sampling cache": {"sampler": {"batch_memory_gb": 0.001}},
        "student optimizer": {"model": {"qlora_rank": 2}},
        "teacher weights": {"teacher": {"quantization": "nf4"}},
    }.items():
        assert sizes(**sections)[name] < base[name]


def test_a_plan_that_does_not_fit_says_what_to_change(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    assert plan_of(models).fits
    assert plan_of(models).devices[0].advice == ()
    plan = plan_of(models, device=CRAMPED, trainer={"gradient_checkpointing": False})
    assert not plan.fits
    assert not plan.devices[0].fits
    assert any(
        line.startswith("trainer.gradient_checkpointing: true") for line in plan.devices[0].advice
    )


def test_the_tokens_of_a_pass_follow_from_the_model_and_not_from_what_is_free(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def held(plan: Plan) -> int:
        parts = {f"{part.model} {part.name}": part.bytes for part in plan.devices[0].parts}
        return parts["student activations"]

    never = {"gradient_checkpointing": False}
    whole = held(plan_of(models, trainer=never))
    monkeypatch.setattr("rnow.models.activations.CPU_ACTIVATION_BYTES", whole // 2)
    monkeypatch.setattr("rnow.models.activations.LEAST_MICRO_BATCH_TOKENS", 1)
    half = held(plan_of(models, trainer=never))
    assert 0.4 * whole < half <= 0.52 * whole, "the mask of rows comes on top"
    assert held(plan_of(models, trainer=never, device=CRAMPED)) == half
    asked = held(plan_of(models, trainer=never | {"micro_batch_tokens": CPU_MICRO_BATCH_TOKENS}))
    assert asked == whole


def test_as_few_layers_are_recomputed_as_fit(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    def plan(free: int, wanted: Any = "auto") -> Plan:
        device = replace(ROOMY, free_bytes=free)
        settings = {"gradient_checkpointing": wanted, "micro_batch_tokens": 4096}
        return plan_of(models, device=device, trainer=settings, teacher={"residency": "resident"})

    roomy = ROOMY.free_bytes
    none, some, everything = plan(roomy), plan(roomy, False), plan(roomy, True)
    assert none.recomputed_layers == some.recomputed_layers == 0
    assert none.devices[0].parts == some.devices[0].parts
    assert everything.recomputed_layers == everything.layers == 2
    assert "activations of 2 of 2 layers" in shown(everything)
    # One of two costs least: its own activations are needed when the other's are no longer there.
    tight = plan(none.devices[0].peak_bytes - 1)
    assert tight.fits
    assert tight.recomputed_layers == 1
    assert "activations of 1 of 2 layers" in shown(tight)
    assert tight.devices[0].peak_bytes < none.devices[0].peak_bytes
    assert not plan(none.devices[0].peak_bytes - 1, False).fits, "the config says none"
    assert plan(everything.devices[0].peak_bytes, True).recomputed_layers == 2
    hopeless = plan(tight.devices[0].peak_bytes // 4)
    assert not hopeless.fits
    assert hopeless.recomputed_layers == 2, "all that can be done"


def test_a_model_that_recomputes_nothing_is_not_asked_to(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan_module.shape_of
    monkeypatch.setattr(
        plan_module, "shape_of", lambda model: replace(found(model), recomputes="none")
    )
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM cannot compute") as refusal:
        plan_of(models, trainer={"gradient_checkpointing": True})
    assert refusal.value.where == "trainer.gradient_checkpointing"
    assert plan_of(models, trainer={"gradient_checkpointing": "auto"}).recomputed_layers == 0


def test_only_what_is_always_held_makes_a_plan_hopeless(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    whole = {"residency": "resident"}
    device = plan_of(models).devices[0]
    lasting = ("always", "until the update")
    always = sum(part.bytes for part in device.parts if part.stage in lasting)
    tight = plan_of(models, device=replace(ROOMY, free_bytes=always), teacher=whole)
    assert not tight.fits
    assert not tight.devices[0].hopeless
    assert "may not fit with the longest answers" in shown(tight)
    hopeless = plan_of(models, device=replace(ROOMY, free_bytes=always - 1), teacher=whole)
    assert hopeless.devices[0].hopeless
    assert "does not fit: at most" in shown(hopeless)


def test_transcripts_and_journal_count_on_the_disk(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(models, data={"batch_size": 2, "group_size": 3}, rollout={"max_tokens": 50})
    # An int32 and a float64 in base64, and four letters of the answer.
    assert plan.journal_bytes >= 2 * 6 * 50 * ((4 + 8) * 4 / 3 + 4)
    assert plan.transcripts_bytes >= plan.rollouts * 50 * 20
    assert plan.disk_bytes == plan.checkpoints_bytes + plan.journal_bytes + plan.transcripts_bytes
    usage = namedtuple("usage", "total used free")
    free = plan.checkpoints_bytes + 10
    monkeypatch.setattr("rnow.plan.devices.shutil.disk_usage", lambda _: usage(free, 0, free))
    tight = plan_of(models, data={"batch_size": 2, "group_size": 3}, rollout={"max_tokens": 50})
    assert not tight.disk_suffices
    assert not tight.fits
    assert "may not suffice for the longest answers" in shown(tight, 300)


def test_a_full_disk_does_not_fit(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("rnow.plan.devices.shutil.disk_usage", lambda _: usage(100, 99, 1))
    plan = plan_of(models)
    assert not plan.disk_suffices
    assert not plan.fits
    assert "set output_dir to another disk" in shown(plan, 200)


def test_what_is_to_be_downloaded_is_said_with_the_disk_that_takes_it(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    assert plan_of(models).download is None
    assert "to download" not in shown(plan_of(models))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://ann:key@hub.example")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("rnow.plan.devices.shutil.disk_usage", lambda _: usage(0, 0, 9 * 10**9))
    coming = tuple(
        replace(model, revision="c0ffee", missing_bytes=size)
        for model, size in zip(models, (4 * 10**9, 3 * 10**9), strict=True)
    )
    plan = plan_of(coming)
    assert plan.download is not None
    assert plan.download.models == {"student": 4 * 10**9, "teacher": 3 * 10**9}
    assert plan.fits
    text = " ".join(shown(plan, 300).split())
    assert "to download: student 4.0 GB, teacher 3.0 GB, from https://hub.example into" in text
    assert "9.0 GB free" in text
    download = plan.to_dict()["download"]
    assert isinstance(download, dict)
    assert download["free_bytes"] == 9 * 10**9
    large = (coming[0], replace(coming[1], missing_bytes=6 * 10**9))
    plan = plan_of(large)
    assert not plan.fits
    text = " ".join(shown(plan, 300).split())
    assert "does not fit; free space in" in text
    assert "export HF_HOME=/path/on/it" in text
    # What comes takes room that the run would have had on the same disk.
    full = (replace(coming[0], missing_bytes=9 * 10**9), models[1])
    assert not plan_of(full).disk_suffices
    # One model in two roles comes once; of a teacher behind a server only the tokenizer does.
    same = (coming[0], replace(coming[0], local_dir=coming[1].local_dir))
    plan = plan_of(same)
    assert plan.download is not None
    assert plan.download.models == {"student": 4 * 10**9}
    plan = plan_of(coming, teacher={"backend": "vllm", "url": "http://localhost:1/v1"})
    assert plan.download is not None
    assert plan.download.models == {"student": 4 * 10**9}


def test_two_devices_are_planned_apart(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = DeviceInfo(device="cuda:0", name="a card", total_bytes=80 * 10**9, free_bytes=79 * 10**9)
    config = make_config(
        model={"path": "student", "device": "cuda:0"}, teacher={"path": "teacher", "device": "cpu"}
    )
    dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 4)))
    plan = build_plan(
        prepared_of(config, dataset, models),
        run_dir=Path("runs/x"),
        devices={"cuda:0": card, "cpu": ROOMY},
    )
    on_card, on_cpu = plan.devices
    assert {part.model for part in on_card.parts} == {"student"}
    assert {part.model for part in on_cpu.parts} == {"teacher"}
    student = plan.models["student"]
    assert (student.quantization, student.dtype) == ("nf4", "bfloat16")


@pytest.mark.parametrize("device", [{}, {"device": "cuda"}, {"device_map": "auto"}])
def test_one_card_under_two_names_is_one_device(
    models: tuple[ResolvedModel, ResolvedModel],
    monkeypatch: pytest.MonkeyPatch,
    device: dict[str, str],
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = DeviceInfo(device="cuda:0", name="a card", total_bytes=80 * 10**9, free_bytes=10**5)
    config = make_config(
        model={"path": "student", "device": "cuda:0"}, teacher={"path": "teacher"} | device
    )
    dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 4)))
    plan = build_plan(
        prepared_of(config, dataset, models), run_dir=Path("runs/x"), devices={"cuda:0": card}
    )
    (only,) = plan.devices
    assert {part.model for part in only.parts} == {"student", "teacher"}
    assert not only.fits


@pytest.fixture
def on_a_card(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Plan]:
    """``on_a_card(gigabytes, **sections)``: the plan of a run whose student vLLM samples, on one card that is free."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def make(gigabytes: float, **sections: Any) -> Plan:
        size = int(gigabytes * 1e9)
        card = DeviceInfo(device="cuda:0", name="a card", total_bytes=size, free_bytes=size)
        vllm = {"backend": "vllm"} | sections.pop("sampler", {})
        config = make_config(
            model={"path": "student", "device": "cuda"} | sections.pop("model", {}),
            teacher={"path": "teacher", "device": "cuda:0"} | sections.pop("teacher", {}),
            sampler=vllm,
            **sections,
        )
        dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 4)))
        cards = {f"cuda:{index}": replace(card, device=f"cuda:{index}") for index in range(4)}
        cards["device_map auto"] = replace(card, device="device_map auto")
        return build_plan(
            prepared_of(config, dataset, models), run_dir=Path("runs/x"), devices=cards
        )

    return make


def test_a_large_card_holds_all_at_once(on_a_card: Callable[..., Plan]) -> None:
    (card,) = on_a_card(24).devices
    assert card.residency == "resident"
    assert card.fits
    assert set(card.peaks) == {"resident", "time_shared"}
    assert card.peak_bytes == card.peaks["resident"]
    assert card.peaks["resident"] >= 0.35 * 24e9
    text = shown(on_a_card(24))
    assert "student vLLM KV cache" in text
    assert "recomputed      no activations" in text
    assert "all at once (residency: resident): 9.3 GB, fits  <- chosen" in text
    assert "in turns (residency: time_shared): 19.9 GB, fits" in text
    assert "all at once with teacher.quantization: nf4: 9.3 GB, fits" in text


def test_a_4_bit_teacher_is_one_way_to_have_all_at_once(on_a_card: Callable[..., Plan]) -> None:
    def smaller(**teacher: Any) -> int | None:
        (card,) = on_a_card(24, teacher=teacher).devices
        return card.with_nf4_teacher

    (card,) = on_a_card(24).devices
    found = smaller()
    assert found is not None
    assert found < card.peaks["resident"]
    (with_it,) = on_a_card(24, teacher={"quantization": "nf4"}).devices
    assert found == with_it.peaks["resident"]
    assert smaller(quantization="nf4") is None
    assert smaller(backend="vllm") is None


def test_a_small_card_is_shared_in_turns(on_a_card: Callable[..., Plan]) -> None:
    """A trainer of 3.3 GB beside 35% of 6 GB and a context is more than 95% of the card; 80% alone is not."""
    large = {
        "model": {"qlora_rank": 110_000},
        "rollout": {"max_tokens": 8},
        "trainer": {"micro_batch_tokens": 1},
    }
    (card,) = on_a_card(6, **large).devices
    assert card.residency == "time_shared"
    assert card.fits
    assert card.peak_bytes == card.peaks["time_shared"]
    text = shown(on_a_card(6, **large))
    assert "in turns (residency: time_shared): 5.5 GB, fits  <- chosen" in text
    assert "main memory for what sleeps: 2.7 GB of" in text


def test_a_vllm_that_gets_too_little_is_told(on_a_card: Callable[..., Plan]) -> None:
    """It takes a gigabyte before anything else: 35% of this card is less."""
    forced = on_a_card(2.6, residency="resident").devices[0]
    assert forced.residency == "resident"
    assert not forced.fits
    assert forced.peaks == {}
    (line,) = forced.lacking
    assert line.startswith("sampler.gpu_memory_utilization gives vLLM 910 MB; its weights and one")


def test_a_card_too_small_for_either_says_so(on_a_card: Callable[..., Plan]) -> None:
    plan = on_a_card(1.0)
    assert not plan.fits
    assert plan.devices[0].hopeless
    assert "sampler.gpu_memory_utilization gives vLLM" in shown(plan, 200)


def test_residency_is_what_the_config_says(on_a_card: Callable[..., Plan]) -> None:
    assert on_a_card(24, residency="time_shared").devices[0].residency == "time_shared"
    assert on_a_card(24, residency="resident").devices[0].peaks == {}


@pytest.mark.parametrize(
    "sections",
    [
        {"sampler": {"url": "http://127.0.0.1:1"}, "teacher": {"url": "http://127.0.0.1:2"}},
        {"sampler": {"tensor_parallel_size": 2}, "teacher": {"device": "cpu"}},
        {"sampler": {"backend": "transformers"}, "teacher": {"device_map": "auto"}},
    ],
)
def test_who_shares_with_nobody_takes_no_turns(
    on_a_card: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    plan = on_a_card(24, **sections, residency="time_shared")
    assert {device.residency for device in plan.devices} == {"resident"}
    assert all(device.peaks == {} for device in plan.devices)


def test_what_is_spread_has_cards_of_its_own(
    on_a_card: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    sections: dict[str, Any] = {"sampler": {"tensor_parallel_size": 2}}
    with pytest.raises(ConfigError, match="0 of the 1 cards here are used by nothing else"):
        on_a_card(24, **sections)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    own, spread = on_a_card(24, **sections).devices
    assert (own.info.device, spread.info.device) == ("cuda:0", "cuda:1")
    assert not any("vLLM" in part.name for part in own.parts)
    held = {part.name: part.bytes for part in spread.parts}
    share = held["vLLM weights"] + held["vLLM KV cache"] + held["vLLM buffers"]
    assert share == pytest.approx(0.9 * 24e9)
    (whole,) = on_a_card(24).devices
    alone = {part.name: part.bytes for part in whole.parts if part.model == "student"}
    assert held["vLLM weights"] == pytest.approx(alone["vLLM weights"] / 2, abs=1)


def test_a_loaded_teacher_takes_turns_with_an_embedded_sampler(
    on_a_card: Callable[..., Plan],
) -> None:
    plan = on_a_card(24, sampler={"backend": "transformers"}, residency="time_shared")
    (card,) = plan.devices
    assert {part.owner for part in card.parts} == {"trainer", "teacher", None}
    (waiting,) = [part for part in card.parts if part.owner is None]
    assert (waiting.name, waiting.bytes) == ("hidden states of the step", 0), "in main memory"
    assert waiting.host > 0
    assert card.peaks["time_shared"] < card.peaks["resident"]


def test_turns_are_decided_by_the_conversations_of_an_agent(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer is short here, a conversation with tools fills the window: the run must plan for what it will do."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = make_config(
        model={"path": "student", "device": "cuda"},
        teacher={"path": "teacher", "device": "cuda:0"},
        sampler={"backend": "transformers", "batch_memory_gb": 1e-4},
        rollout={"max_tokens": 8},
        trainer={"micro_batch_tokens": 1},
    )
    dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 4)))

    def turns(size: int, tools: dict[str, Any]) -> frozenset[str]:
        card = DeviceInfo(device="cuda:0", name="a card", total_bytes=size, free_bytes=size)
        monkeypatch.setattr(plan_module, "describe_device", lambda name, *cards: card)
        prepared = prepared_of(config, dataset, models, tools)
        plan = build_plan(prepared, run_dir=Path("runs/x"), devices={"cuda:0": card})
        found = choose_residencies(prepared, Path("runs/x")).turns
        assert bool(found) == (plan.devices[0].residency == "time_shared"), "as the check said"
        return found

    one_answer = build_plan(
        prepared_of(config, dataset, models),
        run_dir=Path("runs/x"),
        devices={"cuda:0": DeviceInfo(device="cuda:0", name="", total_bytes=1, free_bytes=1)},
    )
    size = round((one_answer.devices[0].peaks["resident"] + 1000) / (1 - MARGIN))
    assert turns(size, {}) == frozenset()
    assert turns(size, {"search": {}}) == {"trainer", "teacher"}


def test_what_sleeps_needs_main_memory(
    on_a_card: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    (roomy,) = on_a_card(24, residency="time_shared").devices
    assert roomy.fits
    weights = sum(p.bytes for p in roomy.parts if p.name.endswith("weights"))
    lora = sum(p.bytes for p in roomy.parts if p.name in ("adapter", "optimizer"))
    (waiting,) = [p.host for p in roomy.parts if p.name == "hidden states of the step"]
    pinned = roomy.host_bytes - lora - waiting
    assert weights < pinned < 2 * weights, "rounded up to powers of two"
    monkeypatch.setattr("rnow.plan.plan.cpu_memory", lambda: (10**6, roomy.host_bytes - 1))
    plan = on_a_card(24, residency="time_shared")
    assert plan.devices[0].hopeless
    assert "main memory does not hold what sleeps" in shown(plan, 200)
    assert on_a_card(24).fits, "all at once needs none of it"


def test_a_run_whose_sleepers_have_no_room_is_refused(
    models: tuple[ResolvedModel, ResolvedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = DeviceInfo(device="cuda:0", name="a card", total_bytes=24 * 10**9, free_bytes=23 * 10**9)
    monkeypatch.setattr(plan_module, "describe_device", lambda name, *cards: card)
    config = make_config(
        model={"path": "student", "device": "cuda"},
        teacher={"path": "teacher", "device": "cuda:0"},
        residency="time_shared",
    )
    dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 4)))
    prepared = prepared_of(config, dataset, models)
    assert choose_residencies(prepared, Path("runs/x")).turns == {"trainer", "teacher"}
    monkeypatch.setattr(plan_module, "cpu_memory", lambda: (10**6, 10**3))
    with pytest.raises(ConfigError, match="does not fit main memory") as caught:
        choose_residencies(prepared, Path("runs/x"))
    assert caught.value.where == "residency"


def test_turns_on_a_cpu_are_refused(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    with pytest.raises(ConfigError, match="CUDA card only") as refusal:
        plan_of(models, residency="time_shared")
    assert refusal.value.where == "residency"
    assert plan_of(models, residency="resident").devices[0].peaks == {}


def test_a_large_teacher_answers_the_held_out_prompts_only_where_it_is_served() -> None:
    shape = ModelShape(
        architecture="x", parameters=32 * 10**9, linear=(), layers=64, hidden=5120, kv_width=1024,
        vocabulary_rows=151_936,
    )  # fmt: skip
    small = replace(shape, parameters=10**9)

    def answers(shape: ModelShape, asked: Any = "auto", **teacher: Any) -> bool:
        section = {"path": "teacher"} | teacher
        config = make_config(teacher=section, evaluation={"teacher": asked})
        served = roles_of(config)["teacher"].backend == "vllm"
        return teacher_answers(config, shape, served=served)

    assert not answers(shape)
    assert answers(small)
    assert answers(shape, backend="vllm")
    assert answers(shape, url="http://h:1")
    assert answers(shape, asked=True)
    assert not answers(small, asked=False)


def test_the_plan_says_what_the_teachers_own_answers_cost(
    on_a_card: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = {"data": {"val_split": 0.25}}
    assert not any("the teacher itself" in notice for notice in on_a_card(24).notices)
    held = tuple(prompts_of(*["cat"] * 50))
    real = prepared_of

    def with_held_out(config: Config, dataset: Dataset, *others: Any) -> Prepared:
        return real(config, replace(dataset, held_out=held), *others)

    monkeypatch.setitem(globals(), "prepared_of", with_held_out)
    (notice,) = on_a_card(24, **held_out, rollout={"max_tokens": 400}).notices
    assert notice.startswith("the teacher itself is evaluated, once: 200 answers")
    # 3 layers, 1.5 ms each, 400 tokens, all answers in one batch
    assert "of at most 400 tokens, about 0.0 h with transformers" in notice
    monkeypatch.setattr(choices_module, "SMALL_TEACHER", 1)
    (notice,) = on_a_card(24, **held_out, rollout={"max_tokens": 400}).notices
    assert "evaluation.teacher: true would" in notice


def test_a_batch_larger_than_the_dataset_is_refused(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    with pytest.raises(DataError, match="batch_size is 11"):
        plan_of(models, data={"batch_size": 11})


def test_a_device_that_does_not_exist_is_refused(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    with pytest.raises(ModelError):
        plan_of(models, model={"device": "quantum"})


def test_this_machine_has_memory(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    info = describe_device("cpu")
    assert 0 < info.free_bytes <= info.total_bytes
    assert plan_of(models, device=None).devices[0].info.name.startswith("CPU, ")


def test_nothing_is_written(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    plan = plan_of(models)
    assert not Path(plan.run_dir).exists()


def test_json_holds_plain_values(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    values = json.loads(json.dumps(plan_of(models, device=CRAMPED).to_dict(), allow_nan=False))
    assert values["fits"] is False
    assert values["devices"][0]["fits"] is False
    assert values["student"]["parameters"] > 0
    assert values["teacher"]["path"] == "teacher"
    assert "models" not in values
    assert values["devices"][0]["parts"][0] == {
        "model": "student", "name": "weights", "stage": "always", "owner": "trainer",
        "bytes": values["devices"][0]["parts"][0]["bytes"],
    }  # fmt: skip


# --- on a terminal ------------------------------------------------------------------------------------------------


def shown(plan: Plan, width: int = 80) -> str:
    console = Console(width=width, color_system=None, force_terminal=True)
    with console.capture() as capture:
        console.print(plan_view(plan, console))
    return capture.get()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("device", [ROOMY, CRAMPED])
def test_the_view_fits_its_width(
    models: tuple[ResolvedModel, ResolvedModel], width: int, device: DeviceInfo
) -> None:
    plan = plan_of(
        models,
        device=device,
        run_dir=Path("runs/first"),
        trainer={"gradient_checkpointing": False},
    )
    text = shown(plan, width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "…" not in text
    assert " MB" in text
    for part in (
        "student",
        "10; the longest has",
        "student sampling cache",
        "warning: odd rows",
        "per checkpoint",
    ):
        assert part in text
    assert ("does not fit" in text) == (device is CRAMPED)
    assert ("gradient_checkpointing: true" in text) == (device is CRAMPED)


def test_the_view_says_for_whom_a_prompt_is_computed_once(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    plan = plan_of(models)
    assert "computed once (student, teacher)" in shown(plan)
    why = "its attention goes by distances"
    teacher = replace(plan.models["teacher"], separate=why)
    apart = shown(replace(plan, models={**plan.models, "teacher": teacher}), 120)
    assert f"computed once (student); once for each answer (teacher): {why}" in apart
    served = replace(teacher, separate=None)
    alone = shown(replace(plan, models={**plan.models, "teacher": served}))
    assert "computed once (student)" in alone
    assert why not in alone


def test_int8_has_a_row_for_each_sample(models: tuple[ResolvedModel, ResolvedModel]) -> None:
    plan = plan_of(models, teacher={"quantization": "int8"})
    assert "LLM.int8" in (plan.models["teacher"].separate or "")
    assert plan.models["student"].separate == ""


def test_text_from_the_config_cannot_control_the_terminal(
    models: tuple[ResolvedModel, ResolvedModel],
) -> None:
    plan = plan_of(models)
    hostile = replace(
        plan,
        warnings=("\x1b[2J[bold]x[/bold]",),
        models={"student": replace(plan.models["student"], path="[red]\x07")},
    )
    text = shown(hostile)
    assert "\x1b[2J" not in text
    assert "\x07" not in text
    assert "[bold]x[/bold]" in text
    assert "[red]" in text
