"""docs/configuration.md is what the schema says, and its minimal config runs as far as the config goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnow.config import load_config
from rnow.config.docs import COMMAND, MINIMAL, main, render
from rnow.config.schema import LISTS, SECTION_NAMES, SECTIONS, Schema

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), f"run: {COMMAND}"


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == render()
    with pytest.raises(SystemExit, match="usage"):
        main([])


def test_every_key_has_a_sentence() -> None:
    for model in (*LISTS.values(), *SECTIONS.values()):
        for key, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{key}"
            assert field.description.endswith("."), f"{model.__name__}.{key}"
    for key, field in Schema.model_fields.items():
        assert field.description or key in SECTION_NAMES, key


def test_the_minimal_config_is_valid(tmp_path: Path) -> None:
    assert MINIMAL in PAGE.read_text(encoding="utf-8")
    path = tmp_path / "config.yml"
    path.write_text(MINIMAL)
    loaded = load_config(path)
    assert loaded.warnings == []
    assert loaded.config.trainer.num_epochs == 1


def test_what_is_said_of_defaults_is_what_is_done() -> None:
    from rnow.models import activations
    from rnow.sampling.transformers import CPU_BATCH_BYTES, GPU_BATCH_FRACTION

    page = PAGE.read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    gib = 2**30
    cpu = f"on a CPU {activations.CPU_MICRO_BATCH_TOKENS} or what {activations.CPU_ACTIVATION_BYTES // 2**20} MiB"
    gpu = f"on a GPU {activations.GPU_MICRO_BATCH_TOKENS} or what {activations.GPU_ACTIVATION_BYTES // gib} GiB"
    assert cpu in lines["micro_batch_tokens"]
    assert gpu in lines["micro_batch_tokens"]
    assert GPU_BATCH_FRACTION == 1 / 4
    cache = f"{CPU_BATCH_BYTES // 2**30} GiB on a CPU, a quarter of the card on a GPU"
    assert cache in lines["batch_memory_gb"]
    assert "since the last save" in lines["save_minutes"]


def test_an_adapter_is_not_offered_as_the_student() -> None:
    """rnow.models.resolve refuses a folder that holds only an adapter."""
    description = SECTIONS["model"].model_fields["path"].description or ""
    assert description == "The student: a HuggingFace id or a local folder."
