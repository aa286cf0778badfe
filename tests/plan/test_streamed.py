"""Which teachers the plan streams, and what it says of that."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from tests.models.folders import model_folder
from tests.plan.test_plan import prepared_of
from tests.plan.test_rendered import make_config, prompts_of

from rnow.config import Config
from rnow.errors import ModelError
from rnow.models.resolved import ResolvedModel
from rnow.plan import plan as plan_module
from rnow.plan.devices import DeviceInfo
from rnow.plan.plan import Plan, build_plan, choose_residencies
from rnow.plan.prepare import Prepared
from rnow.plan.view import plan_view
from rnow.project.dataset import Dataset

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40960,
}  # fmt: skip
QWEN3_32B = QWEN3_4B | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "tie_word_embeddings": False,
}  # fmt: skip
LAYER_32B = 5120 * 128 * (64 + 8 + 8 + 64) + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128
TABLES_32B = 2 * 151_936 * 5120 + 5120

MakePlan = Callable[..., Plan]


def folder(path: Path, shape: dict[str, Any]) -> ResolvedModel:
    """A config and a tokenizer, and no weights."""
    model_folder(path, **shape)
    (path / "model.safetensors").unlink()
    return ResolvedModel(path=path.name, local_dir=path, revision=None, weights_bytes=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResolvedModel, ResolvedModel]:
    root = tmp_path_factory.mktemp("models")
    return folder(root / "4B", QWEN3_4B), folder(root / "32B", QWEN3_32B)


@pytest.fixture(scope="module")
def measured() -> Callable[[Prepared], Any]:
    """``measure``, which takes a second at this size, once: no setting here changes its result."""
    original, kept = plan_module.measure, []

    def measure(prepared: Prepared) -> Any:
        kept.extend([] if kept else [original(prepared)])
        return kept[0]

    return measure


def card_of(gigabytes: float) -> DeviceInfo:
    size = int(gigabytes * 1e9)
    return DeviceInfo(
        device="cuda:0", name="a card", total_bytes=size, free_bytes=size - 600_000_000
    )


@pytest.fixture
def prepared(
    models: tuple[ResolvedModel, ResolvedModel],
    measured: Callable[[Prepared], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Prepared]:
    """configs/one-24gb-gpu.yml with a teacher of 32B in bfloat16, on a machine with a card, vLLM and 128 GB."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("rnow.plan.choices.find_spec", lambda name: object())
    monkeypatch.setattr("rnow.plan.plan.cpu_memory", lambda: (128 * 10**9, 128 * 10**9))
    monkeypatch.setattr(plan_module, "measure", measured)

    def make(teacher: dict[str, Any] | None = None, **sections: Any) -> Prepared:
        values = yaml.safe_load((CONFIGS / "one-24gb-gpu.yml").read_text())
        values["model"]["path"] = "4B"
        values["trainer"]["learning_rate"] = 1e-4  # YAML 1.1 takes 1e-4 for a text
        values["teacher"] = {"path": "32B", "dtype": "bfloat16"} | (teacher or {})
        config = Config(**values | sections)
        return prepared_of(config, Dataset(prompts=tuple(prompts_of(*["cat"] * 8))), models)

    return make


def plan_on(gigabytes: float, prepared: Prepared) -> Plan:
    return build_plan(prepared, run_dir=Path("runs/x"), devices={"cuda:0": card_of(gigabytes)})


def shown(plan: Plan) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(plan_view(plan, console))
    return console.export_text()


def test_a_teacher_of_64_gb_fits_a_card_of_24(prepared: Callable[..., Prepared]) -> None:
    plan = plan_on(24, prepared())
    (card,) = plan.devices
    assert card.fits
    assert card.residency == "resident", "it needs no turns"
    streaming = plan.models["teacher"].streaming
    assert streaming is not None
    assert streaming.bytes == 64 * LAYER_32B * 2
    assert streaming.seconds == pytest.approx(streaming.bytes / 25e9)
    held = {part.name: part.bytes for part in card.parts if part.model == "teacher"}
    assert held["weights, two layers at a time"] == 2 * (2 * LAYER_32B + TABLES_32B)
    text = shown(plan)
    assert "streamed: 62.4 GB a step from main memory, 2.5 s at 25 GB/s" in text
    assert "teacher weights, two layers at a time" in text
    plain = plan.to_dict()["teacher"]
    assert isinstance(plain, dict)
    assert plain["streaming"]["bytes"] == streaming.bytes


def test_files_that_main_memory_cannot_keep_come_from_the_disk(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "cpu_memory", lambda: (64 * 10**9, 60 * 10**9))
    assert "62.4 GB a step from the disk, 21 s at 3 GB/s" in shown(plan_on(24, prepared()))


def test_where_it_fits_it_stays_in_memory(prepared: Callable[..., Prepared]) -> None:
    assert plan_on(141, prepared()).models["teacher"].streaming is None
    assert plan_on(141, prepared({"residency": "streamed"})).models["teacher"].streaming


@pytest.mark.parametrize(
    "sections",
    [
        {"teacher": {"residency": "resident"}},
        {"evaluation": {"teacher": True}},
        {"teacher": {"trust_remote_code": True}},
    ],
)
def test_what_may_not_be_streamed_is_not(
    prepared: Callable[..., Prepared], sections: dict[str, Any]
) -> None:
    plan = plan_on(24, prepared(**sections))
    assert plan.models["teacher"].streaming is None
    assert plan.devices[0].hopeless
    may = "trust_remote_code" not in sections.get("teacher", {})
    advice = any("teacher.residency: streamed" in line for line in plan.devices[0].advice)
    assert advice == (may and "evaluation" not in sections)


def test_a_card_too_small_for_either_changes_nothing(prepared: Callable[..., Prepared]) -> None:
    plan = plan_on(6, prepared())
    assert not plan.fits
    assert plan.models["teacher"].streaming is None


def test_the_run_does_what_the_check_said(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    for gigabytes, streamed in ((24, {"teacher"}), (141, set())):
        monkeypatch.setattr(plan_module, "describe_device", lambda *_, g=gigabytes: card_of(g))
        found = choose_residencies(prepared(), Path("runs/x"))
        assert (found.streamed, found.turns) == (streamed, frozenset())


def test_hidden_states_of_the_whole_step_wait_between_layers(
    prepared: Callable[..., Prepared],
) -> None:
    def activations(group_size: int) -> int:
        data = {"batch_size": 8, "group_size": group_size}
        (card,) = plan_on(24, prepared({"residency": "streamed"}, data=data)).devices
        return next(p.bytes for p in card.parts if (p.model, p.name) == ("teacher", "activations"))

    plan = plan_on(24, prepared())
    longest = plan.longest_prompt + plan.completion_tokens
    # As they are and as they began, and the rotary positions of a head of 128.
    assert activations(8) - activations(4) == 32 * longest * 2 * (5120 + 128) * 2


def test_on_a_cpu_too(tmp_path: Path) -> None:
    both = model_folder(tmp_path / "s"), model_folder(tmp_path / "t", num_hidden_layers=40)
    resolved = tuple(
        ResolvedModel(path=path.name, local_dir=path, revision=None, weights_bytes=0)
        for path in both
    )
    config = make_config(
        model={"path": "s", "device": "cpu"},
        teacher={"path": "t", "device": "cpu"},
        rollout={"max_tokens": 8},
    )
    dataset = Dataset(prompts=tuple(prompts_of(*["cat"] * 4)))

    def on(free: int, **trainer: Any) -> Plan:
        cpu = DeviceInfo(device="cpu", name="CPU", total_bytes=10**10, free_bytes=free)
        section = config.trainer.model_copy(update=trainer)
        changed = config.model_copy(update={"trainer": section})
        return build_plan(
            prepared_of(changed, dataset, resolved),  # type: ignore[arg-type]
            run_dir=Path("runs/x"),
            devices={"cpu": cpu},
        )

    roomy = on(10**9)
    assert roomy.models["teacher"].streaming is None
    recomputed = on(10**9, gradient_checkpointing=True)
    # Layers are recomputed first: a little less than that needs.
    assert on(roomy.devices[0].peak_bytes - 1).models["teacher"].streaming is None
    tight = on(recomputed.devices[0].peak_bytes - 1)
    assert tight.fits
    assert tight.models["teacher"].streaming is not None
    assert tight.devices[0].peak_bytes < roomy.devices[0].peak_bytes


def test_a_teacher_without_layers_that_can_be_found_is_refused_by_name(
    prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared({"residency": "streamed"})
    shapes = {n: replace(s, unstreamed="it has none") for n, s in plan_module.measure(made)[0].items()}  # fmt: skip
    monkeypatch.setattr(plan_module, "measure", lambda prepared: (shapes, 0))
    with pytest.raises(ModelError, match="'32B' cannot be streamed") as caught:
        plan_on(24, made)
    assert caught.value.where == "teacher.residency"
    assert "nf4" in str(caught.value.fix)
