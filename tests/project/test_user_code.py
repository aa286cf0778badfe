"""Loading rewards.py: what is found, what is refused with its line, and that projects do not leak into each other."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from pathlib import Path

import pytest

from rnow.errors import InputError
from rnow.project.user_code import load_rewards
from rnow.usercode.host import CodeHost

ROOT = Path(__file__).resolve().parents[2]
HEAD = "from rnow.core import reward, RewardArgs\n"


def write(folder: Path, code: str, name: str = "rewards.py") -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(textwrap.dedent(code))


def value_of(folder: Path, name: str) -> float:
    """What a reward gives for an empty conversation."""
    info = load_rewards(folder)[name]
    with CodeHost(info.file, "rewards") as host:
        outcome = asyncio.run(host.call(name, {"messages": []}, timeout=20))
    assert outcome.error is None
    return outcome.value


def refused(folder: Path, code: str) -> InputError:
    write(folder, code)
    with pytest.raises(InputError) as caught:
        load_rewards(folder)
    assert caught.value.exit_code == 2
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return caught.value


def test_no_file_means_no_rewards(tmp_path: Path) -> None:
    assert load_rewards(tmp_path) == {}


def test_rewards_by_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        HEAD
        + """
@reward
def plain(args, messages):
    return helper()

@reward(precondition=True, timeout=3)
async def gate(args: RewardArgs, messages: list, strict: bool = True) -> float:
    return 1.0

def helper():
    return 0.5
""",
    )
    rewards = load_rewards(tmp_path)
    assert list(rewards) == ["plain", "gate"]
    assert value_of(tmp_path, "plain") == 0.5
    assert (rewards["gate"].precondition, rewards["gate"].timeout) == (True, 3.0)
    assert (rewards["gate"].is_async, rewards["gate"].place) == (True, "rewards.py:7")


def test_a_path_with_spaces_and_dots(tmp_path: Path) -> None:
    folder = tmp_path / "my project v1.0"
    write(folder, HEAD + "@reward\ndef f(args, messages): return 1.0\n")
    assert list(load_rewards(folder)) == ["f"]


def test_rewards_of_a_helper_and_of_a_factory_count(tmp_path: Path) -> None:
    write(tmp_path, HEAD + "@reward\ndef shared(args, messages): return 1.0\n", "scoring.py")
    write(
        tmp_path,
        HEAD
        + """
import scoring

def make(name):
    def f(args, messages):
        return 0.0
    f.__name__ = name
    reward(f)

make("a")
make("b")
""",
    )
    assert sorted(load_rewards(tmp_path)) == ["a", "b", "shared"]


def test_two_projects_with_helpers_of_one_name(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        write(tmp_path / name, f"VALUE = {value}\n", "helpers.py")
        write(
            tmp_path / name,
            HEAD + f"import helpers\n@reward\ndef {name}(args, messages): return helpers.VALUE\n",
        )
    one, two = load_rewards(tmp_path / "one"), load_rewards(tmp_path / "two")
    assert (list(one), list(two)) == (["one"], ["two"])
    assert value_of(tmp_path / "one", "one") == 1.0
    assert value_of(tmp_path / "two", "two") == 2.0


def test_nothing_of_it_is_imported_here(tmp_path: Path) -> None:
    (tmp_path / "pkg_of_user").mkdir()
    (tmp_path / "pkg_of_user" / "inner.py").write_text("X = 1\n")
    write(tmp_path, "X = 2\n", "wandb.py")
    write(
        tmp_path,
        HEAD
        + "import wandb\nfrom pkg_of_user import inner\n@reward\ndef f(args, messages): return wandb.X + inner.X\n",
    )
    modules, path = set(sys.modules), list(sys.path)
    assert value_of(tmp_path, "f") == 3
    assert not {"wandb", "rewards", "pkg_of_user"} & (set(sys.modules) - modules)
    assert sys.path == path


def test_imports_inside_functions_still_work(tmp_path: Path) -> None:
    write(tmp_path, "X = 5.0\n", "lazy_helper_of_user.py")
    write(
        tmp_path,
        HEAD
        + "@reward\ndef f(args, messages):\n    import lazy_helper_of_user as h\n    return h.X\n",
    )
    assert value_of(tmp_path, "f") == 5.0


def test_secrets_that_it_names_are_there_while_it_is_imported(tmp_path: Path) -> None:
    write(
        tmp_path,
        HEAD
        + "import os\nKEY = os.environ['MY_KEY']\n@reward\ndef f(args, messages): return 1.0\n",
    )
    assert list(load_rewards(tmp_path, secrets={"MY_KEY": "sk-1"})) == ["f"]
    with pytest.raises(InputError, match="cannot be imported"):
        load_rewards(tmp_path)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for name in ("first", "other"):
        write(tmp_path, HEAD + f"@reward\ndef {name}(args, messages): return 1.0\n")
        assert list(load_rewards(tmp_path)) == [name]


def test_noise_is_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, HEAD + "print('loading')\n@reward\ndef f(args, messages): return 1.0\n")
    load_rewards(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("code", "message", "where", "why"),
    [
        ("x = 1\ndef f(:\n", "rewards.py is not valid Python", "rewards.py:2", "SyntaxError"),
        (
            "\nimport no_such_package_anywhere.sub\n",
            'imports "no_such_package_anywhere", which is not installed',
            "rewards.py:2",
            "ModuleNotFoundError: No module named 'no_such_package_anywhere'",
        ),
        (
            "from rnow.core import rewrad\n",
            "rewards.py cannot be imported",
            "rewards.py:1",
            "ImportError: cannot import name 'rewrad'",
        ),
        (
            "def f():\n    return 1 / 0\n\nf()\n",
            "rewards.py cannot be imported",
            "rewards.py:2",
            "ZeroDivisionError: division by zero",
        ),
        ("import sys\nsys.exit(3)\n", "ends the program", "rewards.py:2", "SystemExit: 3"),
        (
            HEAD + "@reward(precondtion=True)\ndef f(args, messages): return 1.0\n",
            "rewards.py cannot be imported",
            "rewards.py:2",
            "unexpected keyword argument 'precondtion'",
        ),
        (
            HEAD + "@reward(timeout=-1)\ndef f(args, messages): return 1.0\n",
            "rewards.py cannot be imported",
            "rewards.py:2",
            "timeout must be a positive number",
        ),
        (
            "raise ValueError('\\x1b[2Jgone')\n",
            "cannot be imported",
            "rewards.py:1",
            "\\x1b[2Jgone",
        ),
    ],
)
def test_what_cannot_be_imported(
    tmp_path: Path, code: str, message: str, where: str, why: str
) -> None:
    error = refused(tmp_path, code)
    assert message in error.message
    assert error.where == where
    assert error.why is not None
    assert why in error.why
    assert error.fix
    assert error.title == "Invalid rewards"


def test_a_fault_in_a_helper_is_shown_there(tmp_path: Path) -> None:
    write(tmp_path, "\n\nraise RuntimeError('broken')\n", "scoring.py")
    error = refused(tmp_path, "import scoring\n")
    assert error.where == "scoring.py:3"
    assert "scoring" not in sys.modules


def test_requirements_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("no_such_package_anywhere\n")
    error = refused(tmp_path, "import no_such_package_anywhere\n")
    assert error.fix is not None
    assert error.fix == f"{sys.executable} -m pip install -r {tmp_path / 'requirements.txt'}"


@pytest.mark.parametrize(
    ("imports", "requirements", "package"),
    [
        ("import no_such_package_anywhere.sub", None, "no_such_package_anywhere"),
        ("import no_such_package_anywhere", "other==1\n# no-such-package-anywhere\n", "no_such_package_anywhere"),
        ("raise ModuleNotFoundError('gone', name='sklearn.svm')", "sklearns", "scikit-learn"),
        ("raise ModuleNotFoundError('gone', name='PIL')", None, "pillow"),
        ("raise ModuleNotFoundError('gone', name='crawl4ai')", None, f"-c {ROOT / 'constraints-agents.txt'} '{ROOT}[agents]'"),
        ("raise ModuleNotFoundError('gone', name='yaml')", "requests\n PyYAML>=6 # config\n", None),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_as_pip_names_it_and_with_the_python_to_install_it_for(
    tmp_path: Path, imports: str, requirements: str | None, package: str | None
) -> None:
    file = tmp_path / "requirements.txt"
    if requirements is not None:
        file.write_text(requirements)
    error = refused(tmp_path, f"{imports}\n")
    assert "which is not installed" in error.message
    assert error.where == "rewards.py:1"
    expected = f"-r {file}" if package is None else package
    assert error.fix == f"{sys.executable} -m pip install {expected}"


def test_the_fix_of_an_error_of_ours_is_not_lost(tmp_path: Path) -> None:
    code = (
        "from rnow.errors import InputError\n"
        "try:\n"
        "    raise InputError('no browser', fix='apt-get install chromium', why='none found')\n"
        "except InputError as error:\n"
        "    error.add_note('seen on this machine')\n"
        "    raise\n"
    )
    error = refused(tmp_path, code)
    assert error.fix == "apt-get install chromium"
    assert error.where == "rewards.py:3"
    assert "no browser" in (error.why or "")
    assert "seen on this machine" in (error.why or "")


@pytest.mark.parametrize(
    ("signature", "accepted"),
    [
        ("def f(args, messages)", True),
        ("def f(*anything)", True),
        ("def f(args, messages, k=1, *, j=2)", True),
        ("def f(messages)", False),
        ("def f()", False),
        ("def f(args, messages, expected)", False),
        ("async def f(args, messages, *, expected)", False),
    ],
)
def test_parameters(tmp_path: Path, signature: str, accepted: bool) -> None:
    code = HEAD + f"\n@reward\n{signature}:\n    return 1.0\n"
    if accepted:
        write(tmp_path, code)
        assert list(load_rewards(tmp_path)) == ["f"]
        return
    error = refused(tmp_path, code)
    assert error.message == 'the reward "f" cannot be called with (args, messages)'
    assert error.where == "rewards.py:3"
    assert error.fix == "write it as def f(args: RewardArgs, messages: list) -> float"


def test_generators_are_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, HEAD + "@reward\ndef f(args, messages):\n    yield 1.0\n")
    assert (error.message, error.where) == ('the reward "f" yields', "rewards.py:2")


def test_two_rewards_of_one_name(tmp_path: Path) -> None:
    one = "@reward\ndef f(args, messages): return 1.0\n"
    error = refused(tmp_path, HEAD + one + one)
    assert error.message == 'two rewards are named "f"'
    assert error.where == "rewards.py:2 and rewards.py:4"


def test_sandbox_is_read(tmp_path: Path) -> None:
    write(tmp_path, HEAD + "@reward(sandbox=True)\ndef f(args, messages): return 1.0\n")
    assert load_rewards(tmp_path)["f"].sandbox


@pytest.mark.parametrize("name", ["mean", "failure_fraction"])
def test_names_of_other_metrics_are_refused(tmp_path: Path, name: str) -> None:
    error = refused(tmp_path, HEAD + f"@reward\ndef {name}(args, messages): return 1.0\n")
    assert error.where == "rewards.py:2"
    assert f'cannot be named "{name}"' in error.message
