"""What importing the package costs: names come lazily, and the light commands load nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TRACKERS = ("wandb", "tensorboard", "mlflow", "trackio")
HEAVY = ("torch", "transformers", "peft", "vllm", "bitsandbytes", "datasets", *TRACKERS)
NOT_FOR_HELP = (*HEAVY, "pydantic", "yaml", "numpy")


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def loaded_after(arguments: list[str], cwd: Path) -> tuple[int, set[str], str]:
    """Exit code of a command, the top-level modules it loaded, and what it wrote to standard error."""
    done = run_python(
        f"""
        import json, sys
        from rnow.cli.main import run_command_line
        code = run_command_line({arguments!r})
        names = sorted({{name.partition(".")[0] for name in sys.modules}})
        print("\\n" + json.dumps([code, names]))
        """,
        cwd,
    )
    assert done.returncode == 0, done.stderr
    code, names = json.loads(done.stdout.splitlines()[-1])
    return code, set(names), done.stderr


def test_import_rnow_loads_only_itself(tmp_path: Path) -> None:
    done = run_python(
        "import sys, rnow; print([n for n in sys.modules if n.startswith('rnow')])", tmp_path
    )
    assert done.stdout.strip() == "['rnow']", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_loads_nothing_it_does_not_show(tmp_path: Path, arguments: list[str]) -> None:
    code, modules, _ = loaded_after(arguments, tmp_path)
    assert code == 0
    assert not modules.intersection(NOT_FOR_HELP)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--help"],
        ["rollouts", "--help"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["serve", "--help"],
        ["report", "--help"],
        ["compare", "--help"],
        ["study", "--help"],
        ["track", "--help"],
        ["export", "--help"],
        ["init", "-y", "-t", "distill"],
        ["init", "--list"],
        ["login"],
        ["status"],
        ["runs", "clean"],
        ["schema"],
        ["doctor", "--help"],
    ],
)
def test_light_commands_load_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    code, modules, error = loaded_after(arguments, tmp_path)
    assert code == 0, error
    assert not modules.intersection(HEAVY)


def test_names_that_hosted_files_import_from_models_cost_no_model_library(tmp_path: Path) -> None:
    done = run_python(
        """
        import sys
        from rnow.models import RewardArgs, ToolArgs, get_response
        import rnow.core
        assert RewardArgs is rnow.core.RewardArgs
        assert ToolArgs is rnow.core.ToolArgs
        assert get_response is rnow.core.get_response
        print(sorted({name.partition(".")[0] for name in sys.modules}))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY).intersection(json.loads(done.stdout.replace("'", '"')))


@pytest.mark.parametrize("command", [["run"], ["check"], ["check", "--json"], ["run", "--debug"]])
def test_config_error_loads_nothing_heavy(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "config.yml").write_text("dataset_type: distill\ntrainer:\n  lr: 1e-4\n")
    code, modules, error = loaded_after(command, tmp_path)
    assert code == 2
    assert "Traceback" not in error
    assert "learning_rate" in error
    assert not modules.intersection(HEAVY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yml"]


@pytest.mark.parametrize(
    "order",
    [
        "from rnow import run",
        "import rnow.setup.build; from rnow import run",
        "import rnow.setup; from rnow import run",
        "import rnow.display.terminal; from rnow import run",
        "import rnow; run = rnow.run; from rnow.setup import build",
    ],
)
def test_run_is_a_plain_function_in_any_order(tmp_path: Path, order: str) -> None:
    done = run_python(
        f"""
        {order}
        import inspect, types
        import rnow, rnow.setup.build
        assert run is rnow.run is rnow.setup.build.run
        assert type(run) is types.FunctionType
        assert list(inspect.signature(run).parameters) == ["config", "folder", "fresh", "display"]
        print("ok")
        """,
        tmp_path,
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_unknown_names_are_attribute_errors(tmp_path: Path) -> None:
    import rnow

    with pytest.raises(AttributeError, match="no attribute 'train'"):
        rnow.train  # noqa: B018
    assert {"Config", "run", "load_teacher", "__version__"} <= set(dir(rnow))


def test_config_is_reached_through_the_package() -> None:
    import rnow
    from rnow.config import Config

    assert rnow.Config is Config
