"""Which of our environment, and which of the project's secrets, reach the user's code.

The code gets the variables that programs need to run at all, and of everything else (the project's ``.env``, and what was
exported in the shell) what it names: a variable whose NAME occurs in the text of the file, or of a module of the folder that
the file imports. A comment counts. So a tool that never heard of HF_TOKEN cannot leak it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from rnow.core.judge import SETTINGS

BASE = frozenset(
    """
    PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TERM VIRTUAL_ENV PYTHONPATH LD_LIBRARY_PATH
    XDG_RUNTIME_DIR XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME PLAYWRIGHT_BROWSERS_PATH
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NODE_EXTRA_CA_CERTS
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
    DOCKER_HOST DOCKER_CONTEXT DOCKER_CONFIG CONTAINER_HOST
    """.split()  # noqa: SIM905
)
"""What every program may see, with every ``LC_*``. Without the proxies nothing is reached from many networks; a password in
one is kept out of texts as a secret is."""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_LONG = 12  # characters
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|AUTH", re.IGNORECASE)
"""Names whose values are secrets, wherever they come from."""


def base_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What a child is started with. Numeric libraries get one thread each, as there are many workers; a number that was
    set on purpose stays."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in BASE or name.startswith("LC_") or name in _ONE_THREAD
    }
    return dict.fromkeys(_ONE_THREAD, "1") | kept


def declared(available: Mapping[str, str], words: Iterable[str]) -> dict[str, str]:
    """The variables that the code names. ``llm_judge`` names what it reads."""
    named = set(words)
    if "llm_judge" in named:
        named.update(SETTINGS)
    return {name: value for name, value in available.items() if name in named}


def words_of(file: Path) -> set[str]:
    """Every word in the text of ``file`` and of the modules of its folder that it imports, and they."""
    words: set[str] = set()
    for path in source_files(file):
        words.update(_WORD.findall(_read(path)))
    return words


def source_files(file: Path) -> list[Path]:
    """``file`` and the Python files of its folder that it reaches by import statements, itself first."""
    file = file.resolve()
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        for module in _imported(path, file.parent):
            waiting += _files_of(module, file.parent)
    return list(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _imported(path: Path, root: Path) -> set[str]:
    """Dotted names that the file imports; relative ones as seen from ``root``."""
    try:
        tree = ast.parse(_read(path))
    except (SyntaxError, ValueError, RecursionError):
        return set()
    package = path.parent.relative_to(root).parts if path.is_relative_to(root) else ()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            names.add(".".join(base))
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names - {""}


def _files_of(module: str, root: Path) -> list[Path]:
    """The files that importing ``module`` would run, as far as they lie in the folder."""
    parts = module.split(".")
    files = [root.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
    files += [root.joinpath(*parts[:count]).with_suffix(".py") for count in range(1, len(parts) + 1)]  # fmt: skip
    return [path for path in files if path.is_file()]


def plainly_secret(secrets: Mapping[str, str]) -> dict[str, str]:
    """Of a project's ``.env``, what is worth changing a page for that the model reads: not the "info" of LOG_LEVEL=info.
    Whoever writes files takes all of it out."""
    return {
        name: value for name, value in secrets.items() if len(value) >= _LONG or SECRET.search(name)
    }


def hidden_values(environ: Mapping[str, str]) -> dict[str, str]:
    """Of these variables, what must not be written anywhere: those with a telling name, and the passwords of proxies."""
    hidden = {name: value for name, value in environ.items() if value and SECRET.search(name)}
    for name, value in environ.items():
        if name.lower().endswith("_proxy"):
            try:
                password = urlsplit(value).password
            except ValueError:
                continue
            if password:
                hidden[name] = password
    return hidden
