"""The project folders ``rnow init`` can write, and the careful copying of one into a user's folder."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from rnow.config.json_schema import MADE_BY, schema_text
from rnow.errors import InputError
from rnow.text.install import install_command
from rnow.text.suggest import closest
from rnow.text.user_files import place_of, read_regular

_CONFIG = "config.yml"
SCHEMA = Path(".config.schema.json")
"""What tells editors of config.yml's keys."""
MODELINE = f"# yaml-language-server: $schema={SCHEMA}"
"""The first line of every template's config, by which editors find it."""
_SHARED = "shared.txt"
ROWS_SCRIPT = "generate_teacher_data.py"
"""Of a template whose rows a teacher has yet to write."""
_NOT_COPIED = frozenset({"__pycache__", "runs", "rollouts", "wandb", ".DS_Store", _SHARED})
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_YAML_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A folder that ``rnow init`` can copy. ``description`` is the first comment of its config.yml that is for people.

    What it has in common with another template is there once: a line of its ``shared.txt`` names a file or a folder of that one
    (``quickstart/student``), which is copied under its own name too.
    """

    name: str
    folder: Path
    description: str

    def files(self) -> dict[Path, Path]:
        """Every file of a new project, relative, with where it comes from."""
        found = {path: self.folder / path for path in _files(self.folder)}
        for shared in self._shared():
            if shared.is_dir():
                found |= {shared.name / path: shared / path for path in _files(shared)}
            else:
                found[Path(shared.name)] = shared
        return dict(sorted(found.items()))

    def _shared(self) -> list[Path]:
        path = self.folder / _SHARED
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [self.folder.parent / line for line in lines if line and not line.startswith("#")]

    def setup_commands(self) -> list[str]:
        """What to type before the project can run: what the first comments of its requirements.txt say, and the script that
        writes its rows."""
        path = self.folder / "requirements.txt"
        commands: list[str] = []
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            commands += [install_command(name) for name in re.findall(r"rnow's extra (\w+)", text)]
            commands += ["pip install -r requirements.txt"]
            commands += re.findall(r"^# then: (.+)$", text, re.MULTILINE)
        if (self.folder / ROWS_SCRIPT).is_file():
            commands.append(f"python {ROWS_SCRIPT}")
        return commands


@dataclass(frozen=True, slots=True, kw_only=True)
class InitPlan:
    """What writing a template would do. Paths are relative, sorted.

    ``new`` do not exist yet, ``same`` are there with the same content, ``conflicts`` are there with other content.
    """

    template: Template
    folder: Path
    new: tuple[Path, ...]
    same: tuple[Path, ...]
    conflicts: tuple[Path, ...]


def templates_folder() -> Path:
    """Where the templates are: inside the installed package, or beside ``src/`` in a source checkout.

    Raises:
        InputError: the installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_templates", package.parents[1] / "templates"):
        if folder.is_dir():
            return folder
    raise InputError(
        "the templates are missing from this installation of rnow",
        where=str(package / "_templates"),
        fix="install rnow again, from a clone: pip install .",
    )


def load_templates() -> dict[str, Template]:
    """All templates by name, in alphabetical order."""
    found = {}
    for folder in sorted(templates_folder().iterdir()):
        config = folder / _CONFIG
        if config.is_file():
            text = config.read_text(encoding="utf-8").removeprefix(f"{MODELINE}\n")
            first = text.partition("\n")[0]
            description = first.removeprefix("#").strip() if first.startswith("#") else ""
            found[folder.name] = Template(name=folder.name, folder=folder, description=description)
    return found


def find_template(name: str) -> Template:
    """The template called ``name``.

    Raises:
        InputError: there is none; the error suggests the closest, or lists all.
    """
    templates = load_templates()
    if name in templates:
        return templates[name]
    close = closest(name, templates)
    raise InputError(
        f"there is no template {name!r}",
        title="Unknown template",
        fix=f"use --template {close[0]}" if close else "choose one of: " + ", ".join(templates),
    )


def plan_init(template: Template, folder: Path) -> InitPlan:
    """Compare a template with what is in ``folder``; reads only.

    Raises:
        InputError: the folder is a file, or a folder stands where a file should go, or the reverse.
    """
    new: list[Path] = []
    same: list[Path] = []
    conflicts: list[Path] = []
    place_of(folder, Path(), where="--dir")
    for relative, source in template.files().items():
        target = folder / relative
        _refuse_wrong_kind(folder, relative)
        if not os.path.lexists(target):
            new.append(relative)
        elif target.is_file() and filecmp.cmp(source, target, shallow=False):
            same.append(relative)
        else:
            conflicts.append(relative)
    return InitPlan(
        template=template,
        folder=folder,
        new=tuple(new),
        same=tuple(same),
        conflicts=tuple(conflicts),
    )


def write_template(
    plan: InitPlan, *, overwrite: Collection[Path] = (), project_name: str | None = None
) -> tuple[Path, ...]:
    """Copy the new files of a plan, and of its conflicts those in ``overwrite``; give the paths written.

    Each file appears complete or not at all. ``project_name`` goes into config.yml only if this call wrote that file.

    Raises:
        InputError: the folder cannot be written.
    """
    chosen = [*plan.new, *(path for path in plan.conflicts if path in overwrite)]
    written: list[Path] = []
    sources = plan.template.files()
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
        for relative in sorted(chosen):
            content = sources[relative].read_bytes()
            if project_name is not None and relative == Path(_CONFIG):
                content = set_project_name(content.decode("utf-8"), project_name).encode("utf-8")
            _write_whole(plan.folder / relative, content)
            written.append(relative)
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or plan.folder}: {error.strerror}",
            where=str(plan.folder),
            fix="choose a folder you can write to, with --dir",
            details=[f"already written: {path}" for path in written],
        ) from error
    return tuple(written)


def write_schema(folder: Path) -> bool:
    """Write what the first line of a template's config names, or renew what an earlier version wrote; a file of that name that is
    the user's stays. Gives whether something was written.

    Raises:
        InputError: the folder cannot be written.
    """
    target, text = folder / SCHEMA, schema_text()
    if os.path.lexists(target):
        try:
            there = read_regular(target).decode("utf-8")
        except (InputError, OSError, UnicodeDecodeError):
            return False
        if there == text or MADE_BY not in there:
            return False
    try:
        _write_whole(target, text.encode("utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}",
            where=str(folder),
            fix="choose a folder you can write to, with --dir",
        ) from error
    return True


def set_project_name(config_text: str, name: str) -> str:
    """``config_text`` with ``project_name: name``; every other character, comments included, stays as it is.

    Without such a line one is added before the first key.
    """
    value = name
    if not _PLAIN_NAME.fullmatch(name) or name.lower() in _YAML_WORDS:
        value = json.dumps(name, ensure_ascii=False)
    line = re.compile(
        r"""^project_name:[ \t]*("(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|[^\s#][^#\n]*?)?(?=[ \t]+\#|[ \t]*$)""",
        re.MULTILINE,
    )
    if line.search(config_text):
        return line.sub(lambda _: f"project_name: {value}", config_text, count=1)
    first_key = re.search(r"^[A-Za-z_\"']", config_text, re.MULTILINE)
    at = first_key.start() if first_key else len(config_text)
    return f"{config_text[:at]}project_name: {value}\n{config_text[at:]}"


def _files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not _NOT_COPIED.intersection(relative.parts):
            yield relative


def _refuse_wrong_kind(folder: Path, relative: Path) -> None:
    parents = [folder, *(folder / parent for parent in reversed(relative.parents[:-1]))]
    for parent in parents:
        if os.path.lexists(parent) and not parent.is_dir():
            raise InputError(f"{parent} is a file where a folder is needed", where=str(parent))
    if (folder / relative).is_dir():
        raise InputError(
            f"{folder / relative} is a folder where a file is needed", where=str(folder / relative)
        )


def _write_whole(target: Path, content: bytes) -> None:
    """Write beside ``target``, then rename: an interrupted copy never leaves half of a file under its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.rnow-{os.getpid()}")
    try:
        aside.write_bytes(content)
        if target.exists():
            shutil.copymode(target, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
