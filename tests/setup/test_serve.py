"""``rnow serve`` with a scripted program in vLLM's place: what it is started with, what is said, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.processes.test_leash import wait_for
from tests.serving import scripted
from tests.setup.projects import Project

from rnow.config import config_for
from rnow.disk.folder import folder_name
from rnow.errors import InputError, ModelError, StopRequested
from rnow.processes.leash import descendants
from rnow.processes.process import ProcessFailed, free_port
from rnow.serving import server as server_module
from rnow.serving.client import VllmClient
from rnow.serving.http import ServerDown
from rnow.setup import serve as serve_module
from rnow.setup.build import run
from rnow.setup.serve import Served, serve, usage_lines
from rnow.setup.subjects import Trained, find_trained
from rnow.tasks import run_anywhere

MakeModel = Callable[..., Path]
PROGRAM = (sys.executable, scripted.__file__)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: MakeModel) -> Project:
    torch.set_num_threads(1)
    project = Project(tmp_path_factory.mktemp("served") / "project", tiny_model_dir)
    config = project.config(trainer={"max_steps": 2, "save_step": 1})
    run(config, folder=project.folder)
    return project


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "START_TIMEOUT", 20.0)
    monkeypatch.setattr(server_module, "_serve_command", lambda: list(PROGRAM))
    monkeypatch.setattr(serve_module, "require_vllm", lambda *where, **otherwise: None)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def trained(project: Project, name: str = "tiny", step: int | None = None) -> Trained:
    return find_trained(name, folder=project.folder, output_dir="runs", step=step, command="serve")


def served(
    project: Project,
    found: Trained,
    look: Callable[[Served], None] = lambda served: None,
    **options: Any,
) -> list[str]:
    """Serve until it is ready and looked at; the stages."""
    stages: list[str] = []

    def ready(served: Served) -> None:
        look(served)
        os.kill(os.getpid(), signal.SIGINT)

    config = options.pop("config", None) or project.config()
    serve(config, found, folder=project.folder, stage=stages.append, ready=ready, **options)
    return stages


def commands() -> list[list[str]]:
    """Of the programs below this one."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        found.append(line.decode().split("\0")[:-1])
    return [command for command in found if command[:1] == [sys.executable]]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_it_serves_the_adapter_beside_its_base_until_ctrl_c(project: Project) -> None:
    seen: list[Served] = []

    def look(served: Served) -> None:
        seen.append(served)
        client = VllmClient(served.address.url)
        models = {model.id: model for model in run_anywhere(client.models())}
        base = Path(project.student).name
        assert models.keys() == {"tiny", base}
        assert models["tiny"].root == str((project.run_dir / "adapter").resolve())
        assert models["tiny"].parent == base
        (command,) = [c for c in commands() if "--lora-modules" in c and "--fd" not in c]
        assert option(command, "--model") == str(project.student)
        assert option(command, "--served-model-name") == base
        assert option(command, "--max-lora-rank") == "8", "vLLM has no 4"
        assert option(command, "--dtype") == "float32"
        assert option(command, "--max-model-len") == "512", "the model's own limit"
        assert option(command, "--host") == "127.0.0.1"
        assert {"--enable-lora", "--enforce-eager", "--no-enable-chunked-prefill"} <= {*command}

    handler = signal.getsignal(signal.SIGINT)
    stages = served(project, trained(project), look)
    assert stages == ["looking for the base model", "starting vLLM", "stopping"]
    assert signal.getsignal(signal.SIGINT) is handler
    (one,) = seen
    assert one.log == project.run_dir / "serve.log"
    with pytest.raises(ServerDown):
        run_anywhere(VllmClient(one.address.url, None, 0.5).models())


def test_a_step_and_an_adapter_that_lies_anywhere(project: Project, tmp_path: Path) -> None:
    def root_of(served: Served) -> str:
        models = run_anywhere(VllmClient(served.address.url).models())
        (root,) = [model.root for model in models if model.id == served.name]
        return str(root)

    roots: list[str] = []
    names: list[str] = []

    def look(served: Served) -> None:
        roots.append(root_of(served))
        names.append(served.name)

    served(project, trained(project, step=1), look)
    copied = tmp_path / "mine" / "adapter"
    shutil.copytree(project.run_dir / "adapter", copied)
    elsewhere = Project(tmp_path / "elsewhere", project.make_model)
    found = trained(elsewhere, str(copied))
    # Outside of a project there is no config.
    served(elsewhere, found, look, config=config_for(found.adapter.base, ["model.device=cpu"]))
    assert roots == [str(project.run_dir / "checkpoints/step-000001"), str(copied)]
    assert names == ["tiny", "mine"]


def test_where_one_stands_and_what_was_copied(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> tuple[str | None, int | None]:
        one = find_trained(name, folder=Path(), output_dir="runs", command="serve")
        return one.run and one.run.path.name, one.step

    checkpoints = project.run_dir / "checkpoints"
    for place, expected in (
        (project.run_dir / "adapter", ("tiny", 2)),
        (project.run_dir, ("tiny", 2)),
        (checkpoints / "step-000001", ("tiny", 1)),
    ):
        monkeypatch.chdir(place)
        assert found(".") == expected
    monkeypatch.chdir(project.folder)
    (tmp_path / "best").symlink_to(checkpoints / "step-000001")
    assert found(str(tmp_path / "best")) == ("tiny", 1)
    # Neither a copy nor what was set aside is a checkpoint, whatever comes first by name.
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(project.run_dir, run)
    shutil.rmtree(run / "adapter")
    for name in ("step-000001-best", "damaged-step-000001"):
        shutil.copytree(run / "checkpoints" / "step-000001", run / "checkpoints" / name)
        assert found(str(run / "checkpoints" / name)) == ("tiny", None)
    assert found(str(run)) == ("tiny", 2)
    run.rename(run.with_name(folder_name("new@1")))
    monkeypatch.chdir(tmp_path)
    assert found("new@1")[1] == 2, "its own name, and no step of another"


def test_the_port(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    ports: list[int] = []

    def look(served: Served) -> None:
        ports.append(served.address.port)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 cannot be had") as caught:
            served(project, trained(project), port=port)
        assert caught.value.why == "Address already in use"
        monkeypatch.setattr(serve_module, "PORT", port)
        served(project, trained(project), look)
    wanted = free_port()
    served(project, trained(project), look, port=wanted)
    assert ports[0] != port
    assert ports[1] == wanted
    for host in ("nowhere.invalid", "192.0.2.1", f"{'a' * 64}.b", "::2"):
        for given in (None, 8123):
            with pytest.raises(InputError, match="no address of this machine") as caught:
                served(project, trained(project), host=host, port=given)
            assert caught.value.where == "--host"


def test_a_key_that_the_user_has_set_is_asked_for(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "my-own-key")
    shown: list[str] = []

    def look(served: Served) -> None:
        assert run_anywhere(VllmClient(served.address.url, "my-own-key").models())
        with pytest.raises(InputError, match="key"):
            run_anywhere(VllmClient(served.address.url).models())
        shown.extend(usage_lines(served))

    served(project, trained(project), look)
    assert not any("my-own-key" in line for line in shown)
    assert sum("$VLLM_API_KEY" in line for line in shown) == 3


def test_how_it_is_asked_and_measured(project: Project) -> None:
    lines: list[str] = []
    served(
        project, trained(project), lambda served: lines.extend(usage_lines(served)), host="0.0.0.0"
    )
    code = [shlex.split(line) for line in lines if line.startswith("    ")]
    curl, lm_eval, inspect = code
    url = curl[1].removesuffix("/v1/chat/completions")
    assert url.startswith("http://127.0.0.1:")
    assert json.loads(option(curl, "-d"))["model"] == "tiny"
    arguments = dict(part.split("=", 1) for part in option(lm_eval, "--model_args").split(","))
    assert arguments["model"] == "tiny"
    assert arguments["base_url"] == f"{url}/v1/completions"
    assert (Path(arguments["tokenizer"]) / "tokenizer.json").is_file()
    assert option(inspect, "--model") == "openai-api/rnow/tiny"
    assert option(inspect, "--model-base-url") == f"{url}/v1"
    assert lines[-1].startswith("warning: whoever reaches this machine")


def test_a_base_that_is_no_longer_what_the_adapter_was_trained_on_is_refused(
    project: Project, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(project.student, base)
    copied = tmp_path / "run"
    shutil.copytree(project.run_dir, copied)
    config = copied / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(base)}
    config.write_text(json.dumps(values))
    warnings: list[str] = []
    served(project, trained(project, str(copied)), warn=warnings.append)
    assert warnings == []
    other = project.make_model(seed=5, num_hidden_layers=1, vocab_size=128)
    shutil.copy(other / "model.safetensors", base)
    with pytest.raises(ModelError, match="was trained on another model") as caught:
        served(project, trained(project, str(copied)))
    assert "weights" in (caught.value.why or "")


def test_a_server_that_ends_is_told(project: Project) -> None:
    def end_it(served: Served) -> None:
        (pid,) = [
            pid
            for pid in descendants(os.getpid())
            if b"--lora-modules" in (command := Path(f"/proc/{pid}/cmdline").read_bytes())
            and b"--fd" not in command
        ]
        os.kill(pid, signal.SIGKILL)

    with pytest.raises(ProcessFailed, match="ended") as caught:
        serve(project.config(), trained(project), folder=project.folder, ready=end_it)
    assert "serve.log" in (caught.value.fix or "")


def test_a_start_that_fails_or_is_stopped(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('no room for the KV cache')"]
    monkeypatch.setattr(server_module, "_serve_command", lambda: failing)
    with pytest.raises(ModelError, match="ended while it started") as caught:
        served(project, trained(project))
    assert "no room for the KV cache" in caught.value.details

    waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(server_module, "_serve_command", lambda: waiting)

    def stop(text: str) -> None:
        if text == "starting vLLM":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StopRequested):
        serve(project.config(), trained(project), folder=project.folder, stage=stop)
    wait_for(lambda: not any("time.sleep(600)" in part for c in commands() for part in c))


def test_what_is_no_trained_student(project: Project) -> None:
    with pytest.raises(InputError, match="no run and no adapter 'student'") as caught:
        trained(project, "student")
    assert caught.value.fix == "rnow serve tiny"
    with pytest.raises(InputError, match="there are 1, 2") as caught:
        trained(project, step=9)
    assert caught.value.fix == "rnow serve tiny@2"


def test_without_vllm_it_says_what_to_type(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "require_vllm", server_module.require_vllm)
    monkeypatch.setattr(server_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="vLLM is not installed") as caught:
        served(project, trained(project))
    assert "pip install" in (caught.value.fix or "")
    assert "backend" not in (caught.value.fix or ""), "there is no other one to serve with"
