"""``benchmarks/one_card.py`` on the CPU, tiny: every line of it but the card's own memory counter."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.benchmarks.scripts import load_benchmark


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_benchmark("one_card")


@pytest.fixture(scope="module")
def models(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_card")
    script.write_models(folder, tiny=True)
    return folder


def check(row: dict[str, Any]) -> None:
    assert row["steps"] == 2
    for stage in ("rollout", "teacher", "update"):
        assert row["tokens_per_s"][stage] > 0
        assert 0.05 < row["peak_gb"][stage] < 64
        assert row["seconds"][stage] > 0
    assert {"starting", "between steps"} <= row["peak_gb"].keys()
    assert all(math.isfinite(value) for value in row["teacher_kl"])
    assert len(set(row["teacher_kl"])) == 2, "something was learned"
    json.dumps(row)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_case(script: ModuleType, models: Path, quantization: str) -> None:
    row = script.measure(
        models, quantization, "resident", tiny=True, backend="transformers", steps=2
    )
    check(row)
    assert max(map(abs, row["sampler_trainer_kl"])) < 0.05


@pytest.mark.vllm
@pytest.mark.slow
def test_a_case_on_vllm(
    script: ModuleType, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for name in ("student", "teacher"):
        (tmp_path / name).symlink_to(models / name)
    check(script.measure(tmp_path, "none", "resident", tiny=True, backend="vllm", steps=2))


@pytest.mark.whole
def test_the_command(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Taking turns needs a card: the case fails, says why, and the others are measured all the same."""
    options = "--tiny --steps 1 --backend transformers --quantization none --residency"
    arguments = [script.__file__, *options.split(), "time_shared", "resident"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 1
    failed, worked = capsys.readouterr().out.split("none, resident:")
    assert "none, time_shared:\n    failed: ConfigError" in failed
    assert "tokens/s" in worked


def test_the_shapes_are_those_of_qwen3(script: ModuleType) -> None:
    """Parameters of the released models, from their shapes alone."""
    random_models = sys.modules["random_models"]
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for shape, billions in ((random_models.QWEN3_06B, 0.596), (random_models.QWEN3_4B, 4.022)):
        with torch.device("meta"):
            model = Qwen3ForCausalLM(Qwen3Config(**shape))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count / 1e9 == pytest.approx(billions, abs=0.001)
    assert len(random_models.build_tokenizer(1000)) == 1000
