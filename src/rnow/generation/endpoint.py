"""An endpoint before it is asked: its key, whether it is there, and what it serves."""

from __future__ import annotations

import os
from collections.abc import Callable
from urllib.parse import urlsplit

from rnow.config.teachers import API_KEY
from rnow.errors import InputError, TemporaryError
from rnow.generation.wanted import AT_ONCE, Wanted
from rnow.plan.prepare import Prepared
from rnow.serving.chat import ChatClient
from rnow.serving.http import BadAnswer, Refused
from rnow.serving.reach import CONNECT_SECONDS, check_listening

_OPENAI_KEY, _OPENAI = "OPENAI_API_KEY", "api.openai.com"


def endpoint_key(prepared: Prepared, wanted: Wanted) -> tuple[str, str] | None:
    """The variable and the key that it holds. OpenAI's own goes to OpenAI alone.

    Raises:
        InputError: the variable that was named is not set.
    """
    if wanted.url is None:
        return None
    names = [API_KEY]
    if wanted.key_variable is not None:
        names = [wanted.key_variable]
    elif urlsplit(wanted.url).hostname == _OPENAI:
        names.append(_OPENAI_KEY)
    for name in names:
        if value := prepared.project.secrets.get(name) or os.environ.get(name):
            return name, value
    if wanted.key_variable is not None:
        raise InputError(
            f"{wanted.key_variable} is not set",
            where="--key",
            why="it names the variable that holds the endpoint's key",
            fix=f"write {wanted.key_variable}=... into .env, or export it",
        )
    return None


def client_of(wanted: Wanted, key: tuple[str, str] | None) -> ChatClient:
    """A client of the endpoint, with the key of ``endpoint_key``. Raises as ``ServerClient``."""
    assert wanted.url is not None, "asked for an endpoint only"
    return ChatClient(
        wanted.url,
        None if key is None else key[1],
        wanted.timeout,
        max_concurrency=wanted.at_once or AT_ONCE,
    )


async def check_endpoint(client: ChatClient, wanted: Wanted, warn: Callable[[str], None]) -> str:
    """The model's name at the endpoint, which is there and takes the key.

    Args:
        warn: told where it is not well: requests are repeated for long, and nothing would be seen meanwhile.

    Raises:
        InputError: nobody listens, the key is refused, or it is not clear which model is meant.
    """
    await check_listening(client.url, where="--url")
    names: list[str] | None = None
    try:
        names = await client.hurried(CONNECT_SECONDS).model_names()
    except Refused as error:
        # A key of OpenAI's may be good for answers, and not for the list (401, "Missing scopes").
        listless = wanted.model is not None and (error.status == 403 or "scope" in error.message)
        if error.status in (401, 403) and not listless:
            raise InputError(
                error.message,
                title="Key refused",
                where="--url",
                fix=f"put the key into .env as {wanted.key_variable or API_KEY}=..., or name its variable with --key",
            ) from error
    except BadAnswer:
        pass  # many endpoints list nothing; the first request tells what is wrong
    except TemporaryError as error:
        warn(f"{error.message}: {error.why}")
    if wanted.model is not None:
        return wanted.model
    if names is None or len(names) != 1:
        raise InputError(
            "the endpoint does not say which model is meant",
            where="--url",
            details=[f"it serves {name}" for name in (names or [])[:10]],
            fix="name the model with --model",
        )
    return names[0]
