"""Choosing a sandbox, and the life of containers, with programs that pass for docker, podman and bwrap."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.usercode.fake_engines import FakeEngines, is_alive

from rnow.errors import InputError, TemporaryError
from rnow.types import ToolContext
from rnow.usercode import engines
from rnow.usercode.containers import owner, sweep
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CallOutcome, CodeHost, call_function
from rnow.usercode.sandbox import DEFAULT_IMAGE, Sandboxes, check_sandbox

TOOLS = '''
import os
import time

from rnow.core import tool

state = []


@tool(sandbox=True)
def note(text: str) -> str:
    """Remember."""
    state.append(text)
    return ",".join(state)


@tool(sandbox=True)
def who() -> str:
    """Process of the host."""
    return str(os.getppid())


@tool(sandbox=True)
def variable(of: str) -> str:
    """A variable, backwards."""
    return os.environ.get(of, "none")[::-1]


@tool(sandbox=True)
def key() -> str:
    """The secret that it names."""
    return str(len(os.environ["CITY_KEY"])) + str("OTHER" + "_KEY" in os.environ)


@tool(sandbox=True)
def hang() -> str:
    """Never ends."""
    time.sleep(600)
    return ""
'''
REWARDS = """
from rnow.core import reward, RewardArgs


@reward(sandbox=True)
def long(args: RewardArgs, messages: list) -> float:
    return float(len(messages))
"""
IMAGE = "tools:1"


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    found = FakeEngines(tmp_path)
    monkeypatch.setenv("PATH", str(found.programs))
    monkeypatch.setattr("rnow.usercode.sandbox._START_SECONDS", 20)
    engines.forget()
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "a project, mine"
    folder.mkdir()
    (folder / "tools.py").write_text(TOOLS)
    (folder / "rewards.py").write_text(REWARDS)
    (folder / ".env").write_text("CITY_KEY=paris-paris\nOTHER_KEY=london\n")
    return folder


def function(**changes: Any) -> FunctionInfo:
    values: dict[str, Any] = {"kind": "tools", "name": "f", "file": Path("tools.py"), "place": "tools.py:7"}  # fmt: skip
    return FunctionInfo(**(values | {"sandbox": True} | changes))


class Bench:
    """The sandboxes of a project and its tools."""

    def __init__(self, project: Path, **options: Any) -> None:
        self.warnings: list[str] = []
        self.boxes = Sandboxes(project, warn=self.warnings.append, **options)
        secrets = {"CITY_KEY": "paris-paris", "OTHER_KEY": "london"}
        self.tools = CodeHost(project / "tools.py", "tools", secrets=secrets)
        self.rewards = CodeHost(project / "rewards.py", "rewards")

    async def __aenter__(self) -> Bench:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.boxes.close()

    async def call(
        self, name: str, rollout: str = "a", *, image: str | None = IMAGE, timeout: float = 20, env: Any = None, **arguments: Any
    ) -> CallOutcome:  # fmt: skip
        context = ToolContext(rollout_id=rollout, docker=image, docker_env=env or {})
        return await self.ask(self.tools, name, {"arguments": arguments}, context, timeout=timeout)

    async def ask(
        self, host: CodeHost, name: str, given: Any, context: ToolContext, *, timeout: float = 20
    ) -> CallOutcome:
        return await call_function(
            function(name=name), given, context, host=host, sandboxes=self.boxes, timeout=timeout
        )

    async def value(self, name: str, rollout: str = "a", **options: Any) -> Any:
        outcome = await self.call(name, rollout, **options)
        assert outcome.status == "ok", outcome
        return outcome.value


# -- which one


def test_docker_comes_before_podman(fakes: FakeEngines) -> None:
    fakes.install("docker", "podman")
    found = engines.find_containers()
    assert isinstance(found, engines.ContainerEngine)
    assert found.name == "docker"


def test_podman_where_docker_does_not_answer(fakes: FakeEngines) -> None:
    fakes.install("docker", "podman")
    fakes.switch("down")
    found = engines.find_containers()
    assert isinstance(found, engines.ContainerEngine)
    assert found.name == "podman"
    assert engines.find_containers() == found
    assert [call[0] for call in fakes.calls()] == ["docker", "podman"]  # each was asked once


def test_what_leads_to_the_engine_comes_along(
    fakes: FakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install("docker")
    monkeypatch.setenv("DOCKER_CERT_PATH", "/certs")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = engines.find_containers()
    assert isinstance(found, engines.ContainerEngine)
    assert found.command("ps") == ["env", "DOCKER_CERT_PATH=/certs", found.path, "ps"]


def test_nothing_to_ask_for(fakes: FakeEngines, project: Path) -> None:
    assert check_sandbox([function(sandbox=False)], {}, project) == []
    assert fakes.calls() == []


def test_no_sandbox_at_all(fakes: FakeEngines, project: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_sandbox([function(sandbox=False), function()], {}, project)
    text = caught.value.render()
    assert "tools.py:7" in text
    assert "bwrap) is not installed" in text
    assert "apt-get install bubblewrap" in text
    assert "neither docker nor podman is installed" in text


def test_bubblewrap_that_may_not(fakes: FakeEngines, project: Path) -> None:
    fakes.install("bwrap")
    fakes.switch("denied")
    with pytest.raises(InputError) as caught:
        check_sandbox([function()], {}, project)
    assert "No permissions to create new namespace" in caught.value.render()


def test_an_image_without_an_engine(fakes: FakeEngines, project: Path) -> None:
    fakes.install("bwrap", "docker")
    fakes.switch("down")
    with pytest.raises(InputError) as caught:
        check_sandbox([function()], {"python:3.12": "train.jsonl:4"}, project)
    text = caught.value.render()
    assert "train.jsonl:4" in text
    assert "Cannot connect to the Docker daemon" in text


def test_a_dockerfile_that_is_not_there(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    with pytest.raises(InputError, match=r"Dockerfile\.shell"):
        check_sandbox([function()], {"local/shell": "train.jsonl:4"}, project)


def test_images_that_nothing_uses_are_mentioned(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    (notice,) = check_sandbox([function(sandbox=False)], {IMAGE: "train.jsonl:1"}, project)
    assert "no function has sandbox=True" in notice


@pytest.mark.parametrize(
    ("programs", "expected"),
    [(("bwrap",), "run in bubblewrap"), (("docker",), f"run in docker ({DEFAULT_IMAGE})")],
)
def test_what_it_will_be_is_said(
    fakes: FakeEngines, project: Path, programs: tuple[str, ...], expected: str
) -> None:
    fakes.install(*programs)
    (notice,) = check_sandbox([function()], {}, project)
    assert expected in notice


def test_a_home_folder_is_no_project(
    fakes: FakeEngines, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install("bwrap")
    monkeypatch.setenv("HOME", str(project / "x"))
    with pytest.raises(InputError, match="would show all of"):
        check_sandbox([function()], {}, project)


# -- bubblewrap


def test_rollouts_share_one_bubblewrap(fakes: FakeEngines, project: Path) -> None:
    fakes.install("bwrap", "docker")

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.boxes.prepare(bench.tools, {})
            first = await bench.value("who", "a", image=None)
            assert await bench.value("who", "b", image=None) == first
            await bench.boxes.release("a")  # the rollout's end is not the host's
            assert await bench.value("who", "b", image=None) == first
            assert await bench.value("key", image=None) == "11False"
        assert not is_alive(int(first))

    asyncio.run(work())
    assert fakes.calls("run") == []
    command = fakes.calls()[-1]
    text = " ".join(command)
    for needed in engines.ISOLATION:
        assert needed in command
    assert "--disable-userns" in command
    assert "--remount-ro /" in text
    assert f"--ro-bind {project} {project}" in text
    assert f"/empty {project}/.env" in text


def test_an_older_bubblewrap(fakes: FakeEngines, project: Path) -> None:
    fakes.install("bwrap")
    fakes.switch("old-bwrap")

    async def work() -> None:
        async with Bench(project) as bench:
            assert await bench.value("note", image=None, text="x") == "x"

    asyncio.run(work())
    assert "--disable-userns" not in fakes.calls()[-1]
    assert "--size" not in fakes.calls()[-1]


def test_without_bubblewrap_a_container_of_python(
    fakes: FakeEngines, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.usercode.sandbox.MAX_CONTAINERS", 1)
    fakes.install("docker")

    async def work() -> None:
        async with Bench(project) as bench:
            assert await bench.value("note", "a", image=None, text="x") == "x"
            first = fakes.containers()
            await bench.value("note", "b", image=None, text="y")
            assert fakes.containers() == first
        assert fakes.containers() == []

    asyncio.run(work())
    assert [call[2:] for call in fakes.calls("pull")] == [[DEFAULT_IMAGE]]


# -- containers


def test_one_container_for_a_rollout(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            values = await asyncio.gather(*(bench.value("who") for _ in range(3)))
            other = await bench.value("who", "b")
            assert len(set(values)) == 1
            assert other not in values
            messages = {"messages": [{"role": "user", "content": "x"}]}
            context = ToolContext(rollout_id="a", docker=IMAGE)
            score = await bench.ask(bench.rewards, "long", messages, context)
            assert score.value == 1.0
            assert len(fakes.containers()) == 2
            pids = fakes.pids()
            await bench.boxes.release("a")
            await bench.boxes.release("a")
            assert len(fakes.containers()) == 1
            assert not is_alive(int(values[0]))
            assert is_alive(int(other))
        assert fakes.containers() == []
        assert [pid for pid in pids if is_alive(pid)] == []

    asyncio.run(work())
    names = [call[call.index("--name") + 1] for call in fakes.calls("run")]
    assert len(set(names)) == 2
    removed = [call[-1] for call in fakes.calls("rm")]
    assert sorted(removed) == sorted(names)


def test_the_command_line_of_a_container(
    fakes: FakeEngines, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.usercode.containers.MEMORY_GB", 0.5)
    monkeypatch.setattr("rnow.usercode.containers.PROCESSES", 99)
    monkeypatch.setattr("rnow.usercode.containers.CPUS", 0.5)
    fakes.install("docker")
    fakes.have(IMAGE)
    (project / "runs").mkdir()

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", text="x", env={"COLOUR": "green-green"})

    asyncio.run(work())
    (command,) = fakes.calls("run")
    text = " ".join(command)
    for part in (
        "--rm --interactive --pull never",
        "--cap-drop ALL --security-opt no-new-privileges",
        "--memory 512m --memory-swap 512m --pids-limit 99 --cpus 0.5",
        f"--label rnow.owner={owner()}",
        f"--entrypoint python3 {IMAGE} -I -S",
    ):
        assert part in text
    mounts = [value for name, value in pairwise(command) if name == "--mount"]
    # The folder has a comma in its name, which the mount must survive.
    assert f'type=bind,"source={project}","destination={project}",readonly' in mounts
    assert any(f'/empty,"destination={project}/.env",readonly' in mount for mount in mounts)
    assert any(f'/nothing,"destination={project}/runs",readonly' in mount for mount in mounts)
    every = json.dumps(fakes.calls())
    assert "green-green" not in every
    assert "COLOUR" not in every
    assert "paris-paris" not in every
    assert "--privileged" not in every


def test_variables_of_the_row_and_the_secret_that_code_names(
    fakes: FakeEngines, project: Path
) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            env = {"COLOUR": "green\nblue"}
            assert await bench.value("variable", of="COLOUR", env=env) == "eulb\nneerg"
            assert await bench.value("variable", "b", of="COLOUR", env={}) == "enon"
            assert await bench.value("key", "b") == "11False"

    asyncio.run(work())


def test_a_call_that_hangs_leaves_the_container_in_use(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", text="x")
            started = time.monotonic()
            outcome = await bench.call("hang", timeout=0.3)
            assert outcome.status == "timeout"
            assert time.monotonic() - started < 5
            await bench.value("note", text="y")
        assert len(fakes.calls("run")) == 1

    asyncio.run(work())


def test_a_container_that_died_is_replaced(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", text="x")
            (name,) = fakes.containers()
            call = asyncio.ensure_future(bench.call("hang"))
            await asyncio.sleep(0.3)
            subprocess.run([fakes.programs / "docker", "rm", "--force", name], check=True)
            assert (await call).status == "died"
            assert await bench.value("note", text="y") == "y"
            assert fakes.containers() != [name]

    asyncio.run(work())


def test_rollouts_wait_for_a_container(
    fakes: FakeEngines, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.usercode.sandbox.MAX_CONTAINERS", 2)
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            most = 0

            async def rollout(name: str) -> None:
                nonlocal most
                await bench.value("note", name, text="x")
                most = max(most, len(fakes.containers()))
                await bench.value("note", name, text="y")
                await bench.boxes.release(name)

            await asyncio.gather(*(rollout(name) for name in "abcde"))
            assert most == 2
            assert fakes.containers() == []

    asyncio.run(work())


def test_waiting_has_an_end(
    fakes: FakeEngines, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.usercode.sandbox.MAX_CONTAINERS", 1)
    monkeypatch.setattr("rnow.usercode.sandbox._WAIT_SECONDS", 0.2)
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", "a", text="x")
            with pytest.raises(TemporaryError, match="no container became free"):
                await bench.call("note", "b", text="x")
            await bench.boxes.release("a")
            await bench.value("note", "b", text="x")

    asyncio.run(work())


def test_one_who_is_cancelled_gives_up_the_turn(
    fakes: FakeEngines, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rnow.usercode.sandbox.MAX_CONTAINERS", 1)
    monkeypatch.setattr("rnow.usercode.sandbox._WAIT_SECONDS", 10)
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", "a", text="x")
            second = asyncio.ensure_future(bench.call("note", "b", text="x"))
            third = asyncio.ensure_future(bench.value("note", "c", text="x"))
            await asyncio.sleep(0.05)
            second.cancel()
            await bench.boxes.release("a")
            assert await third == "x"

    asyncio.run(work())


def test_a_rollout_that_ends_while_its_container_starts(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)

    async def work() -> None:
        async with Bench(project) as bench:
            call = asyncio.ensure_future(bench.call("note", text="x"))
            await asyncio.sleep(0.05)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await bench.boxes.release("a")
            assert len(fakes.calls("run")) == 1
            assert fakes.containers() == []

    asyncio.run(work())


def test_another_event_loop(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)
    bench = Bench(project)

    async def first() -> None:
        await bench.value("note", text="x")

    async def second() -> None:
        assert await bench.value("note", text="y") in ("y", "x,y")
        await bench.boxes.close()

    asyncio.run(first())
    asyncio.run(second())
    assert fakes.containers() == []


def test_limits_that_cannot_be_set_are_said(fakes: FakeEngines, project: Path) -> None:
    fakes.install("podman")
    fakes.have(IMAGE)
    fakes.switch("no-cpus")

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", "a", text="x")
            await bench.value("note", "b", text="x")
            (warning,) = bench.warnings
            assert "podman cannot limit the CPUs" in warning

    asyncio.run(work())
    assert "--cpus" not in fakes.calls("run")[-1]
    assert "--memory" in fakes.calls("run")[-1]


@pytest.mark.parametrize(
    ("image", "complaint", "hint"),
    [
        ("empty:1", "has no python3", "Python 3.11 or newer"),
        ("old:1", "has Python 3.8", "newer python3"),
        ("nowhere:1", "cannot be fetched", "docker pull nowhere:1"),
    ],
)
def test_an_image_that_cannot_be_used(
    fakes: FakeEngines, project: Path, image: str, complaint: str, hint: str
) -> None:
    fakes.install("docker")
    fakes.have("empty:1", "old:1")

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.boxes.prepare(bench.tools, {image: "train.jsonl:9"}, plain=False)

    with pytest.raises(InputError) as caught:
        asyncio.run(work())
    text = caught.value.render()
    assert complaint in text
    assert hint in text
    assert "train.jsonl:9" in text
    assert fakes.containers() == []


def test_a_file_that_cannot_be_imported_in_the_image(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)
    (project / "tools.py").write_text("import surely_not_installed\n")

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.boxes.prepare(bench.tools, {IMAGE: "train.jsonl:9"}, plain=False)

    with pytest.raises(InputError) as caught:
        asyncio.run(work())
    text = caught.value.render()
    assert f'in the image "{IMAGE}"' in text
    assert "tools.py:1" in text
    assert "install surely_not_installed in the image" in text


def test_what_was_left_behind_is_swept_and_nothing_else(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    fakes.have(IMAGE)
    mine, gone = owner(), subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = mine.rpartition("/")[0].rpartition("/")[0]
    fakes.add_container("left", f"{here}/{gone.pid}/123")
    fakes.add_container("reused-id", f"{mine.rpartition('/')[0]}/1")
    fakes.add_container("mine", mine)
    fakes.add_container("elsewhere", f"another-machine/1/{gone.pid}/123")
    fakes.add_container("strange", "x")

    async def work() -> None:
        async with Bench(project) as bench:
            await bench.value("note", text="x")

    asyncio.run(work())
    assert fakes.containers() == ["elsewhere", "mine", "strange"]


OWNER = """
import asyncio, sys
from pathlib import Path
from rnow.usercode.host import CodeHost
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.sandbox import Sandboxes
from rnow.usercode.host import call_function
from rnow.types import ToolContext

async def main():
    folder = Path(sys.argv[1])
    file = folder / "tools.py"
    hosts = dict(host=CodeHost(file, "tools"), sandboxes=Sandboxes(folder))
    context = ToolContext(rollout_id="a", docker=sys.argv[2] or None)

    async def call(name):
        info = FunctionInfo(kind="tools", name=name, file=file, place="", sandbox=True)
        return await call_function(info, {"arguments": {}}, context, timeout=60, **hosts)

    print((await call("who")).value, flush=True)
    await call("hang")

asyncio.run(main())
"""


@pytest.mark.parametrize("image", [IMAGE, ""])
def test_nothing_outlives_a_killed_owner(fakes: FakeEngines, project: Path, image: str) -> None:
    fakes.install("docker", "bwrap")
    fakes.have(IMAGE)
    command = [sys.executable, "-c", OWNER, str(project), image]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        host = int(process.stdout.readline())
        pids = [*fakes.pids(), host]
        assert all(is_alive(pid) for pid in pids)
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    # The daemon of Docker removes what ended; where nobody does, the next run does.
    found = engines.find_containers()
    assert isinstance(found, engines.ContainerEngine)
    sweep(found)
    assert fakes.containers() == []


def wait_until(done: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# -- images of the project


def test_a_dockerfile_is_built_once(fakes: FakeEngines, project: Path, tmp_path: Path) -> None:
    fakes.install("docker")
    (project / "Dockerfile.shell").write_text("FROM tools:1\n")
    (project / "data").mkdir()
    (project / "data" / "words.txt").write_text("a b")
    for name in ("runs", ".git", ".venv"):
        (project / name).mkdir()
        (project / name / "file").write_text("x")
    (project / ".env.local").write_text("KEY=1")

    async def work() -> None:
        async with Bench(project, log_dir=tmp_path / "logs") as bench:
            await asyncio.gather(
                *(bench.value("note", name, image="local/shell", text="x") for name in "ab")
            )
        async with Bench(project, log_dir=tmp_path / "logs") as bench:
            await bench.value("note", image="local/shell", text="x")
            assert len(fakes.calls("build")) == 1
            (project / "data" / "words.txt").write_text("a b c")
        async with Bench(project, log_dir=tmp_path / "logs") as bench:
            await bench.value("note", image="local/shell", text="x")
            assert len(fakes.calls("build")) == 2

    asyncio.run(work())
    tags = [call[call.index("--tag") + 1] for call in fakes.calls("build")]
    assert all(tag.startswith("rnow/shell:") for tag in tags)
    assert len(set(tags)) == 2
    context = (fakes.state / "context").read_text().split("\n")
    assert context == ["Dockerfile.shell", "data/words.txt", "rewards.py", "tools.py"]
    assert "step 29" in (tmp_path / "logs" / "image-shell.log").read_text()


def test_a_build_that_fails(fakes: FakeEngines, project: Path, tmp_path: Path) -> None:
    fakes.install("docker")
    (project / "Dockerfile.shell").write_text("FROM tools:1\nRUN false\n")

    async def work() -> None:
        async with Bench(project, log_dir=tmp_path / "logs") as bench:
            await bench.boxes.prepare(bench.tools, {"local/shell": "train.jsonl:2"}, plain=False)

    with pytest.raises(InputError) as caught:
        asyncio.run(work())
    text = caught.value.render()
    assert "Dockerfile.shell cannot be built" in text
    assert "the command false returned 1" in text
    assert "step 29" in text
    assert "step 5\n" not in text
    assert str(tmp_path / "logs" / "image-shell.log") in text
    assert "train.jsonl:2" in text


def test_a_build_that_is_not_waited_for_any_more(fakes: FakeEngines, project: Path) -> None:
    fakes.install("docker")
    (project / "Dockerfile.shell").write_text("FROM tools:1\nRUN sleep\n")

    async def work() -> None:
        async with Bench(project) as bench:
            images = {"local/shell": "train.jsonl:2"}
            preparing = asyncio.ensure_future(bench.boxes.prepare(bench.tools, images, plain=False))
            while not fakes.calls("build"):
                await asyncio.sleep(0.05)
            preparing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(preparing, 20)

    asyncio.run(work())
