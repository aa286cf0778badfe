"""Every alias leads to a key that exists."""

from __future__ import annotations

import pytest

from rnow.config.schema import field_at
from rnow.config.suggest import ALIASES, KNOWN, suggest


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_lead_to_real_keys(alias: str) -> None:
    assert field_at(tuple(ALIASES[alias].split("."))) is not None


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("lr",), "trainer.learning_rate"),
        (("trainer", "lr"), "trainer.learning_rate"),
        (("learning_rate",), "trainer.learning_rate"),
        (("epochs",), "trainer.num_epochs"),
        (("bs",), "data.batch_size"),
        (("trainer", "batch_size"), "data.batch_size"),
        (("trainer", "epochs"), "trainer.num_epochs"),
        (("model", "lora_rank"), "model.qlora_rank"),
        (("teacher_model",), "teacher.path"),
        (("kl_coef",), "algorithm.kl_penalty_coef"),
        (("algorithm", "beta"), "algorithm.kl_penalty_coef"),
        (("batchSize",), "data.batch_size"),
        (("Data",), "data"),
        (("trainer", "num-epochs"), "trainer.num_epochs"),
        (("algorithm", "los_fn"), "algorithm.loss_fn"),
        (("data", "train_files"), "data.train_file"),
        (("evals", 0, "pass_1"), "pass1"),
        (("data", "train_file", 1, "pth"), "path"),
        (("rollout", "max_new_tokens"), "rollout.max_tokens"),
    ],
)
def test_suggestions(path: tuple[str | int, ...], key: str) -> None:
    assert suggest(path) == f"did you mean {key}?"


def test_several_homes() -> None:
    hint = suggest(("path",))
    assert hint is not None
    assert "model.path" in hint
    assert "teacher.path" in hint


def test_without_an_idea_the_known_keys_are_listed() -> None:
    hint = suggest(("sampler", "zzz"))
    assert hint == f"known here: {', '.join(KNOWN['sampler'])}"


def test_inside_an_unknown_section_nothing_is_invented() -> None:
    assert suggest(("zzz", "qqq")) is None
