"""What `rnow doctor` looks at. Each probe runs in a process of its own, ``python -m rnow.setup.probes NAME FOLDER``, which tells
a finding per line of JSON: one that crashes, hangs or cannot be imported says nothing of the others."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rnow import __version__
from rnow.errors import RnowError
from rnow.text.install import install_command, pinned_command

Status = Literal["ok", "warning", "fault"]

LOW_BYTES, LEAST_BYTES = 20e9, 1e9
"""Of a disk: what most models need, and what nothing works without."""
HELD_SHARE = 0.25
"""Of a card's memory that others may hold without a word."""
CONNECT_SECONDS = 10.0
_DRIVER_OF_CUDA = {11: 450, 12: 525, 13: 580}
"""NVIDIA's oldest driver for each major version of CUDA (its "minor version compatibility" table)."""
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. ``fix``: what to type, where something is to be done."""

    name: str
    status: Status
    text: str
    fix: str = ""


def _ok(name: str, text: str) -> Finding:
    return Finding(name=name, status="ok", text=text)


def _warning(name: str, text: str, fix: str) -> Finding:
    return Finding(name=name, status="warning", text=text, fix=fix)


def _fault(name: str, text: str, fix: str) -> Finding:
    return Finding(name=name, status="fault", text=text, fix=fix)


def look_at_python(folder: Path) -> Iterator[Finding]:
    """Python, and rnow with the packages that it needs."""
    yield _ok("Python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")
    with suppress(metadata.PackageNotFoundError):
        yield _warning(
            "hosted client",
            f"rnow {metadata.version('rnow')} uses the same names as rnow-local: one overwrites the other",
            "give each its own environment, or: pip uninstall rnow",
        )
    unmet = list(_unmet())
    if unmet:
        yield _fault("rnow", f"{__version__}; {'; '.join(unmet)}", install_command(""))
    else:
        yield _ok("rnow", f"{__version__}, with the packages that it needs")


def _unmet(extra: str = "") -> Iterator[str]:
    """Requirements of rnow, or of one of its extras, that this environment does not meet."""
    from packaging.requirements import Requirement

    try:
        wanted = metadata.requires("rnow-local") or []
    except metadata.PackageNotFoundError:  # it runs from a clone that is not installed
        return
    for text in wanted:
        need = Requirement(text)
        marked = need.marker is not None and "extra" in str(need.marker)
        if marked != bool(extra) or (need.marker and not need.marker.evaluate({"extra": extra})):
            continue
        try:
            found = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield f"{need.name} is not installed"
            continue
        if not need.specifier.contains(found, prereleases=True):
            yield f"{need.name} is {found}, and rnow needs {need.specifier}"


def look_at_torch(folder: Path) -> Iterator[Finding]:
    """torch, the card and its driver against what the wheel was built for, and a real calculation on each card."""
    import torch

    built = torch.version.cuda
    yield _ok("torch", f"{torch.__version__}, built for {f'CUDA {built}' if built else 'the CPU'}")
    driver = _driver()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _try_card(index)
    elif driver is None:
        yield _ok("CUDA", "no NVIDIA card here: everything runs on the CPU")
    elif not built:
        yield _warning(
            "CUDA",
            f"there is an NVIDIA card (driver {driver}), and this torch is built for the CPU",
            pinned_command("torch", cuda=True),
        )
    else:
        yield _no_cuda(built, driver)


def _try_card(index: int) -> Finding:
    import torch

    name = f"cuda:{index}"
    title = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    try:
        (torch.ones(8, 8, device=name) @ torch.ones(8, 8, device=name)).sum().item()
    except RuntimeError as error:
        built = " ".join(torch.cuda.get_arch_list())
        return _fault(
            name,
            f"{title} (sm_{major}{minor}) does not calculate: {_first_line(error)}; this torch has kernels for {built}",
            pinned_command("torch", cuda=True),
        )
    return _ok(name, f"{title} (sm_{major}{minor}), driver {_driver() or 'unknown'}, calculates")


def _no_cuda(built: str, driver: str) -> Finding:
    """Why torch sees no card, though there is a driver."""
    least = _DRIVER_OF_CUDA.get(int(built.split(".")[0]))
    has = driver.split(".")[0]
    if least and has.isdigit() and int(has) < least:
        return _fault(
            "CUDA",
            f"the NVIDIA driver {driver} is too old for CUDA {built}, which torch is built for: {least} or newer",
            f"install a newer driver (Debian, Ubuntu: apt-get install nvidia-driver-{least}) and restart",
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return _warning(
            "CUDA",
            f"torch sees no card: CUDA_VISIBLE_DEVICES is '{hidden}'",
            "unset CUDA_VISIBLE_DEVICES",
        )
    return _fault(
        "CUDA",
        f"torch (CUDA {built}) sees no card, though there is a driver ({driver})",
        "nvidia-smi must list the card; in a container, start it with --gpus all",
    )


def _driver() -> str | None:
    """The version of the NVIDIA driver; None where there is none."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        for word in text.split():
            if word.replace(".", "").isdigit() and "." in word:
                return word
    rows = _smi("--query-gpu=driver_version")
    return rows[0][0] if isinstance(rows, list) and rows else None


def _smi(*query: str) -> list[list[str]] | str:
    """Rows of what nvidia-smi says; why it says nothing, empty where there is none."""
    from rnow.usercode.engines import ask

    path = shutil.which("nvidia-smi")
    if path is None:
        return ""
    said = ask([path, *query, "--format=csv,noheader,nounits"])
    if not said.ok:
        return said.last_lines()
    lines = filter(None, (line.strip() for line in said.text.splitlines()))
    return [[cell.strip() for cell in line.split(",")] for line in lines]


def look_at_libraries(folder: Path) -> Iterator[Finding]:
    """Whether what reads and adapts models can be imported."""
    import peft
    import safetensors
    import transformers

    versions = f"{transformers.__version__}, peft {peft.__version__}, safetensors {safetensors.__version__}"
    yield _ok("transformers", versions)


def look_at_cards(folder: Path) -> Iterator[Finding]:
    """The memory of each card, and who holds it."""
    cards = _smi("--query-gpu=index,uuid,name,memory.total,memory.used")
    if isinstance(cards, str):
        if cards:
            yield _fault(
                "GPU memory",
                f"nvidia-smi fails: {cards}",
                "restart the machine (after an update of the driver, the old one still runs), or install the driver anew",
            )
        return
    held = _smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    holders = held if isinstance(held, list) else []
    for index, uuid, name, total, used in (card for card in cards if len(card) == 5):
        own = [row for row in holders if len(row) == 3 and row[0] == uuid]
        yield _card_memory(f"memory of cuda:{index}", name, _number(total), _number(used), own)


def _card_memory(name: str, title: str, total: int, used: int, held: list[list[str]]) -> Finding:
    """
    Args:
        total, used: MiB.
        held: uuid, process id and MiB of each process that nvidia-smi sees.
    """
    text = f"{(total - used) * _MIB / 1e9:.1f} of {total * _MIB / 1e9:.1f} GB free ({title})"
    pids = [row[1] for row in held if row[1].isdigit()]
    who = [f"{_process(pid)} {_gigabytes(mib)}" for _, pid, mib in held if pid.isdigit()]
    if used <= HELD_SHARE * total:
        return _ok(name, text)
    if not who:
        fix = "look on the host: nvidia-smi there names the processes that a container does not see"
        return _warning(name, f"{text}; who holds the rest cannot be seen from here", fix)
    fix = f"wait, or end what you do not need (kill {' '.join(pids)}), or use another card (model.device=cuda:N)"
    return _warning(name, f"{text}; held by {', '.join(who)}", fix)


def _process(pid: str) -> str:
    """``process 4242 (python of ann)``; of a command line nothing more, which may hold keys."""
    try:
        command = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        return f"process {pid} ({command} of {Path(f'/proc/{pid}').owner()})"
    except (OSError, KeyError):
        return f"process {pid}"


def _gigabytes(mib: str) -> str:
    return f"{_number(mib) * _MIB / 1e9:.1f} GB" if mib.isdigit() else ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def look_at_vllm(folder: Path) -> Iterator[Finding]:
    """Whether vLLM can be imported."""
    there = importlib.util.find_spec("vllm") is not None
    if not there:
        if _driver() is None:
            yield _ok("vLLM", "not installed; on a CPU transformers samples")
        else:
            yield _warning(
                "vLLM",
                "not installed: transformers samples, which is slower on a card",
                install_command("vllm"),
            )
        return
    if unmet := list(_unmet("vllm")):
        yield _warning("vLLM", "; ".join(unmet), install_command("vllm"))
    importlib.import_module("vllm")
    yield _ok("vLLM", metadata.version("vllm"))


def look_at_bitsandbytes(folder: Path) -> Iterator[Finding]:
    """Whether weights can be stored in 4 bits where the run would."""
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    device = "cuda" if torch.cuda.is_available() else "cpu"
    functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4")
    yield _ok("bitsandbytes", f"{bitsandbytes.__version__}, packs nf4 on {device}")


def look_at_sandbox(folder: Path) -> Iterator[Finding]:
    """Where functions with ``sandbox=True`` and rows that name images would run."""
    from rnow.usercode.engines import Bubblewrap, ContainerEngine, find_bubblewrap, find_containers
    from rnow.usercode.sandbox import INSTALL_BUBBLEWRAP, INSTALL_CONTAINERS

    bubblewrap, containers = find_bubblewrap(), find_containers()
    has = [
        *(["bubblewrap"] if isinstance(bubblewrap, Bubblewrap) else []),
        *([containers.name] if isinstance(containers, ContainerEngine) else []),
    ]
    if not has:
        yield _warning(
            "sandbox",
            f"none for sandbox=True and for rows that name images: {bubblewrap}; {containers}",
            f"{INSTALL_BUBBLEWRAP}, or {INSTALL_CONTAINERS}",
        )
    elif isinstance(containers, str):
        yield _ok(
            "sandbox", f"bubblewrap; no container engine for rows that name images: {containers}"
        )
    else:
        yield _ok("sandbox", " and ".join(has))


def look_at_browser(folder: Path) -> Iterator[Finding]:
    """Whether tools can browse the web."""
    from rnow.usercode.engines import ask
    from rnow.web.chromium import find_chromium, require_packages

    try:
        require_packages()
        path = find_chromium()
    except RnowError as error:
        yield _warning("Chromium", f"tools cannot browse: {error.message}", error.fix or "")
        return
    said = ask([path, "--version"])
    if said.ok:
        yield _ok("Chromium", f"{said.text.splitlines()[0].strip() if said.text else ''} ({path})")
    else:
        yield _warning(
            "Chromium",
            f"{path} does not start: {said.last_lines()}",
            "crawl4ai-doctor says what it lacks (Debian: apt-get install chromium)",
        )


def look_at_disk(folder: Path) -> Iterator[Finding]:
    """Room for models, and for runs."""
    from rnow.models.downloads import cache_folder
    from rnow.models.hub import MORE_ROOM

    cache = cache_folder()
    yield _disk("models' disk", cache, MORE_ROOM.format(cache=cache))
    runs = folder / "runs"
    yield _disk("runs' disk", runs, f"free space in {runs}, rnow runs clean, or set output_dir")


def _disk(name: str, folder: Path, fix: str) -> Finding:
    from rnow.disk.folder import nearest
    from rnow.plan.devices import free_disk

    there = nearest(folder)
    free = free_disk(folder)
    text = f"{free / 1e9:.1f} GB free in {folder}"
    if not os.access(there, os.W_OK | os.X_OK):
        return _fault(name, f"{there} cannot be written by this user", fix)
    if free < LEAST_BYTES:
        return _fault(name, text, fix)
    return _ok(name, text) if free >= LOW_BYTES else _warning(name, text, fix)


def look_at_hub(folder: Path) -> Iterator[Finding]:
    """Whether models can be fetched, and as whom."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from rnow.models.downloads import hub_address

    where = hub_address()
    if constants.HF_HUB_OFFLINE:
        text = "offline mode is on (HF_HUB_OFFLINE): only models on this machine can be used"
        yield _warning("hub", text, "unset HF_HUB_OFFLINE")
        return
    token = get_token()
    try:
        if token:
            account = HfApi().whoami(token).get("name")
            yield _ok("hub", f"{where} answers, logged in as {account}")
            return
        HfApi().model_info("Qwen/Qwen3-0.6B", timeout=CONNECT_SECONDS)
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if token and status in (401, 403):
            yield _warning("hub", f"{where} does not take the token ({status})", "hf auth login")
            return
        if status >= 500 or not status:
            yield _warning("hub", f"{where} answers with {status}", "wait, and try again")
            return
    except Exception as error:
        yield _warning(
            "hub",
            f"{where} cannot be reached: {_first_line(error)}",
            "check the network and any proxy (HTTPS_PROXY), or name local folders as models",
        )
        return
    yield _ok("hub", f"{where} answers; without a token, so no gated or private models")


def look_at_tokens(folder: Path) -> Iterator[Finding]:
    """Names of the keys that are there; a value is never told."""
    from huggingface_hub import constants

    from rnow.project.secrets import OWN_VARIABLES, load_secrets

    found = [f"{name} (environment)" for name in OWN_VARIABLES if os.environ.get(name)]
    if Path(constants.HF_TOKEN_PATH).is_file():
        found.append("HuggingFace's (hf auth login)")
    try:
        found += [f"{name} (.env)" for name in load_secrets(folder)]
    except RnowError as error:
        yield _warning(".env", f"{error.message}: {error.why}", error.fix or "")
    none = "none; gated and private models need one: hf auth login"
    yield _ok("tokens", ", ".join(found) or none)


Probe = Callable[[Path], Iterator[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A probe, what it is about for those who see it fail, how long it may take, and what to type where it crashes."""

    look: Probe
    about: str
    fix: str
    seconds: float = 60.0


PROBES: Mapping[str, Known] = {
    "python": Known(look=look_at_python, about="rnow", fix=install_command("")),
    "torch": Known(look=look_at_torch, about="torch", fix=pinned_command("torch")),
    "libraries": Known(
        look=look_at_libraries, about="transformers", fix=pinned_command("transformers peft")
    ),
    "cards": Known(look=look_at_cards, about="GPU memory", fix="nvidia-smi must answer"),
    "vllm": Known(look=look_at_vllm, about="vLLM", fix=install_command("vllm"), seconds=120.0),
    "bitsandbytes": Known(
        look=look_at_bitsandbytes, about="bitsandbytes", fix=pinned_command("bitsandbytes")
    ),
    "sandbox": Known(
        look=look_at_sandbox, about="sandbox", fix="docker info and bwrap --help must answer"
    ),
    "browser": Known(look=look_at_browser, about="Chromium", fix=install_command("agents")),
    "disk": Known(look=look_at_disk, about="disk", fix="df -h must answer: a disk may be gone"),
    "hub": Known(
        look=look_at_hub, about="hub", fix=pinned_command("huggingface_hub"), seconds=30.0
    ),
    "tokens": Known(look=look_at_tokens, about="tokens", fix=pinned_command("huggingface_hub")),
}
"""In the order of the report."""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def main(name: str, folder: Path) -> None:
    """Run one probe, its findings as lines of JSON on what is standard output now. Nothing that a library prints gets there."""
    known = PROBES[name]
    signal.alarm(round(known.seconds) + 5)  # it ends though whoever started it is gone
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as told:
        os.dup2(2, 1)

        def tell(finding: Finding) -> None:
            told.write(json.dumps(asdict(finding)) + "\n")
            told.flush()

        try:
            for finding in known.look(folder):
                tell(finding)
        except BaseException as error:
            tell(_fault(known.about, _first_line(error), known.fix))
        told.flush()
        # Whatever a library wants at the end is not waited for.
        os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
