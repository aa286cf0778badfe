"""The servers that a config names by address."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from rnow.errors import InputError
from rnow.plan.prepare import Prepared
from rnow.serving.client import VllmClient
from rnow.serving.reach import check_listening
from rnow.tasks import first_cause
from rnow.tools.mcp_address import parse_address


async def check_addresses(prepared: Prepared) -> None:
    """Whether somebody listens at each of them. Before anything is loaded or written.

    Raises:
        InputError: nobody does, at one of them.
    """
    try:
        async with asyncio.TaskGroup() as asking:
            for where, url in _addresses(prepared):
                asking.create_task(check_listening(url, where=where))
    except BaseExceptionGroup as failures:
        raise first_cause(failures) from None


def _addresses(prepared: Prepared) -> Iterator[tuple[str, str]]:
    for model in prepared.models.values():
        role = model.role
        if role.backend == "vllm" and role.serving.url is not None:
            key = f"{role.serving_key}.url"
            try:
                yield key, VllmClient(role.serving.url).url
            except InputError as error:
                error.where = key
                raise
    for entry in prepared.config.rollout.mcp_url:
        for url in parse_address(entry, prepared.project.secrets).urls[:1]:
            yield "rollout.mcp_url", url
