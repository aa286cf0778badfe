"""Which checkpoints of a run stay, and which are known to be good."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fakes import FakePolicy

from rnow.algorithm.records import Batch
from rnow.disk.checkpoints import CheckpointStore
from rnow.disk.journal import JournalFolder
from rnow.errors import RnowError
from rnow.training.saver import Saver

EMPTY = Batch(samples=(), num_loss_tokens=0)


class Run:
    """A policy that is saved after every step, and whose ``skip``-th updates are skipped."""

    def __init__(
        self,
        folder: Path,
        *,
        every_steps: int = 1,
        every_minutes: float = 1e9,
        skip: tuple[int, ...] = (),
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self.policy = FakePolicy(skip=skip)
        self.store = CheckpointStore(folder / "checkpoints", keep=2, warn=pytest.fail)
        self.saver = Saver(
            self.store,
            JournalFolder(folder / "journal"),
            self.policy,
            every_steps=every_steps,
            every_minutes=every_minutes,
            facts={},
            counters=dict,
            settle=settle,
        )

    def steps(self, *numbers: int) -> None:
        for step in numbers:
            self.policy.update(EMPTY)
            self.saver.after_step(step)

    @property
    def saved(self) -> list[int]:
        return [step for step in range(99) if (self._folder / f"step-{step:06d}").exists()]

    @property
    def _folder(self) -> Path:
        return self.store._folder


def test_a_checkpoint_is_good_when_an_update_was_computed_from_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.saver.last_good() is None
    run.steps(1)
    assert run.saver.last_good() is None, "nobody has used these weights yet"
    run.steps(2)
    assert run.saver.last_good() == 1


def test_the_last_good_checkpoint_is_not_pruned_by_those_of_a_diverged_run(tmp_path: Path) -> None:
    run = Run(tmp_path, skip=(3, 4, 5, 6))
    run.steps(1, 2, 3, 4, 5, 6)
    # After step 3 came no update: what it left may be what spoils them.
    assert run.saved == [2, 5, 6]
    assert run.saver.last_good() == 2
    run.saver.rescue(7)
    assert run.saved == [2, 6, 7]


def test_a_run_that_recovers_keeps_no_more_than_before(tmp_path: Path) -> None:
    run = Run(tmp_path, skip=(3, 4))
    run.steps(1, 2, 3, 4, 5, 6, 7)
    assert run.saved == [6, 7]
    assert run.saver.last_good() == 6


def test_what_is_good_is_known_after_a_resume(tmp_path: Path) -> None:
    Run(tmp_path, skip=(3, 4)).steps(1, 2, 3, 4, 5)
    again = Run(tmp_path, skip=(0, 1))
    checkpoint = again.store.latest()
    assert checkpoint is not None
    assert again.saver.restore(checkpoint) == 5
    assert again.saver.last_good() == 2
    again.steps(6, 7)
    assert again.saved == [2, 6, 7]


def test_a_checkpoint_of_an_earlier_version_says_nothing_of_later_steps(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(1, 2)
    checkpoint = run.store.latest()
    assert checkpoint is not None
    state: dict[str, Any] = {k: v for k, v in checkpoint.state.items() if k != "updated_step"}
    object.__setattr__(checkpoint, "state", state)
    again = Run(tmp_path)
    again.saver.restore(checkpoint)
    assert again.saver.last_good() == 1


def test_nothing_to_restore_is_no_step(tmp_path: Path) -> None:
    assert Run(tmp_path).saver.restore(None) == 0


def test_it_saves_when_the_minutes_are_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = Run(tmp_path, every_steps=-1, every_minutes=15)
    for step, seconds in ((1, 899), (2, 2), (3, 898), (4, 2)):
        now[0] += seconds
        run.steps(step)
        assert run.saved == {1: [], 2: [2], 3: [2], 4: [2, 4]}[step]


def test_the_journal_of_the_step_after_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, every_steps=2)
    for step in range(1, 6):
        (tmp_path / "journal" / f"step-{step:06d}.jsonl").touch()
        run.steps(step)
    assert [path.name for path in (tmp_path / "journal").iterdir()] == ["step-000005.jsonl"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(1, 2)
    run.policy.update(EMPTY)
    run.policy.value = math.inf
    with pytest.raises(RnowError, match="not finite; the last good checkpoint is step-000002") as e:
        run.saver.after_step(3)
    assert e.value.title == "Training diverged"
    assert "learning_rate" in str(e.value.fix)
    run.saver.rescue(3)  # hides nothing of what ended the run
    assert run.saved == [1, 2]


def test_a_checkpoint_waits_for_what_its_steps_left(tmp_path: Path) -> None:
    waited: list[list[int]] = []
    run = Run(tmp_path, settle=lambda: waited.append(run.saved))
    run.steps(1, 2)
    assert waited == [[], [1]]
    run.saver.save(2)
    assert len(waited) == 2, "what is saved is saved"


def test_a_step_whose_transcript_is_lost_is_not_saved(tmp_path: Path) -> None:
    """A resumed run makes both again; a checkpoint would leave a gap."""

    def full() -> None:
        if run.saved:
            raise OSError(28, "No space left on device")

    run = Run(tmp_path, settle=full)
    run.steps(1)
    with pytest.raises(OSError, match="No space left"):
        run.steps(2)
    run.saver.rescue(2)
    assert run.saved == [1]


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), MemoryError("none left")]
)
def test_a_rescue_hides_nothing_of_what_ended_the_run(tmp_path: Path, fault: Exception) -> None:
    def fail() -> None:
        raise fault

    run = Run(tmp_path, settle=fail)
    run.saver.rescue(1)
    assert run.saved == []
