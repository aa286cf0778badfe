"""Who is awake when: the order of sleeping and waking, in a step, an evaluation, a resumed run, and when things go wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.fakes import FakeEnvironment, FakePolicy, FakeRewarder, FakeSampler, FakeTeacher
from tests.setup.projects import Project

from rnow.algorithm.records import SAMPLED
from rnow.errors import EXIT_TEMPORARY, ConfigError, TemporaryError
from rnow.rewards.watch import RewardWatch
from rnow.rollout.collect import RolloutSettings
from rnow.setup.build import run
from rnow.training.evaluations import Answering, Evaluations, Evaluator, Scheduled
from rnow.training.loop import OnPolicy, Parts, Workers, train
from rnow.training.residency import Part, Residency, StageClock
from rnow.types import Prompt

END = 9
PARTS: tuple[Part, ...] = ("sampler", "teacher", "trainer")


class Card:
    """Parts that note each change, and insist on being alone when they work."""

    def __init__(self, *, awake: tuple[Part, ...] = PARTS) -> None:
        self.awake: set[str] = set(awake)
        self.events: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.gpu = Residency()
        for part in PARTS:
            self.gpu.add(part, self.sleeper(part))

    def sleeper(self, part: Part) -> Any:
        async def change(to: str) -> None:
            before = part in self.awake
            await asyncio.sleep(0)
            if error := self.fail.pop(f"{to} {part}", None):
                raise error
            (self.awake.add if to == "wake" else self.awake.discard)(part)
            if before != (part in self.awake):
                self.events.append(f"{to} {part}")

        return SimpleNamespace(sleep=lambda: change("sleep"), wake=lambda: change("wake"))

    def work(self, part: Part, what: str) -> None:
        assert self.awake == {part}, f"{what} while {sorted(self.awake)} are on the card"
        if not self.events or self.events[-1] != what:
            self.events.append(what)


def use(card: Card, *parts: Part) -> None:
    async def turns() -> None:
        for part in parts:
            async with card.gpu.only(part):
                card.work(part, f"work {part}")

    asyncio.run(turns())


def test_the_others_sleep_before_one_wakes() -> None:
    card = Card()
    use(card, "sampler", "teacher", "teacher", "trainer")
    assert card.events == [
        "sleep teacher", "sleep trainer", "work sampler", "sleep sampler", "wake teacher",
        "work teacher", "sleep teacher", "wake trainer", "work trainer",
    ]  # fmt: skip


def test_without_parts_nothing_happens_and_nothing_is_timed() -> None:
    async def turns() -> dict[str, float]:
        gpu, clock = Residency(), StageClock()
        for part in PARTS:
            async with gpu.only(part, clock):
                pass
        return clock.metrics()

    assert set(asyncio.run(turns())) == {"time/step"}


def test_times_are_kept_apart_from_the_work() -> None:
    async def pause() -> None:
        await asyncio.sleep(0.05)

    async def turns() -> dict[str, float]:
        gpu, clock = Residency(), StageClock()
        for part in PARTS[:2]:
            gpu.add(part, SimpleNamespace(sleep=pause, wake=pause))
        async with gpu.only("sampler", clock):
            with clock.stage("rollout"):
                pass
        return clock.metrics()

    times = asyncio.run(turns())
    assert set(times) == {"time/sleep_teacher", "time/wake_sampler", "time/rollout", "time/step"}
    assert times["time/sleep_teacher"] >= 0.05
    assert times["time/wake_sampler"] >= 0.05
    assert times["time/rollout"] < 0.05


def test_two_parts_that_are_one_do_not_put_each_other_to_sleep() -> None:
    card = Card()
    trainer = card.sleeper("trainer")
    card.gpu.add("sampler", trainer)
    card.gpu.add("trainer", trainer)

    async def turns() -> None:
        for part in ("sampler", "trainer", "teacher", "sampler"):
            async with card.gpu.only(part):  # type: ignore[arg-type]
                card.events.append(part)

    asyncio.run(turns())
    assert card.events == [
        "sleep teacher", "sampler", "trainer", "sleep trainer", "wake teacher", "teacher",
        "sleep teacher", "wake trainer", "sampler",
    ]  # fmt: skip


def test_a_part_on_a_card_of_its_own_disturbs_nobody() -> None:
    card = Card()
    del card.gpu._sleepers["teacher"]

    async def turns() -> None:
        async with card.gpu.only("sampler"):
            pass
        async with card.gpu.only("teacher"):
            card.events.append("score")
        async with card.gpu.only("sampler"):
            pass

    asyncio.run(turns())
    assert card.events == ["sleep trainer", "score"]


def test_all_sleep_where_another_is_to_be_loaded() -> None:
    card = Card()
    asyncio.run(card.gpu.clear())
    assert card.events == ["sleep sampler", "sleep teacher", "sleep trainer"]
    use(card, "teacher")


def test_one_at_a_time_also_in_the_program() -> None:
    async def nested() -> None:
        gpu = Residency()
        async with gpu.only("sampler"):
            with pytest.raises(RuntimeError, match="trainer asks for the card while sampler"):
                async with gpu.only("trainer"):
                    pass
        async with gpu.only("trainer"):
            pass

    asyncio.run(nested())


@pytest.mark.parametrize("where", ["sleep trainer", "wake teacher"])
@pytest.mark.parametrize("error", [TemporaryError("no"), asyncio.CancelledError()])
def test_after_a_change_that_failed_the_next_one_goes_on(where: str, error: BaseException) -> None:
    card = Card()
    use(card, "trainer")
    card.fail[where] = error
    with pytest.raises(type(error)):
        use(card, "teacher")
    use(card, "teacher", "trainer")
    assert card.awake == {"trainer"}


def test_an_error_in_the_block_leaves_its_part_awake_and_the_card_free() -> None:
    card = Card()

    async def broken() -> None:
        async with card.gpu.only("teacher"):
            raise ValueError("scoring")

    with pytest.raises(ValueError, match="scoring"):
        asyncio.run(broken())
    assert card.awake == {"teacher"}
    use(card, "sampler")


# ---- the loop -------------------------------------------------------------------------------------------------------

SETTINGS = RolloutSettings(
    group_size=2,
    window=64,
    max_tokens=8,
    stop_token_ids=(END,),
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    run_seed=0,
    purpose="train",
)
PROMPTS = [
    Prompt(id=f"dataset_0/{row}", dataset="dataset_0", row=row, messages=()) for row in range(2)
]


class Watched:
    """The fakes of a run on ``card``; each works only where it is alone there."""

    def __init__(self, card: Card, *, fault: Callable[[str], None] = lambda what: None) -> None:
        self.card, self.fault = card, fault
        self.saved: list[int] = []
        self.clock: StageClock | None = None
        self.times: dict[int, dict[str, float]] = {}
        self.rows: list[dict[str, Any]] = []
        self.answered: list[str] = []
        self.sampler = FakeSampler([[4, END]])
        self.answering = FakeSampler([[5, END]])
        self.teacher = FakeTeacher()
        self.policy = FakePolicy()
        self._guard(self.sampler, "complete", "sampler", "draw")
        self._guard(self.answering, "complete", "teacher", "answer")
        self._guard(self.teacher, "score", "teacher", "score")
        self._guard(self.policy, "update", "trainer", "update")
        self._guard(self.sampler, "load_policy", "trainer", "sync")

    def _guard(self, owner: Any, name: str, part: Part, what: str) -> None:
        real = getattr(owner, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.card.work(part, what)
            self.fault(what)
            return real(*args, **kwargs)

        setattr(owner, name, guarded)

    # What the loop needs of a recorder and a saver.
    def make_clock(self) -> StageClock:
        self.clock = StageClock()
        return self.clock

    def record(self, step: int, *rest: Any) -> None:
        assert self.clock
        self.times[step] = self.clock.metrics()
        self.card.events.append(f"step {step}")

    def evaluated(self, name: str, step: int, metrics: Any) -> None:
        self.rows.append({"name": name, "step": step})
        self.card.events.append(name)

    def save(self, step: int) -> None:
        self.saved.append(step)

    def parts(self, *, num_steps: int, evaluated: bool = False) -> Parts:
        recorder: Any = SimpleNamespace(
            clock=self.make_clock, record=self.record, evaluated=self.evaluated,
            evaluations=lambda: self.rows, stage=lambda name: None, end_if_idle=lambda: None,
            end_if_untrained=lambda updates: None,
            answered=lambda name, step, groups, rewards: self.answered.append(name),
        )  # fmt: skip
        saver: Any = SimpleNamespace(
            save=self.save,
            rescue=self.save,
            after_step=lambda step: None,
            last_good=lambda: None,
        )
        evaluator = Evaluator(
            prompts=PROMPTS,
            environments=lambda *_: FakeEnvironment((1, 2)),
            settings=SETTINGS,
            rewarder=FakeRewarder(),
            reward_watch=RewardWatch(pytest.fail, teaching=True),
            success_reward=1.0,
        )
        return Parts(
            num_steps=num_steps,
            source=OnPolicy(
                prompts_of=lambda step: PROMPTS,
                advantages=lambda groups, rewards: dict.fromkeys(rewards, 0.0),
                workers=Workers(
                    needs=SAMPLED,
                    environments=lambda *_: FakeEnvironment((1, 2)),
                    settings=SETTINGS,
                    journal=lambda step: None,
                    sampler=self.sampler,
                    rewarder=FakeRewarder(),
                    reward_watch=RewardWatch(pytest.fail, teaching=True),
                    teacher=self.teacher,
                    gpu=self.card.gpu,
                ),
            ),
            policy=self.policy,
            sampler=self.sampler,
            gpu=self.card.gpu,
            evaluations=Evaluations(
                main=evaluator if evaluated else None,
                scheduled=[Scheduled(name="often", every=1, evaluators=[evaluator])]
                if evaluated
                else [],
                sampler=self.sampler,
                teacher=self.teacher,
                teachers=[Answering(sampler=self.answering, part="teacher")] if evaluated else [],
                gpu=self.card.gpu,
                recorder=recorder,
            ),
            recorder=recorder,
            saver=saver,
        )


FIRST = ["sleep sampler", "sleep teacher", "sync"]
STEP = [
    "sleep trainer", "wake sampler", "draw", "sleep sampler", "wake teacher", "score",
    "sleep teacher", "wake trainer", "update", "sync",
]  # fmt: skip


def test_the_turns_of_a_step() -> None:
    card = Card()
    run = Watched(card)
    asyncio.run(train(run.parts(num_steps=2), 0))
    assert card.events == [*FIRST, *STEP, "step 1", *STEP, "step 2"]
    assert [version for _, version in run.sampler.loaded] == [0, 1, 2]
    changes = {f"time/{what}_{part}" for what in ("sleep", "wake") for part in PARTS}
    work = {f"time/{stage}" for stage in ("rollout", "reward", "teacher", "update", "sync", "step")}
    for times in run.times.values():
        assert set(times) == changes | work
        assert times["time/step"] >= sum(times.values()) - times["time/step"]


def test_a_resumed_run_wakes_the_trainer_first() -> None:
    card = Card(awake=("teacher",))
    run = Watched(card)
    asyncio.run(train(run.parts(num_steps=3), 2))
    assert card.events == ["sleep teacher", "wake trainer", "sync", *STEP, "step 3"]
    assert [version for _, version in run.sampler.loaded] == [2, 3]


def test_the_turns_of_evaluations() -> None:
    card = Card()
    run = Watched(card)
    asyncio.run(train(run.parts(num_steps=1, evaluated=True), 0))
    judged = ["draw", "sleep sampler", "wake teacher", "score"]
    assert card.events == [
        *FIRST,
        "sleep trainer", "wake sampler", *judged, "before",
        "answer", "teacher",
        "sleep teacher", "wake sampler", *STEP[2:], "step 1",
        "sleep trainer", "wake sampler", *judged, "often",
        "sleep teacher", "wake sampler", *judged, "after",
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["draw", "score", "update"])
def test_a_fault_in_a_stage_saves_and_is_raised(what: str) -> None:
    card = Card()
    count = 0

    def fault(done: str) -> None:
        nonlocal count
        count += done == what
        if done == what and "step 1" in card.events:
            raise TemporaryError(f"no {what}")

    run = Watched(card, fault=fault)
    with pytest.raises(TemporaryError, match=what):
        asyncio.run(train(run.parts(num_steps=3), 0))
    assert run.saved == [1]
    assert count > 1
    use(card, *PARTS)


@pytest.mark.parametrize("where", ["wake sampler", "sleep sampler", "wake teacher", "wake trainer"])
def test_a_part_that_does_not_change_saves_and_is_raised(where: str) -> None:
    card = Card()
    run = Watched(card)
    parts = run.parts(num_steps=3)
    record = parts.recorder.record

    def recorded(step: int, *rest: Any) -> None:
        record(step, *rest)
        card.fail[where] = TemporaryError("the engine is gone")

    parts.recorder.record = recorded  # type: ignore[method-assign]
    with pytest.raises(TemporaryError) as failure:
        asyncio.run(train(parts, 0))
    assert failure.value.exit_code == EXIT_TEMPORARY
    assert run.saved == [1]


def test_the_card_is_looked_at_whenever_everybody_sleeps() -> None:
    card = Card(awake=())

    def measure() -> dict[str, float]:
        assert not card.awake
        card.events.append("look")
        return {"memory/asleep_gb": len(card.events)}

    card.gpu = Residency(measure)
    clock = StageClock()

    async def turns() -> None:
        for part in PARTS[:2]:
            card.awake.add(part)
            card.gpu.add(part, card.sleeper(part))
            await card.gpu.clear()
        for part in ("sampler", "sampler", "teacher"):
            async with card.gpu.only(part, clock):
                card.work(part, part)

    asyncio.run(turns())
    assert card.events == [
        "sleep sampler", "look", "sleep teacher", "look", "look", "wake sampler", "sampler",
        "sleep sampler", "look", "wake teacher", "teacher",
    ]  # fmt: skip
    assert clock.metrics()["memory/asleep_gb"] == 9


def test_turns_on_a_cpu_are_refused_before_anything_is_written(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    project = Project(tmp_path, tiny_model_dir)
    for sampler in ({}, {"backend": "vllm", "url": "http://127.0.0.1:1"}):
        with pytest.raises(ConfigError, match="CUDA card only"):
            run(project.config(residency="time_shared", sampler=sampler), folder=tmp_path)
    assert not (tmp_path / "runs").exists()
