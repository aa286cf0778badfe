"""What of our environment and of the project's secrets reaches the user's code, and that no secret gets out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.usercode.projects import call, make_host, write

from rnow.errors import InputError
from rnow.text.redact import Redactor
from rnow.usercode.environment import (
    base_environment,
    declared,
    hidden_values,
    source_files,
    words_of,
)
from rnow.usercode.log import LIMIT, OutputLog

CANARY = "sk-canary-5f2b81c0"
SECRETS = {"USED_KEY": CANARY, "OTHER_KEY": "sk-other-91ab"}
LOOK = """
import json, os, subprocess, sys
import helper

@tool
def environment() -> str:
    '''Show it.'''
    return json.dumps(dict(os.environ))

@tool
def child() -> str:
    '''Show a child's.'''
    return subprocess.run(["env"], capture_output=True, text=True).stdout

@tool
def leak(how: str) -> str:
    '''Let the key out.'''
    key = os.environ["USED_KEY"]
    print("printed", key, file=sys.stderr)
    os.write(1, b"half " + key[:7].encode()); os.write(1, key[7:].encode() + b" whole")
    if how == "raise": raise ValueError("refused " + key)
    return "it is " + key
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_TOKEN", "hf_never")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "never")
    monkeypatch.setenv("SHELL_KEY", "exported")
    monkeypatch.setenv("LC_TIME", "C")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter22@proxy:1")
    write(tmp_path, "# reads SHELL_KEY\n", "helper.py")
    return tmp_path


def test_code_gets_what_it_names(folder: Path) -> None:
    with make_host(folder, LOOK, secrets=SECRETS, env={"EXTRA": "1"}) as host:
        outcome = call(host, "environment")
        seen = json.loads(outcome.value)
    # The names arrive; the values of secrets are taken out of what comes back.
    assert seen["USED_KEY"] == "[USED_KEY]"
    assert seen["SHELL_KEY"] == "[SHELL_KEY]"
    assert seen["EXTRA"] == "1"
    assert seen["LC_TIME"] == "C"
    assert {"PATH", "HTTPS_PROXY", "OMP_NUM_THREADS"} <= set(seen)
    assert "hunter22" not in outcome.value
    assert not {"OTHER_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HF_HUB_OFFLINE"} & set(seen)


def test_children_of_the_code_get_the_same(folder: Path) -> None:
    with make_host(folder, LOOK, secrets=SECRETS) as host:
        seen = call(host, "child").value
    assert "USED_KEY=[USED_KEY]" in seen
    assert "OTHER_KEY" not in seen
    assert "HF_TOKEN" not in seen


def test_a_canary_is_nowhere(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = folder / "runs" / "x"
    with make_host(folder, LOOK, secrets=SECRETS, log=out / "tools.log") as host:
        fine, raised = call(host, "leak", how="return"), call(host, "leak", how="raise")
    assert fine.value == "it is [USED_KEY]"
    assert raised.error == "ValueError: refused [USED_KEY]"
    assert raised.detail is not None
    assert "refused [USED_KEY]" in raised.detail
    assert CANARY not in repr((fine, raised))
    text = (out / "tools.log").read_text()
    assert "printed [USED_KEY]" in text
    assert "half [USED_KEY] whole" in text
    assert CANARY not in text
    assert not any(CANARY in path.read_text() for path in out.rglob("*") if path.is_file())
    assert capfd.readouterr() == ("", "")


def test_a_canary_in_an_import_error(folder: Path) -> None:
    code = "import os\nraise ValueError('refused ' + os.environ['USED_KEY'])\n"
    with pytest.raises(InputError) as caught:
        make_host(folder, code, secrets=SECRETS).start()
    assert CANARY not in caught.value.render()
    assert "refused [USED_KEY]" in caught.value.render()


def test_no_secret_is_on_a_command_line_or_in_our_environment(folder: Path) -> None:
    with make_host(folder, LOOK, secrets=SECRETS) as host:
        call(host, "environment")
        for pid in host.pids():
            proc = Path("/proc") / str(pid)
            assert CANARY.encode() not in (proc / "cmdline").read_bytes()
            assert CANARY.encode() not in (proc / "environ").read_bytes()


def test_rewards_get_the_secrets_they_name(tmp_path: Path) -> None:
    code = """
    @reward
    def f(args, messages):
        return float(dict(args.secrets) == {"USED_KEY": "sk-canary-5f2b81c0"})
    """
    with make_host(tmp_path, code, "rewards", secrets=SECRETS) as host:
        outcome = asyncio.run(host.call("f", {"messages": []}, timeout=10))
    assert outcome.value == 1.0


def test_the_judge_names_what_it_reads() -> None:
    available = {"OPENAI_API_KEY": "a", "OPENAI_MODEL": "b", "OTHER": "c"}
    assert declared(available, {"llm_judge"}) == {"OPENAI_API_KEY": "a", "OPENAI_MODEL": "b"}
    assert declared(available, {"OPENAI_MODEL"}) == {"OPENAI_MODEL": "b"}
    assert declared(available, {"OPENAI_API_KEYS"}) == {}


def test_the_files_that_count(tmp_path: Path) -> None:
    for name, text in {
        "tools.py": "import a\nfrom pack import inner\ndef f():\n    from lazy import x\nimport json",
        "a.py": "import b.c as d, tools",
        "b/__init__.py": "",
        "b/c.py": "from . import e\nfrom .. import nothing",
        "b/e.py": "E_KEY",
        "pack/__init__.py": "P_KEY",
        "pack/inner.py": "from .deep.leaf import X",
        "pack/deep/leaf.py": "def broken(:\n LEAF_KEY",
        "lazy.py": "L_KEY",
        "rewards.py": "R_KEY",
        "convert.py": "C_KEY",
        "json.py": "SHADOW_KEY",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = {str(path.relative_to(tmp_path)) for path in source_files(tmp_path / "tools.py")}
    assert found == {
        "tools.py", "a.py", "b/__init__.py", "b/c.py", "b/e.py", "pack/__init__.py", "pack/inner.py",
        "pack/deep/leaf.py", "lazy.py", "json.py",
    }  # fmt: skip
    words = words_of(tmp_path / "tools.py")
    assert {"E_KEY", "P_KEY", "L_KEY", "LEAF_KEY"} <= words
    assert not {"R_KEY", "C_KEY"} & words


def test_numeric_libraries_get_one_thread_unless_told() -> None:
    assert base_environment({})["OMP_NUM_THREADS"] == "1"
    assert base_environment({"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


def test_what_is_hidden_beside_the_secrets() -> None:
    environ = {
        "MY_TOKEN": "t0ken",
        "PATH": "/bin",
        "https_proxy": "http://u:pass@h:1",
        "http_proxy": "http://h:1",
        "NO_PROXY": "[::bad",
        "EMPTY_KEY": "",
    }
    assert hidden_values(environ) == {"MY_TOKEN": "t0ken", "https_proxy": "pass"}


@given(st.lists(st.text(alphabet="abcé [X]\n", max_size=12)), st.integers(1, 7))
def test_no_way_of_cutting_lets_a_secret_into_the_log(parts: list[str], size: int) -> None:
    import tempfile

    secrets: Mapping[str, str] = {"X": "abcab", "Y": "ébbé\nc"}
    raw = "".join([*parts, "abcab", *parts, "ébbé\nc", *parts]).encode()
    with tempfile.TemporaryDirectory() as folder:
        log = OutputLog(Path(folder) / "x.log", Redactor(secrets))
        for start in range(0, len(raw), size):
            log.write(raw[start : start + size])
        log.close()
        text = (Path(folder) / "x.log").read_text()
    assert not any(value in text for value in secrets.values())
    assert text.count("[") >= 2


def test_a_full_log_is_begun_anew_by_the_next_host(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    for _ in range(2):
        log = OutputLog(path, Redactor())
        for _ in range(40):
            log.write(b"x" * 65536)
        log.close()
        assert LIMIT < path.stat().st_size < LIMIT + 100
        assert path.read_text().endswith("this log is full, the rest is left out ...\n")
    log = OutputLog(path, Redactor())
    log.write(b"new\n")
    log.close()
    assert path.read_text() == "new\n"
    log = OutputLog(path, Redactor())
    log.write(b"more\n")
    log.close()
    assert path.read_text() == "new\nmore\n"


def test_a_log_that_cannot_be_written_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = OutputLog(tmp_path / "file" / "x.log", Redactor())
    log.write(b"x")
    log.close()
