"""What a user's file offers, read without running it in this process, and its faults in words."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rnow.core.tool_schema import Schema
from rnow.errors import InputError
from rnow.text.install import install_command
from rnow.text.suggest import hint
from rnow.usercode.records import Fault, MistakeReport, Report
from rnow.usercode.text import escape

Kind = Literal["tools", "rewards"]

PACKAGES: Mapping[str, str] = {
    "PIL": "pillow", "attr": "attrs", "bs4": "beautifulsoup4", "Crypto": "pycryptodome",
    "cv2": "opencv-python-headless", "dateutil": "python-dateutil", "docx": "python-docx", "dotenv": "python-dotenv",
    "fitz": "pymupdf", "git": "gitpython", "jwt": "pyjwt", "OpenSSL": "pyopenssl",
    "skimage": "scikit-image", "sklearn": "scikit-learn", "yaml": "pyyaml",
}  # fmt: skip
"""Module -> what pip calls its package, where that has another name."""

EXTRAS: Mapping[str, str] = {"crawl4ai": "agents", "mcp": "mcp"}
"""Module -> the extra of rnow that brings it along, with what else rnow needs for it."""

IMPORT_TIMEOUT = 60.0
"""Seconds that importing a user's file may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionInfo:
    """A decorated function, described. ``timeout`` is in seconds, None = the config's; ``parameters`` is a JSON schema
    (tools only); ``place`` is ``tools.py:12``; ``file`` is the file that a host runs to have this function."""

    kind: Kind
    name: str
    file: Path
    place: str
    description: str = ""
    parameters: Schema = field(default_factory=dict)
    is_async: bool = False
    timeout: float | None = None
    sandbox: bool = False
    precondition: bool = False


class CannotImport(InputError):
    """A user's file cannot be imported, or a function in it is wrong. ``module``: what it imports and is not there."""

    module: str | None = None


def read_functions(report: Report, file: Path, kind: Kind) -> list[FunctionInfo]:
    """A child's report as records.

    Raises CannotImport for the mistakes in it.
    """
    mistakes = report["mistakes"]
    if mistakes:
        raise _mistaken(mistakes, file, kind)
    return [
        FunctionInfo(
            kind=kind,
            name=function["name"],
            file=file,
            place=function["place"],
            description=function["description"],
            parameters=function.get("parameters", {}),
            is_async=function["is_async"],
            timeout=function["timeout"],
            sandbox=function["sandbox"],
            precondition=function.get("precondition", False),
        )
        for function in report["functions"]
    ]


def _mistaken(mistakes: Sequence[MistakeReport], file: Path, kind: Kind) -> CannotImport:
    first = mistakes[0]
    if len(mistakes) == 1:
        return CannotImport(
            escape(first["message"]),
            title=f"Invalid {kind}",
            where=escape(first["place"]),
            why=escape(first.get("why", "")) or None,
            fix=first["fix"],
        )
    return CannotImport(
        f"{file.name} has {len(mistakes)} mistakes",
        title=f"Invalid {kind}",
        where=escape(first["place"]),
        fix=f"correct them; the first: {escape(first['fix'])}",
        details=[escape(f"{mistake['place']}: {mistake['message']}") for mistake in mistakes],
    )


def import_error(report: Fault, file: Path, *, timeout: float) -> CannotImport:
    """Why a file could not be imported, from a child's report."""
    kind, name, where, why = report.get("kind"), file.name, file.name, None
    if kind == "timeout":
        what = f"{name} was not imported within {timeout:g} s"
        fix = "move work that takes long, or waits for something, out of the top level of the file"
    elif kind == "processes":
        what = f"{name} started more than {report['limit']} processes while it was imported"
        fix = "remove what starts them from the top level of the file"
    elif kind == "ended":
        what, why = (
            f"{name} ends the program while it is imported",
            how_it_ended(report.get("status")),
        )
        fix = f"`python {name}` shows more"
    else:
        line, shown = report.get("line"), escape(str(report.get("file") or name))
        where = f"{shown}:{line}" if line else shown
        why = f"{report['type']}: {escape(str(report['message']))}".rstrip(": ")[:500]
        what, fix = _raised(report, shown, file)
    error = CannotImport(what, title=f"Invalid {file.stem}", where=where, why=why, fix=fix)
    error.module = str(report["module"]) if report.get("module") else None
    return error


def _raised(report: Fault, shown: str, file: Path) -> tuple[str, str]:
    """What an error that the file raised, in the file ``shown``, means, and what to do."""
    if module := report.get("module"):
        what = f'{file.name} imports "{escape(str(module))}", which is not installed'
        return what, fix_missing(str(module), file)
    if fix := report.get("fix"):
        return f"{file.name} cannot be imported", escape(str(fix))
    if report.get("kind") == "syntax":
        return f"{shown} is not valid Python", "correct this line"
    if report.get("kind") == "exit":
        return f"{file.name} ends the program while it is imported", "remove the exit() call"
    return f"{file.name} cannot be imported", f"correct it; `python {file.name}` shows more"


def fix_missing(module: str, file: Path, *, elsewhere: bool = False) -> str:
    """What to install for a module that ``file`` imports, and where.

    Args:
        elsewhere: the code runs in a sandbox, not in this environment.
    """
    top, package = module.partition(".")[0], package_of(module)
    if elsewhere:
        return f"install {package} where the sandbox runs: in the row's image, else in the environment that runs rnow"
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    requirements = file.parent / "requirements.txt"
    if {_normal(top), _normal(package)} & _required(requirements):
        return f"{pip} -r {shlex.quote(str(requirements))}"
    if extra := EXTRAS.get(top):
        return install_command(extra, pip=pip)
    helpers = [entry.stem for entry in file.parent.glob("*.py")]
    return f"{pip} {package}{hint(top, helpers)}"


def package_of(module: str) -> str:
    """What pip calls the package of a module."""
    top = module.partition(".")[0]
    return PACKAGES.get(top, top)


def _required(requirements: Path) -> set[str]:
    """Names of the packages in a requirements.txt; empty when there is none."""
    try:
        lines = requirements.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {_normal(line) for line in lines}


def _normal(requirement: str) -> str:
    """The package's name as pip compares it, without version and extras."""
    name = re.match(r"[\s']*([A-Za-z0-9._-]*)", requirement)
    return re.sub(r"[._-]+", "-", name[1]).lower() if name else ""


def how_it_ended(status: object) -> str:
    """``exit code 3`` or ``signal 9``: how a process ended, in waitpid's words."""
    if not isinstance(status, int):
        return "it stopped answering"
    return f"signal {-status}" if status < 0 else f"exit code {status}"
