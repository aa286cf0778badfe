"""The managed teacher on the real engine: the same numbers, its death, and what is left when its owner is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from tests.processes.test_leash import wait_for
from tests.teacher.conformance import VOCABULARY, make_sample, pids

import rnow
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.processes import leash
from rnow.serving.find import ServerProtocol
from rnow.teacher.served import Asking, ServedTeacher
from rnow.teacher.transformers import TransformersTeacher
from rnow.teacher.vllm import VllmTeacher
from rnow.teacher.vllm_server import TeacherServerSettings
from rnow.types import Sample

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROWS = 128
WINDOW = 512
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir(seed=1, vocab_size=ROWS, num_hidden_layers=1)


@pytest.fixture(scope="module")
def lm(folder: Path) -> CausalLM:
    return load_causal_lm(folder, vocabulary=ROWS, dtype=torch.float32, device=torch.device("cpu"))


def make(folder: Path, log: Path) -> VllmTeacher:
    settings = TeacherServerSettings(
        local_dir=folder,
        log=log,
        dtype="float32",
        max_model_len=WINDOW,
        max_num_batched_tokens=128,  # prompts go through in several chunks
    )
    return VllmTeacher.managed(settings)


@pytest.fixture(scope="module", autouse=True)
def _small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmTeacher]:
    made = make(folder, tmp_path_factory.mktemp("logs") / "teacher.log")
    yield made
    made.close()


def assert_like_transformers(teacher: ServedTeacher, lm: CausalLM, samples: list[Sample]) -> None:
    found = asyncio.run(teacher.score(samples))
    expected = TransformersTeacher(lm).score_now(samples)
    assert found.keys() == expected.keys()
    for name, evidence in expected.items():
        torch.testing.assert_close(
            found[name].teacher_logprobs, evidence.teacher_logprobs, atol=TOLERANCE, rtol=0
        )


def engine(pids: set[int]) -> int:
    (found,) = [pid for pid in pids if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
    return found


def test_the_check_passes(teacher: VllmTeacher, lm: CausalLM, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = asyncio.run(teacher.check(tokenizer, VOCABULARY, longest=WINDOW))
    assert found.warnings == ()
    probe = tokenizer.encode(
        "The quick brown fox: 3.14 + 27 = 30.14\n\tdef f(x):  return x ** 2  # na",
        add_special_tokens=False,
    )[:64]
    with torch.no_grad():
        table = lm.model(input_ids=torch.tensor([probe])).logits[0].softmax(-1)
    mass = table[[0, 31, 63], VOCABULARY:].sum(-1).mean().item()
    assert found.padding_mass == pytest.approx(mass, abs=1e-4)
    assert mass > 0.05, "these padding rows do take probability"


def test_the_same_numbers_as_transformers(teacher: VllmTeacher, lm: CausalLM) -> None:
    lengths = [2, 3, 50, 127, 128, 129, 300, WINDOW]
    samples = [make_sample(f"s{length}", length, first=length) for length in lengths]
    assert_like_transformers(teacher, lm, samples)


@pytest.mark.parametrize("way", ["vllm", "openai by id", "openai by text"])
def test_both_endpoints_of_a_server(
    teacher: VllmTeacher, lm: CausalLM, folder: Path, way: str
) -> None:
    """vLLM's own question and the OpenAI-compatible one, with tokens named by id and by text: one answer."""
    from transformers import AutoTokenizer

    asyncio.run(teacher.start())
    protocol, _, named = way.partition(" ")
    by_text = named == "by text"
    served = ServedTeacher.at(
        teacher._server.url,
        protocol=cast(ServerProtocol, protocol),
        api_key=teacher._server._key,
        asking=Asking(top_k=0 if by_text else 20, max_concurrency=1),
    )
    if by_text:
        served._use(served._clients[1])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = asyncio.run(served.check(tokenizer, VOCABULARY, longest=WINDOW, rows=ROWS))
    assert [text for text in found.warnings if "padding" not in text] == []
    assert found.noise < TOLERANCE
    assert "does not reach a prompt" in found.summary
    if not by_text:
        ids = list(range(5, 25))
        assert asyncio.run(served._clients[0].prompt_top_logprobs(ids, model="teacher", top_k=20))
    samples = [make_sample(f"s{length}", length, first=length) for length in (2, 50, 129, WINDOW)]
    assert_like_transformers(served, lm, samples)


def test_the_key_is_in_no_log_and_no_command_line(teacher: VllmTeacher) -> None:
    asyncio.run(teacher.start())
    server = teacher._server
    assert server is not None
    assert server._key not in server.log.read_text()
    for pid in pids(teacher):
        assert server._key not in Path(f"/proc/{pid}/cmdline").read_text()


def test_kill_9_of_the_engine_in_the_middle_of_scoring(
    teacher: VllmTeacher, lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [make_sample(f"s{i}", 400, first=i) for i in range(80)]
    asyncio.run(teacher.score(samples[:1]))
    before = pids(teacher)
    killed: list[float] = []

    def poll() -> None:
        if len(killed) < 2:
            killed.append(time.monotonic())
        if len(killed) == 2:  # half a second into it
            killed.append(time.monotonic())
            os.kill(engine(pids(teacher)), signal.SIGKILL)

    monkeypatch.setattr(teacher, "_asking", replace(teacher._asking, poll=poll, timeout=60.0))
    assert_like_transformers(teacher, lm, samples)
    assert len(killed) == 3
    after = pids(teacher)
    assert after
    assert not before & after


def test_nothing_is_left_after_close(folder: Path, tmp_path: Path, teacher: VllmTeacher) -> None:
    asyncio.run(teacher.start())
    living = pids(teacher)
    assert len(living) >= 2
    teacher.close()
    assert alive(living) == set()


OWNER = """
import asyncio, sys, time
from pathlib import Path
from rnow.teacher.vllm import VllmTeacher
from rnow.teacher.vllm_server import TeacherServerSettings
teacher = VllmTeacher.managed(TeacherServerSettings(
    local_dir=Path(sys.argv[1]), log=Path(sys.argv[2]), dtype="float32", max_model_len=256))
asyncio.run(teacher.start())
sys.stdout.write("ready\\n")
sys.stdout.flush()
time.sleep(600)
"""


def alive(pids: set[int]) -> set[int]:
    found = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZX":
            found.add(pid)
    return found


def test_no_vllm_process_10_seconds_after_kill_9_of_the_owner(
    folder: Path, tmp_path: Path, teacher: VllmTeacher
) -> None:
    teacher.close()  # one engine at a time
    source = Path(rnow.__file__).parents[1]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), str(tmp_path / "log")],
        env=os.environ | {"PYTHONPATH": str(source)},
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()[-2000:]
    tree = leash.descendants(owner.pid)
    assert engine(tree) in tree
    owner.kill()
    owner.wait()
    assert wait_for(lambda: alive(tree) == set(), 10) < 10
