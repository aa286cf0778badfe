"""What a vLLM server is started with, and how a lost or deaf one shows."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving import scripted

from rnow.errors import InputError, ModelError
from rnow.processes.process import free_port
from rnow.sampling.adapter_files import AdapterFiles
from rnow.sampling.vllm_backend import EngineGone
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_server import (
    GivenServer,
    ManagedServer,
    VllmServerSampler,
    padded_ids,
    run_apart,
    server_arguments,
)
from rnow.sampling.vllm_settings import VllmSettings
from rnow.types import Adapter


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


def settings_of(folder: Path, **changes: Any) -> VllmSettings:
    values = {"local_dir": folder, "vocabulary": 10, "work_dir": folder / "adapters"}
    return VllmSettings(**values | {"log": folder / "log"} | changes)


def arguments_of(*, cpu: bool = False, **changes: Any) -> list[str]:
    return server_arguments(settings_of(Path("/models/a b"), **changes), cpu=cpu)


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_the_command_line_says_what_training_needs() -> None:
    arguments = arguments_of(max_lora_rank=12, tensor_parallel_size=2)
    assert value(arguments, "--logprobs-mode") == "processed_logprobs"
    assert value(arguments, "--max-lora-rank") == "16"
    assert value(arguments, "--tensor-parallel-size") == "2"
    assert {"--enable-lora", "--enable-prefix-caching"} <= set(arguments)
    off = {"--quantization", "--max-model-len", "--enforce-eager", "--enable-sleep-mode"}
    assert not off & set(arguments)


def test_the_command_line_follows_the_settings() -> None:
    arguments = arguments_of(
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
    arguments = arguments_of(cpu=True, max_model_len=window)
    assert "--no-enable-chunked-prefill" in arguments
    assert value(arguments, "--max-num-batched-tokens") == expected
    assert "--no-enable-chunked-prefill" not in arguments_of()


def test_on_a_cpu_the_models_own_window_counts_when_none_is_set(tmp_path: Path) -> None:
    folder = student(tmp_path, {"vocab_size": 9, "max_position_embeddings": 7000})
    arguments = server_arguments(settings_of(folder), cpu=True)
    assert value(arguments, "--max-num-batched-tokens") == "7000"


SCRIPTED = (sys.executable, scripted.__file__)


def managed(folder: Path, *, cpu: bool = False, **changes: Any) -> ManagedServer:
    """A server of ours with a scripted program in vLLM's place, which takes arguments that it does not know."""
    settings = settings_of(student(folder, {"vocab_size": 12}), start_timeout=20.0, **changes)
    return ManagedServer(
        settings, cpu=cpu, command=SCRIPTED, padding=[10, 11], request_timeout=5.0, max_concurrency=4
    )  # fmt: skip


def test_a_server_of_ours_serves_behind_a_key(tmp_path: Path) -> None:
    backend = managed(tmp_path)
    backend.start()
    try:
        assert backend._bias == {10: -100.0, 11: -100.0}
        (model,) = asyncio.run(backend._client(5.0).models())
        assert model.id == "student"
        assert model.root == str(tmp_path)
        for pid in backend.pids():
            assert backend._server._key not in Path(f"/proc/{pid}/cmdline").read_text()
    finally:
        backend.stop()
    assert not backend.pids()


def test_a_server_of_ours_sleeps_where_there_is_a_card(tmp_path: Path) -> None:
    backend = managed(tmp_path, enable_sleep=True)
    assert backend.supports_sleep
    backend.start()
    try:
        (pid, *_) = backend.pids()
        environment = Path(f"/proc/{pid}/environ").read_text()
        assert "VLLM_SERVER_DEV_MODE=1" in environment
        assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in environment
        assert "--enable-sleep-mode" in Path(f"/proc/{pid}/cmdline").read_text()
        client = backend._client(5.0)
        backend.sleep()
        assert asyncio.run(client.is_sleeping())
        backend.wake()
        assert not asyncio.run(client.is_sleeping())
    finally:
        backend.stop()
    with pytest.raises(EngineGone):
        backend.sleep()


@pytest.mark.parametrize(("cpu", "asked"), [(True, True), (False, False)])
def test_a_server_that_cannot_sleep_is_not_told_to(tmp_path: Path, cpu: bool, asked: bool) -> None:
    backend = managed(tmp_path, cpu=cpu, enable_sleep=asked)
    assert not backend.supports_sleep
    assert "--enable-sleep-mode" not in server_arguments(
        settings_of(tmp_path, enable_sleep=asked), cpu=cpu
    )


def test_an_adapter_on_a_server_of_ours_is_exchanged_across_a_sleep(tmp_path: Path) -> None:
    """Level 1 keeps the list of adapters: what is loaded after waking has another name, and the old one goes."""
    backend = managed(tmp_path, enable_sleep=True)
    sampler = VllmSampler(
        backend,
        vocabulary=10,
        max_lora_rank=8,
        files=AdapterFiles(tmp_path / "adapters"),
        probe=(1, 2, 3),
    )
    adapter = Adapter(tensors={"a": torch.ones(2)}, config={"r": 4})

    def served() -> list[str]:
        models = asyncio.run(backend._client(5.0).models())
        return [model.id for model in models if model.parent]

    async def nap() -> None:
        await sampler.sleep()
        await sampler.wake()

    with sampler:
        sampler.load_policy(adapter, version=1)
        (before,) = served()
        asyncio.run(nap())
        (after,) = served()
        assert before != after
        assert sampler.probe_gaps["base"].mean == 0.0


def test_a_server_that_does_not_start_shows_its_log(tmp_path: Path) -> None:
    settings = settings_of(student(tmp_path, {"vocab_size": 12}), start_timeout=20.0)
    backend = ManagedServer(
        settings,
        cpu=False,
        command=(sys.executable, "-c", "import sys; sys.exit('no room for the KV cache')"),
        padding=[],
        request_timeout=5.0,
        max_concurrency=1,
    )
    with pytest.raises(EngineGone, match="its server did not start") as failure:
        backend.start()
    assert "no room for the KV cache" in failure.value.details


def test_a_given_server_that_is_not_there(tmp_path: Path) -> None:
    settings = settings_of(student(tmp_path, {"vocab_size": 12}), start_timeout=0.6)
    sampler = VllmServerSampler(settings, url=f"http://127.0.0.1:{free_port()}")
    assert isinstance(sampler._backend, GivenServer)
    with sampler, pytest.raises(ModelError, match=r"127\.0\.0\.1"):
        sampler.start().result()


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="http"):
        VllmServerSampler(settings_of(student(tmp_path, {"vocab_size": 12})), url="localhost:8000")


def test_run_apart_works_inside_and_outside_a_loop() -> None:
    async def seven() -> int:
        await asyncio.sleep(0)
        return 7

    async def inside() -> int:
        return run_apart(seven())

    assert run_apart(seven()) == 7
    assert asyncio.run(inside()) == 7
