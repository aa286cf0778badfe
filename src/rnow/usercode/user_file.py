"""Importing a user's file, in a child, and telling the other side what is in it or what is wrong with it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from rnow.core.marks import Spec
from rnow.core.reward import REWARDS
from rnow.core.tool import TOOLS
from rnow.core.tool_schema import describe
from rnow.errors import RnowError
from rnow.usercode.records import Fault, FunctionReport, MistakeReport, Report

_MAX_TEXT = 2000


class ImportFault(Exception):
    """The file cannot be imported. ``report`` says why, as plain data."""

    def __init__(self, report: Fault) -> None:
        super().__init__(report)
        self.report = report


class UserFile:
    """An imported tools.py or rewards.py: its functions in the order of their names' first appearance."""

    def __init__(self, file: str, kind: str, specs: list[Spec]) -> None:
        self.file = Path(file)
        self.folder = self.file.parent
        self.kind = kind
        self.specs = specs
        self.injected: set[str] = set()
        """Names of the tools that want ``args`` besides their parameters."""
        self.report = self._read()
        """``functions`` (as FunctionInfo has them) and ``mistakes`` (message, place, why, fix), JSON-ready."""

    def named(self, names: list[str]) -> list[Spec]:
        """The functions of these names, in this order.

        Raises KeyError for a name that is no longer there.
        """
        by_name = {spec.name: spec for spec in self.specs}
        return [by_name[name] for name in names]

    def _read(self) -> Report:
        functions: list[FunctionReport] = []
        mistakes: list[MistakeReport] = []
        places: dict[str, str] = {}
        for spec in self.specs:
            place = self._place(spec.function)
            if spec.name in places:
                mistakes.append(
                    {
                        "message": f'two {self.kind} are named "{spec.name}"',
                        "place": f"{places[spec.name]} and {place}",
                        "fix": "rename one of the functions",
                    }
                )
                continue
            places[spec.name] = place
            report: FunctionReport = {
                "name": spec.name,
                "place": place,
                "description": "",
                "is_async": spec.is_async,
                "timeout": spec.timeout,
                "sandbox": spec.sandbox,
            }
            if self.kind == "tools":
                mistakes += self._describe_tool(spec, report)
            else:
                mistakes += _describe_reward(spec, report)
            functions.append(report)
        return {"functions": functions, "mistakes": mistakes}

    def _describe_tool(self, spec: Spec, report: FunctionReport) -> list[MistakeReport]:
        signature = describe(spec.function)
        report["description"] = signature.description
        report["parameters"] = signature.parameters
        if signature.injected:
            self.injected.add(spec.name)
        return [
            {"message": mistake.message, "place": report["place"], "fix": mistake.fix}
            for mistake in signature.mistakes
        ]

    def _place(self, function: Callable[..., object]) -> str:
        code = inspect.unwrap(function).__code__
        return f"{relative(code.co_filename, self.folder)}:{code.co_firstlineno}"


def _describe_reward(spec: Spec, report: FunctionReport) -> list[MistakeReport]:
    report["description"] = inspect.getdoc(spec.function) or ""
    report["precondition"] = spec.precondition
    inner = inspect.unwrap(spec.function)
    mistake: MistakeReport = {
        "message": f'the reward "{spec.name}" yields',
        "place": report["place"],
        "fix": "return one number instead",
    }
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        return [mistake]
    try:
        inspect.signature(spec.function).bind(None, None)
    except TypeError as error:
        mistake["message"] = f'the reward "{spec.name}" cannot be called with (args, messages)'
        mistake["why"] = str(error)
        mistake["fix"] = f"write it as def {spec.name}(args: RewardArgs, messages: list) -> float"
        return [mistake]
    return []


def import_user_file(file: str, kind: str) -> UserFile:
    """Execute the file as the module of its own name, its folder first on ``sys.path``.

    Functions of helper modules that it imports count too. Raises ImportFault.
    """
    path = Path(file)
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    # Checking a project writes nothing into it, not even __pycache__.
    sys.dont_write_bytecode = True
    sys.argv = [file]
    location = importlib.util.spec_from_file_location(path.stem, path)
    if location is None or location.loader is None:
        raise ImportFault({"type": "ImportError", "message": f"{path.name} is not a Python file"})
    module = importlib.util.module_from_spec(location)
    sys.modules[path.stem] = module
    marks = REWARDS if kind == "rewards" else TOOLS
    with marks.collect() as decorated:
        try:
            location.loader.exec_module(module)
        except BaseException as error:
            raise ImportFault(_fault(path, error)) from None
    named = [spec for value in vars(module).values() if (spec := marks.spec_of(value))]
    found = {id(spec.function): spec for spec in (*decorated, *named)}
    return UserFile(file, kind, list(found.values()))


def _fault(path: Path, error: BaseException) -> Fault:
    line, shown = _fault_line(path, error)
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return {
        "type": type(error).__name__,
        "message": error.message if isinstance(error, RnowError) else safe_text(error),
        "fix": error.fix if isinstance(error, RnowError) else None,
        "module": name,
        "kind": "syntax" if isinstance(error, SyntaxError) else "exit" if isinstance(error, SystemExit) else "",
        "line": line,
        "file": shown,
    }  # fmt: skip


def _fault_line(path: Path, error: BaseException) -> tuple[int | None, str]:
    """Line and file of the deepest frame in the user's folder (or of the syntax error)."""
    folder = path.parent
    if isinstance(error, SyntaxError) and error.filename:
        return error.lineno, relative(error.filename, folder)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        inside = Path(frame.filename).parent
        if frame.filename == str(path) or inside == folder:
            return frame.lineno, relative(frame.filename, folder)
    return None, path.name


def relative(filename: str, folder: Path) -> str:
    """``filename`` as seen from the user's folder; only its name when it is elsewhere."""
    file = Path(filename)
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name


def safe_text(error: BaseException) -> str:
    """``str(error)``, cut; "" when even that fails."""
    try:
        return str(error)[:_MAX_TEXT]
    except BaseException:
        return ""
