"""A student behind a given server, against a scripted one: adapters, refusals, and how a lost or deaf server shows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.scripted import ROWS, VOCABULARY, ScriptedServer, changed, logprob, status

from rnow.errors import InputError, ModelError
from rnow.processes.process import free_port
from rnow.sampling import vllm_server
from rnow.sampling.adapter_files import AdapterFiles
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_server import ServerBackend, padded_ids
from rnow.sampling.vllm_settings import VllmSettings
from rnow.serving.http import Refused, ServerDown
from rnow.types import Adapter, SamplingParams

KEY = "k3y"
PARAMS = SamplingParams(max_tokens=3, stop_token_ids=(80,))
ADAPTER = Adapter(tensors={"a": torch.ones(2)}, config={"r": 4})
COOLED = 0.5


def student(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def settings_of(folder: Path, **changes: Any) -> VllmSettings:
    values = {
        "local_dir": student(folder, {"vocab_size": ROWS}),
        "vocabulary": VOCABULARY,
        "work_dir": folder / "adapters",
        "log": folder / "log",
    }
    return VllmSettings(**values | changes)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Gives processed log-probabilities: those of completions differ from those of prompts."""

    def cool(choice: dict[str, Any]) -> None:
        if drawn := choice["logprobs"]:
            drawn["token_logprobs"] = [value - COOLED for value in drawn["token_logprobs"]]

    with ScriptedServer(key=KEY) as started:
        started.always = changed(cool)
        yield started


@pytest.fixture
def backend(server: ScriptedServer, tmp_path: Path) -> ServerBackend:
    return ServerBackend(settings_of(tmp_path), url=server.url, api_key=KEY)


def test_padded_ids_are_those_the_head_has_and_the_tokenizer_has_not(tmp_path: Path) -> None:
    assert list(padded_ids(student(tmp_path, {"vocab_size": 12}), 10)) == [10, 11]
    assert list(padded_ids(student(tmp_path, {"vocab_size": 10}), 10)) == []
    nested = student(tmp_path, {"text_config": {"vocab_size": 11}})
    assert list(padded_ids(nested, 10)) == [10]
    with pytest.raises(ModelError, match="vocab_size"):
        padded_ids(student(tmp_path, {}), 10)


def test_each_adapter_replaces_the_one_before_and_goes_at_the_end(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with closing(
        VllmSampler(ServerBackend(settings_of(tmp_path), url=server.url, api_key=KEY))
    ) as sampler:
        for version in (1, 2):
            sampler.load_policy(ADAPTER, version=version)
            (name,) = set(server.models) - {"base"}
            folder = Path(server.models[name][0])
            assert folder == tmp_path / "adapters" / f"adapter-{version}"
            assert folder.stat().st_mode & 0o777 == 0o755, "its owner may be another user"
            completion = asyncio.run(sampler.complete((5, 9, 77), PARAMS, 3))
            assert completion.policy_version == version
            assert completion.token_ids == (78, 79, 80)
            assert completion.logprobs == pytest.approx(
                [logprob(t, i) - COOLED for i, t in enumerate([78, 79, 80], 3)]
            )
            body = server.asked("/v1/completions")[-1]
            assert (body["model"], body["seed"]) == (name, 3)
            assert body["logit_bias"] == {str(i): -100.0 for i in range(VOCABULARY, ROWS)}
    assert set(server.models) == {"base"}


def test_a_probe_is_scored_by_the_base_or_the_adapter(
    server: ScriptedServer, backend: ServerBackend, tmp_path: Path
) -> None:
    stored = AdapterFiles(tmp_path / "adapters").write(ADAPTER, 1)
    with pytest.raises(ServerDown, match="stopped"):
        asyncio.run(backend.probe([5, 6, 7], None))
    backend.start()
    backend.load(stored, replacing=None)
    for adapter, model in ((None, "base"), (stored, stored.name)):
        found = asyncio.run(backend.probe([5, 6, 7], adapter))
        assert found == pytest.approx([logprob(6, 1), logprob(7, 2)])
        assert server.asked("/v1/completions")[-1]["model"] == model


def test_raw_log_probabilities_are_refused(server: ScriptedServer, backend: ServerBackend) -> None:
    server.always = None
    with pytest.raises(ModelError, match="before temperature and masks") as caught:
        backend.start()
    assert "--logprobs-mode processed_logprobs" in (caught.value.fix or "")


def test_a_model_that_is_not_served(server: ScriptedServer, tmp_path: Path) -> None:
    other = ServerBackend(settings_of(tmp_path), url=server.url, api_key=KEY, served_model="other")
    with pytest.raises(ModelError, match="does not serve other") as caught:
        other.start()
    assert caught.value.where == "sampler.served_model"
    assert caught.value.details == ("it serves base",)


def test_a_server_that_cannot_load_adapters_is_told_what_it_needs(
    server: ScriptedServer, backend: ServerBackend, tmp_path: Path
) -> None:
    stored = AdapterFiles(tmp_path / "adapters").write(ADAPTER, 1)
    server.always = status(500, '{"error": {"message": "rank 64 is greater than 32"}}')
    with pytest.raises(Refused, match=r"rank 64 .* --max-lora-rank") as caught:
        backend.load(stored, replacing=None)
    assert str(stored.folder) in str(caught.value)


def test_a_server_that_forgot_the_adapter_was_restarted(
    server: ScriptedServer, backend: ServerBackend, tmp_path: Path
) -> None:
    stored = AdapterFiles(tmp_path / "adapters").write(ADAPTER, 1)
    backend.start()
    backend.load(stored, replacing=None)
    del server.models[stored.name]
    with pytest.raises(ServerDown, match="it lost the adapter"):
        asyncio.run(backend.draw((5, 9, 77), PARAMS, 1, stored))
    with pytest.raises(Refused, match="out-of-vocab"):
        asyncio.run(backend.draw((5, ROWS), PARAMS, 1, None))


def test_a_given_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "CONNECT_SECONDS", 0.6)
    backend = ServerBackend(settings_of(tmp_path), url=f"http://127.0.0.1:{free_port()}")
    with closing(VllmSampler(backend)) as sampler, pytest.raises(ModelError, match=r"127\.0\.0\.1"):
        sampler.start().result()


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="http"):
        ServerBackend(settings_of(tmp_path), url="localhost:8000")
