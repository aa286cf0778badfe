"""``rnow serve``: a trained student behind vLLM's OpenAI-compatible server, for as long as the command runs."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shlex
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rnow.config import Config
from rnow.display.downloads import DownloadLines
from rnow.errors import InputError, StopRequested
from rnow.models.adapter import check_base
from rnow.models.loading import quiet_libraries
from rnow.models.resolve import resolve_model
from rnow.plan.engines import check_format
from rnow.plan.rendered import choose_window
from rnow.plan.roles import OWN_CARD, STUDENT, Role, RunModel, roles_of
from rnow.processes.process import family_of, free_port
from rnow.sampling.vllm_engine import environment
from rnow.sampling.vllm_settings import allowed_rank
from rnow.sampling.vllm_worker import CPU_BATCHED_TOKENS
from rnow.serving.nf4 import ARGUMENT as BITSANDBYTES
from rnow.serving.server import HOST, Address, VllmServer, card_environment, require_vllm
from rnow.setup.answering import with_base
from rnow.setup.subjects import Trained
from rnow.tasks import run_anywhere
from rnow.training.signals import StopFlag

PORT = 8000
"""vLLM's own default."""
KEY = "VLLM_API_KEY"
"""The variable with the key that clients must send; without it none is asked for."""
ASKED_SECONDS = 30.0
"""For an answer of a server that is ready."""
LOOK_SECONDS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What is served: the names of adapter and base in requests, the folder with the tokenizer, and where."""

    name: str
    base: str
    tokenizer: Path
    address: Address
    log: Path


def serve(
    config: Config,
    trained: Trained,
    *,
    folder: Path,
    host: str = HOST,
    port: int | None = None,
    stage: Callable[[str], None] = lambda text: None,
    warn: Callable[[str], None] = lambda text: None,
    ready: Callable[[Served], None] = lambda served: None,
) -> None:
    """Serve the adapter, and its base beside it, until Ctrl-C or SIGTERM.

    Args:
        config: how the base is held (``model``) and vLLM set up (``sampler``).
        folder: where relative paths start.
        port: None: 8000 or, where that is taken, any.
        stage: told what is being done; ``warn``: what cannot be told of the base.
        ready: called once, when the server answers.

    Raises:
        InputError: (ModelError) vLLM is not installed or does not start with this model, the port is taken, or the base is another than
            the adapter was trained on.
        StopRequested: before it was ready.
        TemporaryError: (ProcessFailed) the server ended by itself.
    """
    require_vllm("rnow serve", otherwise="")
    quiet_libraries()
    config = with_base(config, trained.adapter)
    role = roles_of(config)[STUDENT]
    check_format(role)
    address = Address(host=host, port=_choose_port(host, port), key=os.environ.get(KEY) or None)
    stage("looking for the base model")
    base = _base_of(config, role, folder, stage)
    for text in check_base(trained.adapter, base.resolved):
        warn(text)
    served = _served(base, trained, address)
    window = choose_window(config.rollout.max_context_window, {STUDENT: base})
    stop = StopFlag()
    server = VllmServer(
        base.resolved.local_dir,
        name=served.base,
        log=served.log,
        arguments=_arguments(config, role, trained, served, window),
        # Spread over several cards it takes those that it sees, as vLLM does.
        env=environment() | card_environment((role.index,) if _on_one_card(role) else ()),
        poll=stop.poll,
        address=address,
    )
    with stop.watch(lambda: stage("stopping")):
        run_anywhere(_serve(server, served, stop, stage, ready))


async def _serve(
    server: VllmServer,
    served: Served,
    stop: StopFlag,
    stage: Callable[[str], None],
    ready: Callable[[Served], None],
) -> None:
    stage("starting vLLM")
    try:
        await server.start()
        names = [model.id for model in await server.client(timeout=ASKED_SECONDS).models()]
        if served.name not in names:
            raise InputError(
                f"vLLM serves {', '.join(names)}, and not the adapter",
                where=str(served.log),
                fix="the log says why it did not load it",
            )
        ready(served)
        while server.alive():
            try:
                stop.poll()
            except StopRequested:
                return  # that is how it ends
            await asyncio.sleep(LOOK_SECONDS)
        raise server.failure("ended")
    finally:
        server.stop()


def _base_of(config: Config, role: Role, folder: Path, stage: Callable[[str], None]) -> RunModel:
    """Raises ModelError where there is no such model."""
    section, lines = config.model, DownloadLines()
    resolved = resolve_model(
        section.path,
        key="model.path",
        base_dir=folder,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        watch=lambda download: stage(download.line()) if lines.due(download) else None,
    )
    return RunModel(role=role, resolved=resolved)


def _choose_port(host: str, port: int | None) -> int:
    """The port asked for, else vLLM's default, else any. It may be taken before the server has it, which then says so.

    Raises:
        InputError: it cannot be had, or nobody can listen at ``host``.
    """
    wanted = PORT if port is None else port
    try:
        with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
            # As servers do: a connection that ended a moment ago does not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, wanted))
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        if getattr(error, "errno", None) not in (errno.EADDRINUSE, errno.EACCES):
            raise InputError(
                f"{host!r} is no address of this machine",
                where="--host",
                why=why,
                fix="leave it out to serve this machine alone, or give 0.0.0.0 for all its addresses",
            ) from None
        if port is None:
            return free_port(host)
        raise InputError(
            f"port {port} of {host} cannot be had",
            where="--port",
            why=why,
            fix="name another with --port, or leave it out for one that is free",
        ) from None
    return wanted


def _served(base: RunModel, trained: Trained, address: Address) -> Served:
    folder = trained.adapter.folder.resolve()
    path = base.resolved.path
    base_name = path if base.resolved.revision is not None else base.resolved.local_dir.name
    name = folder.parent.name if folder.name == "adapter" else folder.name
    log = Path(tempfile.gettempdir()) / f"rnow-serve-{os.getpid()}.log"
    if trained.run is not None:
        name, log = trained.run.path.resolve().name, trained.run.path / "serve.log"
    return Served(
        name=name,
        base=base_name if base_name != name else f"{base_name}-base",
        tokenizer=base.resolved.local_dir,
        address=address,
        log=log,
    )


def _on_one_card(role: Role) -> bool:
    return role.on_gpu and role.serving.tensor_parallel_size == 1


def _arguments(
    config: Config, role: Role, trained: Trained, served: Served, window: int
) -> list[str]:
    """Of vLLM's server. The numbers are those that the run's own vLLM would give: the same base, held alike."""
    section = config.sampler
    quantization, dtype = role.serving_format
    module = {"name": served.name, "path": str(trained.adapter.folder.resolve())}
    options: dict[str, object] = {
        "--dtype": dtype,
        "--max-model-len": window,
        "--max-num-seqs": section.max_num_seqs,
        "--tensor-parallel-size": section.tensor_parallel_size,
        "--max-lora-rank": allowed_rank(trained.adapter.rank),
        "--lora-modules": json.dumps(module | {"base_model_name": served.base}),
    }
    flags = ["--enable-lora"]
    if quantization == "nf4":
        options["--quantization"] = BITSANDBYTES
    if role.on_gpu:
        options["--gpu-memory-utilization"] = section.gpu_memory_utilization or OWN_CARD
    else:
        # A prompt prefilled in two parts makes vLLM rewind the request's random generator, which a CPU's cannot.
        options["--max-num-batched-tokens"] = max(CPU_BATCHED_TOKENS, window)
        flags.append("--no-enable-chunked-prefill")
    if section.enforce_eager or not role.on_gpu:
        flags.append("--enforce-eager")
    if not section.enable_prefix_caching:
        flags.append("--no-enable-prefix-caching")
    if config.model.trust_remote_code:
        flags.append("--trust-remote-code")
    return [*(str(part) for option in options.items() for part in option), *flags]


def usage_lines(served: Served) -> list[str]:
    """How the server is asked, as commands to copy; ``label: value`` lines and code as ``Display.finish`` takes them."""
    url, name = served.address.url, shlex.quote(served.name)
    keyed = served.address.key is not None
    header = f' -H "Authorization: Bearer ${KEY}"' if keyed else ""
    question = {"model": served.name, "messages": [{"role": "user", "content": "Hello"}]}
    arguments = {
        "model": served.name,
        "base_url": f"{url}/v1/completions",
        "tokenizer": served.tokenizer,
        "tokenizer_backend": "huggingface",
        "tokenized_requests": False,
        "num_concurrent": 16,
    }
    model_args = ",".join(f"{key}={value}" for key, value in arguments.items())
    own_key = f'"${KEY}"' if keyed else "none"
    lines = [
        f"serving: {served.name} at {url}/v1, and its base as {served.base}; Ctrl-C ends it",
        f"log: {served.log}",
        "ask it with:",
        f"    curl {url}/v1/chat/completions{header} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(question))}",
        "measure it with lm-eval, or inspect-ai (TASK is yours to fill in):",
        f"    OPENAI_API_KEY={own_key} lm_eval --model local-completions --tasks TASK --apply_chat_template --model_args {shlex.quote(model_args)}",
        f"    RNOW_API_KEY={own_key} inspect eval TASK.py --model openai-api/rnow/{name} --model-base-url {url}/v1",
    ]
    if served.address.host not in (HOST, "localhost", "::1") and not keyed:
        lines.append(
            f"warning: whoever reaches this machine at {served.address.host} can use it; set {KEY} to ask for a key"
        )
    return lines
