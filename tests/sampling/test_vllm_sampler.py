"""Everything between the loop and vLLM, with a stand-in for vLLM in the worker process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from rnow.errors import (
    EXIT_TEMPORARY,
    InputError,
    ModelError,
    NotYetSupported,
    RnowError,
    TemporaryError,
)
from rnow.protocols import Sampler
from rnow.sampling.vllm_engine import EngineBackend, engine_arguments
from rnow.sampling.vllm_probe import EXACT, QUANTISED, ROUNDED, gap_between, tolerance_of
from rnow.sampling.vllm_sampler import VllmSampler
from rnow.sampling.vllm_settings import LORA_RANKS, VllmSettings
from rnow.sampling.vllm_worker import fitted
from rnow.serving.http import Refused
from rnow.types import Adapter, Completion, SamplingParams

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
PARAMS = SamplingParams(max_tokens=8, stop_token_ids=())
DRAW, DIE, DEAD, HANG, REFUSED, SLOW, STALE = (1,), (2,), (3,), (4,), (5,), (6,), (7,)

Make = Callable[..., VllmSampler]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[VllmSampler] = []

    def build(
        *flags: str, silence: float = 30.0, probe: tuple[int, ...] = (), **changes: Any
    ) -> VllmSampler:
        settings = VllmSettings(
            local_dir=tmp_path / "student",
            vocabulary=10,
            work_dir=tmp_path / "adapters",
            log=tmp_path / "log",
            dtype=changes.pop("dtype", "float32"),
            max_lora_rank=8,
            probe=probe,
            request_timeout=silence,
            **changes,
        )
        command = (sys.executable, str(STAND_IN), str(tmp_path), *flags)
        made.append(VllmSampler(EngineBackend(settings, command=command)))
        return made[-1]

    yield build
    for sampler in made:
        sampler.close()


def adapter(rank: int = 4) -> Adapter:
    return Adapter(tensors={"a": torch.ones(2)}, config={"r": rank})


def complete(sampler: VllmSampler, *requests: tuple[tuple[int, ...], int]) -> list[Completion]:
    async def everything() -> list[Completion]:
        return await asyncio.gather(
            *[sampler.complete(prompt, PARAMS, seed) for prompt, seed in requests]
        )

    return asyncio.run(everything())


def events(folder: Path) -> list[str]:
    return (folder / "events").read_text().splitlines()


def starts(folder: Path) -> int:
    return events(folder).count("start")


def tokens(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def test_it_starts_at_the_first_use_and_stamps_the_version(make: Make, tmp_path: Path) -> None:
    sampler = make()
    assert isinstance(sampler, Sampler)
    assert not (tmp_path / "events").exists()
    assert complete(sampler, (DRAW, 12), (DRAW, 34)) == [
        Completion(token_ids=ids, logprobs=(-0.5, -0.5), finish_reason="length", policy_version=0)
        for ids in ((1, 2), (3, 4))
    ]
    sampler.load_policy(adapter(), version=5)
    assert complete(sampler, (DRAW, 12))[0].policy_version == 5
    sampler.load_policy(adapter(), version=6)
    assert complete(sampler, (DRAW, 12))[0].policy_version == 6
    assert [line for line in events(tmp_path) if "dr" not in line] == [
        "start", "load adapter-5 of 1", "load adapter-6 of 1"
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["adapter-6"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "bfloat16", "engine": {"lora_dtype": "auto"}}, torch.bfloat16),
        ({"dtype": "bfloat16", "engine": {"lora_dtype": "float32"}}, torch.float32),
    ],
)
def test_the_engine_reads_the_adapter_out_of_memory_in_its_own_format(
    make: Make, tmp_path: Path, settings: dict[str, Any], expected: torch.dtype
) -> None:
    sampler = make(**settings)
    exact = torch.tensor([1.0, 1 / 3, -2e-3])
    sampler.load_policy(Adapter(tensors={"a": exact}, config={"r": 4}), version=1)
    read = load((tmp_path / "weights").read_bytes())["a"]
    assert read.dtype == expected
    assert torch.equal(read, exact.to(expected))
    weights = tmp_path / "adapters" / "adapter-1" / "adapter_model.safetensors"
    assert weights.is_symlink() == (sys.platform == "linux"), "no bytes of them in the run folder"


@pytest.mark.skipif(sys.platform != "linux", reason="their files are in memory there")
def test_adapters_in_memory_are_let_go(make: Make) -> None:
    def held() -> int:
        """By this process, of this test's or another's."""
        names = []
        for path in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                names.append(str(path.readlink()))
        return sum("rnow-adapter" in name for name in names)

    sampler, before = make(), held()
    for version in (1, 2, 2, 3):
        sampler.load_policy(adapter(), version=version)
        assert held() == before + 1
    sampler.close()
    assert held() == before


def test_a_stop_id_makes_it_a_stop(make: Make) -> None:
    async def stopped() -> Completion:
        params = SamplingParams(max_tokens=2, stop_token_ids=(4,))
        return await make().complete(DRAW, params, 34)

    assert asyncio.run(stopped()).finish_reason == "stop"


def test_what_is_owed_is_drawn_again_after_a_death(make: Make, tmp_path: Path) -> None:
    sampler = make()
    sampler.load_policy(adapter(), version=3)
    done = complete(sampler, (SLOW, 11), (DIE, 22), (SLOW, 33), (DRAW, 44))
    assert tokens(done) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert {completion.policy_version for completion in done} == {3}
    assert starts(tmp_path) == 2
    lines = events(tmp_path)
    assert lines.count("start") == 2
    assert lines.count("load adapter-3 of 1") == 2
    assert lines.count("drew 44") == 1, "what had been answered is not drawn again"
    assert lines.count("draw 11") == 2


def test_the_second_death_under_one_version_ends_the_run(make: Make, tmp_path: Path) -> None:
    sampler = make()
    with pytest.raises(TemporaryError) as failure:
        complete(sampler, (DEAD, 1))
    assert failure.value.exit_code == EXIT_TEMPORARY
    assert starts(tmp_path) == 2
    with pytest.raises(TemporaryError):
        complete(sampler, (DRAW, 1))
    with pytest.raises(TemporaryError):
        sampler.load_policy(adapter(), version=1)
    assert events(tmp_path).count("start") == 2


def test_a_new_version_may_restart_again(make: Make, tmp_path: Path) -> None:
    sampler = make()
    complete(sampler, (DIE, 1))
    sampler.load_policy(adapter(), version=1)
    (tmp_path / "died").unlink()
    assert tokens(complete(sampler, (DIE, 12))) == [(1, 2)]
    assert starts(tmp_path) == 3


def test_a_death_while_an_adapter_is_loaded(make: Make, tmp_path: Path) -> None:
    sampler = make()
    complete(sampler, (DRAW, 1))
    backend: Any = sampler._backend
    backend._process.stop()
    sampler.load_policy(adapter(), version=2)
    assert starts(tmp_path) == 2
    assert complete(sampler, (DRAW, 1))[0].policy_version == 2
    assert events(tmp_path).count("load adapter-2 of 1") == 1


def test_silence_is_taken_for_death(make: Make, tmp_path: Path) -> None:
    sampler = make(silence=1.0)
    complete(sampler, (DRAW, 1))

    async def hang() -> list[Completion]:
        tasks = [
            asyncio.create_task(sampler.complete(prompt, PARAMS, 77)) for prompt in (HANG, DRAW)
        ]
        await asyncio.sleep(0.5)
        (tmp_path / "events").write_text("")
        while "start" not in events(tmp_path):
            await asyncio.sleep(0.05)
        (tmp_path / "healed").touch()
        return list(await asyncio.gather(*tasks))

    assert tokens(asyncio.run(hang())) == [(7, 7), (7, 7)]
    assert starts(tmp_path) == 1, "since the events were cleared"


def test_silence_without_anything_owed_is_no_death(make: Make, tmp_path: Path) -> None:
    sampler = make(silence=0.5)
    complete(sampler, (DRAW, 1))
    time.sleep(2.5)
    complete(sampler, (DRAW, 1))
    assert starts(tmp_path) == 1


def test_a_refused_request_is_the_users_and_harms_nobody_else(make: Make, tmp_path: Path) -> None:
    sampler = make()
    with pytest.raises(InputError, match="refused") as refusal:
        complete(sampler, (REFUSED, 1))
    assert refusal.value.why == "too long"
    assert tokens(complete(sampler, (DRAW, 12))) == [(1, 2)]
    assert starts(tmp_path) == 1


def test_the_weights_of_another_version_are_an_error(make: Make) -> None:
    sampler = make()
    sampler.load_policy(adapter(), version=1)
    with pytest.raises(RnowError, match="stale"):
        complete(sampler, (STALE, 1))


def test_ids_the_tokenizer_does_not_have_are_an_error(make: Make, tmp_path: Path) -> None:
    sampler = make()
    sampler._vocabulary = 3
    with pytest.raises(RnowError, match="token id 4"):
        complete(sampler, (DRAW, 124))


def test_a_cancelled_completion_is_aborted(make: Make, tmp_path: Path) -> None:
    sampler = make()

    async def cancel() -> None:
        task = asyncio.create_task(sampler.complete(HANG, PARAMS, 9))
        while not (tmp_path / "events").exists() or "draw 9" not in events(tmp_path):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while "aborted 9" not in events(tmp_path):
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(cancel(), 20))
    sampler.load_policy(adapter(), version=1)
    assert complete(sampler, (DRAW, 1))[0].policy_version == 1


def test_load_policy_beside_completions_is_a_mistake(make: Make) -> None:
    sampler = make()

    async def both() -> None:
        task = asyncio.create_task(sampler.complete(SLOW, PARAMS, 9))
        await asyncio.sleep(0)
        while not sampler._drawing:
            await asyncio.sleep(0.02)
        with pytest.raises(RuntimeError, match="1 completions"):
            sampler.load_policy(adapter(), version=1)
        await task

    asyncio.run(both())


def test_load_policy_inside_a_running_loop(make: Make) -> None:
    sampler = make()

    async def loop() -> list[int]:
        versions = []
        for version in range(1, 4):
            sampler.load_policy(adapter(), version=version)
            versions.append((await sampler.complete(DRAW, PARAMS, 1)).policy_version)
        return versions

    assert asyncio.run(loop()) == [1, 2, 3]


def test_probes_run_alone(make: Make, tmp_path: Path) -> None:
    sampler = make()

    async def both() -> list[float]:
        slow = [asyncio.create_task(sampler.complete(SLOW, PARAMS, 10 + i)) for i in range(3)]
        while not sampler._drawing:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        probe = asyncio.create_task(sampler._backend.probe([1, 2, 3], None))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        late = asyncio.create_task(sampler.complete(DRAW, PARAMS, 99))
        await asyncio.gather(*slow, late)
        return await probe

    assert asyncio.run(both()) == [-1.0, -1.0]
    lines = events(tmp_path)
    assert max(map(lines.index, ["drew 10", "drew 11", "drew 12"])) < lines.index("probe base")
    assert lines.index("probe base") < lines.index("draw 99")


def test_sleep_and_wake_bring_the_adapter_back(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps")
    sampler.load_policy(adapter(), version=4)

    async def nap() -> Completion:
        await sampler.sleep()
        with pytest.raises(RuntimeError, match="wake"):
            await sampler.complete(DRAW, PARAMS, 1)
        await sampler.wake()
        return await sampler.complete(DRAW, PARAMS, 1)

    assert asyncio.run(nap()).policy_version == 4
    assert events(tmp_path)[-5:] == [
        "sleep", "wake", "load adapter-4 of 1", "draw 1", "drew 1"
    ]  # fmt: skip


def test_no_sleep_where_the_engine_has_none(make: Make) -> None:
    sampler = make()
    sampler.start().result()
    assert not sampler._backend.supports_sleep
    with pytest.raises(NotYetSupported, match="no sleep mode") as refusal:
        asyncio.run(sampler.sleep())
    assert refusal.value.fix == "set residency: resident"
    assert tokens(complete(sampler, (DRAW, 12))) == [(1, 2)]


# ---- sleeping -------------------------------------------------------------------------------------------------------


def test_sleeping_twice_and_waking_twice_is_once(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps")

    async def twice() -> None:
        await sampler.wake()
        await asyncio.gather(sampler.sleep(), sampler.sleep())
        await sampler.sleep()
        await asyncio.gather(sampler.wake(), sampler.wake())

    asyncio.run(twice())
    assert events(tmp_path) == ["start", "sleep", "wake"]


def test_an_adapter_loaded_asleep_is_there_after_waking(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps", probe=PROBE)
    sampler.watch(lambda ids, masked: ADAPTED)
    sampler.load_policy(adapter(), version=1)
    (tmp_path / "events").write_text("")

    async def nap() -> Completion:
        await sampler.sleep()
        sampler.load_policy(adapter(), version=2)
        sampler.load_policy(adapter(), version=3)
        assert events(tmp_path) == ["sleep"]
        assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["adapter-3"]
        await sampler.wake()
        return await sampler.complete(DRAW, PARAMS, 1)

    assert asyncio.run(nap()).policy_version == 3
    assert events(tmp_path)[:5] == [
        "sleep", "wake", "probe base", "load adapter-3 of 1", "probe adapter"
    ]  # fmt: skip


def test_what_was_loaded_before_a_sleep_has_another_name_after_it(make: Make) -> None:
    sampler = make("sleeps")
    sampler.load_policy(adapter(), version=1)
    before = sampler._current

    async def nap() -> None:
        await sampler.sleep()
        await sampler.wake()

    asyncio.run(nap())
    after = sampler._current
    assert before
    assert after
    assert (after.folder, after.version) == (before.folder, before.version)
    assert after.name != before.name
    assert after.number != before.number


@pytest.mark.parametrize("when", ["sleep", "wake"])
def test_a_death_on_the_way_to_or_from_sleep_is_one_restart(
    make: Make, tmp_path: Path, when: str
) -> None:
    sampler = make("sleeps", probe=PROBE)
    sampler.watch(lambda ids, masked: ADAPTED)
    sampler.load_policy(adapter(), version=1)
    (tmp_path / f"dies at {when}").touch()

    async def nap() -> Completion:
        await sampler.sleep()
        if when == "sleep":
            backend: Any = sampler._backend
            assert not backend._process.pids(), "half dead, it would keep the card"
        await sampler.wake()
        return await sampler.complete(DRAW, PARAMS, 12)

    assert asyncio.run(nap()).token_ids == (1, 2)
    assert starts(tmp_path) == 2
    assert events(tmp_path)[-6:] == [
        "start", "probe base", "load adapter-1 of 1", "probe adapter", "draw 12", "drew 12"
    ]  # fmt: skip


def test_an_engine_killed_in_its_sleep_is_one_restart(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps")
    sampler.load_policy(adapter(), version=1)

    async def nap() -> Completion:
        await sampler.sleep()
        backend: Any = sampler._backend
        backend._process.stop()
        await sampler.wake()
        return await sampler.complete(DRAW, PARAMS, 12)

    assert asyncio.run(nap()).policy_version == 1
    assert starts(tmp_path) == 2


def test_an_engine_that_dies_at_every_wake_ends_the_run(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps")

    async def nap() -> None:
        await sampler.sleep()
        await sampler.wake()

    (tmp_path / "dies at wake").touch()
    asyncio.run(nap())
    (tmp_path / "dies at wake").touch()
    with pytest.raises(TemporaryError, match="failed twice") as failure:
        asyncio.run(nap())
    assert failure.value.exit_code == EXIT_TEMPORARY
    with pytest.raises(TemporaryError):
        complete(sampler, (DRAW, 1))


def test_a_cancelled_sleep_is_slept_all_the_same(make: Make, tmp_path: Path) -> None:
    """The engine cannot be called back half way; what matters is that both sides know."""
    sampler = make("sleeps")

    async def cancelled(work: Any) -> None:
        task = asyncio.create_task(work)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def nap() -> Completion:
        (tmp_path / "slow sleep").touch()
        await cancelled(sampler.sleep())
        await sampler.sleep()
        with pytest.raises(RuntimeError, match="wake it first"):
            await sampler.complete(DRAW, PARAMS, 1)
        (tmp_path / "slow wake").touch()
        await cancelled(sampler.wake())
        await sampler.wake()
        return await sampler.complete(DRAW, PARAMS, 12)

    sampler.start().result()
    assert asyncio.run(nap()).token_ids == (1, 2)
    assert [line for line in events(tmp_path) if line in ("sleep", "wake")] == ["sleep", "wake"]


def test_no_sleep_beside_completions(make: Make) -> None:
    sampler = make("sleeps")

    async def both() -> Completion:
        task = asyncio.create_task(sampler.complete(SLOW, PARAMS, 9))
        while not sampler._drawing:
            await asyncio.sleep(0.02)
        with pytest.raises(RuntimeError, match="1 completions"):
            await sampler.sleep()
        return await task

    assert asyncio.run(both()).token_ids == (9,)


# ---- probes ---------------------------------------------------------------------------------------------------------

PROBE = (1, 2, 3)
BASE, ADAPTED = [-1.0, -1.0], [-2.0, -2.0]  # what the stand-in says


def test_the_base_is_probed_at_the_start_and_every_adapter_at_its_load(
    make: Make, tmp_path: Path
) -> None:
    sampler = make(probe=PROBE)
    asked: list[tuple[tuple[int, ...], bool]] = []

    def trainer(ids: Any, masked: bool) -> list[float]:
        asked.append((tuple(ids), masked))
        return ADAPTED

    sampler.watch(trainer)
    sampler.load_policy(adapter(), version=1)
    sampler.load_policy(adapter(), version=2)
    assert events(tmp_path) == [
        "start", "probe base", "load adapter-1 of 1", "probe adapter", "load adapter-2 of 1",
        "probe adapter",
    ]  # fmt: skip
    assert asked == [(PROBE, True)] * 2


def test_an_adapter_that_is_wrong_from_the_start_is_the_users_affair(make: Make) -> None:
    sampler = make(probe=PROBE)
    sampler.watch(lambda ids, masked: [-2.0, -2.1])
    with pytest.raises(ModelError) as failure:
        sampler.load_policy(adapter(), version=0)
    assert failure.value.message == (
        "vLLM's engine and the trainer disagree on adapter version 0: 0.05 nats per token on average "
        "(0.1 at most, 2 tokens), and 0.001 on average is allowed"
    )
    assert "sampler.quantization" in str(failure.value.fix)
    with pytest.raises(ModelError):
        complete(sampler, (DRAW, 1))


def test_where_limits_are_not_measured_a_gap_is_told_and_written_down(
    make: Make, tmp_path: Path
) -> None:
    gaps, told = tmp_path / "gaps.jsonl", list[str]()
    sampler = make(probe=PROBE, measured=False, gaps=gaps)
    sampler.watch(lambda ids, masked: [-2.0, -2.1], warn=told.append)
    sampler.load_policy(adapter(), version=3)
    assert complete(sampler, (DRAW, 1))[0].policy_version == 3
    (line,) = told
    assert "off by 0.05 nats" in line
    base, adapted = [json.loads(row) for row in gaps.read_text().splitlines()]
    assert (base["what"], base["mean"]) == ("the base", 0.0)
    assert (adapted["what"], adapted["version"], adapted["tokens"]) == ("the adapter", 3, 2)
    assert adapted["mean"] == pytest.approx(0.05)
    sampler.watch(lambda ids, masked: [-2.0, -5.0], warn=told.append)
    with pytest.raises(TemporaryError, match=r"1\.5 nats"):
        sampler.load_policy(adapter(), version=4)


def test_an_adapter_that_goes_wrong_once_is_loaded_again(make: Make, tmp_path: Path) -> None:
    sampler = make(probe=PROBE)
    sampler.watch(lambda ids, masked: ADAPTED)
    sampler.load_policy(adapter(), version=1)
    (tmp_path / "wrong adapter once").touch()
    sampler.load_policy(adapter(), version=2)
    assert events(tmp_path)[-4:] == ["load adapter-2 of 1", "probe adapter"] * 2
    assert complete(sampler, (DRAW, 12))[0].policy_version == 2
    assert starts(tmp_path) == 1


def test_an_adapter_that_stays_wrong_ends_the_run(make: Make, tmp_path: Path) -> None:
    sampler = make(probe=PROBE)
    sampler.watch(lambda ids, masked: ADAPTED)
    sampler.load_policy(adapter(), version=1)
    (tmp_path / "wrong adapter").touch()
    with pytest.raises(TemporaryError, match="adapter version 2") as failure:
        sampler.load_policy(adapter(), version=2)
    assert failure.value.exit_code == EXIT_TEMPORARY
    assert events(tmp_path).count("load adapter-2 of 1") == 2
    with pytest.raises(TemporaryError):
        complete(sampler, (DRAW, 12))


def test_a_base_that_wakes_up_as_another_is_started_again(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps", probe=PROBE)

    async def nap() -> None:
        await sampler.sleep()
        (tmp_path / "wrong base once").touch()
        await sampler.wake()

    asyncio.run(nap())
    assert starts(tmp_path) == 2
    assert events(tmp_path)[-2:] == ["start", "probe base"]


def test_a_base_that_stays_another_ends_the_run(make: Make, tmp_path: Path) -> None:
    sampler = make("sleeps", probe=PROBE)

    async def nap() -> None:
        await sampler.sleep()
        (tmp_path / "wrong base").touch()
        await sampler.wake()

    with pytest.raises(TemporaryError, match="failed twice") as failure:
        asyncio.run(nap())
    assert "its base model is not what it was at the start" in failure.value.details[0]
    assert "0.5 nats" in failure.value.details[0]
    assert starts(tmp_path) == 2


def test_a_restart_is_probed_before_anybody_draws_again(make: Make, tmp_path: Path) -> None:
    sampler = make(probe=PROBE)
    sampler.watch(lambda ids, masked: ADAPTED)
    sampler.load_policy(adapter(), version=3)

    async def late() -> list[Completion]:
        """One asks while the engine is being started again and has no adapter yet."""
        (tmp_path / "slow load").touch()
        dying = asyncio.create_task(sampler.complete(DIE, PARAMS, 11))
        while "draw 11" not in events(tmp_path):
            await asyncio.sleep(0.01)
        while events(tmp_path).count("start") < 2:
            await asyncio.sleep(0.01)
        return [await sampler.complete(DRAW, PARAMS, 22), await dying]

    assert tokens(asyncio.run(late())) == [(2, 2), (1, 1)]
    lines = events(tmp_path)
    again = lines[lines.index("start", 1) :]
    assert again[:4] == ["start", "probe base", "load adapter-3 of 1", "probe adapter"]


def test_without_probe_ids_nothing_is_probed(make: Make, tmp_path: Path) -> None:
    sampler = make()
    sampler.watch(lambda ids, masked: pytest.fail("asked"))
    sampler.load_policy(adapter(), version=1)
    assert events(tmp_path) == ["start", "load adapter-1 of 1"]
    with pytest.raises(ValueError, match="two"):
        make(probe=(1,))


def test_tolerances_follow_what_is_stored() -> None:
    assert tolerance_of("float32", "none") == EXACT
    assert EXACT.trainer == 1e-3
    assert tolerance_of("bfloat16", "none") == tolerance_of("auto", "none") == ROUNDED
    assert tolerance_of("float32", "nf4") == tolerance_of("bfloat16", "nf4") == QUANTISED
    for tolerance in (EXACT, ROUNDED, QUANTISED):
        assert tolerance.same <= tolerance.trainer


@pytest.mark.parametrize(
    "other", [[-1.0], [], [-1.0, float("nan")], [-1.0, float("-inf")], [-1.0, -1.6]]
)
def test_gaps_that_are_none(other: list[float]) -> None:
    assert not gap_between(other, BASE).within(QUANTISED.trainer)
    assert gap_between(BASE, BASE).within(0.0)


def test_an_engine_that_does_not_start_shows_its_log(make: Make) -> None:
    sampler = make("fails")
    with pytest.raises(ModelError) as failure:
        sampler.load_policy(adapter(), version=0)
    assert "no room for the KV cache" in "\n".join(failure.value.details)


def test_an_engine_that_cannot_serve_the_model_says_why(make: Make) -> None:
    with pytest.raises(ModelError) as failure:
        make("refuses").start().result()
    assert failure.value.why == "too old"


def test_close_ends_the_process_and_removes_the_adapters(make: Make, tmp_path: Path) -> None:
    sampler = make()
    sampler.load_policy(adapter(), version=0)
    backend: Any = sampler._backend
    pids = backend._process.pids()
    assert pids
    sampler.close()
    sampler.close()
    assert not (tmp_path / "adapters").exists()
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids)
    with pytest.raises(TemporaryError, match="closed"):
        complete(sampler, (DRAW, 1))


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 8), (8, 8), (9, 16), (32, 32), (257, 320), (512, 512)]
)
def test_ranks_are_rounded_up_to_what_vllm_allows(rank: int, allowed: int) -> None:
    assert settings_of(max_lora_rank=rank).allowed_rank == allowed
    assert allowed in LORA_RANKS


def test_ranks_beyond_vllm_are_an_error(make: Make) -> None:
    with pytest.raises(ModelError, match="512"):
        settings_of(max_lora_rank=513).allowed_rank  # noqa: B018
    with pytest.raises(ModelError, match="rank 9"):
        make().load_policy(adapter(rank=9), version=0)


def test_temperatures_beyond_vllm_are_an_error(make: Make) -> None:
    params = SamplingParams(max_tokens=1, stop_token_ids=(), temperature=2.5)
    with pytest.raises(InputError, match=r"2\.5"):
        asyncio.run(make().complete(DRAW, params, 1))


def settings_of(**changes: Any) -> VllmSettings:
    places = {name: Path("/") / name for name in ("local_dir", "work_dir", "log")}
    return VllmSettings(**places, vocabulary=10, **changes)


def arguments_of(
    settings: VllmSettings, known: set[str] | None = None, *, cpu: bool = False
) -> dict[str, Any]:
    return fitted(engine_arguments(settings), KNOWN if known is None else known, cpu)


SETTINGS = settings_of(
    quantization="nf4",
    enable_sleep=True,
    engine={"tensor_parallel_size": 2, "enforce_eager": False, "enable_prefix_caching": True},
)
CUDA_ONLY = {"enable_sleep_mode"}
CPU_ONLY = {"enable_chunked_prefill", "max_num_batched_tokens"}
COMMON = {
    "model", "dtype", "max_model_len", "gpu_memory_utilization", "max_num_seqs", "tensor_parallel_size",
    "enforce_eager", "enable_prefix_caching", "trust_remote_code", "enable_lora", "max_loras",
    "max_lora_rank", "logprobs_mode", "generation_config", "skip_tokenizer_init",
    "worker_extension_cls", "quantization", "stream_interval", "disable_log_stats", "enable_log_requests",
}  # fmt: skip
KNOWN = COMMON | CUDA_ONLY | CPU_ONLY


def test_engine_arguments_follow_what_this_vllm_has() -> None:
    assert set(arguments_of(SETTINGS)) == COMMON | CUDA_ONLY
    assert set(arguments_of(SETTINGS, cpu=True)) == COMMON | CPU_ONLY
    without = KNOWN - {"stream_interval"}
    assert "stream_interval" not in arguments_of(SETTINGS, without)
    with pytest.raises(Refused, match="has no logprobs_mode; "):
        arguments_of(SETTINGS, KNOWN - {"logprobs_mode"})


def test_engine_arguments_say_how_tokens_are_drawn_and_judged() -> None:
    arguments = arguments_of(SETTINGS)
    assert arguments["logprobs_mode"] == "processed_logprobs"
    assert arguments["generation_config"] == "vllm"
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["quantization"] == "bitsandbytes"
    assert "quantization" not in arguments_of(settings_of())


def test_on_a_cpu_prompts_are_not_cut() -> None:
    arguments = arguments_of(settings_of(max_model_len=9000), cpu=True)
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["max_num_batched_tokens"] == 9000
