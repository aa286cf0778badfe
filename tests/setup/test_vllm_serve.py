"""``rnow serve`` with the real vLLM: what it serves is the adapter that was trained."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.setup.projects import Project

from rnow.config import to_yaml
from rnow.models.adapter import find_adapter
from rnow.plan.prepare import prepare
from rnow.processes.leash import descendants
from rnow.serving.client import VllmClient
from rnow.setup.build import run
from rnow.setup.models import build_student, load_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOLERANCE = 1e-3


def test_it_serves_the_distribution_that_was_trained(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    project = Project(tmp_path / "project", tiny_model_dir)
    # Without padding rows, which a server cannot leave out of its softmax.
    project.student = tiny_model_dir(seed=0, num_hidden_layers=1)
    project.teacher = tiny_model_dir(seed=1, num_hidden_layers=1)
    config = project.config(
        trainer={"max_steps": 2, "learning_rate": 0.05}, sampler={"backend": "transformers"}
    )
    run(config, folder=project.folder)
    (project.folder / "config.yml").write_text(to_yaml(config))

    prepared = prepare(config, project.folder, weights=True)
    ids = [*next(iter(prepared.rendered.prompt_token_ids.values())), *range(40, 60)]
    student = build_student(
        prepared, load_model(prepared.student, prepared.rendered), lambda: None, {}, embedded=False
    )
    adapter = find_adapter("runs/tiny", key="RUN", places=[project.folder])
    assert adapter is not None
    untrained = student.as_teacher.compute_logprobs(ids)[1:]
    student.policy.load_adapter(adapter.tensors())
    wanted = student.as_teacher.compute_logprobs(ids)[1:]

    source = Path(__file__).parents[2] / "src"
    process = subprocess.Popen(
        [sys.executable, "-m", "rnow", "serve", "tiny"],
        cwd=project.folder,
        env=os.environ | {"PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"serving: tiny at (http://127\.0\.0\.1:\d+)/v1", line)
        assert found is not None, line
        client = VllmClient(found[1])

        def asked(model: str) -> list[float | None]:
            return asyncio.run(client.prompt_logprobs(ids, model=model))[1:]

        served, base = asked("tiny"), asked(project.student.name)
        children = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 0
    finally:
        process.kill()

    def gap(one: list[float | None], other: list[float | None]) -> float:
        return max(abs((a or 0.0) - (b or 0.0)) for a, b in zip(one, other, strict=True))

    assert gap(served, wanted) < TOLERANCE
    assert gap(base, untrained) < TOLERANCE
    assert gap(wanted, untrained) > 100 * TOLERANCE, "the adapter does something"
    assert not any(Path(f"/proc/{pid}").exists() for pid in children), "it ends with us"
