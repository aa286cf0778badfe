"""What `rnow export` writes, served by the real vLLM: the merged model and the adapter give the trainer's log-probabilities."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.setup.projects import Project

from rnow.export.probe import compare, probe_logprobs
from rnow.models.loading import load_causal_lm
from rnow.policy.lora import attach_trained
from rnow.sampling.vllm_engine import environment
from rnow.serving.server import VllmServer
from rnow.setup.build import run
from rnow.setup.export import Wanted, export
from rnow.setup.subjects import find_trained

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 1e-3
IDS = [*range(40, 70), *range(5, 25)]
ON_A_CPU = [
    "--dtype", "float32", "--max-model-len", "128", "--max-num-batched-tokens", "2048", "--enforce-eager",
    "--no-enable-chunked-prefill",
]  # fmt: skip


def test_merged_and_adapter_give_what_was_trained(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    project = Project(tmp_path / "project", tiny_model_dir)
    # Without padding rows, which a server cannot leave out of its softmax.
    project.student = tiny_model_dir(seed=0, num_hidden_layers=1)
    project.teacher = tiny_model_dir(seed=1, num_hidden_layers=1)
    run(
        project.config(
            trainer={"max_steps": 2, "learning_rate": 0.05}, sampler={"backend": "transformers"}
        ),
        folder=project.folder,
    )
    trained = find_trained("tiny", folder=project.folder, output_dir="runs", command="export")
    (adapter,) = export(trained, Wanted(), folder=project.folder, tell=lambda line: None)
    wanted = Wanted(merge=True, dtype="float32")
    (merged,) = export(trained, wanted, folder=project.folder, tell=lambda line: None)

    lm = load_causal_lm(
        project.student, vocabulary=100, dtype=torch.float32, device=torch.device("cpu")
    )
    untrained = probe_logprobs(lm, IDS)
    attach_trained(lm, trained.adapter)
    expected = probe_logprobs(lm, IDS)
    assert compare(expected, untrained).largest > 100 * TOLERANCE, "the adapter does something"

    whole = served(merged, "merged", ON_A_CPU, tmp_path / "merged.log")
    assert compare(expected, whole).largest < TOLERANCE
    module = json.dumps({"name": "mine", "path": str(adapter), "base_model_name": "base"})
    beside = ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", module]
    loaded = served(project.student, "base", [*ON_A_CPU, *beside], tmp_path / "base.log", "mine")
    assert compare(expected, loaded).largest < TOLERANCE


def served(
    model: Path, name: str, arguments: Sequence[str], log: Path, asked: str | None = None
) -> list[float]:
    """Log-probabilities of all but the first token, by a server of this model. ``asked``: of an adapter beside it."""

    async def ask() -> list[float | None]:
        server = VllmServer(model, name=name, log=log, arguments=arguments, env=environment())
        try:
            await server.start()
            client = server.client(timeout=60.0)
            return await client.prompt_logprobs(IDS, model=asked or name)
        finally:
            server.stop()

    found = [value for value in asyncio.run(ask())[1:] if value is not None]
    assert len(found) == len(IDS) - 1
    return found
