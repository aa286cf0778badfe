"""The command line: what it passes on, what it prints, and the code it ends with."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import re
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import rnow.setup
from rnow import __version__
from rnow.cli import hosted
from rnow.cli.main import run_command_line
from rnow.cli.rehearse import parse_rows
from rnow.errors import DataError, InputError, ModelError, RnowError, TemporaryError

CONFIG = """\
# my project
dataset_type: distill
data:
  train_file: train.jsonl
model:
  path: student
teacher:
  path: teacher
trainer:
  learning_rate: 1e-4
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "my project"
    folder.mkdir()
    (folder / "config.yml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    return folder


class Plan:
    """A plan that says who made it."""

    def __init__(self, config: Any, folder: Path) -> None:
        self.config, self.folder = config, folder

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.config.model.path, "lr": self.config.trainer.learning_rate}


class Build:
    """Stands for rnow.setup.build and rnow.setup.rehearse; records how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.problem: RnowError | None = None
        self.notes: list[str] = []

    def _called(self, what: str, config: Any, options: dict[str, Any]) -> Any:
        self.calls.append((what, config, options))
        if self.error is not None:
            raise self.error
        return types.SimpleNamespace(values={"steps": 7}, problem=self.problem)

    def run(self, config: Any, *, folder: Path, fresh: bool, display: Any) -> Any:
        for note in self.notes:
            display.note(note)
        return self._called("run", config, {"folder": folder, "fresh": fresh})

    def check(self, config: Any, folder: Path) -> Plan:
        self._called("check", config, {"folder": folder})
        return Plan(config, folder)

    def rehearse(self, config: Any, **options: Any) -> Any:
        options.pop("console")
        return self._called("rehearse", config, options)


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    fake = Build()
    for name in ("build", "rehearse"):
        module: Any = types.ModuleType(f"rnow.setup.{name}")
        module.run, module.check, module.rehearse = fake.run, fake.check, fake.rehearse
        monkeypatch.setitem(sys.modules, f"rnow.setup.{name}", module)
        monkeypatch.setattr(rnow.setup, name, module, raising=False)
    view: Any = types.ModuleType("rnow.plan.view")
    view.plan_view = lambda plan, console: f"plan for {plan.config.model.path}"
    monkeypatch.setitem(sys.modules, "rnow.plan.view", view)
    return fake


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rnow_(capsys: pytest.CaptureFixture[str]) -> Run:
    """``rnow_("check", "--json") -> (exit code, standard output, standard error)``."""

    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command_line(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_run_passes_flags_and_overrides(project: Path, build: Build, rnow_: Run) -> None:
    arguments = [
        "run",
        "-m",
        "other",
        "-e",
        "3",
        "-b",
        "8",
        "--lr",
        "2e-5",
        "-n",
        "2024",
        "--fresh",
        "data.group_size=2",
    ]
    code, _, error = rnow_(*arguments)
    assert code == 0, error
    what, config, options = build.calls[0]
    assert (what, options) == ("run", {"folder": Path(), "fresh": True})
    assert config.model.path == "other"
    assert config.model.name == "2024"
    assert config.trainer.num_epochs == 3
    assert config.trainer.learning_rate == 2e-5
    assert (config.data.batch_size, config.data.group_size) == (8, 2)
    assert "trainer.learning_rate: 1e-4 -> 2e-5" in error.replace("0.0001", "1e-4")


def test_flags_by_their_hosted_names(project: Path, build: Build, rnow_: Run) -> None:
    arguments = ["--learning-rate", "3e-5", "--max-context-window", "512"]
    assert rnow_("run", *arguments, "--epochs", "2")[0] == 0
    assert rnow_("test", "--num-rollouts", "3", "--max-context-window", "256")[0] == 0
    assert rnow_("test", "--entry", "0,2")[0] == 0
    trained, tried, some = build.calls
    assert trained[1].trainer.learning_rate == 3e-5
    assert trained[1].rollout.max_context_window == 512
    assert (tried[1].rollout.max_context_window, tried[2]["limit"]) == (256, 3)
    assert some[2]["rows"] == (0, 2)


def test_dotted_overrides_win_over_flags(project: Path, build: Build, rnow_: Run) -> None:
    assert rnow_("run", "--lr", "1e-3", "trainer.learning_rate=5e-5")[0] == 0
    assert build.calls[0][1].trainer.learning_rate == 5e-5


@pytest.mark.parametrize("name", ["null", "~", "[a, b]", "{seed}", "ü", '"', "a: b", "2024"])
def test_a_name_is_text(project: Path, build: Build, rnow_: Run, name: str) -> None:
    rnow_("run", "-n", name)
    (call,) = build.calls
    assert call[1].model.name == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-n", ""], "-n has no name"),
        (["-n", "  "], "-n has no name"),
        (["-n", "a", "model.name=b"], "named twice"),
        (["-n", "{trainer.lr}"], "did you mean trainer.learning_rate?"),
    ],
)
def test_a_name_that_is_none_is_refused(
    project: Path, build: Build, rnow_: Run, arguments: list[str], words: str
) -> None:
    code, _, told = rnow_("run", *arguments)
    assert code == 2
    assert words in told
    assert not build.calls
    assert rnow_("run", "-n", "a", "model.name=a")[0] == 0


def test_run_in_another_folder(
    project: Path, build: Build, rnow_: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rnow_("run", "-d", "my project")[0] == 0
    assert build.calls[0][2]["folder"] == Path("my project")


def events_of(out: str) -> list[dict[str, Any]]:
    """The lines of standard output, each of which is an event."""
    return [json.loads(line) for line in out.splitlines()]


def test_run_json_is_events_and_nothing_else_on_standard_output(
    project: Path, build: Build, rnow_: Run
) -> None:
    build.notes = ["a note from\nthe run \u202e\x1b[31m"]
    code, out, error = rnow_("run", "--json", "data.batch_size=2", "trainer.max_billing=3")
    assert code == 0
    assert "a note from" in error
    events = events_of(out)
    assert [event["event"] for event in events] == [
        "start",
        "stage",
        "warning",
        "note",
        "note",
        "note",
        "finished",
    ]
    assert events[0]["rnow"] == __version__
    assert events[1]["stage"] == "starting"
    assert events[2]["text"].startswith("trainer.max_billing is ignored")
    assert events[3]["text"] == "data.batch_size: 4 (default) -> 2"
    assert events[5]["text"] == build.notes[0]
    assert out.isascii(), "nothing that could control a terminal"
    assert "\x1b" not in out
    assert (events[-1]["summary"], events[-1]["exit_code"]) == ({"steps": 7}, 0)


@pytest.mark.parametrize("flags", [["--json"], ["--json", "--quiet"]])
def test_run_json_says_how_it_failed(
    project: Path, build: Build, rnow_: Run, flags: list[str]
) -> None:
    build.error = ModelError("it does not fit", where="teacher.path", fix="take a smaller one")
    code, out, error = rnow_("run", *flags)
    assert code == 2
    assert "it does not fit" in error
    last = events_of(out)[-1]
    assert (last["event"], last["exit_code"]) == ("failed", 2)
    assert last["where"].startswith("config.yml:")
    assert last["fix"] == "take a smaller one"
    build.error = OSError(errno.EMFILE, "too many open files")
    code, out, _ = rnow_("run", *flags)
    assert (code, events_of(out)[-1]["exit_code"]) == (75, 75)
    (project / "config.yml").write_text("dataset_type: [\n")
    code, out, _ = rnow_("run", *flags)
    assert code == 2
    assert [event["event"] for event in events_of(out)][-1] == "failed"


def test_run_json_holds_no_secret(project: Path, build: Build, rnow_: Run) -> None:
    (project / ".env").write_text('TOKEN="very-se\\"cret"\n')
    build.notes = ['uses very-se"cret']
    out = rnow_("run", "--json")[1]
    assert "cret" not in out.replace("[TOKEN]", "")
    assert "uses [TOKEN]" in out


def test_quiet_is_errors_and_the_result_alone(project: Path, build: Build, rnow_: Run) -> None:
    build.notes = ["a note"]
    code, out, error = rnow_("run", "--quiet", "trainer.max_billing=3", "-b", "2")
    assert (code, error) == (0, "")
    assert out == "run: 7 steps; no adapter\n"
    assert rnow_("run", "-q", "--json")[2] == ""
    build.error = InputError("not here")
    code, out, error = rnow_("run", "-q")
    assert (code, out) == (2, "")
    assert "not here" in error


@pytest.mark.parametrize("command", [["check"], ["run", "--debug"]])
def test_check(project: Path, build: Build, rnow_: Run, command: list[str]) -> None:
    code, out, _ = rnow_(*command)
    assert code == 0
    assert out.startswith("resolved config:\n")
    assert out.rstrip().endswith("plan for student")
    assert "    learning_rate: 0.0001\n" in out
    code, out, _ = rnow_(*command, "--json", "model.path=x")
    assert code == 0
    shown = json.loads(out)
    assert (shown["model"], shown["lr"]) == ("x", 1e-4)
    assert shown["config"]["teacher"]["path"] == "teacher"
    assert [call[0] for call in build.calls] == ["check", "check"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_check_redacts_secrets(project: Path, build: Build, rnow_: Run, flags: list[str]) -> None:
    (project / ".env").write_text('TOKEN="very-se\\"cret"\n')
    out = rnow_("check", *flags, 'description=uses very-se"cret here')[1]
    assert "cret here" not in out
    assert "[TOKEN] here" in out


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ([], {"limit": 4, "rows": None, "verbose": False}),
        (["-n", "2", "-v"], {"limit": 2, "rows": None, "verbose": True}),
        (["-e", "0,2,5"], {"limit": None, "rows": (0, 2, 5), "verbose": False}),
        (["--all"], {"limit": None, "rows": None, "verbose": False}),
    ],
)
def test_rehearsal_options(
    project: Path, build: Build, rnow_: Run, arguments: list[str], options: Mapping[str, Any]
) -> None:
    code, _, error = rnow_("test", *arguments, "--model", "m", "rollout.max_tokens=5")
    assert code == 0, error
    what, config, given = build.calls[0]
    assert what == "rehearse"
    assert given == {"folder": Path(), **options}
    assert (config.model.path, config.rollout.max_tokens) == ("m", 5)


def test_a_rehearsal_with_failing_rewards_ends_with_1(
    project: Path, build: Build, rnow_: Run
) -> None:
    build.problem = RnowError("a reward failed", title="Rewards fail", details=["at rewards.py:4"])
    code, _, error = rnow_("test")
    assert code == 1
    assert error.startswith("Rewards fail: a reward failed\n  at rewards.py:4\n")


def test_rehearsal_choices_exclude_each_other(project: Path, build: Build, rnow_: Run) -> None:
    code, _, error = rnow_("test", "-n", "2", "--all")
    assert code == 2
    assert "exclude each other" in error
    assert build.calls == []


def test_parse_rows() -> None:
    assert parse_rows("0,2,5") == (0, 2, 5)
    assert parse_rows(" 3-5 , 1,4") == (3, 4, 5, 1)
    for bad in ("", "a", "1,", "-1", "5-3", "1--2", "²"):
        with pytest.raises(InputError, match="not a list of rows"):
            parse_rows(bad)


def test_an_error_is_a_report_without_traceback(project: Path, build: Build, rnow_: Run) -> None:
    build.error = DataError(
        "line 3 is not JSON", where="train.jsonl:3", fix="mend it", details=["{\x1b[2J [bold]x[/]"]
    )
    code, out, error = rnow_("run")
    assert code == 2
    assert out.endswith("starting ...\n")
    assert out.count("\n") == 1
    assert error == (
        "Invalid training data: line 3 is not JSON\n"
        "  {\\x1b[2J [bold]x[/]\n"
        "  where: train.jsonl:3\n"
        "  fix: mend it\n"
    )


def test_an_error_at_a_key_gets_its_line(project: Path, build: Build, rnow_: Run) -> None:
    for arguments, place in (
        (["run"], "config.yml:8"),
        (["check"], "config.yml:8"),
        (["run", "teacher.path=x"], "command line"),
    ):
        build.error = ModelError("no such teacher", where="teacher.path")
        assert f"where: {place} (teacher.path)\n" in rnow_(*arguments)[2]
    build.error = ModelError("bad row", where="train.jsonl")
    assert "where: train.jsonl\n" in rnow_("run")[2]


def test_a_temporary_error_ends_with_75(project: Path, build: Build, rnow_: Run) -> None:
    build.error = TemporaryError("disk full")
    assert rnow_("run")[0] == 75


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("fault", "expected", "words"),
    [
        (OSError(errno.EMFILE, "Too many open files"), 75, "ulimit -n"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 75, "ulimit -u"),
        (RuntimeError("can't start new thread"), 75, "ulimit -u"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 75, "no more memory"),
        (MemoryError(), 75, "why: MemoryError"),
        (RuntimeError("[enforce] DefaultCPUAllocator: no\n#1 frame"), 75, "Allocator: no\n  fix"),
        (ImportError("libx.so: failed to map segment from shared object"), 75, "rnow check"),
        (OSError(errno.ENOSPC, "No space left on device", "/full/evals"), 75, "where: /full/evals"),
        (OSError(errno.ENOSPC, "No space left on device"), 75, "free some space"),
        (FileNotFoundError(errno.ENOENT, "No such file"), 2, "working directory is gone"),
        (PermissionError(errno.EACCES, "Permission denied", "/far/file"), 2, "where: /far/file"),
    ],
)
def test_what_the_system_refuses_is_no_fault_of_the_program(
    build: Build, rnow_: Run, fault: Exception, expected: int, words: str
) -> None:
    build.error = fault
    code, _, error = rnow_("run")
    assert code == expected
    assert "Traceback" not in error
    assert words in error


@pytest.mark.usefixtures("project")
def test_a_library_that_may_not_be_loaded_is_no_lack_of_memory(build: Build, rnow_: Run) -> None:
    build.error = ImportError(
        "libx.so: failed to map segment from shared object: Operation not permitted"
    )
    assert "Traceback" in rnow_("run")[2]


def test_a_fault_of_the_program_shows_its_traceback(
    project: Path, build: Build, rnow_: Run
) -> None:
    build.error = ZeroDivisionError("oops")
    code, _, error = rnow_("run")
    assert code == 1
    assert "Traceback" in error
    assert "ZeroDivisionError: oops" in error
    assert "fault in rnow itself" in error


def test_ctrl_c_ends_with_130(project: Path, build: Build, rnow_: Run) -> None:
    build.error = KeyboardInterrupt()
    assert rnow_("run")[0] == 130


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--no-such-option"], "No such option"),
        (["dance"], "No such command"),
        (["run", "x"], "is not an override"),
        (["run", "--epochs", "many"], "trainer.num_epochs"),
        (["run", "-d", "nowhere"], "nowhere"),
    ],
)
def test_bad_usage_ends_with_2(
    project: Path, build: Build, rnow_: Run, arguments: list[str], text: str
) -> None:
    code, out, error = rnow_(*arguments)
    assert code == 2
    assert text in out + error
    assert "Traceback" not in error
    assert build.calls == []


@pytest.mark.parametrize(
    "command", [["login"], ["login", "--force"], ["logout"], ["orgs"], ["orgs", "org_1"]]
)
def test_accounts_are_not_needed(rnow_: Run, command: list[str]) -> None:
    code, out, error = rnow_(*command)
    assert (code, error) == (0, "")
    assert len(out.splitlines()) == 1
    assert "no account" in out


def test_version(rnow_: Run) -> None:
    assert rnow_("--version")[:2] == (0, f"rnow {__version__} (rnow-local)\n")


def test_the_hosted_client_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rnow_: Run
) -> None:
    assert hosted.hosted_client_note() is None
    info = tmp_path / "rnow-0.4.37.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rnow\nVersion: 0.4.37\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    code, _, error = rnow_("login")
    assert code == 0
    assert len(error.splitlines()) == 1
    assert "hosted client (rnow 0.4.37)" in error
    assert rnow_("--help")[2] == ""
    assert rnow_("--version")[2] == ""


# -- init ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_init_writes_here_and_says_what_next(empty: Path, rnow_: Run) -> None:
    code, out, error = rnow_("init", "-t", "distill", "-n", "mine")
    assert code == 0, error
    assert "project_name: mine\n" in (empty / "config.yml").read_text()
    assert "wrote config.yml" in out
    assert "rnow run" in out
    assert "cd " not in out
    code, out, _ = rnow_("init", "-t", "distill", "-n", "mine", "-y")
    assert code == 0
    assert "kept your config.yml" in out


def test_init_writes_what_tells_editors_of_the_keys(empty: Path, rnow_: Run) -> None:
    assert "wrote .config.schema.json" in rnow_("init", "-t", "distill")[1]
    first = (empty / "config.yml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=.config.schema.json"
    schema = empty / ".config.schema.json"
    assert schema.read_text() == rnow_("schema")[1]
    schema.write_text(schema.read_text().replace("The student", "An older student"))
    assert "wrote .config.schema.json" in rnow_("init", "-t", "distill", "-y")[1], "renewed"
    assert "An older student" not in schema.read_text()
    schema.write_text("{}")  # the user's own
    assert ".config.schema.json" not in rnow_("init", "-t", "distill", "-y")[1]
    assert schema.read_text() == "{}"


def test_init_into_another_folder_names_it(empty: Path, rnow_: Run) -> None:
    code, out, _ = rnow_("init", "-t", "distill", "--dir", "a b/c")
    assert code == 0
    assert (empty / "a b" / "c" / "train.jsonl").is_file()
    assert "cd 'a b/c'" in out


def test_init_refuses_without_a_terminal(empty: Path, rnow_: Run) -> None:
    (empty / "config.yml").write_text("mine\n")
    (empty / "train.jsonl").write_text("mine\n")
    code, out, error = rnow_("init", "-t", "distill")
    assert code == 2
    assert out == ""
    assert "  config.yml\n" in error
    assert "  train.jsonl\n" in error
    assert sorted(path.name for path in empty.iterdir()) == ["config.yml", "train.jsonl"]


def test_init_yes_keeps_and_force_overwrites(empty: Path, rnow_: Run) -> None:
    (empty / "config.yml").write_text("mine\n")
    code, out, _ = rnow_("init", "-t", "distill", "-y", "-n", "x")
    assert code == 0
    assert "kept your config.yml" in out
    assert "project_name was not changed" in out
    assert (empty / "config.yml").read_text() == "mine\n"
    assert (empty / "train.jsonl").is_file()
    assert rnow_("init", "-t", "distill", "--force")[0] == 0
    assert "dataset_type" in (empty / "config.yml").read_text()


def test_init_lists_templates(empty: Path, rnow_: Run) -> None:
    code, out, _ = rnow_("init", "--list")
    assert code == 0
    assert "distill  " in out
    assert list(empty.iterdir()) == []


def test_init_unknown_template(empty: Path, rnow_: Run) -> None:
    code, _, error = rnow_("init", "-t", "distil")
    assert code == 2
    assert "use --template distill" in error
    assert list(empty.iterdir()) == []


def test_init_asks_about_each_file_on_a_terminal(empty: Path) -> None:
    (empty / "config.yml").write_text("mine\n")
    (empty / "train.jsonl").write_text("mine\n")
    code, shown = on_a_terminal(["init", "-t", "distill"], answers="y\nn\n", cwd=empty)
    assert code == 0, shown
    assert shown.count("Overwrite it?") == 2
    assert "dataset_type" in (empty / "config.yml").read_text()
    assert (empty / "train.jsonl").read_text() == "mine\n"
    assert (empty / "rewards.py").is_file()


def test_init_interrupted_at_the_question_writes_nothing(empty: Path) -> None:
    (empty / "config.yml").write_text("mine\n")
    code, _ = on_a_terminal(["init", "-t", "distill"], answers="\x04", cwd=empty)
    assert code != 0
    assert [path.name for path in empty.iterdir()] == ["config.yml"]


def on_a_terminal(
    arguments: list[str], *, answers: str, cwd: Path, **settings: str
) -> tuple[int, str]:
    """Run a command on a pseudo-terminal and type the answers. ``settings``: of its environment."""
    left_out = ("NO_COLOR", "FORCE_COLOR", "CI", "GITHUB_ACTIONS")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "rnow", *arguments],
            cwd=cwd,
            env=kept | {"TERM": "xterm-256color"} | settings,
            stdin=slave,
            stdout=slave,
            stderr=slave,
        )
        os.close(slave)
        os.write(master, answers.encode())
        shown = b""
        with contextlib.suppress(OSError):  # the terminal is gone when the process ends
            while piece := os.read(master, 4096):
                shown += piece
        return process.wait(timeout=30), shown.decode()
    finally:
        os.close(master)


def completed(words: str, cwd: Path) -> list[str]:
    """What a shell is told after ``words``."""
    done = subprocess.run(
        [sys.executable, "-m", "rnow"],
        cwd=cwd,
        env=os.environ
        | {
            "_RNOW_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_commands_and_runs(empty: Path) -> None:
    for name in ("tiny", "tiny-2", "other", ".hidden"):
        (empty / "runs" / name).mkdir(parents=True)
    assert completed("rnow doc", empty) == ["doctor"]
    assert completed("rnow logs ti", empty) == ["tiny", "tiny-2"]
    assert completed("rnow run --qui", empty) == ["--quiet"]


@pytest.mark.parametrize("settings", [{}, {"NO_COLOR": "1"}])
def test_no_color_is_no_color(empty: Path, settings: dict[str, str]) -> None:
    """On a terminal, of errors and of help."""
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-79]|4[0-79]|9[0-7]|10[0-7]|38;|48;)[0-9;]*m")
    shown = ""
    for arguments in (["run"], ["--help"]):
        shown += on_a_terminal(arguments, answers="", cwd=empty, **settings)[1]
    assert "no config.yml here" in shown
    assert bool(colour.search(shown)) is not bool(settings)


@pytest.mark.parametrize("verb", ["deploy"])
def test_verbs_of_the_hosted_client_answer_in_one_line(rnow_: Run, verb: str) -> None:
    code, out, err = rnow_(verb, "some-run", "--force")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert f"rnow {verb} is not in this version" in err


@pytest.mark.parametrize(
    ("word", "meant"), [("bogus", None), ("orgz", "orgs"), ("tset", "test"), ("chek", "check")]
)
def test_a_command_is_suggested_only_when_it_is_close(
    rnow_: Run, word: str, meant: str | None
) -> None:
    code, _, err = rnow_(word)
    assert code == 2
    assert (f"did you mean rnow {meant}?" in err) if meant else ("did you mean" not in err)


def test_entries_add_up(project: Path, build: Build, rnow_: Run) -> None:
    assert rnow_("test", "-e", "0", "-e", "2,3")[0] == 0
    assert build.calls[-1][2]["rows"] == (0, 2, 3)


@pytest.mark.parametrize("command", [["check"], ["run"], ["test"]])
def test_a_file_is_no_project_folder(
    project: Path, build: Build, rnow_: Run, command: list[str]
) -> None:
    code, _, err = rnow_(*command, "-d", "config.yml")
    assert code == 2
    assert "config.yml is a file" in err
    assert not build.calls


def test_init_says_what_the_hosted_d_means(empty: Path, rnow_: Run) -> None:
    code, _, err = rnow_("init", "-t", "distill", "-d", "train")
    assert code == 0
    assert "--dir train" in err
    assert (empty / "config.yml").is_file()


def test_the_config_that_differs_comes_first(project: Path, build: Build, rnow_: Run) -> None:
    out = rnow_("check", "trainer.learning_rate=3e-5")[1]
    changed, rest = out.split("and at the defaults:")
    assert "learning_rate: 3.0e-05" in changed
    assert "num_epochs" not in changed
    assert "num_epochs: 1" in rest


def test_nothing_secret_of_a_broken_config_is_printed(project: Path, rnow_: Run) -> None:
    (project / ".env").write_text("TOKEN=hush-hush-1\n")
    with (project / "config.yml").open("a") as file:
        file.write(
            "description: hush-hush-1 [\nsampler: {url: 'http://ann:pass-word@h', urll: 1}\n"
        )
    code, out, err = rnow_("check")
    assert code == 2
    assert "hush-hush-1" not in out + err
    assert "pass-word" not in out + err
