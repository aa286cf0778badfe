"""When to save, and what a checkpoint says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from rnow.disk.checkpoints import (
    Checkpoint,
    CheckpointStore,
    random_state,
    restore_random_state,
)
from rnow.disk.journal import JournalFolder
from rnow.errors import InputError
from rnow.protocols import Policy


class Saver:
    """Saves and restores one run.

    Args:
        every_steps: save after so many steps; -1 for the end only.
        every_minutes: save at the first step that ends so long after the last save.
        facts: what every checkpoint states about the run (config, ids, hashes, versions), JSON-ready.
        counters: totals to carry over a resume, e.g. completion tokens.
        settle: called before each checkpoint; returns when what the steps left is on the disk, or raises.
        committed: called after each checkpoint, with the steps that are done.
    """

    def __init__(
        self,
        store: CheckpointStore,
        journals: JournalFolder,
        policy: Policy,
        *,
        every_steps: int,
        every_minutes: float,
        facts: Mapping[str, Any],
        counters: Callable[[], Mapping[str, float]],
        settle: Callable[[], None] = lambda: None,
        committed: Callable[[int], None] = lambda step: None,
    ) -> None:
        self._store = store
        self._journals = journals
        self._policy = policy
        self._every_steps = every_steps
        self._every_seconds = every_minutes * 60
        self._facts = facts
        self._counters = counters
        self._settle = settle
        self._committed = committed
        self._saved_step = 0
        self._finished = 0
        self._updates_of_step = policy.updates
        self._updated_step = 0
        self._saved_at = time.monotonic()

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Load a checkpoint into the policy; returns how many steps are done.

        Raises:
            InputError: the checkpoint does not fit this student.
        """
        if checkpoint is None:
            return 0
        try:
            self._policy.load_adapter(checkpoint.adapter)
            self._policy.load_state_dict(
                {"updates": checkpoint.state["updates"], "moments": checkpoint.moments}
            )
        except (ValueError, KeyError) as error:
            raise InputError(
                "the checkpoint does not fit this student",
                where=str(checkpoint.folder),
                why=str(error),
                fix="start over in a new folder with --fresh",
            ) from error
        restore_random_state(checkpoint.moments)
        self._saved_step = self._finished = checkpoint.step
        self._updates_of_step = self._policy.updates
        self._updated_step = checkpoint.state.get("updated_step", checkpoint.step)
        return checkpoint.step

    def after_step(self, step: int) -> None:
        """Save if it is time to."""
        if self._policy.updates > self._updates_of_step:
            self._updated_step = step
        self._updates_of_step, self._finished = self._policy.updates, step
        due = self._every_steps > 0 and step % self._every_steps == 0
        if due or time.monotonic() - self._saved_at >= self._every_seconds:
            self.save(step)
        self._journals.forget(keep={self._saved_step + 1})

    def rescue(self, step: int) -> None:
        """Save the state after ``step`` before the run ends with a fault. Nothing is saved when the policy has moved on
        since (the fault came between an update and the end of its step): the step would be trained twice."""
        if self._policy.updates == self._updates_of_step:
            # Neither a disk's fault nor memory's, nor weights that cannot be saved may hide what happened first.
            with suppress(Exception):
                self.save(step)

    def rescue_finished(self) -> None:
        """``rescue`` after the last step that is finished, for those who do not count steps."""
        self.rescue(self._finished)

    def last_good(self) -> int | None:
        """The step of the newest checkpoint from whose weights an update was computed since, and was finite. Of the weights
        after the last update nobody knows yet."""
        return self._store.newest_step(before=self._updated_step)

    def save(self, step: int) -> None:
        """Commit a checkpoint of the state after ``step`` steps, unless it is committed already."""
        if step > 0 and step == self._saved_step:
            return
        self._settle()
        policy = self._policy.state_dict()
        self._store.save(
            step,
            adapter=self._policy.adapter(),
            moments={**policy["moments"], **random_state()},
            state={
                "step": step,
                "updates": policy["updates"],
                "policy_version": step,
                "data_cursor": step,
                "updated_step": self._updated_step,
                "counters": dict(self._counters()),
                **self._facts,
            },
            good_before=self._updated_step,
        )
        self._saved_step = step
        self._saved_at = time.monotonic()
        self._committed(step)
