"""What a vLLM server is started with, and how a lost or deaf one shows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from rnow.errors import InputError, ModelError
from rnow.sampling.vllm_server import (
    GivenServer,
    ManagedServer,
    VllmServerSampler,
    padded_ids,
    run_apart,
    server_command,
)
from rnow.serving.process import free_port


def student(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_padded_ids_are_those_the_head_has_and_the_tokenizer_has_not(tmp_path: Path) -> None:
    assert list(padded_ids(student(tmp_path, {"vocab_size": 12}), 10)) == [10, 11]
    assert list(padded_ids(student(tmp_path, {"vocab_size": 10}), 10)) == []
    nested = student(tmp_path, {"text_config": {"vocab_size": 11}})
    assert list(padded_ids(nested, 10)) == [10]
    with pytest.raises(ModelError, match="vocab_size"):
        padded_ids(student(tmp_path, {}), 10)


def command(**changes: Any) -> list[str]:
    settings: dict[str, Any] = {
        "dtype": "bfloat16",
        "quantization": "none",
        "max_model_len": None,
        "gpu_memory_utilization": 0.5,
        "max_num_seqs": 64,
        "tensor_parallel_size": 2,
        "enforce_eager": False,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "max_lora_rank": 16,
        "cpu": False,
    }
    return server_command(Path("/models/a b"), **settings | changes)


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_the_command_line_says_what_training_needs() -> None:
    arguments = command()
    assert value(arguments, "--model") == "/models/a b"
    assert value(arguments, "--logprobs-mode") == "processed_logprobs"
    assert value(arguments, "--max-lora-rank") == "16"
    assert value(arguments, "--generation-config") == "vllm"
    assert value(arguments, "--tensor-parallel-size") == "2"
    assert {"--enable-lora", "--enable-prefix-caching"} <= set(arguments)
    assert not {"--quantization", "--max-model-len", "--enforce-eager"} & set(arguments)


def test_the_command_line_follows_the_settings() -> None:
    arguments = command(
        quantization="nf4",
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        trust_remote_code=True,
    )
    assert value(arguments, "--quantization") == "bitsandbytes"
    assert value(arguments, "--max-model-len") == "512"
    assert {"--enforce-eager", "--no-enable-prefix-caching", "--trust-remote-code"} <= set(
        arguments
    )


@pytest.mark.parametrize(("window", "expected"), [(512, "4096"), (9000, "9000")])
def test_on_a_cpu_prompts_are_not_cut(window: int, expected: str) -> None:
    arguments = command(cpu=True, max_model_len=window)
    assert "--no-enable-chunked-prefill" in arguments
    assert value(arguments, "--max-num-batched-tokens") == expected
    assert "--no-enable-chunked-prefill" not in command()


def test_on_a_cpu_the_models_own_window_counts_when_none_is_set(tmp_path: Path) -> None:
    folder = student(tmp_path, {"vocab_size": 9, "max_position_embeddings": 7000})
    settings = {"dtype": "auto", "quantization": "none", "max_model_len": None}
    rest = {"gpu_memory_utilization": 0.9, "max_num_seqs": 8, "tensor_parallel_size": 1}
    flags = {"enforce_eager": True, "enable_prefix_caching": True, "trust_remote_code": False}
    arguments = server_command(folder, **settings, **rest, **flags, max_lora_rank=8, cpu=True)  # type: ignore[arg-type]
    assert value(arguments, "--max-num-batched-tokens") == "7000"


def test_the_key_is_not_on_the_command_line(tmp_path: Path) -> None:
    sampler = VllmServerSampler(
        student(tmp_path, {"vocab_size": 12}),
        vocabulary=10,
        work_dir=tmp_path,
        log=tmp_path / "log",
    )
    backend = sampler._backend
    assert isinstance(backend, ManagedServer)
    assert len(backend._key) >= 32
    assert backend._key not in " ".join(backend._command)
    assert backend._bias == {10: -100.0, 11: -100.0}


def test_a_given_server_that_is_not_there(tmp_path: Path) -> None:
    sampler = VllmServerSampler(
        student(tmp_path, {"vocab_size": 12}),
        vocabulary=10,
        work_dir=tmp_path / "adapters",
        log=tmp_path / "log",
        url=f"http://127.0.0.1:{free_port()}",
        start_timeout=0.6,
    )
    assert isinstance(sampler._backend, GivenServer)
    with sampler, pytest.raises(ModelError, match=r"127\.0\.0\.1"):
        sampler.start().result()


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="http"):
        VllmServerSampler(
            student(tmp_path, {"vocab_size": 12}),
            vocabulary=10,
            work_dir=tmp_path,
            log=tmp_path / "log",
            url="localhost:8000",
        )


def test_run_apart_works_inside_and_outside_a_loop() -> None:
    async def seven() -> int:
        await asyncio.sleep(0)
        return 7

    async def inside() -> int:
        return run_apart(seven())

    assert run_apart(seven()) == 7
    assert asyncio.run(inside()) == 7
