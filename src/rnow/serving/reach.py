"""Whether anybody listens at an address: asked before a run begins, for each that the config names."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from rnow.core.judge_http import is_loopback
from rnow.errors import InputError

CONNECT_SECONDS = 10.0
"""How long a connection to any server that the config names may take before training."""


async def check_listening(url: str, *, where: str) -> None:
    """Open a connection to the host of ``url`` and close it again. What answers there is not looked at, and a host behind a
    proxy is not tried.

    Args:
        where: the config key that holds the address.

    Raises:
        InputError: nobody listens there.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not is_loopback(host) and parts.scheme in getproxies() and not proxy_bypass(host):
        return
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        why = f"no connection came about within {CONNECT_SECONDS:g} s"
    except socket.gaierror as error:
        why = f"the name {host} is not known: {error.strerror}"
    except (OSError, UnicodeError) as error:
        why = str(error)
    else:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return
    name = f"[{host}]" if ":" in host else host
    raise InputError(
        f"nobody listens at {name}:{port}",
        title="Server unreachable",
        where=where,
        why=why,
        fix="start the server, or correct the address",
    )
