"""The served teacher against a scripted server: what it scores, what it checks, and the faults it survives."""

from __future__ import annotations

import asyncio
import gc
import json
import math
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
    DEEP,
    DIGITS,
    VOCABULARY,
    ScriptedServer,
    body,
    bomb,
    changed,
    cut,
    drip,
    flood,
    hang_up,
    html,
    logprob,
    prompt_value,
    slow,
    status,
)
from tests.teacher.conformance import make_sample, pids

from rnow.algorithm.records import TeacherNeeds, TopKEvidence
from rnow.errors import (
    EXIT_TEMPORARY,
    ConfigError,
    ModelError,
    StopRequested,
    TemporaryError,
)
from rnow.processes.process import StartFailed
from rnow.protocols import Sampler, Teacher
from rnow.serving import client as client_module
from rnow.serving import server as server_module
from rnow.serving.client import BadAnswer, Refused, ServerDown
from rnow.serving.server import VllmServer
from rnow.teacher import vllm, vllm_server
from rnow.teacher.vllm import VllmTeacher
from rnow.teacher.vllm_sampler import VllmTeacherSampler
from rnow.teacher.vllm_server import Asking, TeacherServerSettings
from rnow.types import Adapter, Completion, Sample, SamplingParams

SAMPLES = [make_sample(f"dataset_0/{i}#0", 6 + i, first=i) for i in range(12)]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        yield started


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(server_module, "START_TIMEOUT", 20.0)
    monkeypatch.delenv(vllm.API_KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer()


def served(
    server: ScriptedServer, model: str | None = "base", api_key: str | None = None, **asking: Any
) -> VllmTeacher:
    return VllmTeacher.served(
        server.url, model, api_key=api_key, asking=Asking(**{"timeout": 2.0} | asking)
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


# ---- scoring --------------------------------------------------------------------------------------------------------


def test_only_loss_tokens_by_sample_id(server: ScriptedServer) -> None:
    teacher = served(server)
    assert isinstance(teacher, Teacher)
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    asked = server.asked("/v1/completions")
    assert sorted(body["prompt"] for body in asked) == sorted(
        list(sample.token_ids) for sample in SAMPLES
    )


def test_what_follows_the_last_loss_token_is_not_sent(server: ScriptedServer) -> None:
    sample = make_sample("a", 20, loss=[4, 5, 9])
    assert_right(run(served(server).score([sample])), [sample])
    (body,) = server.asked("/v1/completions")
    assert body["prompt"] == list(sample.token_ids[:10])


def test_a_sample_without_loss_tokens_costs_no_request(server: ScriptedServer) -> None:
    sample = make_sample("a", 5, loss=[])
    assert_right(run(served(server).score([sample])), [sample])
    assert server.requests == []


@pytest.mark.parametrize("most", [1, 4])
def test_concurrency_is_bounded(server: ScriptedServer, most: int) -> None:
    server.pause = 0.03
    assert_right(run(served(server, max_concurrency=most).score(SAMPLES)), SAMPLES)
    assert server.most_in_flight == most


def test_the_only_model_needs_no_name(server: ScriptedServer) -> None:
    assert_right(run(served(server, model=None).score(SAMPLES)), SAMPLES)


def test_the_key_is_given_or_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(key="k3y") as server:
        with pytest.raises(TemporaryError, match="Unauthorized"):
            run(served(server).score(SAMPLES))
        monkeypatch.setenv(vllm.API_KEY_VARIABLE, "k3y")
        assert_right(run(served(server).score(SAMPLES)), SAMPLES)
        with pytest.raises(TemporaryError, match="Unauthorized"):
            run(served(server, api_key="wrong").score(SAMPLES))
        monkeypatch.delenv(vllm.API_KEY_VARIABLE)
        assert_right(run(served(server, api_key="k3y").score(SAMPLES)), SAMPLES)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_temperature_is_refused(temperature: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        VllmTeacher.served("http://127.0.0.1:1", temperature=temperature)
    with pytest.raises(ConfigError, match="temperature"):
        VllmTeacher.managed(settings_of(tmp_path), temperature=temperature)


# ---- faults while training ------------------------------------------------------------------------------------------


def test_a_server_that_is_unwell_for_a_while(server: ScriptedServer) -> None:
    server.faults += [status(429), status(500), hang_up, html, slow(0.2), status(503), status(429)]
    assert_right(run(served(server).score(SAMPLES)), SAMPLES)


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(429),
        status(401),
        slow(2),
        hang_up,
        html,
        prompt_value(math.nan),
        prompt_value(0.1),
        changed(lambda choice: choice["prompt_logprobs"].pop()),
        cut,
        bomb,
        flood,
        drip,
        body(DEEP),
        body(DIGITS),
        body("\x00\xff garbage"),
        prompt_value(-(10**400)),
        prompt_value([[]]),
    ],
    ids=[
        "500",
        "429",
        "401",
        "slow",
        "hang-up",
        "html",
        "nan",
        "positive",
        "count",
        "cut",
        "bomb",
        "flood",
        "drip",
        "deep",
        "digits",
        "garbage",
        "huge",
        "lists",
    ],
)
def test_a_server_that_stays_unwell_stops_the_run_for_now(
    server: ScriptedServer, fault: scripted.Fault
) -> None:
    """Exit 75 with the state saved, not 2: training is under way."""
    server.faults += [slow(0)] * 3
    server.always = fault
    before = time.monotonic()
    with pytest.raises(TemporaryError) as caught:
        run(served(server, timeout=0.5).score(SAMPLES))
    assert caught.value.exit_code == 75
    assert server.url in caught.value.message
    assert time.monotonic() - before < 5


def test_samples_that_fail_together_are_one_error(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio shows a traceback of every failure that nobody looked at."""

    async def fail(*given: object) -> None:
        raise BadAnswer("no")

    monkeypatch.setattr(VllmTeacher, "_judge", fail)
    with pytest.raises(TemporaryError):
        run(served(server).score(SAMPLES))
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_nobody_there() -> None:
    with pytest.raises(ServerDown):
        run(
            VllmTeacher.served("http://127.0.0.1:9", "base", asking=Asking(timeout=0.3)).score(
                SAMPLES
            )
        )


def test_a_stop_is_noticed_while_waiting(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "_POLL", 0.05)
    server.always = slow(3)
    seen = []

    def poll() -> None:
        seen.append(1)
        if len(seen) == 3:
            raise StopRequested

    before = time.monotonic()
    with pytest.raises(StopRequested):
        run(served(server, timeout=30, poll=poll).score(SAMPLES))
    assert time.monotonic() - before < 2


# ---- checks before training -----------------------------------------------------------------------------------------


def test_a_good_server_passes(server: ScriptedServer, tokenizer: Any) -> None:
    found = run(served(server, model=None).check(tokenizer, VOCABULARY, longest=63))
    assert found.warnings == ()
    assert found.padding_mass == pytest.approx(0.04), "four ids of one hundredth each"


def test_no_padding(server: ScriptedServer, tokenizer: Any) -> None:
    found = run(served(server).check(tokenizer, scripted.ROWS))
    assert found.padding_mass == 0.0


def test_an_old_server_cannot_say_how_much_padding(server: ScriptedServer, tokenizer: Any) -> None:
    server.always = changed(
        lambda choice: choice["logprobs"] and choice["logprobs"].update(top_logprobs=[{}])
    )
    found = run(served(server).check(tokenizer, VOCABULARY))
    assert found.padding_mass is None
    assert len(found.warnings) == 1


def test_another_model(server: ScriptedServer, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no model 'Qwen/Qwen3-4B'") as caught:
        run(served(server, model="Qwen/Qwen3-4B").check(tokenizer, VOCABULARY))
    assert caught.value.details == ("served: base",)
    server.models["more"] = ("/models/more", None)
    with pytest.raises(ModelError, match="serves 2 models"):
        run(served(server, model=None).check(tokenizer, VOCABULARY))


def test_another_tokenizer(server: ScriptedServer, tokenizer: Any) -> None:
    server.faults += [slow(0), slow(0), status(200, '{"tokens": [57, 1, 2]}')]
    with pytest.raises(ModelError, match="reads text differently from token 1 on") as caught:
        run(served(server).check(tokenizer, VOCABULARY))
    assert caught.value.title == "Student and teacher tokenizers differ"
    assert caught.value.where == "teacher.url"


def test_no_tokenize_is_a_warning(server: ScriptedServer, tokenizer: Any) -> None:
    server.faults += [slow(0), slow(0), status(404)]
    found = run(served(server).check(tokenizer, VOCABULARY))
    assert len(found.warnings) == 1
    assert "/tokenize" in found.warnings[0]


def test_sequences_that_do_not_fit(server: ScriptedServer, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="up to 63 tokens, the run has up to 64") as caught:
        run(served(server).check(tokenizer, VOCABULARY, longest=64))
    assert "--max-model-len 65" in (caught.value.fix or "")


def test_answers_that_change(server: ScriptedServer, tokenizer: Any) -> None:
    server.models["adapter"] = ("/a", "base")
    answers = iter(range(1, 1000))
    server.always = changed(
        lambda choice: (
            choice["prompt_logprobs"]
            and choice["prompt_logprobs"][-1].update(
                {str(choice["prompt_token_ids"][-1]): {"logprob": -1.0 * next(answers)}}
            )
        )
    )
    with pytest.raises(BadAnswer, match="differ by 1 nats"):
        run(served(server).check(tokenizer, VOCABULARY))


def test_rounding_that_goes_with_the_batch_is_no_change(
    server: ScriptedServer, tokenizer: Any
) -> None:
    """A bfloat16 server that others use as well."""
    answers = iter(range(1, 1000))
    server.always = changed(
        lambda choice: (
            choice["prompt_logprobs"]
            and choice["prompt_logprobs"][-1].update(
                {str(choice["prompt_token_ids"][-1]): {"logprob": -9.0 - 0.1 * (next(answers) % 2)}}
            )
        )
    )
    run(served(server).check(tokenizer, VOCABULARY))
    assert next(answers) > 2, "it was asked twice"


def test_a_server_with_adapters_is_asked_one_at_a_time(
    server: ScriptedServer, tokenizer: Any
) -> None:
    server.models["adapter"] = ("/a", "base")
    teacher = served(server, max_concurrency=8)
    run(teacher.check(tokenizer, VOCABULARY))
    server.pause, server.most_in_flight = 0.02, 0
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert server.most_in_flight == 1


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (status(500), ModelError),
        (status(401), Refused),
        (hang_up, ModelError),
        (html, BadAnswer),
        (prompt_value(math.nan), BadAnswer),
        (slow(4), ModelError),
        (cut, ModelError),
        (bomb, BadAnswer),
        (flood, BadAnswer),
        (drip, ModelError),
        (body(DEEP), BadAnswer),
        (prompt_value(-(10**400)), BadAnswer),
    ],
    ids=[
        "500",
        "401",
        "hang-up",
        "html",
        "nan",
        "slow",
        "cut",
        "bomb",
        "flood",
        "drip",
        "deep",
        "huge",
    ],
)
def test_a_bad_server_before_training_is_bad_input(
    server: ScriptedServer, tokenizer: Any, fault: scripted.Fault, error: type[Exception]
) -> None:
    def only_scores(handler: Any, answer: dict[str, Any]) -> bool:
        scores = "choices" in answer and answer["choices"][0]["prompt_logprobs"]
        return bool(scores) and fault(handler, answer)

    server.always = only_scores
    with pytest.raises(error) as caught:
        run(served(server, timeout=1.5).check(tokenizer, VOCABULARY))
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
    assert caught.value.where == "teacher.url"  # type: ignore[attr-defined]
    assert caught.value.fix, "what to do next"  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", [slow(5), hang_up, cut, drip, html, status(503)])
def test_who_does_not_say_what_it_serves_is_given_ten_seconds(
    server: ScriptedServer, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fault: scripted.Fault
) -> None:
    """However long an answer may take later."""
    assert vllm.CONNECT_SECONDS == 10
    monkeypatch.setattr(vllm, "CONNECT_SECONDS", 0.4)
    server.always = fault
    before = time.monotonic()
    with pytest.raises(ModelError) as caught:
        run(served(server, timeout=600.0).check(tokenizer, VOCABULARY))
    assert caught.value.exit_code == 2
    assert server.url in caught.value.message
    assert time.monotonic() - before < 4


@pytest.mark.parametrize(
    "entry", [{"id": 5}, {"id": "base", "max_model_len": "60"}, {"id": "base", "root": []}, 7]
)
def test_a_list_of_models_that_is_none(
    server: ScriptedServer, tokenizer: Any, entry: object
) -> None:
    server.always = body(json.dumps({"data": [entry]}))
    with pytest.raises(BadAnswer, match="list of models"):
        run(served(server).check(tokenizer, VOCABULARY))


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
        made.append(
            VllmTeacher(
                server=server, model="teacher", where="teacher.path", asking=Asking(timeout=10)
            )
        )
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
    return VllmTeacher(server=server, model="teacher", where="teacher.path", asking=Asking())


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


# ---- the likeliest tokens -------------------------------------------------------------------------------------------


def test_top_k_evidence(server: ScriptedServer) -> None:
    sample = make_sample("a", 8, loss=[3, 6, 7])
    evidence = run(served(server).score([sample], TeacherNeeds(top_k=3)))["a"]
    assert isinstance(evidence, TopKEvidence)
    (body,) = server.asked("/v1/completions")
    assert body["prompt_logprobs"] == 3
    for row, position in enumerate((3, 6, 7)):
        token = sample.token_ids[position]
        # The scripted server lists ids 0 to 2 and the given one.
        listed = {t: logprob(t, position) for t in {0, 1, 2, token}}
        best = sorted(listed, key=lambda t: -listed[t])[:3]
        assert evidence.ids[row].tolist() == best
        assert evidence.logprobs[row].tolist() == pytest.approx([listed[t] for t in best])
        assert evidence.teacher_logprobs[row] == pytest.approx(logprob(token, position))


def test_a_server_that_lists_too_few_is_told_from_its_check(
    server: ScriptedServer, tokenizer: Any
) -> None:
    def refuses(handler: Any, answer: dict[str, Any]) -> bool:
        asked = handler.server.requests[-1][1].get("prompt_logprobs")
        return bool(asked) and status(400, '{"error": {"message": "too many"}}')(handler, answer)

    server.always = refuses
    with pytest.raises(Refused) as caught:
        run(served(server, top_k=50).check(tokenizer, VOCABULARY))
    assert "--max-logprobs 50" in (caught.value.fix or "")
    assert caught.value.where == "teacher.url"


def test_a_padding_id_among_the_likeliest_is_an_error(
    server: ScriptedServer, tokenizer: Any
) -> None:
    teacher = served(server, top_k=2)
    run(teacher.check(tokenizer, VOCABULARY))
    server.always = changed(
        lambda choice: choice["prompt_logprobs"][-1].update({str(VOCABULARY): {"logprob": -0.01}})
    )
    with pytest.raises(TemporaryError, match=f"id {VOCABULARY} among its 2 likeliest"):
        run(teacher.score(SAMPLES, TeacherNeeds(top_k=2)))


# ---- the teacher answers itself -------------------------------------------------------------------------------------

PROMPT = (5, 9, 77)
PADDING = range(VOCABULARY, scripted.ROWS)


def answer(teacher: VllmTeacher, count: int = 1, **changes: Any) -> list[Completion]:
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
