"""vLLM itself on the quickstart's models: the same numbers as the transformers sampler, and what happens when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.sampling.conformance import OnServer

import rnow
from rnow.algorithm.batching import build_batch, build_training_samples
from rnow.algorithm.policy_gradient import PolicyGradient
from rnow.errors import EXIT_TEMPORARY, ModelError, NotYetSupported, RnowError, TemporaryError
from rnow.models.loading import load_causal_lm
from rnow.models.tokenizer import load_tokenizer, vocabulary_size
from rnow.policy.student import LoraPolicy, OptimizerSettings
from rnow.sampling.transformers import TransformersSampler
from rnow.sampling.vllm_engine import EngineBackend
from rnow.sampling.vllm_probe import gap_between
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_server import ServerBackend
from rnow.sampling.vllm_settings import VllmSettings
from rnow.setup.vllm import probe_reference
from rnow.types import Adapter, Completion, Sample, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STUDENT = Path(__file__).parents[2] / "templates" / "quickstart" / "student"
TOLERANCE = 1e-3
RANK = 12  # not one of vLLM's: it is told 16


@dataclass
class Setup:
    """The embedded policy and sampler, and vLLM beside them."""

    policy: LoraPolicy
    embedded: TransformersSampler
    vllm: Any
    log: Path

    def load(self, version: int) -> None:
        self.embedded.load_policy(self.policy.adapter(), version=version)
        self.vllm.load_policy(self.policy.adapter(), version=version)

    @torch.no_grad()
    def logprobs(self, ids: tuple[int, ...], *, adapter: bool = True) -> list[float]:
        model: Any = self.policy.model
        if adapter:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        else:
            with model.disable_adapter():
                logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        drawn = torch.tensor(ids[1:])[:, None]
        return torch.log_softmax(logits, dim=-1).gather(1, drawn).squeeze(1).tolist()

    async def probe(self, ids: tuple[int, ...], *, adapter: bool) -> list[float]:
        return await self.vllm._backend.probe(ids, self.vllm._current if adapter else None)

    def only(self, kind: type[EngineBackend] | type[OnServer]) -> None:
        if not isinstance(self.vllm._backend, kind):
            pytest.skip(f"this is about {kind.__name__}")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(EngineBackend, id="engine"),
        pytest.param(OnServer, id="server"),
    ],
)
def setup(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("vllm run")
    vocabulary = vocabulary_size(load_tokenizer_of(STUDENT))
    lm = load_causal_lm(
        STUDENT, vocabulary=vocabulary, dtype=torch.float32, device=torch.device("cpu")
    )
    embedded = TransformersSampler.for_student(lm)
    policy = LoraPolicy(
        lm,
        rank=RANK,
        alpha=2 * RANK,
        seed=1,
        base_name="quickstart",
        objective=PolicyGradient(reward_coef=1.0),
        optimizer=OptimizerSettings(learning_rate=1e-2),
    )
    settings = VllmSettings(
        local_dir=STUDENT,
        vocabulary=vocabulary,
        work_dir=folder / "adapters",
        log=folder / "vllm.log",
        dtype="float32",
        engine={"enforce_eager": True},
        enable_sleep=True,  # which a CPU does not have
        max_num_seqs=32,
        max_model_len=256,
        max_lora_rank=RANK,
        probe=PROMPTS[3],
        # The first pass of a fresh engine compiles; on busy cores that alone took over 20 s.
        request_timeout=60.0,
    )
    sampler = VllmSampler(request.param(settings))
    sampler.watch(probe_reference(lm))
    with closing(sampler):
        yield Setup(policy, embedded, sampler, folder / "vllm.log")
    assert not (folder / "adapters").exists()


def load_tokenizer_of(folder: Path) -> Any:
    from rnow.models.resolve import resolve_model

    resolved = resolve_model(
        str(folder), revision=None, key="model.path", weights=True, base_dir=folder
    )
    return load_tokenizer(resolved, trust_remote_code=False)


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_token_ids=(0,), temperature=0.0)


def drawn(max_tokens: int = 24) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_token_ids=(0,))


PROMPTS = [tuple((first + 7 * i) % 90 + 5 for i in range(length)) for length, first in
           [(4, 1), (11, 3), (11, 4), (30, 2), (90, 9)]]  # fmt: skip


def complete(
    sampler: Any,
    params: SamplingParams | Callable[[int], SamplingParams],
    count: int | None = None,
) -> list[Completion]:
    async def one(index: int) -> Completion:
        asked = params(index) if callable(params) else params
        with sampler.live_rollout():
            return await sampler.complete(PROMPTS[index % len(PROMPTS)], asked, 100 + index)

    async def everything() -> list[Completion]:
        return await asyncio.gather(*map(one, range(count or len(PROMPTS))))

    return asyncio.run(everything())


def check_against_embedded(setup: Setup, version: int) -> None:
    """Same greedy tokens, same log-probabilities; and sampled tokens have the trainer's log-probabilities."""
    expected = complete(setup.embedded, greedy())
    got = complete(setup.vllm, greedy())
    for ours, theirs in zip(expected, got, strict=True):
        assert theirs.token_ids == ours.token_ids
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=TOLERANCE)
        assert theirs.policy_version == version
    for ids, completion in zip(PROMPTS, complete(setup.vllm, drawn()), strict=True):
        whole = ids + completion.token_ids
        assert completion.logprobs == pytest.approx(
            setup.logprobs(whole)[len(ids) - 1 :], abs=TOLERANCE
        )


def test_before_any_adapter_it_is_the_base_model(setup: Setup) -> None:
    got = complete(setup.vllm, drawn())
    assert {completion.policy_version for completion in got} == {0}
    for ids, completion in zip(PROMPTS, got, strict=True):
        expected = setup.logprobs(ids + completion.token_ids, adapter=False)[len(ids) - 1 :]
        assert completion.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_a_hot_loaded_adapter_gives_the_trainers_numbers(setup: Setup) -> None:
    setup.load(1)
    check_against_embedded(setup, 1)


def test_after_an_update_it_follows_the_new_adapter(setup: Setup) -> None:
    before = [setup.logprobs(ids) for ids in PROMPTS]
    samples = []
    for index, completion in enumerate(complete(setup.vllm, drawn(), 16)):
        ids = PROMPTS[index % len(PROMPTS)]
        samples.append(
            Sample(
                id=str(index),
                dataset="dataset_0",
                token_ids=ids + completion.token_ids,
                loss_mask=(False,) * len(ids) + (True,) * len(completion.token_ids),
                sampler_logprobs=(0.0,) * len(ids) + completion.logprobs,
            )
        )
    advantages = {sample.id: 1.0 if int(sample.id) % 2 else -1.0 for sample in samples}
    result = setup.policy.update(build_batch(build_training_samples(samples, advantages, None)))
    assert abs(result.metrics["sampler_trainer_kl"]) < TOLERANCE
    moved = max(
        abs(new - old)
        for ids, values in zip(PROMPTS, before, strict=True)
        for new, old in zip(setup.logprobs(ids), values, strict=True)
    )
    assert moved > 10 * TOLERANCE, "the update changed too little for this test to see"
    setup.load(2)
    check_against_embedded(setup, 2)


def test_adapters_are_loaded_inside_a_running_loop_and_leave_no_files(setup: Setup) -> None:
    async def turn(version: int) -> Completion:
        setup.vllm.load_policy(setup.policy.adapter(), version=version)
        return await setup.vllm.complete(PROMPTS[0], greedy(), 1)

    async def turns() -> list[int]:
        return [(await turn(version)).policy_version for version in range(10, 15)]

    assert asyncio.run(turns()) == list(range(10, 15))
    folder = setup.log.parent / "adapters"
    assert [path.name for path in folder.iterdir()] == ["adapter-14"]


def test_a_version_loaded_again_with_other_weights_is_not_the_old_one(setup: Setup) -> None:
    """Prefix cache blocks and loaded adapters go by name; a name that came back would bring the old weights."""
    adapter = setup.policy.adapter()
    kept = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    setup.load(20)
    old = complete(setup.vllm, greedy())
    setup.policy.load_adapter({name: tensor * 3 for name, tensor in kept.items()})
    setup.load(20)
    assert complete(setup.vllm, greedy()) != old
    check_against_embedded(setup, 20)
    setup.policy.load_adapter(kept)
    setup.load(21)


def test_probes_of_base_and_adapter(setup: Setup) -> None:
    # The quickstart's head is not padded, so the server's distribution is the trainer's too.
    ids = PROMPTS[3]
    for adapter in (False, True):
        got = asyncio.run(setup.probe(ids, adapter=adapter))
        assert got == pytest.approx(setup.logprobs(ids, adapter=adapter), abs=TOLERANCE)
    assert setup.logprobs(ids) != pytest.approx(setup.logprobs(ids, adapter=False), abs=TOLERANCE)


def test_every_load_is_held_against_the_trainer(setup: Setup) -> None:
    setup.vllm._proven = False
    setup.load(22)
    assert setup.vllm._proven
    gap = gap_between(asyncio.run(setup.probe(PROMPTS[3], adapter=True)), setup.vllm._expected)
    assert 0 <= gap.largest < TOLERANCE
    assert gap.tokens == len(PROMPTS[3]) - 1


def test_an_adapter_that_is_not_the_trainers_is_found(setup: Setup) -> None:
    """What is handed over differs from what the trainer scores with, by less than an update moves it; with the right one the
    sampler goes on."""
    setup.load(23)
    adapter = setup.policy.adapter()
    other = {
        name: tensor * 1.3 if "lora_B" in name else tensor
        for name, tensor in adapter.tensors.items()
    }
    with pytest.raises(TemporaryError, match=r"adapter version 24: .* nats per token") as failure:
        setup.vllm.load_policy(Adapter(tensors=other, config=adapter.config), version=24)
    assert "loading it again did not help" in failure.value.message
    with pytest.raises(TemporaryError):
        complete(setup.vllm, greedy())
    setup.vllm._failure = None  # for the tests that follow
    setup.load(24)
    check_against_embedded(setup, 24)


def test_probes_beside_completions_and_each_other_are_safe(setup: Setup) -> None:
    setup.only(EngineBackend)

    async def everything() -> tuple[Any, ...]:
        return await asyncio.gather(
            *[setup.vllm.complete(PROMPTS[i % 5], drawn(60), i) for i in range(24)],
            *[setup.probe(PROMPTS[3], adapter=True) for _ in range(8)],
        )

    *_, probe = asyncio.run(everything())
    assert probe == pytest.approx(setup.logprobs(PROMPTS[3]), abs=TOLERANCE)
    assert setup.vllm._starts == 1


def test_more_prompt_tokens_at_once_than_one_batch_holds(setup: Setup) -> None:
    """vLLM then cuts a prompt in two unless told not to, which on a CPU kills the engine of a seeded request."""
    prompts = [tuple((i + 3 * j) % 90 + 5 for j in range(200)) for i in range(64)]

    async def everything() -> list[Completion]:
        return await asyncio.gather(
            *[setup.vllm.complete(ids, drawn(8), i) for i, ids in enumerate(prompts)]
        )

    done = asyncio.run(everything())
    assert setup.vllm._starts == 1
    for ids, completion in list(zip(prompts, done, strict=True))[::16]:
        expected = setup.logprobs(ids + completion.token_ids)[len(ids) - 1 :]
        assert completion.logprobs == pytest.approx(expected, abs=TOLERANCE)


def test_no_sleep_on_a_cpu(setup: Setup) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is about machines without CUDA")
    assert not setup.vllm._backend.supports_sleep
    with pytest.raises(NotYetSupported, match="no sleep mode"):
        asyncio.run(setup.vllm.sleep())


def given(
    setup: Setup, tmp_path: Path, *, max_lora_rank: int = RANK, **changes: Any
) -> VllmSampler:
    """A second sampler on the server of the first."""
    server = setup.vllm._backend.server
    settings = VllmSettings(
        local_dir=STUDENT,
        vocabulary=setup.vllm._vocabulary,
        work_dir=tmp_path / "adapters",
        log=tmp_path / "unused.log",
        max_lora_rank=max_lora_rank,
    )
    backend = ServerBackend(settings, **{"url": server.url, "api_key": server._key} | changes)
    return VllmSampler(backend)


def served(setup: Setup) -> set[str]:
    client = setup.vllm._backend._client(10.0)
    return {model.id for model in asyncio.run(client.models())}


def test_a_server_given_by_url(setup: Setup, tmp_path: Path) -> None:
    setup.only(OnServer)
    setup.load(25)
    before = served(setup)
    with closing(given(setup, tmp_path)) as sampler:
        sampler.load_policy(setup.policy.adapter(), version=25)
        assert len(served(setup)) == len(before) + 1
        assert complete(sampler, drawn()) == complete(setup.vllm, drawn())
    assert served(setup) == before


def test_a_given_server_that_cannot_load_the_adapter(setup: Setup, tmp_path: Path) -> None:
    setup.only(OnServer)
    adapter = setup.policy.adapter()
    wide = Adapter(
        tensors={
            name: torch.zeros(32, tensor.shape[1])
            if "lora_A" in name
            else torch.zeros(tensor.shape[0], 32)
            for name, tensor in adapter.tensors.items()
        },
        config={**adapter.config, "r": 32},
    )
    with (
        closing(given(setup, tmp_path, max_lora_rank=32)) as sampler,
        pytest.raises(ModelError) as failure,
    ):
        sampler.load_policy(wide, version=1)
    assert "max-lora-rank" in str(failure.value.why)
    assert str(tmp_path / "adapters") in str(failure.value.why)


def test_a_given_server_needs_the_right_key_and_model(setup: Setup, tmp_path: Path) -> None:
    setup.only(OnServer)
    with closing(given(setup, tmp_path, api_key="wrong")) as sampler, pytest.raises(RnowError):
        sampler.start().result()
    with (
        closing(given(setup, tmp_path, served_model="other")) as sampler,
        pytest.raises(ModelError, match="does not serve other"),
    ):
        sampler.start().result()


def long_or_short(index: int) -> SamplingParams:
    """The first one ends at once, the others hold the engine for a while."""
    return drawn(100 if index else 1)


def interrupted(setup: Setup, strike: Callable[[int], None]) -> list[Completion]:
    """48 completions, ``strike`` called with the id of the engine's process when some are done and some are not."""

    async def everything() -> list[Completion]:
        tasks = [
            asyncio.create_task(setup.vllm.complete(PROMPTS[i % 5], long_or_short(i), 100 + i))
            for i in range(48)
        ]
        done, owed = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # It is the strike that is tested, no failure from before it.
        assert not [task.exception() for task in done if task.exception()]
        assert owed
        # The one that was started last: the process that computes. Its id need not be the highest: they begin anew.
        strike(max(setup.vllm._backend._process.pids(), key=start_time))
        return list(await asyncio.gather(*tasks))

    return asyncio.run(everything())


def start_time(pid: int) -> int:
    """In clock ticks since the machine was started; 0 for a process that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.policy_version == other.policy_version
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


def test_a_stopped_engine_is_replaced(setup: Setup) -> None:
    """SIGSTOP: it does not die, it only never answers again."""
    setup.only(EngineBackend)
    setup.load(30)
    expected = complete(setup.vllm, long_or_short, 48)
    before = setup.vllm._starts
    got = interrupted(setup, lambda pid: os.kill(pid, signal.SIGSTOP))
    assert setup.vllm._starts == before + 1
    assert_same(got, expected)


def test_a_killed_engine_is_replaced_once_per_version(setup: Setup) -> None:
    setup.only(EngineBackend)
    setup.load(31)
    expected = complete(setup.vllm, long_or_short, 48)
    before = setup.vllm._starts
    got = interrupted(setup, kill)
    assert setup.vllm._starts == before + 1
    assert_same(got, expected)
    check_against_embedded(setup, 31)

    with pytest.raises(TemporaryError) as failure:
        interrupted(setup, kill)
    assert failure.value.exit_code == EXIT_TEMPORARY
    assert "failed twice" in str(failure.value)
    with pytest.raises(TemporaryError):
        complete(setup.vllm, greedy())
    assert not setup.vllm._backend._process.pids()


def test_nothing_is_left_after_kill_9_of_the_parent(tmp_path: Path) -> None:
    """A script without a ``__main__`` guard, killed while vLLM draws."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio, pathlib
        from rnow.sampling.vllm_engine import EngineBackend
        from rnow.sampling.vllm_sampler import VllmSampler
        from rnow.sampling.vllm_settings import VllmSettings
        from rnow.types import SamplingParams
        here = pathlib.Path({str(tmp_path)!r})
        sampler = VllmSampler(EngineBackend(VllmSettings(
            local_dir=pathlib.Path({str(STUDENT)!r}), vocabulary=200, work_dir=here / "w",
            log=here / "log", dtype="float32", engine=dict(enforce_eager=True), max_num_seqs=8, max_model_len=256)))
        sampler.start().result()
        async def draw():
            params = SamplingParams(max_tokens=200, stop_token_ids=())
            while True:
                await asyncio.gather(*[sampler.complete((5, 6, 7), params, i) for i in range(8)])
                pids = " ".join(map(str, sampler._backend._process.pids()))
                (here / "new").write_text(pids)
                (here / "new").rename(here / "pids")
        asyncio.run(draw())
        """)
    )
    source = Path(rnow.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(source)}
    )
    try:
        deadline = time.monotonic() + 180
        while not (tmp_path / "pids").exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pids = {int(text) for text in (tmp_path / "pids").read_text().split()}
        assert len(pids) >= 2, "a worker and an engine"
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while left := {pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists()}:
        assert time.monotonic() < deadline, f"{left} still live"
        time.sleep(0.1)
