"""Importing a user's Python file so that its faults read as faults of that file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from rnow.core.reward import RewardSpec, collect_rewards, reward_spec
from rnow.errors import InputError, NotYetSupported, RnowError
from rnow.project.faults import did_you_mean, escape

METRIC_NAMES = frozenset({"mean", "failure_fraction"})


def load_rewards(folder: Path, filename: str = "rewards.py") -> Mapping[str, RewardSpec]:
    """Name -> reward function of ``folder/rewards.py``; empty when there is no such file.

    Rewards of helper modules that the file imports count too. Nothing is shared between two folders.

    Raises:
        InputError: the file cannot be imported, or a reward has the wrong parameters or a name twice.
        NotYetSupported: a reward with ``sandbox=True``.
    """
    path = folder / filename
    if not path.is_file():
        return {}
    with collect_rewards() as collected:
        module = import_file(path)
    found = {id(spec.function): spec for spec in collected}
    for value in vars(module).values():
        spec = reward_spec(value)
        if spec is not None:
            found[id(spec.function)] = spec
    rewards: dict[str, RewardSpec] = {}
    for spec in found.values():
        _check_reward(spec, folder)
        if spec.name in METRIC_NAMES:
            raise InputError(
                f'a reward cannot be named "{spec.name}": reward/{spec.name} is another metric',
                title="Invalid rewards",
                where=path.name,
                fix="rename the function",
            )
        if spec.name in rewards:
            raise InputError(
                f'two rewards are named "{spec.name}"',
                title="Invalid rewards",
                where=f"{_place(rewards[spec.name], folder)} and {_place(spec, folder)}",
                fix="rename one of the functions",
            )
        rewards[spec.name] = spec
    return rewards


def import_file(path: Path) -> ModuleType:
    """Execute ``path`` as a module under a private name, with its folder first on ``sys.path`` meanwhile.

    What it prints goes to stderr: stdout may be read by a program. Afterwards the folder stays last on ``sys.path``, so
    that imports inside functions still find the user's helpers and never hide an installed package.

    Raises InputError, naming file, line and the original exception, for anything that goes wrong in it.
    """
    path = path.resolve()
    tag = hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()
    name = f"_rnow_user_{path.stem}_{tag}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path.name} cannot be imported", where=path.name)
    module = importlib.util.module_from_spec(spec)
    with _project_path(path.parent):
        sys.modules[name] = module
        try:
            with contextlib.redirect_stdout(sys.stderr):
                spec.loader.exec_module(module)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            del sys.modules[name]
            raise _import_error(path, error) from None
    return module


@contextlib.contextmanager
def _project_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    before = set(sys.modules)
    # An editor or a test may have rewritten a file within the clock's resolution of the last look.
    importlib.invalidate_caches()
    sys.path.insert(0, entry)
    # Checking a project writes nothing into it, not even __pycache__.
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_bytecode
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)
        if entry not in sys.path:
            sys.path.append(entry)
        _forget_helpers(folder, before)


def _forget_helpers(folder: Path, before: set[str]) -> None:
    """Drop the folder's own modules from ``sys.modules``: a ``datasets.py`` of one project must not become the
    ``datasets`` of this program or the ``helpers`` of the next project. Functions keep what they imported."""
    local = {
        name
        for name, module in sys.modules.items()
        if name not in before and "." not in name and _lies_in(module, folder)
    }
    for name in list(sys.modules):
        if name not in before and name.partition(".")[0] in local:
            del sys.modules[name]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    if module.__name__.startswith("_rnow_user_"):
        return False
    spec = getattr(module, "__spec__", None)
    places = [spec.origin] if spec is not None and spec.has_location and spec.origin else []
    if not places:
        places = [f"{place}/__init__.py" for place in getattr(module, "__path__", ())]
    tops = {folder / module.__name__, folder}
    return any(Path(place).parent in tops for place in places)


def _import_error(path: Path, error: BaseException) -> RnowError:
    if isinstance(error, RnowError):
        return error
    folder = path.parent
    line, shown = _fault_line(path, error)
    where = f"{shown}:{line}" if line else shown
    reason = f"{type(error).__name__}: {escape(str(error))}".rstrip(": ")[:500]
    if isinstance(error, ModuleNotFoundError) and error.name:
        top = error.name.partition(".")[0]
        helpers = [entry.stem for entry in folder.glob("*.py")]
        fix = f"pip install {top} (in the environment that runs rnow){did_you_mean(top, helpers)}"
        if (folder / "requirements.txt").is_file():
            fix = "pip install -r requirements.txt (in the environment that runs rnow)"
        what = f'{path.name} imports "{error.name}", which is not installed'
    elif isinstance(error, SyntaxError):
        what, fix = f"{shown} is not valid Python", "correct this line"
    elif isinstance(error, SystemExit):
        what, fix = f"{path.name} ends the program while it is imported", "remove the exit() call"
    else:
        what, fix = (
            f"{path.name} cannot be imported",
            f"correct it; `python {path.name}` shows more",
        )
    return InputError(what, title=f"Invalid {path.stem}", where=where, why=reason, fix=fix)


def _fault_line(path: Path, error: BaseException) -> tuple[int | None, str]:
    """Line and file of the deepest frame in the user's folder (or of the syntax error)."""
    folder = path.parent
    if isinstance(error, SyntaxError) and error.filename:
        return error.lineno, _relative(error.filename, folder)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        inside = Path(frame.filename).parent
        if frame.filename == str(path) or inside == folder:
            return frame.lineno, _relative(frame.filename, folder)
    return None, path.name


def _relative(filename: str, folder: Path) -> str:
    file = Path(filename)
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name


def _place(spec: RewardSpec, folder: Path) -> str:
    code = spec.function.__code__
    return f"{_relative(code.co_filename, folder.resolve())}:{code.co_firstlineno}"


def _check_reward(spec: RewardSpec, folder: Path) -> None:
    where = _place(spec, folder)
    if inspect.isgeneratorfunction(spec.function) or inspect.isasyncgenfunction(spec.function):
        raise InputError(
            f'the reward "{spec.name}" yields',
            title="Invalid rewards",
            where=where,
            fix="return one number instead",
        )
    try:
        inspect.signature(spec.function).bind(None, None)
    except TypeError as error:
        raise InputError(
            f'the reward "{spec.name}" cannot be called with (args, messages)',
            title="Invalid rewards",
            where=where,
            why=str(error),
            fix=f"write it as def {spec.name}(args: RewardArgs, messages: list) -> float",
        ) from None
    if spec.sandbox:
        raise NotYetSupported(
            f'the reward "{spec.name}" asks for sandbox=True, which this version does not have',
            where=where,
            fix="remove sandbox=True to run it in the training process",
        )
