"""Teachers behind servers of each protocol: what they score, what is checked before they are believed, and the faults survived."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import time
from collections.abc import Coroutine, Iterator
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
    first_judged,
    flood,
    hang_up,
    html,
    logprob,
    one_fewer,
    prompt_value,
    slow,
    status,
)
from tests.teacher.conformance import make_sample

from rnow.algorithm.records import TeacherNeeds, TopKEvidence
from rnow.errors import ConfigError, ModelError, StopRequested, TemporaryError
from rnow.protocols import Teacher
from rnow.serving import http as http_module
from rnow.serving.client import VllmClient
from rnow.serving.echo import EchoClient
from rnow.serving.http import BadAnswer, Refused, ServerDown
from rnow.serving.sglang import SglangClient
from rnow.teacher import served as served_module
from rnow.teacher.served import API_KEY_VARIABLE, Asking, ServedTeacher
from rnow.types import Sample

SAMPLES = [make_sample(f"dataset_0/{i}#0", 6 + i, first=i) for i in range(12)]
PROTOCOLS = ["vllm", "sglang", "openai", "openai-text"]
BY_ID = PROTOCOLS[:3]


@pytest.fixture(params=PROTOCOLS)
def server(request: pytest.FixtureRequest) -> Iterator[ScriptedServer]:
    with ScriptedServer(protocol=request.param) as started:
        yield started


@pytest.fixture
def vllm() -> Iterator[ScriptedServer]:
    with ScriptedServer() as started:
        yield started


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "_FIRST_PAUSE", 0.01)
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return character_tokenizer()


def served(
    server: ScriptedServer, model: str | None = "base", api_key: str | None = None, **asking: Any
) -> ServedTeacher:
    """A teacher that is asked in the server's protocol, and in no other."""
    wanted = Asking(**{"timeout": 2.0} | asking)
    protocol: Any = server.protocol.partition("-")[0]
    teacher = ServedTeacher.at(server.url, model, protocol=protocol, api_key=api_key, asking=wanted)
    if server.protocol == "openai-text":
        teacher._use(teacher._clients[1])
    elif server.protocol == "openai":
        teacher._use(teacher._clients[0])
    return teacher


def judged(server: ScriptedServer) -> list[list[int]]:
    """The token ids of the requests for log-probabilities."""
    if server.protocol == "sglang":
        return [body["input_ids"] for body in server.asked("/generate")]
    return [body["prompt"] for body in server.asked("/v1/completions")]


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
    assert sorted(judged(server)) == sorted(list(sample.token_ids) for sample in SAMPLES)


def test_what_follows_the_last_loss_token_is_not_sent(server: ScriptedServer) -> None:
    sample = make_sample("a", 20, loss=[4, 5, 9])
    assert_right(run(served(server).score([sample])), [sample])
    assert judged(server) == [list(sample.token_ids[:10])]


def test_a_sample_without_loss_tokens_costs_no_request(server: ScriptedServer) -> None:
    sample = make_sample("a", 5, loss=[])
    assert_right(run(served(server).score([sample])), [sample])
    assert server.requests == []


@pytest.mark.parametrize("most", [1, 4])
def test_concurrency_is_bounded(vllm: ScriptedServer, most: int) -> None:
    vllm.pause = 0.03
    assert_right(run(served(vllm, max_concurrency=most).score(SAMPLES)), SAMPLES)
    assert vllm.most_in_flight == most


def test_the_only_model_needs_no_name(server: ScriptedServer) -> None:
    assert_right(run(served(server, model=None).score(SAMPLES)), SAMPLES)


def test_the_key_is_given_or_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(key="k3y") as server:
        with pytest.raises(TemporaryError, match="Unauthorized"):
            run(served(server).score(SAMPLES))
        monkeypatch.setenv(API_KEY_VARIABLE, "k3y")
        assert_right(run(served(server).score(SAMPLES)), SAMPLES)
        with pytest.raises(TemporaryError, match="Unauthorized"):
            run(served(server, api_key="wrong").score(SAMPLES))
        monkeypatch.delenv(API_KEY_VARIABLE)
        assert_right(run(served(server, api_key="k3y").score(SAMPLES)), SAMPLES)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        ServedTeacher.at("http://127.0.0.1:1", temperature=temperature)


# ---- which protocol -------------------------------------------------------------------------------------------------

CLIENTS = {
    "vllm": VllmClient,
    "sglang": SglangClient,
    "openai": EchoClient,
    "openai-text": EchoClient,
}


@pytest.mark.parametrize("named", [True, False])
def test_the_protocol_is_found(server: ScriptedServer, tokenizer: Any, named: bool) -> None:
    """By the name that the server gives itself, or by asking."""
    if not named:
        server.owned_by = "a proxy"
    teacher = ServedTeacher.at(server.url, asking=Asking(timeout=2.0))
    found = run(teacher.check(tokenizer, VOCABULARY, longest=60))
    assert type(teacher._client) is CLIENTS[server.protocol]
    assert teacher._client.names_ids == (server.protocol != "openai-text")
    assert teacher.answers == (server.protocol == "vllm")
    assert found.summary.startswith(f"asked by {teacher._client.asks}; model base")
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)


def test_the_protocol_is_found_without_a_check(server: ScriptedServer) -> None:
    teacher = ServedTeacher.at(server.url, asking=Asking(timeout=2.0))
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)


@pytest.mark.parametrize(
    ("protocol", "said"),
    [("llamacpp", "Only no echo is supported"), ("tgi", "missing field `inputs`")],
)
def test_servers_that_cannot_be_teachers(tokenizer: Any, protocol: str, said: str) -> None:
    with ScriptedServer(protocol=protocol) as server:
        teacher = ServedTeacher.at(server.url, asking=Asking(timeout=2.0))
        with pytest.raises(ModelError, match="no log-probabilities of a prompt") as caught:
            run(teacher.check(tokenizer, VOCABULARY))
    assert caught.value.title == "Not a teacher's server"
    assert caught.value.where == "teacher.url"
    details = caught.value.details
    for asked in ("prompt_logprobs at /v1", "return_logprob at /generate", "echo with logprobs"):
        assert any(line.startswith(asked) for line in details)
    assert any(said in line for line in details)


def test_a_protocol_that_the_server_does_not_speak(tokenizer: Any) -> None:
    with ScriptedServer(protocol="sglang") as server:
        teacher = ServedTeacher.at(server.url, protocol="vllm", asking=Asking(timeout=2.0))
        with pytest.raises(BadAnswer, match="gives no log-probabilities of a prompt"):
            run(teacher.check(tokenizer, VOCABULARY))


def test_a_wrong_key_is_not_taken_for_a_missing_protocol(tokenizer: Any) -> None:
    with (
        ScriptedServer(protocol="openai", key="k3y") as server,
        pytest.raises(Refused, match="Unauthorized"),
    ):
        run(ServedTeacher.at(server.url).check(tokenizer, VOCABULARY))


# ---- faults while training ------------------------------------------------------------------------------------------


def test_a_server_that_is_unwell_for_a_while(server: ScriptedServer) -> None:
    server.faults += [
        status(429, retry_after="0.1"),
        status(500),
        hang_up,
        html,
        slow(0.2),
        status(503),
        cut,
    ]
    assert_right(run(served(server).score(SAMPLES)), SAMPLES)


TRANSPORT = {
    "500": status(500),
    "429": status(429),
    "429 for an hour": status(429, retry_after="3600"),
    "401": status(401),
    "redirect": status(307, location="http://127.0.0.1:9/"),
    "slow": slow(2),
    "hang-up": hang_up,
    "html": html,
    "cut": cut,
    "bomb": bomb,
    "flood": flood,
    "drip": drip,
    "deep": body(DEEP),
    "digits": body(DIGITS),
    "garbage": body("\x00\xff garbage"),
}
CONTENT = {
    "nan": prompt_value(math.nan),
    "positive": prompt_value(0.1),
    "huge": prompt_value(-(10**400)),
    "lists": prompt_value([[]]),
    "null": prompt_value(None),
    "bool": prompt_value(False),
    "count": one_fewer,
    "first": first_judged,
    "empty": body("{}"),
    "nonsense": body('{"choices": [7], "meta_info": {"input_token_logprobs": [7, 8]}}'),
}


def stays_unwell(server: ScriptedServer, fault: scripted.Fault) -> None:
    """Exit 75 with the state saved, not 2: training is under way."""
    server.faults += [slow(0)] * 3
    server.always = fault
    before = time.monotonic()
    with pytest.raises(TemporaryError) as caught:
        run(served(server, timeout=0.5).score(SAMPLES))
    assert caught.value.exit_code == 75
    assert server.url in caught.value.message
    assert time.monotonic() - before < 5


@pytest.mark.parametrize("fault", TRANSPORT.values(), ids=TRANSPORT)
def test_a_server_that_stays_unwell_stops_the_run_for_now(
    vllm: ScriptedServer, fault: scripted.Fault
) -> None:
    stays_unwell(vllm, fault)


@pytest.mark.parametrize("fault", CONTENT.values(), ids=CONTENT)
def test_a_server_that_answers_wrongly_stops_the_run_for_now(
    server: ScriptedServer, fault: scripted.Fault
) -> None:
    stays_unwell(server, fault)


def reread(server: ScriptedServer, answer: dict[str, Any]) -> None:
    """Another token stands where one was sent."""
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"][2][1] = 99
    elif answer["choices"][0].get("prompt_logprobs"):
        answer["choices"][0]["prompt_token_ids"] = [99]
    else:
        answer["choices"][0]["logprobs"]["tokens"][2] = "token_id:99"


def one_more(server: ScriptedServer, answer: dict[str, Any]) -> None:
    """A token of the server's own before the prompt, counted and listed."""
    if "meta_info" in answer:
        meta = answer["meta_info"]
        meta["prompt_tokens"] += 1
        meta["input_token_logprobs"].insert(0, [None, 0, None])
    elif answer["choices"][0].get("prompt_logprobs"):
        answer["choices"][0]["prompt_logprobs"].insert(0, None)
    else:
        answer["usage"]["prompt_tokens"] += 1
        for listed in answer["choices"][0]["logprobs"].values():
            listed.insert(0, None)


def other_model(server: ScriptedServer, answer: dict[str, Any]) -> None:
    answer["model"] = "gpt-2"


@pytest.mark.parametrize(
    ("change", "message", "protocols"),
    [
        (reread, "other token ids than it was sent", BY_ID),
        (one_more, "for [0-9]+ tokens|where [0-9]+ were sent", PROTOCOLS),
        (other_model, "gpt-2 answered where base was asked", ["vllm", "openai", "openai-text"]),
    ],
)
def test_other_tokens_or_another_model(
    server: ScriptedServer, change: Any, message: str, protocols: list[str]
) -> None:
    if server.protocol not in protocols:
        return  # it says nothing of that in its answers

    def apply(handler: Any, answer: dict[str, Any]) -> bool:
        change(server, answer)
        return False

    server.always = apply
    with pytest.raises(TemporaryError, match=message) as caught:
        run(served(server).score(SAMPLES[:1]))
    if change is one_more:
        assert "BOS" in (caught.value.why or "")


def test_samples_that_fail_together_are_one_error(
    vllm: ScriptedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio shows a traceback of every failure that nobody looked at."""

    async def fail(*given: object) -> None:
        raise BadAnswer("no")

    monkeypatch.setattr(ServedTeacher, "_judge", fail)
    with pytest.raises(TemporaryError):
        run(served(vllm).score(SAMPLES))
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_ids_that_are_turned_into_text_and_read_again(
    server: ScriptedServer, tokenizer: Any
) -> None:
    """Two tokens become one."""
    server.always = one_fewer
    with pytest.raises(BadAnswer, match="log-probabilities for") as caught:
        run(served(server).check(tokenizer, VOCABULARY))
    assert "read that again" in (caught.value.why or "")


def test_nobody_there() -> None:
    with pytest.raises(ServerDown):
        run(
            ServedTeacher.at("http://127.0.0.1:9", "base", asking=Asking(timeout=0.3)).score(
                SAMPLES
            )
        )


def test_a_stop_is_noticed_while_waiting(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_module, "_POLL", 0.05)
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
    found = run(
        served(server, model=None).check(tokenizer, VOCABULARY, longest=62, rows=scripted.ROWS)
    )
    if server.protocol in ("vllm", "sglang"):
        assert found.warnings == ()
        assert found.padding_mass == pytest.approx(0.04), "four ids of one hundredth each"
        assert "window 64" in found.summary
    else:
        assert len(found.warnings) == 1
        assert "padding ids" in found.warnings[0]
        assert "window not told" in found.summary
    assert found.noise == 0
    assert not server.read_past_the_head
    assert "does not reach a prompt" in found.summary


def test_a_temperature_that_reaches_the_prompt_is_told(
    server: ScriptedServer, tokenizer: Any
) -> None:
    plain = scripted.prompt_value(-9.0)

    def temper(handler: Any, answer: dict[str, Any]) -> bool:
        asked = handler.server.requests[-1][1]
        return asked.get("sampling_params", asked).get("temperature") == 2.0 and plain(
            handler, answer
        )

    server.always = temper
    found = run(served(server).check(tokenizer, VOCABULARY))
    assert "the request's temperature tempers a prompt" in found.summary


def test_no_padding(server: ScriptedServer, tokenizer: Any) -> None:
    found = run(served(server).check(tokenizer, VOCABULARY, rows=VOCABULARY))
    assert found.padding_mass == 0.0
    assert found.warnings == ()


def test_vllm_says_itself_where_its_head_ends(vllm: ScriptedServer, tokenizer: Any) -> None:
    found = run(served(vllm).check(tokenizer, VOCABULARY))
    assert found.padding_mass == pytest.approx(0.04)
    assert run(served(vllm).check(tokenizer, scripted.ROWS)).padding_mass == 0.0


def test_an_old_server_cannot_say_how_much_padding(vllm: ScriptedServer, tokenizer: Any) -> None:
    vllm.always = changed(
        lambda choice: choice["logprobs"] and choice["logprobs"].update(top_logprobs=[{}])
    )
    found = run(served(vllm).check(tokenizer, VOCABULARY))
    assert found.padding_mass is None
    assert len(found.warnings) == 1


def test_another_model(server: ScriptedServer, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no model 'Qwen/Qwen3-4B'") as caught:
        run(served(server, model="Qwen/Qwen3-4B").check(tokenizer, VOCABULARY))
    assert caught.value.details == ("served: base",)
    assert "teacher.served_model" in (caught.value.fix or "")
    server.models["more"] = ("/models/more", None)
    with pytest.raises(ModelError, match="serves 2 models"):
        run(served(server, model=None).check(tokenizer, VOCABULARY))


def test_a_server_without_a_list_of_models(tokenizer: Any) -> None:
    with ScriptedServer(protocol="openai") as server:
        server.faults.append(status(404))
        assert run(served(server).check(tokenizer, VOCABULARY)).noise == 0
        server.faults.append(status(404))
        with pytest.raises(ModelError, match="serves 0 models") as caught:
            run(served(server, model=None).check(tokenizer, VOCABULARY))
    assert "set teacher.served_model" in (caught.value.fix or "")


def test_another_tokenizer(server: ScriptedServer, tokenizer: Any) -> None:
    message = "takes token 30 for something else"
    if server.protocol in ("vllm", "sglang"):
        server.faults += [slow(0), status(200, '{"tokens": [57, 1, 2]}')]
        message = "reads text differently from token 1 on"
    elif server.protocol == "openai":
        server.faults += [slow(0), status(200, '{"ids": []}')]  # a /tokenize of its own kind
    server.names[30] = "xyz"
    with pytest.raises(ModelError, match=message) as caught:
        run(served(server).check(tokenizer, VOCABULARY))
    assert caught.value.title == "Student and teacher tokenizers differ"
    assert caught.value.where == "teacher.url"


def test_without_tokenize_texts_are_compared(tokenizer: Any) -> None:
    with ScriptedServer(protocol="sglang") as server:
        server.faults += [slow(0), status(404)]
        assert run(served(server).check(tokenizer, VOCABULARY, rows=100)).warnings == ()
        server.faults += [slow(0), status(404)]
        server.names[40] = "xyz"
        with pytest.raises(ModelError, match="takes token 40 for something else"):
            run(served(server).check(tokenizer, VOCABULARY))


def test_no_tokenize_is_a_warning_on_vllm(vllm: ScriptedServer, tokenizer: Any) -> None:
    vllm.faults += [slow(0), status(404)]
    found = run(served(vllm).check(tokenizer, VOCABULARY))
    assert len(found.warnings) == 1
    assert "/tokenize" in found.warnings[0]


@pytest.mark.parametrize(
    ("protocol", "option"), [("vllm", "--max-model-len 65"), ("sglang", "--context-length 65")]
)
def test_sequences_that_do_not_fit(tokenizer: Any, protocol: str, option: str) -> None:
    with (
        ScriptedServer(protocol=protocol) as server,
        pytest.raises(ModelError, match="up to 63 tokens, the run has up to 64") as caught,
    ):
        run(served(server).check(tokenizer, VOCABULARY, longest=64))
    assert option in (caught.value.fix or "")
    assert "rollout.max_context_window to 63" in (caught.value.fix or "")


def test_sequences_that_do_not_fit_a_server_that_does_not_tell(tokenizer: Any) -> None:
    with ScriptedServer(protocol="openai") as server:
        server.limit = 300
        run(served(server).check(tokenizer, VOCABULARY, longest=299))
        with pytest.raises(ModelError, match="up to 299 tokens, the run has up to 4096") as caught:
            run(served(server).check(tokenizer, VOCABULARY, longest=4096))
    assert caught.value.fix.startswith("lower rollout.max_context_window to 299")  # type: ignore[union-attr]


# ---- can it be trusted ----------------------------------------------------------------------------------------------


def test_replicas_that_do_not_agree(server: ScriptedServer, tokenizer: Any) -> None:
    server.replicas = [0.0, 0.0, 0.7]
    with pytest.raises(BadAnswer, match=r"differ by 0\.7 nats") as caught:
        run(served(server).check(tokenizer, VOCABULARY))
    assert "replicas" in (caught.value.why or "")


@pytest.mark.parametrize(("gap", "warnings"), [(0.01, 0), (0.1, 1)])
def test_rounding_that_goes_with_the_batch_is_told(
    server: ScriptedServer, tokenizer: Any, gap: float, warnings: int
) -> None:
    """A bfloat16 server that others use as well."""
    server.replicas = [0.0, gap]
    found = run(served(server).check(tokenizer, VOCABULARY, rows=VOCABULARY))
    assert found.noise == pytest.approx(gap)
    assert len(found.warnings) == warnings
    if warnings:
        assert "by 0.100 nats per token" in found.warnings[0]


@pytest.mark.parametrize("shift", [1, -1])
def test_numbers_that_belong_to_the_next_token(
    server: ScriptedServer, tokenizer: Any, shift: int
) -> None:
    server.shift = shift
    with pytest.raises(BadAnswer, match="off by one position") as caught:
        run(served(server).check(tokenizer, VOCABULARY))
    assert caught.value.where == "teacher.url"


def test_a_beginning_of_text_token_that_nobody_sent(server: ScriptedServer) -> None:
    tokenizer = character_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    run(served(server).check(tokenizer, VOCABULARY))
    server.bos = tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(BadAnswer, match=r"the same with <\|im_start\|> before it and without"):
        run(served(server).check(tokenizer, VOCABULARY))


def test_a_server_with_adapters_is_asked_one_at_a_time(
    vllm: ScriptedServer, tokenizer: Any
) -> None:
    vllm.models["adapter"] = ("/a", "base")
    teacher = served(vllm, max_concurrency=8)
    run(teacher.check(tokenizer, VOCABULARY))
    vllm.pause = 0.02
    assert_right(run(teacher.score(SAMPLES)), SAMPLES)
    assert vllm.most_in_flight == 1


BEFORE = {
    "500": (status(500), ModelError),
    "401": (status(401), Refused),
    "hang-up": (hang_up, ModelError),
    "html": (html, BadAnswer),
    "slow": (slow(4), ModelError),
    "cut": (cut, ModelError),
    "bomb": (bomb, BadAnswer),
    "flood": (flood, BadAnswer),
    "drip": (drip, ModelError),
    "deep": (body(DEEP), BadAnswer),
}


def bad_before_training(
    server: ScriptedServer, tokenizer: Any, fault: scripted.Fault, error: type[Exception]
) -> None:
    def only_scores(handler: Any, answer: dict[str, Any]) -> bool:
        meta, (choice, *_) = answer.get("meta_info"), answer.get("choices") or [{}]
        scores = meta or choice.get("prompt_logprobs") or (choice and server.protocol != "vllm")
        return bool(scores) and fault(handler, answer)

    server.always = only_scores
    with pytest.raises(error) as caught:
        run(served(server, timeout=1.0).check(tokenizer, VOCABULARY))
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
    assert caught.value.where == "teacher.url"  # type: ignore[attr-defined]
    assert caught.value.fix, "what to do next"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("fault", "error"), BEFORE.values(), ids=BEFORE)
def test_a_bad_server_before_training_is_bad_input(
    vllm: ScriptedServer, tokenizer: Any, fault: scripted.Fault, error: type[Exception]
) -> None:
    bad_before_training(vllm, tokenizer, fault, error)


@pytest.mark.parametrize("fault", ["nan", "count", "first"])
def test_wrong_answers_before_training_are_bad_input(
    server: ScriptedServer, tokenizer: Any, fault: str
) -> None:
    bad_before_training(server, tokenizer, CONTENT[fault], BadAnswer)


@pytest.mark.parametrize("fault", [slow(5), hang_up, cut, drip, html, status(503)])
def test_who_does_not_say_what_it_serves_is_given_ten_seconds(
    vllm: ScriptedServer, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fault: scripted.Fault
) -> None:
    """However long an answer may take later."""
    assert served_module.CONNECT_SECONDS == 10
    monkeypatch.setattr(served_module, "CONNECT_SECONDS", 0.4)
    vllm.always = fault
    before = time.monotonic()
    with pytest.raises(ModelError) as caught:
        run(served(vllm, timeout=600.0).check(tokenizer, VOCABULARY))
    assert caught.value.exit_code == 2
    assert vllm.url in caught.value.message
    assert time.monotonic() - before < 4


@pytest.mark.parametrize(
    "entry", [{"id": 5}, {"id": "base", "max_model_len": "60"}, {"id": "base", "root": []}, 7]
)
def test_a_list_of_models_that_is_none(vllm: ScriptedServer, tokenizer: Any, entry: object) -> None:
    vllm.always = body(json.dumps({"data": [entry]}))
    with pytest.raises(BadAnswer, match="list of models"):
        run(served(vllm).check(tokenizer, VOCABULARY))


# ---- the likeliest tokens -------------------------------------------------------------------------------------------


def test_top_k_evidence(server: ScriptedServer) -> None:
    sample = make_sample("a", 8, loss=[3, 6, 7])
    asked = served(server).score([sample], TeacherNeeds(top_k=3))
    if server.protocol == "openai-text":
        with pytest.raises(TemporaryError, match="names tokens by their text"):
            run(asked)
        return
    evidence = run(asked)["a"]
    assert isinstance(evidence, TopKEvidence)
    outside = 0
    for row, position in enumerate((3, 6, 7)):
        token = sample.token_ids[position]
        table = {t: logprob(t, position) for t in range(VOCABULARY)}
        best = sorted(table, key=lambda t: (-table[t], t))[:3]
        assert evidence.ids[row].tolist() == best
        assert evidence.logprobs[row].tolist() == pytest.approx([table[t] for t in best])
        assert evidence.teacher_logprobs[row] == pytest.approx(logprob(token, position))
        outside += token not in best
    assert outside, "some sampled token must be outside of the likeliest, or nothing is shown"


@pytest.mark.parametrize("most", [0, 7])
def test_a_server_that_lists_too_few_is_told_from_its_check(
    server: ScriptedServer, tokenizer: Any, most: int
) -> None:
    server.max_listed = most
    with pytest.raises(ModelError) as caught:
        run(served(server, top_k=20).check(tokenizer, VOCABULARY))
    assert caught.value.where == "teacher.url"
    fix = caught.value.fix or ""
    if most and server.protocol != "openai-text":
        assert "lists the 7 likeliest tokens of a position, and 20 are asked for" in str(
            caught.value
        )
        assert "set algorithm.teacher_top_k: 7" in fix
    else:
        assert "set algorithm.kl_estimator: sampled" in fix
    assert ("--max-logprobs 20" in fix) == (server.protocol == "vllm")


def test_a_server_that_lists_enough_passes(server: ScriptedServer, tokenizer: Any) -> None:
    if server.protocol != "openai-text":
        server.max_listed = 20
        found = run(served(server, top_k=20).check(tokenizer, VOCABULARY))
        assert "20 likeliest tokens listed" in found.summary


def test_probabilities_above_one(server: ScriptedServer, tokenizer: Any) -> None:
    server.replicas = [-4.0]
    if server.protocol != "openai-text":
        with pytest.raises(BadAnswer, match=r"a probability of [0-9.]+ together"):
            run(served(server, top_k=20).check(tokenizer, VOCABULARY))


@pytest.mark.parametrize("token", [-1, 10**30])
def test_what_no_token_can_be_among_the_likeliest_is_an_error(
    vllm: ScriptedServer, tokenizer: Any, token: int
) -> None:
    teacher = served(vllm, top_k=2)
    run(teacher.check(tokenizer, VOCABULARY))
    vllm.always = changed(
        lambda choice: choice["prompt_logprobs"][-1].update({str(token): {"logprob": -4.0}})
    )
    with pytest.raises(TemporaryError, match=rf"lists {token} at \d+, which is no token id"):
        run(teacher.score(SAMPLES, TeacherNeeds(top_k=2)))


def test_probabilities_above_one_while_training(server: ScriptedServer, tokenizer: Any) -> None:
    """A server that was well before training is judged in the same way during it."""
    if server.protocol != "openai-text":
        teacher = served(server, top_k=20)
        run(teacher.check(tokenizer, VOCABULARY))
        server.replicas = [-4.0]
        with pytest.raises(TemporaryError, match=r"a probability of [0-9.]+ together"):
            run(teacher.score(SAMPLES, TeacherNeeds(top_k=20)))


def test_a_padding_id_among_the_likeliest_is_an_error(vllm: ScriptedServer, tokenizer: Any) -> None:
    teacher = served(vllm, top_k=2)
    run(teacher.check(tokenizer, VOCABULARY))
    vllm.always = changed(
        lambda choice: choice["prompt_logprobs"][-1].update({str(VOCABULARY): {"logprob": -0.5}})
    )
    with pytest.raises(TemporaryError, match=f"id {VOCABULARY} among its 2 likeliest"):
        run(teacher.score(SAMPLES, TeacherNeeds(top_k=2)))
