"""Programs that pass for docker, podman and bwrap. What they are asked to run they run here, on this machine, so that starting,
entering, ending and removing can be tested to the end; what they were asked is written down.

``FakeEngines(tmp_path).install("docker", ...)`` writes them into a folder that is to be all of PATH. Files in ``state`` change
what they do: ``down`` (the daemon does not answer), ``no-cpus`` (CPUs cannot be limited), ``denied`` (bwrap may not), ``kept``
(containers that ended stay on the list), ``old-bwrap`` (without its newer options).
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

_ENGINE = '''
import json, os, signal, subprocess, sys, time
from pathlib import Path

NAME, STATE, PYTHON = {name!r}, Path({state!r}), {python!r}
CONTAINERS, IMAGES = STATE / "containers", STATE / "images"
VALUES = """--name --label --security-opt --cap-drop --memory --memory-swap --pids-limit --cpus --mount --entrypoint --pull
            --tag --file --format --filter""".split()


def is_on(flag):
    return (STATE / flag).exists()


def fail(text, code=1):
    sys.stdout.flush()
    sys.stderr.write(text + chr(10))
    sys.exit(code)


def known():
    return IMAGES.read_text().split() if IMAGES.exists() else []


def parsed(arguments):
    options = {{}}
    while arguments and arguments[0].startswith("--"):
        option = arguments.pop(0)
        value = arguments.pop(0) if option in VALUES else ""
        options.setdefault(option, []).append(value)
    return options, arguments


def run(options, rest):
    image, command = rest[0], rest[1:]
    name = options["--name"][0]
    if image not in known():
        fail("no such image", 125)
    if is_on("no-cpus") and "--cpus" in options:
        fail("the requested cgroup controller `cpu` is not available", 126)
    if "empty" in image:
        fail('exec: "python3": executable file not found in $PATH', 127)
    if "old" in image:
        print(json.dumps({{"version": [3, 8, 2], "problem": None}}), flush=True)
        sys.stdin.read()
        sys.exit(0)
    child = subprocess.Popen([PYTHON, *command], start_new_session=True)
    record = CONTAINERS / name
    record.write_text(json.dumps({{"label": options["--label"][0].partition("=")[2], "pids": [child.pid]}}))
    code = child.wait()
    if not is_on("kept"):
        record.unlink(missing_ok=True)
    sys.exit(code)


def enter(options, rest):
    record = CONTAINERS / rest[0]
    if not record.exists():
        fail("no such container")
    child = subprocess.Popen([PYTHON if rest[1] == "python3" else rest[1], *rest[2:]], start_new_session=True)
    held = json.loads(record.read_text())
    held["pids"].append(child.pid)
    record.write_text(json.dumps(held))
    sys.exit(child.wait())


def remove(name):
    record = CONTAINERS / name
    if record.exists():
        for pid in json.loads(record.read_text())["pids"]:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        record.unlink(missing_ok=True)


def build(options, rest):
    text = Path(options["--file"][0]).read_text()
    seen = sorted(str(path.relative_to(rest[0])) for path in Path(rest[0]).rglob("*") if path.is_file())
    (STATE / "context").write_text(chr(10).join(seen))
    if "RUN sleep" in text:
        time.sleep(600)
    for number in range(30):
        print("step", number)
    if "RUN false" in text:
        fail("the command false returned 1")
    with IMAGES.open("a") as file:
        file.write(options["--tag"][0] + chr(10))


arguments = sys.argv[1:]
with (STATE / "calls").open("a") as file:
    file.write(json.dumps([NAME, *arguments]) + chr(10))
if is_on("down") and NAME == "docker":
    fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock")
word = arguments.pop(0)
if word == "image":
    arguments.pop(0)
    sys.exit(0 if arguments[0] in known() else 1)
if word == "pull":
    if "nowhere" in arguments[0]:
        fail("manifest unknown")
    with IMAGES.open("a") as file:
        file.write(arguments[0] + chr(10))
    sys.exit(0)
options, rest = parsed(arguments)
if word == "run":
    run(options, rest)
elif word == "exec":
    enter(options, rest)
elif word == "build":
    build(options, rest)
elif word == "rm":
    remove(rest[0])
elif word == "ps":
    print(chr(10).join(sorted(path.name for path in CONTAINERS.iterdir())))
elif word == "inspect":
    print(json.loads((CONTAINERS / rest[0]).read_text())["label"])
'''

_BWRAP = """
import json, os, sys
from pathlib import Path

STATE = Path({state!r})
arguments = sys.argv[1:]
if arguments == ["--help"]:
    print("    --tmpfs DEST   Mount new tmpfs on DEST")
    if not (STATE / "old-bwrap").exists():
        print("    --size BYTES   Set size of next argument")
        print("    --disable-userns   No further namespaces")
    sys.exit(0)
with (STATE / "calls").open("a") as file:
    file.write(json.dumps(["bwrap", *arguments]) + chr(10))
if (STATE / "denied").exists():
    sys.stderr.write("bwrap: No permissions to create new namespace" + chr(10))
    sys.exit(1)
cut = arguments.index("--")
for place, word in enumerate(arguments[:cut]):
    if word == "--setenv":
        os.environ[arguments[place + 1]] = arguments[place + 2]
os.execv(arguments[cut + 1], arguments[cut + 1 :])
"""


class FakeEngines:
    """The programs, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "programs"
        self.state = folder / "state"
        self.programs.mkdir()
        (self.state / "containers").mkdir(parents=True)
        for name in ("env", "true"):
            found = shutil.which(name)
            assert found is not None
            (self.programs / name).symlink_to(found)

    def install(self, *names: str) -> None:
        """Put these (docker, podman, bwrap) on the PATH."""
        for name in names:
            text = _BWRAP if name == "bwrap" else _ENGINE
            text = text.format(name=name, state=str(self.state), python=sys.executable)
            path = self.programs / name
            # Isolated: what a scrubbed environment lacks must not matter. By way of sh, whose second line is a string to
            # Python: the first line of a script cannot name an interpreter whose path has blanks.
            start = f"#!/bin/sh\n''''exec \"{sys.executable}\" -IS \"$0\" \"$@\" # '''\n"
            path.write_text(start + text, encoding="utf-8")
            path.chmod(0o755)

    def switch(self, flag: str) -> None:
        """Change what they do from now on."""
        (self.state / flag).touch()

    def have(self, *images: str) -> None:
        """Images that are there already."""
        with (self.state / "images").open("a", encoding="utf-8") as file:
            file.writelines(f"{image}\n" for image in images)

    def calls(self, word: str | None = None) -> list[list[Any]]:
        """What they were asked, as [program, *arguments]; of one word, when given."""
        path = self.state / "calls"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        every = [json.loads(line) for line in lines]
        return [call for call in every if word is None or call[1] == word]

    def containers(self) -> list[str]:
        """Names of those on the list."""
        return sorted(path.name for path in (self.state / "containers").iterdir())

    def pids(self) -> list[int]:
        """Of everything that was started in containers that are on the list."""
        records = [json.loads(path.read_text()) for path in (self.state / "containers").iterdir()]
        return [pid for record in records for pid in record["pids"]]

    def add_container(self, name: str, label: str) -> None:
        """One that somebody left behind."""
        record = {"label": label, "pids": []}
        (self.state / "containers" / name).write_text(json.dumps(record))


def is_alive(pid: int) -> bool:
    """Whether a process lives; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return text.rpartition(b")")[2].split()[0] not in (b"Z", b"X") and os.getpid() != pid
