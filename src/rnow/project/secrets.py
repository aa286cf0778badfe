"""What a project must not write down: its ``.env``, and passwords and keys in the addresses of its config."""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import parse_qsl, unquote

from rnow.config import Config, full_address
from rnow.config.problems import dotted
from rnow.config.teachers import API_KEY, find_teachers, key_variable, teacher_sections
from rnow.errors import InputError
from rnow.text.redact import Redactor
from rnow.text.user_files import is_present, read_regular
from rnow.usercode.environment import SECRET, plainly_secret

OWN_VARIABLES = (
    API_KEY, "RNOW_SAMPLER_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD",
)  # fmt: skip
"""Keys that rnow and its libraries send, in the environment."""

_USER_INFO = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*://)?([^\s/?#@]+)@")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(?!\$)(.+)", re.DOTALL)


def load_secrets(folder: Path) -> dict[str, str]:
    """Name -> value from ``folder/.env``; empty when there is none. Nothing is put in ``os.environ``.

    Raises InputError for a file that cannot be read as text.
    """
    path = folder / ".env"
    if not is_present(path):
        return {}
    from dotenv import dotenv_values

    try:
        text = read_regular(path).decode("utf-8-sig")
        values = dotenv_values(stream=io.StringIO(text), interpolate=False)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the secrets file cannot be read",
            where=".env",
            why=str(error),
            fix="write it as UTF-8 text, one NAME=value per line",
        ) from None
    return {name: value for name, value in values.items() if value}


def writing_redactor(secrets: Mapping[str, str], config: Config) -> Redactor:
    """Takes the whole of ``.env``, and every key of the config and of ours, out of what a run writes and shows."""
    of_teachers = map(key_variable, find_teachers(config).sections)
    names = dict.fromkeys((*OWN_VARIABLES, *of_teachers))
    own = {name: os.environ[name] for name in names if os.environ.get(name)}
    return Redactor(own | dict(_in_config(config)) | dict(secrets))


def reading_redactor(secrets: Mapping[str, str], config: Config) -> Redactor:
    """Takes out what the student must not read, nor a resumed run reread: only what is plainly a secret. LOG_LEVEL=info
    must not take "info" out of a page."""
    return Redactor(dict(_in_config(config)) | plainly_secret(secrets))


def _in_config(config: Config) -> Iterator[tuple[str, str]]:
    """Names and values of the secrets that stand in the config's addresses and in the commands of MCP servers."""
    named = {
        "sampler.url": config.sampler.url,
        **{f"{dotted(path)}.url": section.url for path, section in teacher_sections(config)},
    }
    named |= {f"mcp_url.{index}": url for index, url in enumerate(config.rollout.mcp_url)}
    for name, given in named.items():
        address = full_address(given or "")
        if address.startswith("stdio:"):
            yield from _in_command(address)
        elif match := _USER_INFO.match(address):
            password = match[1].partition(":")[2]
            yield name, match[1]
            yield f"{name}.password", password
            yield f"{name}.password.unquoted", unquote(password)
        query = address.partition("?")[2].partition("#")[0]
        yield from plainly_secret(dict(parse_qsl(query))).items()


def _in_command(entry: str) -> Iterator[tuple[str, str]]:
    try:
        words = shlex.split(entry.removeprefix("stdio:"))
    except ValueError:
        return  # refused where the server is started
    for word in words:
        if (match := _ASSIGNMENT.fullmatch(word)) and SECRET.search(match[1]):
            yield match[1], match[2]
