"""What one entry of ``rollout.mcp_url`` means."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from rnow.errors import ConfigError
from rnow.usercode.environment import SECRET

_STDIO = "stdio:"
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")
_LABEL_CHARACTERS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class McpAddress:
    """Where a server is: URLs to try in order, or a command to start with the variables it is given.

    ``label`` names it in messages, without passwords and query strings; ``hidden`` are the values that must not be written
    anywhere, by name.
    """

    label: str
    urls: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    hidden: Mapping[str, str] = field(default_factory=dict, repr=False)


def parse_address(text: str, secrets: Mapping[str, str] | None = None) -> McpAddress:
    """Read one entry.

    - ``http://host:port/path`` and ``https://...``: that address; without a path, then with ``/mcp``, where servers
      usually listen; ``/sse``, the address of an older transport, then with ``/mcp`` in its place.
    - ``localhost:8931``: the same with ``http://`` in front where the host is this machine, an IP address, a name without a dot,
      or has a port; else with ``https://``.
    - ``stdio: [NAME=value ...] command arguments``: a server to start here, quoted as for a shell. It gets the variables
      that stand before the command, and of the others only those that programs need to run (PATH, HOME, ...).
      ``NAME=$OTHER`` takes the value from ``secrets`` (the project's .env) or the environment.

    Raises:
        ConfigError: it means nothing of this.
    """
    entry = text.strip()
    if entry.startswith(_STDIO):
        return _parse_command(entry, secrets or {})
    if not entry or re.search(r"[\s\x00-\x1f]", entry):
        raise _problem(entry, "it holds a space" if entry else "it is empty")
    full = entry if "://" in entry else f"{_scheme(entry)}://{entry}"
    try:
        parts = urlsplit(full)
        _ = parts.port
    except ValueError as error:
        raise _problem(entry, str(error)) from None
    if parts.scheme not in ("http", "https"):
        raise _problem(entry, f"{parts.scheme}:// is not spoken")
    if not parts.hostname:
        raise _problem(entry, "it names no host")
    urls = [full]
    if parts.path in ("", "/"):
        urls.append(urlunsplit(parts._replace(path="/mcp")))
    elif parts.path.rstrip("/").endswith("/sse"):
        path = parts.path.rstrip("/").removesuffix("/sse") + "/mcp"
        urls.append(urlunsplit(parts._replace(path=path)))
    return McpAddress(label=shown(full), urls=tuple(urls))


def is_here(url: str) -> bool:
    """Whether a URL's host is this machine: no proxy stands between it and us."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def shown(url: str) -> str:
    """A URL as messages may show it."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))[:_LABEL_CHARACTERS]


def _scheme(entry: str) -> str:
    authority = re.split(r"[/?#]", entry, maxsplit=1)[0].rpartition("@")[2]
    try:
        parts = urlsplit(f"//{authority}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "http"
    if port is not None:
        return "https" if port == 443 else "http"
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "https" if "." in host and not host.endswith(".localhost") else "http"
    return "http"


def _parse_command(entry: str, secrets: Mapping[str, str]) -> McpAddress:
    try:
        words = shlex.split(entry[len(_STDIO) :])
    except ValueError as error:
        raise _problem(entry, str(error)) from None
    env: dict[str, str] = {}
    hidden = dict(secrets)
    while words and (assignment := _ASSIGNMENT.fullmatch(words[0])):
        name, value = assignment.groups()
        if variable := _VARIABLE.fullmatch(value):
            source = variable[1] or variable[2]
            found = secrets.get(source) or os.environ.get(source)
            if found is None:
                raise _problem(
                    entry, f"${source} is set neither in .env nor in the environment", command=True
                )
            value = hidden[source] = found
        elif SECRET.search(name):
            hidden[name] = value
        env[name] = value
        words.pop(0)
    if not words:
        raise _problem(entry, "it names no command", command=True)
    if any("\0" in word for word in (*words, *env.values())):
        raise _problem(entry, "it holds a NUL character", command=True)
    label = f"{_STDIO} {shlex.join(words)}"
    if len(label) > _LABEL_CHARACTERS:
        label = f"{label[: _LABEL_CHARACTERS - 3]}..."
    return McpAddress(label=label, command=tuple(words), env=env, hidden=hidden)


def _problem(entry: str, what: str, *, command: bool = False) -> ConfigError:
    # A command may hold a password: only its kind is repeated.
    name = f"{_STDIO} ..." if command else repr(shown(entry) if "@" in entry else entry[:80])
    return ConfigError(
        f"{name} is no address of an MCP server: {what}",
        where="rollout.mcp_url",
        fix="write http://host:port/mcp, https://host/mcp, or stdio: command arguments",
    )
