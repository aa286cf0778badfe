"""How the rollouts of a run are drawn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.plan.test_rendered import make_config

from rnow.setup.usercode import rollout_settings
from rnow.usercode.sandbox import MAX_CONTAINERS


@pytest.mark.parametrize(
    ("sandboxed", "images", "limited"),
    [
        ({"tools", "rewards"}, {"local/shell": "train.jsonl:1"}, True),
        ({"rewards"}, {"local/shell": "train.jsonl:1"}, False),
        ({"tools"}, {}, False),
        (set(), {}, False),
    ],
    ids=["containers", "rewards only", "bubblewrap", "host"],
)
def test_no_more_rollouts_at_once_than_there_are_containers(
    sandboxed: set[str], images: dict[str, str], limited: bool
) -> None:
    prepared: Any = SimpleNamespace(
        config=make_config(),
        rendered=SimpleNamespace(window=64, stop_ids=(2,)),
        sandboxed=frozenset(sandboxed),
        images=images,
    )
    settings = rollout_settings(prepared, "train", group_size=64)
    assert settings.max_live == (MAX_CONTAINERS - 1 if limited else None)
