"""`rnow status`, `stop`, `logs`, `runs clean` and `download`, on run folders and on processes that work in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rnow.cli import status
from rnow.cli.main import run_command_line

WORKER = """
import signal, sys, time
from pathlib import Path
from rnow.disk.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
asked = []
signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
with run.lock(steps=10):
    print("locked", flush=True)
    while not (asked and sys.argv[2] == "listens"):
        time.sleep(0.01)
    time.sleep(0.2)  # it saves
"""
NOBODY = 1 << 22
"""No process has this number."""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rnow_(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run_command_line(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


def make_run(runs: Path, name: str, *, steps: int = 0, finished: bool = False) -> Path:
    run = runs / name
    (run / "checkpoints").mkdir(parents=True)
    rows = [{"step": n, "teacher_kl": 1 / n, "time/step": 2.0} for n in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    who = {"pid": NOBODY, "host": socket.gethostname(), "started": 1.0, "steps": 10}
    (run / "process.json").write_text(json.dumps(who))
    if steps:
        (run / "checkpoints" / f"step-{steps:06d}").mkdir()
    if finished:
        (run / "summary.json").write_text(json.dumps({"steps": steps}))
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return run


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def begin(run: Path, manner: str = "listens") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(run), manner], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_status_lists_what_works_first(runs: Path, rnow_: Run, start: Start) -> None:
    make_run(runs, "done", steps=10, finished=True)
    process = start(make_run(runs, "busy", steps=4))
    make_run(runs, "new\x1b[31m")
    code, out, _ = rnow_("status")
    assert code == 0
    rows = [line.split() for line in out.splitlines()[2:]]
    assert rows[0] == ["busy", "running", "4/10", "0.250", "0:12", str(process.pid)]
    rest = {row[0]: row[1:3] for row in rows[1:]}
    assert rest == {"done": ["finished", "10/10"], "new\\x1b[31m": ["stopped", "0/10"]}
    found = json.loads(rnow_("status", "--json")[1])["runs"]
    assert (found[0]["name"], found[0]["state"]) == ("busy", "running")
    assert found[0]["seconds_left"] == 12.0
    only = json.loads(rnow_("status", "runs/done", "--json")[1])["runs"]
    assert [run["name"] for run in only] == ["done"]
    assert rnow_("runs")[1].splitlines()[2].startswith("busy")


def test_status_without_runs(runs: Path, rnow_: Run) -> None:
    code, out, _ = rnow_("status")
    assert (code, out) == (0, "no runs in runs yet: rnow run begins one\n")
    assert json.loads(rnow_("status", "--json")[1]) == {"runs": []}
    code, _, err = rnow_("status", "nothing")
    assert code == 2
    assert "there is no run 'nothing'" in err


@pytest.mark.parametrize("named", [["busy"], [], ["busy", "-y", "--save-model"]])
def test_stop_interrupts_and_waits(runs: Path, rnow_: Run, start: Start, named: list[str]) -> None:
    make_run(runs, "done", steps=10, finished=True)
    process = start(make_run(runs, "busy", steps=4))
    code, out, err = rnow_("stop", *named)
    assert code == 0, err
    assert out == "busy is stopped, its state saved, after step 4\n"
    assert f"stopping busy (process {process.pid})" in err
    assert process.wait(timeout=10) == 0


def test_stop_when_there_is_nothing_to_stop(runs: Path, rnow_: Run) -> None:
    make_run(runs, "done", steps=10, finished=True)
    code, _, err = rnow_("stop", "done")
    assert (code, err) == (0, "done is not running (finished, after step 10)\n")
    code, _, err = rnow_("stop")
    assert code == 2
    assert "no run is running here" in err
    who = {"pid": NOBODY, "host": "elsewhere.example", "steps": 10}
    (make_run(runs, "far", steps=2) / "process.json").write_text(json.dumps(who))
    assert "started on elsewhere.example: stop it there" in rnow_("stop", "far")[2]


def test_stop_asks_which_of_several(runs: Path, rnow_: Run, start: Start) -> None:
    for name in ("a", "b"):
        start(make_run(runs, name, steps=1))
    code, _, err = rnow_("stop")
    assert code == 2
    assert "2 runs are running: say which" in err
    assert "fix: rnow stop a" in err


def test_stop_of_a_run_that_does_not_listen(
    runs: Path, rnow_: Run, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(make_run(runs, "busy", steps=4), "deaf")
    monkeypatch.setattr(status, "STOP_SECONDS", 0.3)
    code, _, err = rnow_("stop", "busy")
    assert code == 1
    assert f"kill -KILL {process.pid}" in err
    assert process.poll() is None


def test_stop_twice_is_no_second_signal(
    runs: Path, rnow_: Run, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would end it at once, its state not saved."""
    process = start(make_run(runs, "busy", steps=4), "deaf")
    monkeypatch.setattr(status, "STOP_SECONDS", 0.3)
    assert rnow_("stop", "busy")[0] == 1
    assert [run["stopping"] for run in json.loads(rnow_("status", "--json")[1])["runs"]] == [True]
    assert rnow_("status")[1].splitlines()[2].split()[:2] == ["busy", "stopping"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", lambda pid, number: pytest.fail("a second signal"))
        code, _, err = rnow_("stop", "busy")
    assert code == 1
    assert f"busy (process {process.pid}) is stopping already" in err
    # Another start of the run was not asked.
    process.kill()
    process.wait()
    start(runs / "busy")
    assert [run["stopping"] for run in json.loads(rnow_("status", "--json")[1])["runs"]] == [False]


@pytest.mark.parametrize(
    ("saved", "steps", "words"),
    [
        ("step-000004", 4, "busy is stopped, its state saved, after step 4"),
        ("step-000003", 4, "busy ended after step 4, and goes on from step 3: rnow logs busy"),
        (".tmp-4-9", 4, "goes on from step 0"),
        (".tmp-1-9", 0, "busy is stopped, before its first step was done"),
    ],
)
def test_stop_says_what_was_saved(
    runs: Path, rnow_: Run, start: Start, saved: str, steps: int, words: str
) -> None:
    run = make_run(runs, "busy", steps=steps)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints" / saved).mkdir(parents=True)
    start(run)
    assert words in rnow_("stop")[1]


def test_stop_of_another_users_run(
    runs: Path, rnow_: Run, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(make_run(runs, "busy"))

    def refused(pid: int, number: int) -> None:
        assert (pid, number) == (process.pid, signal.SIGINT)
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", refused)
        code, _, err = rnow_("stop", "busy")
    assert code == 2
    assert f"process {process.pid} is of another user" in err


def test_logs_show_the_last_lines(runs: Path, rnow_: Run) -> None:
    run = make_run(runs, "tiny")
    (run / "run.log").write_text("".join(f"line {number}\x1b[31m\n" for number in range(50)))
    (run / "tools.log").write_text("printed\n")
    code, out, _ = rnow_("logs", "tiny", "-n", "2")
    assert (code, out) == (0, "line 48\\x1b[31m\nline 49\\x1b[31m\n")
    assert len(rnow_("logs", "tiny")[1].splitlines()) == 40
    assert rnow_("logs", "tiny", "--of", "tools")[1] == "printed\n"
    code, _, err = rnow_("logs", "tiny", "--of", "rewards")
    assert code == 2
    assert "this run has no log 'rewards'" in err
    assert "there: tools" in err


def test_logs_go_on(runs: Path) -> None:
    run = make_run(runs, "tiny")
    (run / "run.log").write_text("first\nsec")
    command = [sys.executable, "-m", "rnow", "logs", "tiny", "-f"]
    with subprocess.Popen(
        command, cwd=runs.parent, stdout=subprocess.PIPE, encoding="utf-8"
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "first\n"
        with (run / "run.log").open("a") as file:
            file.write("ond\n")
        assert process.stdout.readline() == "second\n"
        whole = "third, in three parts: ü\n".encode()
        for part in (whole[:5], whole[5:-2], whole[-2:]):  # the second one ends inside a letter
            with (run / "run.log").open("ab") as file:
                file.write(part)
            time.sleep(2 * status.LOOK_SECONDS)
        assert process.stdout.readline() == whole.decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_clean_deletes_what_trained_nothing_and_what_is_damaged(runs: Path, rnow_: Run) -> None:
    bare = make_run(runs, "bare")
    done = make_run(runs, "done", steps=3, finished=True)
    hurt = make_run(runs, "hurt", steps=3)
    (hurt / "checkpoints" / "damaged-step-000002").mkdir()
    (hurt / "damaged-metrics.jsonl").write_text("x" * 2_000_000)
    code, out, err = rnow_("runs", "clean")
    assert code == 2
    assert "add --yes" in err
    assert "bare: a run that trained nothing" in out
    assert "2.0 MB  hurt: damaged-metrics.jsonl, damaged-step-000002" in out
    assert "done" not in out
    assert bare.exists()
    assert rnow_("runs", "clean", "--yes")[0] == 0
    assert not bare.exists()
    assert sorted(path.name for path in (hurt / "checkpoints").iterdir()) == ["step-000003"]
    assert not (hurt / "damaged-metrics.jsonl").exists()
    assert done.exists()
    code, out, _ = rnow_("runs", "clean")
    assert (code, out) == (0, "nothing to delete; rnow runs clean NAME deletes a run\n")


def test_clean_deletes_a_run_that_is_named(runs: Path, rnow_: Run, start: Start) -> None:
    done = make_run(runs, "done", steps=3, finished=True)
    busy = make_run(runs, "busy", steps=3)
    start(busy)
    code, _, err = rnow_("runs", "clean", "busy", "--yes")
    assert code == 2
    assert "busy is running" in err
    assert "rnow stop busy" in err
    code, out, _ = rnow_("runs", "clean", "done", "--yes")
    assert code == 0
    assert "done: the whole run, finished after step 3" in out
    assert not done.exists()
    assert busy.exists()


def add_checkpoints(run: Path, *steps: int) -> None:
    """Whole ones, of 1 kB each."""
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_model.safetensors").write_bytes(bytes(1000))
        manifest = {"files": {"adapter_model.safetensors": {"size": 1000, "sha256": ""}}}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def begun_from(run: Path, **model: str) -> None:
    facts = {"name": "tiny", "config": {"model": {"path": "base", **model}}}
    (run / "run.json").write_text(json.dumps(facts))


def test_clean_keeps_the_last_checkpoint_of_a_finished_run(runs: Path, rnow_: Run) -> None:
    done = make_run(runs, "done", steps=3, finished=True)
    add_checkpoints(done, 1, 2, 3)
    half = make_run(runs, "half", steps=3)
    add_checkpoints(half, 2, 3)
    hurt = make_run(runs, "hurt", steps=3, finished=True)
    add_checkpoints(hurt, 2, 3)
    (hurt / "checkpoints" / "step-000003" / "adapter_model.safetensors").write_bytes(b"cut")
    out = rnow_("runs", "clean", "--yes")[1]
    assert "kB  done: checkpoints before its last, step-000001, step-000002" in out
    assert "deleted: 1" in out
    assert checkpoints(done) == ["step-000003"]
    assert checkpoints(half) == ["step-000002", "step-000003"], "it is not finished"
    assert checkpoints(hurt) == ["step-000002", "step-000003"], "its last one is damaged"


def test_clean_leaves_what_others_start_from(runs: Path, rnow_: Run) -> None:
    first = make_run(runs, "first", steps=3, finished=True)
    add_checkpoints(first, 1, 2, 3)
    second = make_run(runs, "second", steps=3, finished=True)
    begun_from(second, adapter="runs/first/checkpoints/step-000001")
    third = make_run(runs, "third", steps=3, finished=True)
    begun_from(third, adapter="second")
    begun_from(first, path="third")  # a model of that name, which is no run
    assert rnow_("runs", "clean", "--yes")[0] == 0
    assert checkpoints(first) == ["step-000001", "step-000003"]
    for name, by in (("first", "second"), ("second", "third")):
        code, _, err = rnow_("runs", "clean", name, "--yes")
        assert code == 2
        assert f"{name} is what {by} starts from" in err
        assert f"rnow runs clean {name} {by}" in err
    (runs.parent / "config.yml").write_text(
        "dataset_type: distill\nmodel: {path: runs/third}\nteacher: {path: t}\n"
    )
    code, _, err = rnow_("runs", "clean", "third", "--yes")
    assert code == 2
    assert "third is what config.yml starts from" in err
    (runs.parent / "config.yml").unlink()
    assert rnow_("runs", "clean", "third", "second", "--yes")[0] == 0
    assert [path.name for path in runs.iterdir()] == ["first"]


def test_clean_lists_a_run_that_was_begun_over(runs: Path, rnow_: Run) -> None:
    stopped = make_run(runs, "tiny", steps=3)
    begun_from(stopped)
    other = make_run(runs, "other", steps=3)
    for path in (stopped, *stopped.iterdir(), other, *other.iterdir()):
        os.utime(path, (1e9, 1e9))
    again = make_run(runs, "tiny-2", steps=2)
    begun_from(again)
    assert rnow_("runs", "clean")[1].startswith("nothing to delete"), "that one may fail yet"
    (again / "summary.json").write_text(json.dumps({"steps": 2}))
    out = rnow_("runs", "clean")[1]
    assert "tiny: stopped after step 3, and begun over as tiny-2, which is finished" in out
    assert "other" not in out


def test_clean_does_not_delete_a_run_that_began_while_it_asked(
    runs: Path, rnow_: Run, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(runs, "tiny")
    monkeypatch.setattr("rnow.cli.runs._ask", lambda yes, folder: start(run))
    code, out, err = rnow_("runs", "clean")
    assert "tiny: a run that trained nothing" in out
    assert code == 2
    assert "another rnow process is working in this run folder" in err
    assert run.exists()


def test_clean_deletes_nothing_that_may_be_no_run_or_run_elsewhere(runs: Path, rnow_: Run) -> None:
    (runs.parent / "other" / "checkpoints").mkdir(parents=True)
    code, _, err = rnow_("runs", "clean", "other", "--yes")
    assert code == 2
    assert "it has no run.json" in err
    far = make_run(runs, "far", steps=2)
    (far / "process.json").write_text(json.dumps({"pid": NOBODY, "host": "gone.example"}))
    code, _, err = rnow_("runs", "clean", "far", "--yes")
    assert code == 2
    assert "rm -r runs/far" in err
    assert (runs.parent / "other").exists()
    assert far.exists()


def test_download_copies_the_adapter(runs: Path, rnow_: Run) -> None:
    make_run(runs, "done", steps=3, finished=True)
    make_run(runs, "half", steps=3)
    code, out, err = rnow_("download", "done", "-o", "models/mine")
    assert code == 0, err
    assert (runs.parent / "models" / "mine" / "adapter_model.safetensors").read_bytes()
    assert "copied" in out
    code, _, err = rnow_("download", "done", "-o", "models/mine")
    assert code == 2
    assert "nothing is overwritten" in err
    assert "models/mine-2" in err
    assert rnow_("download", "done")[0] == 0
    assert (runs.parent / "done" / "adapter_model.safetensors").is_file()
    code, _, err = rnow_("download", "half")
    assert code == 2
    assert "no adapter yet" in err
    assert "step-000003" in err


def test_download_to_where_nothing_can_be(runs: Path, rnow_: Run) -> None:
    make_run(runs, "done", steps=3, finished=True)
    (runs / "done" / "adapter" / "unreadable").symlink_to("nowhere")
    (runs.parent / "file").touch()
    for place, words in (
        ("/", "fix: rnow download done -o /done"),
        ("file/mine", "the adapter cannot be copied"),
        ("mine", "the adapter cannot be copied"),
    ):
        code, _, err = rnow_("download", "done", "-o", place)
        assert code == 2, err
        assert words in err
    assert sorted(path.name for path in runs.parent.iterdir()) == ["file", "runs"]
