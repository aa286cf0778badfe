"""A real tokenizer, a real chat template, real logits: SmolLM2-135M-Instruct teaches itself without two of its layers.

The models come from ``scripts/fetch_smollm2.py``; ``make test-real`` makes them first.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.benchmarks.scripts import load_benchmark
from tests.rollouts import read_transcripts
from transformers import AutoModelForCausalLM, AutoTokenizer

from rnow.algorithm.batching import at_loss_tokens, build_samples
from rnow.config import load_config
from rnow.models.adapter import find_adapter
from rnow.models.loading import CausalLM
from rnow.plan.prepare import Prepared, prepare
from rnow.plan.roles import TEACHER
from rnow.project.templates import find_template, plan_init, write_template
from rnow.setup.models import answer_as_trained, answer_with, load_model
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import RolloutGroup, Sample

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "real-models"
END = "<|im_end|>"
TEN_HELD_OUT = "data.val_split=0.04"
LONGER = 128
"""Tokens in which the whole model comes to its end most of the time."""

AGREE = 1e-4
"""Nats by which two float32 passes over the same tokens may differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """The template's models and its ten held-out prompts in this process."""

    prepared: Prepared
    student: CausalLM
    teacher: CausalLM


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def heal() -> ModuleType:
    return load_benchmark("heal")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as `rnow init` writes it, with its models."""
    folder = tmp_path_factory.mktemp("heal")
    write_template(plan_init(find_template("heal"), folder))
    for name in ("teacher", "student"):
        if not (MODELS / name / "config.json").is_file():
            pytest.fail(f"there is no {MODELS / name}: python scripts/fetch_smollm2.py")
        (folder / name).symlink_to(MODELS / name)
    return folder


@pytest.fixture(scope="module")
def loaded(project: Path) -> Loaded:
    config = load_config(project, [TEN_HELD_OUT]).config
    prepared = prepare(config, project, weights=True)
    return Loaded(
        prepared=prepared,
        student=load_model(prepared.student, prepared.rendered),
        teacher=load_model(prepared.models[TEACHER], prepared.rendered),
    )


@pytest.fixture(scope="module")
def answered(heal: ModuleType, loaded: Loaded) -> list[RolloutGroup]:
    """The held-out prompts, answered by the damaged student."""
    sampler = answer_with(loaded.prepared, loaded.student, lambda: None)
    return heal.answer(loaded.prepared, sampler, 1)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODELS / "teacher")


def bytes_of(ids: Sequence[int]) -> bytes:
    """What a byte-level BPE's tokens spell, by its vocabulary alone: each character of a token's name stands for a byte."""
    # The printable bytes stand for themselves, the others for characters from U+0100 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    names = tokenizer().convert_ids_to_tokens(list(ids))
    return bytes(byte[character] for name in names for character in name)


def logprobs_alone(model: Any, sample: Sample) -> torch.Tensor:
    """float64 ``[loss tokens, V]`` by transformers: one sequence, no padding, the whole of the logits."""
    with torch.no_grad():
        logits = model(torch.tensor([sample.token_ids])).logits[0, :-1].double()
    return logits.log_softmax(-1)[torch.tensor(sample.loss_mask[1:])]


def drawn_of(sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """What the sampler said of each token that it drew, and the tokens: both ``[loss tokens]``."""
    logprobs = torch.tensor(list(at_loss_tokens(sample, sample.sampler_logprobs)))
    return logprobs, torch.tensor(list(at_loss_tokens(sample, sample.token_ids)))


def load_alone(name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()


# ---- text ------------------------------------------------------------------------------------------------------------


def test_prompts_are_what_the_chat_template_makes_of_them(loaded: Loaded) -> None:
    dataset = loaded.prepared.project.dataset
    prompts = [*dataset.prompts, *dataset.held_out]
    assert len(prompts) == 249
    real = tokenizer()
    for prompt in prompts:
        expected = real.apply_chat_template(
            list(prompt.messages), add_generation_prompt=True, return_dict=False
        )
        assert list(loaded.prepared.rendered.prompt_token_ids[prompt.id]) == expected
    text = real.decode(expected)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_turn_ends_with_the_end_token_and_nowhere_else(
    heal: ModuleType, project: Path, loaded: Loaded, answered: list[RolloutGroup]
) -> None:
    """Of the student's answers and of the whole model's, some of which come to their end."""
    end = tokenizer().convert_tokens_to_ids(END)
    assert loaded.prepared.rendered.stop_ids == (end,)
    longer = load_config(project, [TEN_HELD_OUT, f"rollout.max_tokens={LONGER}"]).config
    whole = answer_with(loaded.prepared, loaded.teacher, lambda: None)
    by_teacher = heal.answer(replace(loaded.prepared, config=longer), whole, 1)
    for groups, cap in ((answered, 48), (by_teacher, LONGER)):
        for (rollout,) in (group.rollouts for group in groups):
            (turn,) = rollout.turns
            ids = turn.completion.token_ids
            assert end not in ids[:-1]
            if rollout.status == "completed":
                assert ids[-1] == end
            else:
                assert rollout.end_reason == "length"
                assert len(ids) == cap
            spelled = bytes_of([token for token in ids if token != end])
            assert rollout.answer == spelled.decode("utf-8", errors="replace")
    endings = [group.rollouts[0].status for group in by_teacher]
    assert endings.count("completed") >= 3
    assert not any("\ufffd" in group.rollouts[0].answer.rstrip("\ufffd") for group in by_teacher)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_a_student_is_its_own_teacher(loaded: Loaded, answered: list[RolloutGroup]) -> None:
    """Sampler, teacher and transformers alone say the same of the same weights, and the KL is 0."""
    samples = build_samples(answered)
    alone = load_alone("student")
    again = load_model(loaded.prepared.student, loaded.prepared.rendered)
    scored = TransformersTeacher(again).score_now(samples)
    gaps = []
    for sample in samples:
        drawn, ids = drawn_of(sample)
        expected = logprobs_alone(alone, sample).gather(1, ids[:, None])[:, 0]
        by_teacher = scored[sample.id].teacher_logprobs
        for found in (drawn, by_teacher):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=AGREE)
        gaps.append(drawn - by_teacher)
    assert abs(float(torch.cat(gaps).mean())) < 1e-5
    assert len(samples) == 10


def test_the_damaged_student_is_two_nats_a_token_from_its_original(
    heal: ModuleType, loaded: Loaded, answered: list[RolloutGroup]
) -> None:
    measured = heal.measure(answered, loaded.student, loaded.teacher)
    assert 1.4 < measured.kl < 2.5
    assert 0.02 < measured.error < 0.5
    samples = build_samples(answered)
    itself = heal.exact_kl(loaded.student, loaded.student, samples)
    assert max(float(values.abs().max()) for values in itself.values()) < 1e-12
    # The sampled estimate of the same quantity, on the same tokens.
    scored = TransformersTeacher(loaded.teacher).score_now(samples)
    sampled = torch.cat(
        [drawn_of(sample)[0] - scored[sample.id].teacher_logprobs for sample in samples]
    )
    standard_error = float(sampled.std()) / len(sampled) ** 0.5
    assert abs(float(sampled.mean()) - measured.kl) < 4 * standard_error


def adapter_by_peft(folder: Path) -> None:
    """An adapter with effect, of the template's rank, made and saved by PEFT alone."""
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(load_alone("student"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.003)
    model.save_pretrained(folder)


def test_sampler_trainer_and_exact_kl_are_those_of_transformers_and_peft_alone(
    heal: ModuleType, loaded: Loaded, tmp_path: Path
) -> None:
    """With an adapter, on the same tokens."""
    adapter_by_peft(tmp_path)
    trained = find_adapter(str(tmp_path), key="model.path", places=[tmp_path])
    assert trained is not None
    trainer = load_model(loaded.prepared.student, loaded.prepared.rendered)
    sampler = answer_as_trained(loaded.prepared, trainer, trained, lambda: None)
    samples = build_samples(heal.answer(loaded.prepared, sampler, 1))
    found = heal.exact_kl(trainer, loaded.teacher, samples)
    by_trainer = TransformersTeacher(trainer).score_now(samples)
    student = PeftModel.from_pretrained(load_alone("student"), tmp_path).eval()
    teacher = load_alone("teacher")
    for sample in samples:
        p, q = logprobs_alone(student, sample), logprobs_alone(teacher, sample)
        kl = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(found[sample.id], kl, rtol=AGREE, atol=AGREE)
        drawn, ids = drawn_of(sample)
        expected = p.gather(1, ids[:, None])[:, 0]
        for logprobs in (drawn, by_trainer[sample.id].teacher_logprobs):
            torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=AGREE)
    without = heal.exact_kl(loaded.student, loaded.teacher, samples)
    moved = torch.cat([found[sample.id] - without[sample.id] for sample in samples])
    assert float(moved.abs().mean()) > 10 * AGREE, "the adapter did nothing"


# ---- a run -----------------------------------------------------------------------------------------------------------

SHORT = (
    "data.batch_size=2",
    "rollout.max_tokens=16",
    "trainer.max_steps=2",
    "trainer.save_step=1",
    "evaluation.max_prompts=2",
    "evaluation.teacher=false",
)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "rnow", *words],
        cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


def killed_after_its_first_step(folder: Path, run: Path) -> None:
    process = start(folder, "run", *SHORT)
    try:
        until = time.monotonic() + 900
        while not (run / "checkpoints" / "step-000001" / "manifest.json").exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_is_killed_goes_on_and_its_student_answers(project: Path) -> None:
    run = project / "runs" / "heal"
    killed_after_its_first_step(project, run)
    assert not (run / "summary.json").exists()
    first = load_file(run / "checkpoints" / "step-000001" / "adapter_model.safetensors")
    said = finish(start(project, "run", *SHORT))
    assert "continuing after step 1" in said

    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(0.5 < row["teacher_kl"] < 5 for row in metrics)
    assert all(row["grad_norm"] > 0 for row in metrics)
    last = load_file(run / "adapter" / "adapter_model.safetensors")
    assert last.keys() == first.keys()
    assert not any(torch.equal(last[name], first[name]) for name in last)
    assert all(bool(last[name].any()) for name in last if "lora_B" in name)

    check_transcripts(run)
    said = finish(start(project, "test", "-n", "2", "-m", "runs/heal", "rollout.max_tokens=8"))
    assert "the student is student with" in said
    assert len(list((project / "rollouts").rglob("sample_*.json"))) == 4


def check_transcripts(run: Path) -> None:
    """Each says what its token ids spell; the text is whole where the bytes are."""
    end = tokenizer().convert_tokens_to_ids(END)
    for step in (1, 2):
        lines = read_transcripts(run / "transcripts", step)
        assert len(lines) == 4
        for line in lines:
            ids = [token["id"] for token in line["tokens"]]
            assert (ids[-1] == end) == (line["status"] == "completed")
            spelled = bytes_of([token for token in ids if token != end])
            (message,) = line["answer"]
            assert message["content"] == spelled.decode("utf-8", errors="replace")
            for token in line["tokens"]:
                if token["id"] != end:
                    alone = bytes_of([token["id"]])
                    assert token["text"] == alone.decode("utf-8", errors="replace")
                assert token["sampler_logprob"] < 0
                assert token["teacher_logprob"] < 0
            kls = [token["kl"] for token in line["tokens"]]
            assert line["teacher_kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
