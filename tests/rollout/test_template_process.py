"""A chat template that would never end, or never stop writing, ends with a report."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from tests.rollout.families import byte_tokenizer

from rnow.errors import InputError
from rnow.rollout import rendering, template_worker
from rnow.rollout.rendering import render_text, set_template_date, template_date
from rnow.rollout.template_process import TemplateProcess

HI = [{"role": "user", "content": "hi"}]
LOOP = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_worker, "CPU_SECONDS", 1)
    monkeypatch.setattr(rendering, "PROCESS", TemplateProcess())


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (LOOP, "took too long"),
        ("{{ 7 ** (10 ** messages[0].content|length ** 3) }}", "took too long"),
        ("{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "wrote too much"),
        ("{{ 'x' * 9999999999 }}", "took too much memory"),
        ("{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "took too"),
    ],
)  # fmt: skip
def test_a_template_out_of_bounds(template: str, why: str) -> None:
    tokenizer = byte_tokenizer(template, "<|end|>")
    with pytest.raises(InputError, match="did not come to an end") as caught:
        render_text(tokenizer, HI)
    assert why in str(caught.value.why)
    assert caught.value.fix
    fine = byte_tokenizer("{{ messages[0].content }}", "<|end|>")
    assert render_text(fine, HI) == "hi"


def test_a_template_reads_the_date_it_is_given() -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y') }}", "<|end|>")
    set_template_date(tokenizer, datetime(2024, 7, 26))  # noqa: DTZ001 - as strftime_now reads it
    assert template_date(tokenizer) is None
    assert render_text(tokenizer, HI) == "26 Jul 2024"
    assert template_date(tokenizer) == datetime(2024, 7, 26)  # noqa: DTZ001


def test_nothing_in_a_template_is_left_to_chance() -> None:
    tokenizer = byte_tokenizer("{{ range(9999)|random }} {{ lipsum(n=1) }}", "<|end|>")
    assert render_text(tokenizer, HI) == render_text(tokenizer, HI)


def test_a_tokenizer_that_renders_with_its_own_code() -> None:
    class Own:
        chat_template = "own"
        all_special_ids: tuple[int, ...] = ()
        special_tokens_map: dict[str, str] = {}  # noqa: RUF012

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return messages[0]["content"].upper()

    assert render_text(Own(), HI) == "HI"  # type: ignore[arg-type]
