"""A teacher on a scripted vLLM: one that rnow starts, its deaths, and answering as vLLM does."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import character_tokenizer
from tests.serving import scripted
from tests.serving.scripted import (
    VOCABULARY,
    ScriptedServer,
    changed,
    logprob,
)
from tests.teacher.conformance import make_sample, pids

from rnow.errors import (
    EXIT_TEMPORARY,
    ConfigError,
    ModelError,
    TemporaryError,
)
from rnow.processes.process import StartFailed
from rnow.protocols import Sampler
from rnow.serving import http as http_module
from rnow.serving import server as server_module
from rnow.serving.http import BadAnswer, ServerDown
from rnow.serving.server import VllmServer
from rnow.teacher import vllm, vllm_server
from rnow.teacher.served import API_KEY_VARIABLE, Asking, ServedTeacher
from rnow.teacher.vllm import VllmTeacher
from rnow.teacher.vllm_sampler import VllmTeacherSampler
from rnow.teacher.vllm_server import TeacherServerSettings
from rnow.types import Adapter, Completion, Sample, SamplingParams

SAMPLES = [make_sample(f"dataset_0/{i}#0", 6 + i, first=i) for i in range(12)]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        yield started


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "START_TIMEOUT", 20.0)
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer()


def served(server: ScriptedServer, **asking: Any) -> ServedTeacher:
    return ServedTeacher.at(
        server.url, "base", protocol="vllm", asking=Asking(**{"timeout": 2.0} | asking)
    )


def settings_of(folder: Path, **changes: Any) -> TeacherServerSettings:
    return TeacherServerSettings(local_dir=folder, log=folder / "log", **changes)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def assert_right(found: Any, samples: list[Sample]) -> None:
    assert list(found) == [sample.id for sample in samples]
    for sample in samples:
        expected = [
            logprob(token, i)
            for i, (token, on) in enumerate(zip(sample.token_ids, sample.loss_mask, strict=True))
            if on
        ]
        torch.testing.assert_close(found[sample.id].teacher_logprobs, torch.tensor(expected))


# ---- a server that rnow starts --------------------------------------------------------------------------------------------


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[Callable[..., VllmTeacher]]:
    """A managed teacher on the scripted program, which exits at some request of its first starts."""
    made: list[VllmTeacher] = []

    def make(stop_after: int = 0, faulty: int = 1) -> VllmTeacher:
        arguments = ["--starts", str(tmp_path / "starts")]
        if stop_after:
            arguments += ["--stop-after", str(stop_after), "--faulty", str(faulty)]
        server = VllmServer(
            tmp_path / "model",
            name="teacher",
            log=tmp_path / "teacher.log",
            arguments=arguments,
            command=(sys.executable, scripted.__file__),
        )
        made.append(VllmTeacher(server, asking=Asking(timeout=10)))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()


def test_it_starts_with_its_first_use(managed: Callable[..., VllmTeacher], tokenizer: Any) -> None:
    teacher = managed()
    assert teacher._server
    assert not teacher._server.alive()
    assert run(teacher.check(tokenizer, VOCABULARY)).warnings == ()
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert len(pids(teacher)) == 1
    teacher.close()
    assert pids(teacher) == set()


def test_death_in_the_middle_is_survived_once(
    managed: Callable[..., VllmTeacher], tmp_path: Path
) -> None:
    teacher = managed(stop_after=6)
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert (tmp_path / "starts").read_text() == "xx"
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert (tmp_path / "starts").read_text() == "xx"


def test_death_twice_stops_the_run(managed: Callable[..., VllmTeacher], tmp_path: Path) -> None:
    before = time.monotonic()
    with pytest.raises(TemporaryError, match="has ended") as caught:
        run(managed(stop_after=3, faulty=9).score(SAMPLES))
    assert caught.value.exit_code == 75
    assert (tmp_path / "starts").read_text() == "xx"
    assert time.monotonic() - before < 10


def test_a_second_death_soon_after_stops_the_run(
    managed: Callable[..., VllmTeacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once per step: a teacher that dies at every step would be started at every step."""
    teacher = managed()

    def kill() -> None:
        for pid in pids(teacher):
            os.kill(pid, signal.SIGKILL)

    run(teacher.score(SAMPLES))
    kill()
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    kill()
    with monkeypatch.context() as later:
        later.setattr(vllm, "RESTART_INTERVAL", 0.0)
        assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert (tmp_path / "starts").read_text() == "xxx"
    kill()
    with pytest.raises(TemporaryError, match="has ended") as caught:
        run(teacher.score(SAMPLES))
    assert caught.value.exit_code == 75
    assert "it had been started again" in (caught.value.why or "")
    assert "serving" in caught.value.details, "the end of its log"
    assert (tmp_path / "starts").read_text() == "xxx"


def test_a_hang_in_the_middle_is_survived_once(
    managed: Callable[..., VllmTeacher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = managed()
    monkeypatch.setattr(teacher, "_asking", Asking(timeout=0.5))
    run(teacher.start())
    for pid in pids(teacher):
        os.kill(pid, signal.SIGSTOP)
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert (tmp_path / "starts").read_text() == "xx"


def test_what_vllm_is_started_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "require_vllm", lambda where: None)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        vllm_server, "require_nf4", lambda where, dtype: asked.append((where, dtype))
    )
    settings = settings_of(
        tmp_path,
        dtype="bfloat16",
        quantization="nf4",
        tensor_parallel_size=2,
        gpu_memory_utilization=0.5,
        max_model_len=1000,
        enable_sleep=True,
    )
    teacher = VllmTeacher.managed(settings, top_k=50)
    assert asked == [("teacher.quantization", "bfloat16")]
    assert teacher._server is not None
    line = " ".join(teacher._server._arguments)
    for part in (
        "--dtype bfloat16",
        "--quantization bitsandbytes",
        "--tensor-parallel-size 2",
        "--gpu-memory-utilization 0.5",
        "--max-num-batched-tokens 1024",
        "--max-model-len 1001",
        "--enable-sleep-mode",
        "--max-num-seqs 1",
        "--max-logprobs 50",
        "--logprobs-mode processed_logprobs",
    ):
        assert part in line
    assert teacher._server._env["VLLM_SERVER_DEV_MODE"] == "1"
    assert "chunked-prefill" not in line
    with pytest.raises(ConfigError, match="int8"):
        VllmTeacher.managed(settings_of(tmp_path, quantization="int8"))


def test_a_teacher_that_answers_too_prefills_prompts_whole_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU engine dies when a seeded request is prefilled in two parts."""
    monkeypatch.setattr(vllm_server, "require_vllm", lambda where: None)
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        teacher = VllmTeacher.managed(settings_of(tmp_path, max_model_len=3000, samples=True))
        assert teacher._server is not None
        line = " ".join(teacher._server._arguments)
        assert ("--no-enable-chunked-prefill" in line) is not on_gpu
        assert f"--max-num-batched-tokens {1024 if on_gpu else 3001}" in line
        assert f"--max-num-seqs {64 if on_gpu else 8}" in line


def test_a_temperature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        VllmTeacher.managed(settings_of(tmp_path), temperature=0.7)


def test_without_vllm_a_managed_teacher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="not installed") as caught:
        VllmTeacher.managed(settings_of(tmp_path))
    assert caught.value.where == "teacher.backend"


# ---- leaving the card and coming back -------------------------------------------------------------------------------


class Server:
    """A server and its client in one, which fail on demand."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.down: set[str] = set()

    async def _do(self, what: str) -> None:
        await asyncio.sleep(0)
        self.events.append(what)
        if what in self.down:
            self.down.discard(what)
            raise StartFailed("no port") if what == "start" else ServerDown("gone")

    async def start(self) -> None:
        await self._do("start")

    def stop(self) -> None:
        self.events.append("stop")

    def client(self, *, timeout: float) -> Server:
        return self

    def limited(self, max_concurrency: int) -> Server:
        return self

    async def sleep(self) -> None:
        await self._do("sleep")

    async def wake_up(self) -> None:
        await self._do("wake_up")


def on(server: Any) -> VllmTeacher:
    return VllmTeacher(server, asking=Asking())


def nap(server: Server, times: int = 1, *, down: tuple[str, ...] = ()) -> None:
    async def naps() -> None:
        teacher = on(server)
        await teacher.start()
        server.down |= set(down)
        await teacher.wake()
        for _ in range(times):
            await teacher.sleep()
            await teacher.sleep()
            await teacher.wake()
            await teacher.wake()

    run(naps())


def test_a_server_is_told_once() -> None:
    server = Server()
    nap(server, times=2)
    assert server.events == ["start", *["sleep", "wake_up"] * 2]


def test_a_server_that_dies_going_to_sleep_gives_the_card_back_and_starts_at_waking() -> None:
    server = Server()
    nap(server, down=("sleep",))
    assert server.events == ["start", "sleep", "stop", "start", "wake_up"]


def test_a_server_that_died_asleep_is_started_once() -> None:
    server = Server()
    nap(server, down=("wake_up",))
    assert server.events == ["start", "sleep", "wake_up", "stop", "start"]


def test_a_server_that_does_not_come_back_ends_the_run() -> None:
    server = Server()
    with pytest.raises(TemporaryError, match="could not be started again: no port") as failure:
        nap(server, down=("wake_up", "start"))
    assert failure.value.exit_code == EXIT_TEMPORARY


def test_a_server_told_to_change_when_cancelled_is_told_again() -> None:
    server = Server()

    async def cancelled() -> None:
        teacher = on(server)
        await teacher.start()
        task = asyncio.create_task(teacher.sleep())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await teacher.wake()
        await teacher.sleep()

    run(cancelled())
    assert server.events == ["start", "wake_up", "sleep"]


# ---- the teacher answers itself -------------------------------------------------------------------------------------

PROMPT = (5, 9, 77)
PADDING = range(VOCABULARY, scripted.ROWS)


def answer(teacher: ServedTeacher, count: int = 1, **changes: Any) -> list[Completion]:
    sampler = VllmTeacherSampler(teacher, vocabulary=VOCABULARY, padding=PADDING)
    params = SamplingParams(**{"max_tokens": 5, "stop_token_ids": (80,), "top_k": 7} | changes)

    async def everything() -> list[Completion]:
        return await asyncio.gather(
            *(sampler.complete(PROMPT, params, seed) for seed in range(count))
        )

    return run(everything())


def test_it_answers_with_token_ids_and_logprobs(server: ScriptedServer) -> None:
    teacher = served(server)
    assert isinstance(VllmTeacherSampler(teacher, vocabulary=VOCABULARY, padding=()), Sampler)
    (completion,) = answer(teacher, temperature=0.7)
    assert completion.token_ids == (78, 79, 80)
    assert completion.finish_reason == "stop"
    assert completion.logprobs == pytest.approx(
        [logprob(t, i) for i, t in enumerate([78, 79, 80], 3)]
    )
    (body,) = server.asked("/v1/completions")
    assert (body["seed"], body["temperature"], body["top_k"]) == (0, 0.7, 7)
    assert body["logit_bias"] == {str(token): -100.0 for token in PADDING}
    assert answer(teacher, max_tokens=2)[0].finish_reason == "length"
    assert answer(teacher, max_tokens=3)[0].finish_reason == "stop"


def test_answers_in_flight_are_bounded_apart_from_scores(server: ScriptedServer) -> None:
    server.pause = 0.02
    teacher = served(server, max_concurrency=1, sampling_concurrency=3)
    answer(teacher, 9)
    assert server.most_in_flight == 3
    server.most_in_flight = 0
    run(teacher.score(SAMPLES))
    assert server.most_in_flight == 1


def test_a_padding_id_that_comes_all_the_same_is_an_error(server: ScriptedServer) -> None:
    server.always = changed(lambda choice: choice.update(token_ids=[78, VOCABULARY, 80]))
    with pytest.raises(BadAnswer, match=f"drew id {VOCABULARY}"):
        answer(served(server))


def test_more_padding_than_can_be_left_out(server: ScriptedServer) -> None:
    with pytest.raises(ModelError, match="1025 ids that no tokenizer produces"):
        VllmTeacherSampler(served(server), vocabulary=VOCABULARY, padding=range(100, 1125))


def test_a_teacher_takes_no_adapter(server: ScriptedServer) -> None:
    sampler = VllmTeacherSampler(served(server), vocabulary=VOCABULARY, padding=())
    with pytest.raises(TypeError, match="no adapter"):
        sampler.load_policy(Adapter(tensors={}, config={}), version=1)


def test_death_among_many_answers_is_one_restart(
    managed: Callable[..., VllmTeacher], tmp_path: Path
) -> None:
    done = answer(managed(stop_after=4), 12)
    assert [completion.token_ids for completion in done] == [(78, 79, 80)] * 12
    assert (tmp_path / "starts").read_text() == "xx"
