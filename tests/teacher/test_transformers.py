"""The embedded teacher: on its own, against the student, and what it never holds in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sampling.conformance import complete_all, make_policy, params, prompt
from tests.teacher.conformance import VOCABULARY, make_sample
from torch.utils._python_dispatch import TorchDispatchMode

from rnow.algorithm import head
from rnow.algorithm.batching import build_batch, build_training_samples, evidence_tensors
from rnow.algorithm.records import SAMPLED, TeacherNeeds
from rnow.errors import ModelError, RnowError, StopRequested
from rnow.models.loading import CausalLM, load_causal_lm
from rnow.models.tensor_files import TensorFiles
from rnow.sampling.transformers import TransformersSampler
from rnow.teacher import load_teacher
from rnow.teacher import transformers as teacher_module
from rnow.teacher.transformers import TransformersTeacher
from rnow.types import Completion, Sample

ODD_VOCABULARY = 331


@pytest.fixture
def lm(tiny_model_dir: Callable[..., Path]) -> CausalLM:
    return load(tiny_model_dir(num_hidden_layers=1))


def load(folder: Path, vocabulary: int = VOCABULARY, *, streamed: bool = False) -> CausalLM:
    return load_causal_lm(
        folder,
        vocabulary=vocabulary,
        dtype=torch.float32,
        device=torch.device("cpu"),
        streamed=streamed,
    )


def sample_of(ids: tuple[int, ...], completion: Completion) -> Sample:
    drawn = len(completion.token_ids)
    return Sample(
        id="dataset_0/0#0",
        dataset="dataset_0",
        token_ids=(*ids, *completion.token_ids),
        loss_mask=(*[False] * len(ids), *[True] * drawn),
        sampler_logprobs=(*[0.0] * len(ids), *completion.logprobs),
    )


def test_an_int8_teacher_judges_a_sample_as_if_it_were_alone(
    tiny_model_dir: Callable[..., Path],
) -> None:
    """LLM.int8 would let the longest answer of a batch choose which columns of the others are kept in float."""
    lm = load_causal_lm(
        tiny_model_dir(num_hidden_layers=1, initializer_range=0.3),
        vocabulary=VOCABULARY,
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization="int8",
    )
    sizes = (20, 33, 64, 120)
    samples = [make_sample(f"d/{i}#0", size, first=i) for i, size in enumerate(sizes)]
    teacher = TransformersTeacher(lm, micro_batch_tokens=10_000)
    together = teacher.score_now(samples)
    for sample in samples:
        alone = teacher.score_now([sample])[sample.id].teacher_logprobs
        assert torch.equal(together[sample.id].teacher_logprobs, alone)
        assert alone.min() < -1.0


# ---- on its own ---------------------------------------------------------------------------------------------------


def test_a_folder_is_a_teacher(tiny_model_dir: Callable[..., Path]) -> None:
    folder = tiny_model_dir(num_hidden_layers=1, vocab_size=128)
    teacher = load_teacher(str(folder))
    ids = list(prompt(9))
    found = asyncio.run(teacher.compute_logprobs_async(ids))
    plain = load(folder).model(input_ids=torch.tensor([ids])).logits[0, :, :VOCABULARY]
    expected = torch.log_softmax(plain, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    assert found[0] is None
    assert found[1:] == pytest.approx(expected.squeeze(1).tolist(), abs=1e-5)
    assert teacher.compute_logprobs(ids) == found


def test_one_token_has_no_logprob(lm: CausalLM) -> None:
    assert TransformersTeacher(lm).compute_logprobs([7]) == [None]


@pytest.mark.parametrize("ids", [[], [5, VOCABULARY], [-1, 5]])
def test_ids_that_cannot_be_are_refused(lm: CausalLM, ids: list[int]) -> None:
    with pytest.raises(ValueError, match="empty" if not ids else "outside the vocabulary of 100"):
        asyncio.run(TransformersTeacher(lm).compute_logprobs_async(ids))


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_teacher(str(tmp_path / "nothing"))


def test_a_stop_is_noticed_between_micro_batches(lm: CausalLM) -> None:
    seen = []

    def poll() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise StopRequested

    teacher = TransformersTeacher(lm, micro_batch_tokens=1, poll=poll)
    with pytest.raises(StopRequested):
        teacher.score_now([make_sample(str(index), 6) for index in range(9)])
    assert len(seen) == 3


# ---- against the student -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("mode", ["merged", "shared"])
def test_a_teacher_that_is_the_student_agrees_with_its_sampler(
    lm: CausalLM, mode: Any, temperature: float
) -> None:
    """End to end: sampler, teacher and trainer give one number; the ratio is 1 and the KL 0."""
    sampler = TransformersSampler(lm, mode=mode)
    policy = make_policy(lm)
    sampler.load_policy(policy.adapter(), version=0)
    requests = [(prompt(3 + seed), params(15, temperature=temperature), seed) for seed in range(6)]
    done = complete_all(sampler, requests)
    teacher = TransformersTeacher(lm, temperature=temperature)
    for (ids, *_), completion in zip(requests, done, strict=True):
        sample = sample_of(tuple(ids), completion)
        judged = teacher.score_now([sample])[sample.id].teacher_logprobs
        gap = judged - torch.tensor(completion.logprobs)
        assert (gap.exp() - 1).abs().max() < 1e-4
        assert gap.mean().abs() < 1e-5


# ---- memory --------------------------------------------------------------------------------------------------------


class _Tall(TorchDispatchMode):
    """The most rows of any tensor made that has a vocabulary-sized dimension; the model's own weights excepted."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and self._vocabulary in tensor.shape:
                shares_weight = tensor.shape in ((self._vocabulary, 64), (64, self._vocabulary))
                if not shares_weight:
                    self.rows = max(self.rows, tensor.numel() // self._vocabulary)
        return out


@contextmanager
def watch(vocabulary: int) -> Iterator[_Tall]:
    with _Tall(vocabulary) as tall:
        yield tall


@pytest.fixture
def odd(tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    # A real tile holds a whole batch of such a small head: shrink it to 16 rows.
    monkeypatch.setattr(head, "CPU_TILE_ROWS", 16)
    monkeypatch.setattr(head, "cpu_tile_bytes", lambda: 16 * ODD_VOCABULARY * 4)
    folder = tiny_model_dir(num_hidden_layers=1, vocab_size=ODD_VOCABULARY)
    return load(folder, vocabulary=ODD_VOCABULARY)


def test_the_watch_sees_a_full_softmax(odd: CausalLM) -> None:
    with watch(ODD_VOCABULARY) as tall, torch.no_grad():
        odd.model(input_ids=torch.tensor([list(prompt(80))]))
    assert tall.rows == 80


@pytest.mark.parametrize("top_k", [0, 5])
def test_scoring_holds_no_tokens_by_vocabulary_tensor(odd: CausalLM, top_k: int) -> None:
    samples = [make_sample(str(index), 80) for index in range(4)]
    with watch(ODD_VOCABULARY) as tall:
        evidence = TransformersTeacher(odd).score_now(samples, TeacherNeeds(top_k=top_k))
    assert len(evidence) == 4
    assert 0 < tall.rows <= 16


def test_updating_holds_no_tokens_by_vocabulary_tensor(odd: CausalLM) -> None:
    samples = [make_sample(str(index), 80) for index in range(4)]
    evidence = TransformersTeacher(odd).score_now(samples)
    policy = make_policy(odd)
    batch = build_batch(
        build_training_samples(samples, {sample.id: 0.0 for sample in samples}, evidence)
    )
    with watch(ODD_VOCABULARY) as tall:
        result = policy.update(batch)
    assert not result.skipped
    assert result.metrics["grad_norm"] > 0
    assert 0 < tall.rows <= 16


def test_prompt_rows_never_reach_the_head(lm: CausalLM) -> None:
    with watch(VOCABULARY) as tall:
        TransformersTeacher(lm).score_now([make_sample("a", 60, loss=[50, 51, 52])])
    assert tall.rows == 3


# ---- out of memory --------------------------------------------------------------------------------------------------


def run_out_of_memory_above(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Refuse passes of more padded tokens; the list fills with the size of each try."""
    tries: list[int] = []
    original = teacher_module.hidden_rows

    def limited(lm: Any, micro: Any) -> torch.Tensor:
        tries.append(micro.token_ids.numel())
        if tries[-1] > tokens:
            raise torch.OutOfMemoryError(f"{tries[-1]} tokens\nsecond line")
        return original(lm, micro)

    monkeypatch.setattr(teacher_module, "hidden_rows", limited)
    return tries


NEEDS = [SAMPLED, TeacherNeeds(top_k=5), TeacherNeeds(hidden=True)]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_out_of_memory_halves_the_pass_and_says_the_same(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch, needs: TeacherNeeds
) -> None:
    samples = [make_sample(str(index), 20, first=index) for index in range(5)]
    teacher = TransformersTeacher(lm)
    expected = {name: evidence_tensors(e) for name, e in teacher.score_now(samples, needs).items()}
    tries = run_out_of_memory_above(monkeypatch, 40)
    found = teacher.score_now(samples, needs)
    # A sample's last token predicts nothing.
    assert tries == [95, 38, 57, 19, 38], "halves of halves, each once"
    assert found.keys() == expected.keys()
    for name, evidence in found.items():
        for field, tensor in evidence_tensors(evidence).items():
            torch.testing.assert_close(tensor, expected[name][field], atol=1e-5, rtol=0)


def test_one_sample_that_does_not_fit_is_an_error(
    lm: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out_of_memory_above(monkeypatch, 18)  # its last token predicts nothing
    with pytest.raises(RnowError, match="teacher scoring with one sequence of 20 tokens") as caught:
        TransformersTeacher(lm).score_now([make_sample("a", 20), make_sample("b", 20)])
    assert "teacher.quantization" in (caught.value.fix or "")


def test_other_faults_are_not_taken_for_it(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(lm: Any, micro: Any) -> torch.Tensor:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(teacher_module, "hidden_rows", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        TransformersTeacher(lm).score_now([make_sample("a", 20), make_sample("b", 20)])


# ---- streamed -----------------------------------------------------------------------------------------------------


@pytest.fixture
def both(tiny_model_dir: Callable[..., Path]) -> tuple[CausalLM, CausalLM]:
    """The same model whole, and with its layers left in its files."""
    folder = tiny_model_dir(num_hidden_layers=4)
    return load(folder), load(folder, streamed=True)


def tensors(evidence: Mapping[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (name, field): tensor
        for name, found in evidence.items()
        for field, tensor in evidence_tensors(found).items()
    }


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


LONG = [make_sample(str(index), 5 + 7 * index, first=index) for index in range(6)]


@pytest.mark.parametrize("tokens", [1, 64, None])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_streamed_says_the_same_bit_for_bit(
    both: tuple[CausalLM, CausalLM], needs: TeacherNeeds, tokens: int | None
) -> None:
    whole, streamed = (
        TransformersTeacher(lm, micro_batch_tokens=tokens, temperature=0.7) for lm in both
    )
    assert_equal(streamed.score_now(LONG, needs), whole.score_now(LONG, needs))
    assert streamed.score_now([], needs) == {}
    assert streamed.compute_logprobs([5, 9, 7]) == whole.compute_logprobs([5, 9, 7])


def test_streamed_reads_each_layer_once_for_all(
    both: tuple[CausalLM, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    original = TensorFiles.read
    monkeypatch.setattr(
        TensorFiles, "read", lambda self, name, *args: (read.append(name), original(self, name, *args))
    )  # fmt: skip
    TransformersTeacher(both[1], micro_batch_tokens=1).score_now(LONG)
    assert len(read) == len({*read}) == 4 * 11


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_streamed_out_of_memory_scores_half_at_a_time(
    both: tuple[CausalLM, CausalLM], monkeypatch: pytest.MonkeyPatch, needs: TeacherNeeds
) -> None:
    teacher = TransformersTeacher(both[1], micro_batch_tokens=60)
    samples = [make_sample(str(index), 20, first=index) for index in range(6)]
    expected = teacher.score_now(samples, needs)
    threads = threading.active_count()
    tries = run_out_of_memory_above(monkeypatch, 40)
    found = teacher.score_now(samples, needs)
    assert tries == [57, 57, 19, 38, 57, 19, 38], "both, one of them, then parts of it"
    for key, tensor in tensors(found).items():
        torch.testing.assert_close(tensor, tensors(expected)[key], atol=1e-5, rtol=0)
    assert threading.active_count() == threads
    run_out_of_memory_above(monkeypatch, 18)
    with pytest.raises(RnowError, match="teacher scoring with one sequence of 20 tokens"):
        teacher.score_now(samples)


def test_streamed_scores_half_at_a_time_where_threads_are_few(
    both: tuple[CausalLM, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = TransformersTeacher(both[1], micro_batch_tokens=1)
    expected = teacher.score_now(LONG)
    original, most = threading.Thread.start, 3

    def start(thread: threading.Thread) -> None:
        if sum(one.name == "rnow-pass" for one in threading.enumerate()) >= most:
            raise RuntimeError("can't start new thread")
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    found = teacher.score_now(LONG)
    for key, tensor in tensors(expected).items():
        assert torch.equal(tensors(found)[key], tensor), "each pass is what it was"
    most = 0
    with pytest.raises(RuntimeError, match="start new thread"):
        teacher.score_now(LONG)


def test_streamed_stops_between_layers(both: tuple[CausalLM, CausalLM]) -> None:
    seen = []

    def poll() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise StopRequested

    before = threading.active_count()
    with pytest.raises(StopRequested):
        TransformersTeacher(both[1], micro_batch_tokens=1, poll=poll).score_now(LONG)
    assert (len(seen), threading.active_count()) == (3, before)


def test_streamed_sleeps_and_wakes(both: tuple[CausalLM, CausalLM]) -> None:
    whole, streamed = map(TransformersTeacher, both)
    expected = whole.score_now(LONG)
    asyncio.run(streamed.sleep())
    asyncio.run(streamed.wake())
    assert_equal(streamed.score_now(LONG), expected)


def test_a_folder_is_a_streamed_teacher(tiny_model_dir: Callable[..., Path]) -> None:
    folder = str(tiny_model_dir(num_hidden_layers=2))
    ids = list(prompt(9))
    streamed = load_teacher(folder, streamed=True)
    assert streamed.lm.layers is not None
    assert streamed.compute_logprobs(ids) == load_teacher(folder).compute_logprobs(ids)
