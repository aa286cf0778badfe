"""The real bubblewrap and a real container engine: what the code inside can see, reach and leave behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.usercode.fake_engines import is_alive

from rnow.types import ToolContext
from rnow.usercode import engines
from rnow.usercode.containers import sweep
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CallOutcome, CodeHost, call_function
from rnow.usercode.sandbox import Sandboxes

pytestmark = pytest.mark.agents

CANARY = "canary-4711-canary"
TOOLS = '''
import json
import os
import socket
import time
from pathlib import Path

from rnow.core import tool


@tool(sandbox=True)
def look() -> str:
    """Everything that can be told from inside, backwards: secrets would be taken out of it."""
    here = Path.cwd()
    seen = {
        "dotenv": (here / ".env").read_text(),
        "runs": os.listdir(here / "runs"),
        "git": os.listdir(here / ".git"),
        "data": (here / "data.txt").read_text(),
        "environ": dict(os.environ),
        "processes": [
            Path("/proc", name, "cmdline").read_text().replace("\\0", " ")
            for name in os.listdir("/proc")
            if name.isdigit()
        ],
        "status": Path("/proc/self/status").read_text(),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "host": socket.gethostname(),
    }
    return json.dumps(seen)[::-1]


@tool(sandbox=True)
def write(paths: list[str]) -> str:
    """Try to write."""
    said = {}
    for path in paths:
        try:
            with open(path, "a") as file:
                file.write("x")
            said[path] = "written"
        except OSError as error:
            said[path] = error.strerror
    return json.dumps(said)


@tool(sandbox=True)
def exists(path: str) -> str:
    """Whether it is there."""
    return str(os.path.exists(path))


@tool(sandbox=True)
def connect(host: str, port: int) -> str:
    """Try to connect."""
    try:
        socket.create_connection((host, port), 2).close()
        return "connected"
    except OSError as error:
        return f"no: {error.strerror}"


@tool(sandbox=True)
def hang() -> str:
    """A process that does not want to end."""
    os.system("exec sleep 31536001 &")
    time.sleep(600)
    return ""
'''
SLEEPER = "sleep 31536001"
WITNESS = "sleep 31536002"


@pytest.fixture
def witness() -> Iterator[None]:
    """A process of this machine that must not be seen inside."""
    with subprocess.Popen(WITNESS.split()) as process:
        yield
        process.kill()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    fill(folder)
    return folder


def fill(folder: Path) -> None:
    (folder / "tools.py").write_text(TOOLS)
    (folder / "data.txt").write_text("data")
    (folder / ".env").write_text(f"UNUSED_KEY={CANARY}\n")
    for name in ("runs", ".git"):
        (folder / name).mkdir()
        (folder / name / "file").write_text(CANARY)


@dataclass
class Tools:
    host: CodeHost
    boxes: Sandboxes

    async def call(
        self, name: str, given: Any, *, timeout: float, docker: str | None = None
    ) -> CallOutcome:
        file = self.host.file
        info = FunctionInfo(kind="tools", name=name, file=file, place="tools.py:1", sandbox=True)
        context = ToolContext(rollout_id="a", docker=docker)
        return await call_function(
            info, given, context, host=self.host, sandboxes=self.boxes, timeout=timeout
        )


def tools_of(project: Path, **options: Any) -> tuple[Tools, Sandboxes]:
    boxes = Sandboxes(project, **options)
    secrets = {"UNUSED_KEY": CANARY}
    return Tools(CodeHost(project / "tools.py", "tools", secrets=secrets), boxes), boxes


async def call(tools: Tools, name: str, *, image: str | None = None, **arguments: Any) -> Any:
    outcome = await tools.call(name, {"arguments": arguments}, timeout=30, docker=image)
    assert outcome.status == "ok", outcome
    return outcome.value


def sleepers() -> set[int]:
    """Processes that a call of ``hang`` started."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
            if text == SLEEPER:
                found.add(int(entry.name))
    return found


def wait_until(done: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)


OWNER = """
import asyncio, sys
from pathlib import Path
from rnow.types import ToolContext
from rnow.usercode.functions import FunctionInfo
from rnow.usercode.host import CodeHost
from rnow.usercode.sandbox import Sandboxes
from rnow.usercode.host import call_function

folder = Path(sys.argv[1])
file = folder / "tools.py"
info = FunctionInfo(kind="tools", name="hang", file=file, place="tools.py:1", sandbox=True)
context = ToolContext(rollout_id="a", docker=sys.argv[2] or None)
hosts = dict(host=CodeHost(file, "tools"), sandboxes=Sandboxes(folder))
asyncio.run(call_function(info, {"arguments": {}}, context, timeout=90, **hosts))
"""


def kill_the_owner(project: Path, image: str) -> None:
    """kill -9 while a call runs, and wait until nothing of it lives."""
    before = sleepers()
    with subprocess.Popen([sys.executable, "-c", OWNER, str(project), image]) as process:
        wait_until(lambda: bool(sleepers() - before), 60)
        os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not sleepers() - before)


# -- bubblewrap


@pytest.fixture
def bubblewrap() -> engines.Bubblewrap:
    found = engines.find_bubblewrap()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.usefixtures("bubblewrap", "witness")
def test_what_bubblewrap_shows(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    tools, boxes = tools_of(project)

    async def work() -> Any:
        seen = json.loads((await call(tools, "look"))[::-1])
        await boxes.close()
        return seen

    seen = asyncio.run(work())
    assert CANARY not in json.dumps(seen)
    assert (seen["dotenv"], seen["runs"], seen["git"], seen["data"]) == ("", [], [], "data")
    assert seen["interfaces"] == ["lo"]
    assert seen["host"] == "sandbox"
    assert not any(WITNESS in command for command in seen["processes"])
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        assert re.search(rf"^{name}:\s+0+$", seen["status"], re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", seen["status"], re.MULTILINE)


@pytest.mark.usefixtures("bubblewrap")
def test_what_can_be_written_in_bubblewrap(project: Path, tmp_path: Path) -> None:
    tools, boxes = tools_of(project)
    private = ["/tmp/rnow-sandbox-test-file", "/dev/shm/rnow-sandbox-test-file"]
    # Opened by root for writing, these would change the machine itself.
    machine = ["/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/vm/overcommit_memory"]  # fmt: skip
    project_files = [str(project / name) for name in ("tools.py", "new", ".env", "runs/new")]
    python = [f"{sys.prefix}/new", f"{sys.base_prefix}/new", str(Path(engines.__file__).with_name("new"))]  # fmt: skip
    outside = ["/new", "/usr/new", "/etc/new", "/etc/passwd", "/dev/new", "/run/new", "/var/new"]
    unseen = [str(tmp_path / "new"), str(Path.home() / "new")]
    refused = [*machine, *project_files, *python, *outside, *unseen]

    async def work() -> Any:
        said = json.loads(await call(tools, "write", paths=[*private, *refused]))
        await boxes.close()
        return said

    said = asyncio.run(work())
    assert {said[path] for path in private} == {"written"}
    # What lies beside the project is in the private /tmp, when it lies in /tmp at all.
    assert [path for path in refused if said[path] == "written"] in ([], [str(tmp_path / "new")])
    assert [path for path in private if Path(path).exists()] == []
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("bubblewrap")
def test_no_way_out_of_bubblewrap(project: Path) -> None:
    import socket

    tools, boxes = tools_of(project)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        async def work() -> list[str]:
            said = [await call(tools, "connect", host=host, port=port) for host in ("127.0.0.1", "192.0.2.1")]  # fmt: skip
            await boxes.close()
            return said

        local, remote = asyncio.run(work())
    assert local == "no: Connection refused"
    assert remote == "no: Network is unreachable"


@pytest.mark.usefixtures("bubblewrap")
def test_a_hang_in_bubblewrap_is_ended(project: Path) -> None:
    tools, boxes = tools_of(project)
    before = sleepers()

    async def work() -> None:
        await call(tools, "write", paths=[])
        started = time.monotonic()
        outcome = await tools.call("hang", {"arguments": {}}, timeout=1)
        assert outcome.status == "timeout"
        assert time.monotonic() - started < 2
        assert await call(tools, "write", paths=[]) == "{}"
        pids = (await boxes.host(tools.host, ToolContext(rollout_id="a"))).pids()
        await boxes.close()
        assert [pid for pid in pids if is_alive(pid)] == []

    asyncio.run(work())
    wait_until(lambda: not sleepers() - before)


@pytest.mark.usefixtures("bubblewrap")
def test_nothing_in_bubblewrap_outlives_a_killed_owner(project: Path) -> None:
    kill_the_owner(project, "")


# -- containers


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A container engine that can run something here, without fetching anything."""
    patch = pytest.MonkeyPatch()
    if os.geteuid() == 0 and "CONTAINERS_CONF" not in os.environ and shutil.which("podman"):
        # Inside a virtual machine or container, root may not be allowed Podman's own limits, nor crun its cgroups.
        conf = tmp_path_factory.mktemp("podman") / "containers.conf"
        runtime = '[engine]\nruntime = "runc"\n' if shutil.which("runc") else ""
        limits = 'default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]'
        conf.write_text(f"[containers]\n{limits}\n{runtime}")
        patch.setenv("CONTAINERS_CONF", str(conf))
    engines.forget()
    found = engines.find_containers()
    if isinstance(found, str):
        patch.undo()
        pytest.skip(found)
    yield found
    patch.undo()
    engines.forget()


@pytest.fixture(scope="module")
def container_project(
    engine: engines.ContainerEngine, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A project whose Dockerfile.python makes an image of this interpreter, from nothing."""
    folder = tmp_path_factory.mktemp("project")
    folder.chmod(0o755)
    fill(folder)
    copy_python(folder / "root")
    (folder / "Dockerfile.python").write_text(
        "FROM scratch\nCOPY root /\nENV PATH=/usr/bin:/bin IN_IMAGE=yes\n"
    )
    yield folder
    images = engine.ask("images", "--format", "{{.Repository}}:{{.Tag}}").text.split()
    for image in images:
        if re.search(r"(^|/)rnow/python:[0-9a-f]{16}$", image):
            engine.ask("rmi", image, timeout=60)


def copy_python(root: Path) -> None:
    """This interpreter, its standard library and the shared libraries that they need."""
    program = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib")).resolve()
    said = subprocess.run(
        ["ldd", program, "/bin/sh", "/bin/sleep", *library.glob("lib-dynload/*.so")],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    libraries = {Path(name) for name in re.findall(r"(?:=> |\t)(/\S+) \(0x", said)}
    for file in {program, Path("/bin/sh"), Path("/bin/sleep"), *libraries}:
        target = root / str(file)[1:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    left_out = ("site-packages", "dist-packages", "test", "__pycache__", "config-*", "idlelib", "tkinter", "ensurepip", "lib2to3")  # fmt: skip
    shutil.copytree(library, root / str(library)[1:], ignore=shutil.ignore_patterns(*left_out))
    (root / "usr/bin").mkdir(parents=True, exist_ok=True)
    if not (root / "usr/bin/python3").exists():
        (root / "usr/bin/python3").symlink_to(program)
    (root / "tmp").mkdir()


IMAGE = "local/python"


@pytest.mark.slow
@pytest.mark.usefixtures("witness")
def test_a_real_container(
    engine: engines.ContainerEngine,
    container_project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rnow.usercode.containers.MEMORY_GB", 1)
    warnings: list[str] = []
    tools, boxes = tools_of(
        container_project,
        log_dir=tmp_path / "logs",
        warn=warnings.append,
    )

    async def work() -> None:
        await boxes.prepare(tools.host, {IMAGE: "train.jsonl:1"}, plain=False)
        seen = json.loads((await call(tools, "look", image=IMAGE))[::-1])
        assert CANARY not in json.dumps(seen)
        assert (seen["dotenv"], seen["runs"], seen["git"], seen["data"]) == ("", [], [], "data")
        assert seen["environ"]["IN_IMAGE"] == "yes"
        assert not any(WITNESS in command for command in seen["processes"])
        assert re.search(r"^CapEff:\s+0+$", seen["status"], re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", seen["status"], re.MULTILINE)
        paths = ["/tmp/left", str(container_project / "new"), str(Path(engines.__file__).with_name("new"))]  # fmt: skip
        said = json.loads(await call(tools, "write", image=IMAGE, paths=paths))
        assert list(said.values()) == ["written", "Read-only file system", "Read-only file system"]
        assert await call(tools, "exists", image=IMAGE, path="/tmp/left") == "True"
        outcome = await tools.call("hang", {"arguments": {}}, timeout=1, docker=IMAGE)
        assert outcome.status == "timeout"
        before = listed(engine)
        assert len(before) == 1
        await boxes.release("a")
        assert listed(engine) == []
        # What comes later under the same name starts from the image again.
        assert await call(tools, "exists", image=IMAGE, path="/tmp/left") == "False"
        assert listed(engine) != before
        await boxes.close()
        assert listed(engine) == []

    try:
        asyncio.run(work())
    finally:
        asyncio.run(boxes.close())
    assert warnings == []


@pytest.mark.slow
def test_no_container_outlives_a_killed_owner(
    engine: engines.ContainerEngine, container_project: Path
) -> None:
    kill_the_owner(container_project, IMAGE)
    sweep(engine)
    assert listed(engine) == []


def listed(engine: engines.ContainerEngine) -> list[str]:
    answer = engine.ask("ps", "--all", "--quiet", "--filter", "label=rnow.owner")
    assert answer.ok, answer.text
    return answer.text.split()
