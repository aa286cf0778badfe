"""User code in bubblewrap: a read-only view of Python and the project, a private /tmp, no network, no other processes."""

from __future__ import annotations

from pathlib import Path

from rnow.usercode.engines import Bubblewrap, isolation
from rnow.usercode.visible import (
    PACKAGE,
    check_project,
    hidden_in,
    import_path,
    outermost,
    python_folders,
    python_links,
)

TMP_BYTES = 2 << 30
ENVIRONMENT = {"HOME": "/tmp/home", "TMPDIR": "/tmp", "XDG_CACHE_HOME": "/tmp/home/.cache"}
"""What the code inside finds instead of ours."""

_SYSTEM = ("/usr", "/nix/store", "/gnu/store")
_LINKED = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = """
    alternatives ca-certificates.conf fonts group host.conf hosts ld.so.cache ld.so.conf ld.so.conf.d localtime
    locale.alias magic mime.types nsswitch.conf os-release passwd pki/tls/certs protocols services ssl/certs
    ssl/openssl.cnf timezone
""".split()  # noqa: SIM905
_UNSET = """
    DOCKER_HOST DOCKER_CONTEXT DOCKER_CONFIG CONTAINER_HOST XDG_RUNTIME_DIR XDG_CONFIG_HOME XDG_DATA_HOME HTTP_PROXY
    HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
""".split()  # noqa: SIM905


# Run by root, the code inside is root to the files of /proc still: these must not be written, or not be read, as in containers.
_PROC_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")
_PROC_HIDDEN = """
    acpi asound kcore keys latency_stats sched_debug scsi timer_list
""".split()  # noqa: SIM905


class BubblewrapView:
    """What code of one project sees inside bubblewrap.

    Args:
        folder: the project; shown read-only under its own path, without ``.env`` and earlier runs.
        empty: an empty file, shown in place of those that are hidden. It must live as long as this is used.

    Raises InputError for a project that is a home folder.
    """

    def __init__(self, bubblewrap: Bubblewrap, folder: Path, empty: Path) -> None:
        check_project(folder)
        self._bubblewrap = bubblewrap
        self._folder = folder
        self._empty = empty
        self.sys_path = import_path(folder)

    def wrap(self, command: list[str]) -> list[str]:
        """The command that runs ``command`` inside; its stdin and stdout stay as they are."""
        return [
            self._bubblewrap.path,
            *isolation(self._bubblewrap),
            *self._system(),
            *self._private(),
            *self._shown(),
            *(part for name in _UNSET for part in ("--unsetenv", name)),
            *(part for item in ENVIRONMENT.items() for part in ("--setenv", *item)),
            # The root that the above was mounted on is writable; mounts below it keep what they are.
            *("--remount-ro", "/"),
            *("--chdir", str(self._folder)),
            "--",
            *command,
        ]

    def _system(self) -> list[str]:
        arguments = []
        for name in _SYSTEM:
            if Path(name).is_dir():
                arguments += ["--ro-bind", name, name]
        for name in _LINKED:
            path = Path(name)
            if path.is_symlink():
                arguments += ["--symlink", str(path.readlink()), name]
            elif path.is_dir():
                arguments += ["--ro-bind", name, name]
        for name in _ETC:
            arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        return arguments

    def _private(self) -> list[str]:
        size = ["--size", str(TMP_BYTES)] if "--size" in self._bubblewrap.options else []
        return [
            *("--proc", "/proc"),
            *self._proc(),
            *("--dev", "/dev"),
            *(*size, "--tmpfs", "/dev/shm"),
            *("--remount-ro", "/dev"),
            *(*size, "--tmpfs", "/tmp"),
            *("--dir", ENVIRONMENT["HOME"]),
            *("--dir", "/run"),
            *("--dir", "/var"),
            *("--symlink", "/tmp", "/var/tmp"),
        ]

    def _proc(self) -> list[str]:
        arguments = []
        for path in (Path("/proc", name) for name in _PROC_READ_ONLY):
            arguments += ["--ro-bind-try", str(path), str(path)]
        for path in (Path("/proc", name) for name in _PROC_HIDDEN):
            if path.is_dir():
                arguments += ["--tmpfs", str(path), "--remount-ro", str(path)]
            elif path.exists():
                arguments += ["--ro-bind", str(self._empty), str(path)]
        return arguments

    def _shown(self) -> list[str]:
        sources = [Path(entry) for entry in self.sys_path]
        projects = [self._folder, *(path for path in sources if path.is_dir())]
        paths = [*python_folders(), PACKAGE, *projects, *sources, *python_links()]
        # A path with links in it must exist as it is written, and as it is.
        paths += [path.resolve() for path in paths]
        shown = [path for path in outermost(paths) if not _in_system(path)]
        arguments = [part for path in shown for part in ("--ro-bind", str(path), str(path))]
        hidden = hidden_in(projects, shown)
        for path in hidden.folders:
            arguments += ["--tmpfs", str(path), "--remount-ro", str(path)]
        for path in hidden.files:
            arguments += ["--ro-bind", str(self._empty), str(path)]
        return arguments


def _in_system(path: Path) -> bool:
    return any(path.is_relative_to(name) for name in (*_SYSTEM, *_LINKED))
