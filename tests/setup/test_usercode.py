"""How the rollouts of a run are drawn, and their answers read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.plan.test_rendered import make_config
from tests.rollout.test_rendering import TOKENIZER

from rnow.setup.usercode import rollout_settings, single_turns
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


def test_answers_are_read_without_control_tokens() -> None:
    rendered = SimpleNamespace(tokenizer=TOKENIZER, prompt_token_ids={})
    prepared: Any = SimpleNamespace(rendered=rendered)
    ids = [*TOKENIZER.encode("a , b ."), TOKENIZER.eos_token_id]
    assert single_turns(prepared).decode(ids) == "a , b .", "nothing is cleaned up"
