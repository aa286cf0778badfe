"""The .env file, and keeping its values out of text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rnow.errors import InputError
from rnow.project.secrets import load_secrets
from rnow.text.redact import Redactor


def test_values_are_read_and_the_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(
        "# comment\nRNOW_TEST_KEY='sk 1'\nexport OTHER=a$RNOW_TEST_KEY # note\nEMPTY=\nBARE\n",
        encoding="utf-8-sig",
    )
    assert load_secrets(tmp_path) == {"RNOW_TEST_KEY": "sk 1", "OTHER": "a$RNOW_TEST_KEY"}
    assert "RNOW_TEST_KEY" not in os.environ


def test_no_file_means_no_secrets(tmp_path: Path) -> None:
    assert load_secrets(tmp_path) == {}
    (tmp_path / ".env").mkdir()
    assert load_secrets(tmp_path) == {}


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"KEY=\xff\xfe\n")
    with pytest.raises(InputError, match="secrets file") as caught:
        load_secrets(tmp_path)
    assert caught.value.where == ".env"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key sk-1234!", "key [KEY]!"),
        ("sk-1234sk-1234", "[KEY][KEY]"),
        ("sk-123456 and sk-1234", "[LONGER] and [KEY]"),
        ("nothing", "nothing"),
        ("id 123", "id 123"),
    ],
)
def test_redaction(text: str, expected: str) -> None:
    secrets = {"KEY": "sk-1234", "LONGER": "sk-123456", "SHORT": "123", "EMPTY": ""}
    assert Redactor(secrets)(text) == expected
