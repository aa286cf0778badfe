"""Config and project folder -> what the student can call."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rnow.config import Config, full_address
from rnow.project.project import TOOLS_FILE
from rnow.project.secrets import reading_redactor
from rnow.protocols import Tokenizer
from rnow.rollout.rendering import ToolDescription
from rnow.tasks import run_anywhere
from rnow.text.user_files import is_present
from rnow.tools.host_tools import HostTool, HostTools
from rnow.tools.limits import TokenLimit
from rnow.tools.mcp_server import mcp_servers
from rnow.tools.toolbox import Toolbox, ToolSource
from rnow.types import Prompt, ToolContext, rollout_id
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CodeHost
from rnow.usercode.sandbox import Sandboxes
from rnow.usercode.state import kept_state


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedTools:
    """What the student can call: name -> description as chat templates take it, and the functions of tools.py."""

    schemas: Mapping[str, ToolDescription]
    functions: Sequence[FunctionInfo]


def build_toolbox(
    config: Config,
    folder: Path,
    secrets: Mapping[str, str],
    *,
    sandboxes: Sandboxes | None = None,
    tokenizer: Tokenizer | None = None,
    log_dir: Path | None = None,
    warn: Callable[[str], None] | None = None,
) -> Toolbox:
    """tools.py and the MCP servers of the config as one toolbox; nothing runs before it is opened.

    Args:
        sandboxes: where functions with ``sandbox=True`` run; without them they can be listed, not called.
        tokenizer: counts ``rollout.max_tool_response``; without it results are not cut by tokens.
        log_dir: where what the tools print is kept; None keeps nothing.
        warn: told of state that tools.py shares between rollouts, and once of a server whose tools changed.

    Raises:
        InputError: an address that cannot be one.
    """
    rollout = config.rollout
    sources: list[ToolSource] = []
    if is_present(folder / TOOLS_FILE):
        log = None if log_dir is None else log_dir / "tools.log"
        host = CodeHost(folder / TOOLS_FILE, "tools", secrets=secrets, log=log)
        sources.append(HostTools(host, rollout.tool_timeout, sandboxes=sandboxes))
        if warn is not None:
            for state in kept_state(folder / TOOLS_FILE):
                warn(state.line())
    sources += mcp_servers(
        list(map(full_address, rollout.mcp_url)),
        timeout=rollout.tool_timeout,
        secrets=secrets,
        log_dir=log_dir,
        warn=warn,
    )
    tokens = None
    if rollout.max_tool_response is not None and tokenizer is not None:
        tokens = TokenLimit(
            limit=rollout.max_tool_response,
            encode=partial(tokenizer.encode, add_special_tokens=False),
            decode=partial(tokenizer.decode, clean_up_tokenization_spaces=False),
        )
    return Toolbox(
        sources,
        tokens=tokens,
        redact=reading_redactor(secrets, config),
        timeout=rollout.tool_timeout,
    )


def list_tools(config: Config, folder: Path, secrets: Mapping[str, str]) -> ListedTools:
    """Everything the student can call. Starts what holds the tools and ends it again.

    Raises:
        InputError: tools.py has a fault, a server is not there, two tools have one name.
    """

    async def listed() -> ListedTools:
        async with build_toolbox(config, folder, secrets) as toolbox:
            return ListedTools(
                schemas=dict(zip(toolbox.names, toolbox.schemas(), strict=True)),
                functions=[tool.info for tool in toolbox.tools if isinstance(tool, HostTool)],
            )

    return run_anywhere(listed())


def context_of(prompt: Prompt, index: int) -> ToolContext:
    """What the tools are told of the rollout that calls."""
    return ToolContext(
        rollout_id=rollout_id(prompt.id, index),
        episode=uuid.uuid4().hex,
        metadata=prompt.metadata,
        variables=prompt.variables,
        docker=prompt.docker,
        docker_env=prompt.docker_env,
    )
