"""Where functions with ``sandbox=True`` run: in a container of the row's image, else in bubblewrap, never on this machine as
it is. docs/adr/0012."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rnow.errors import InputError, TemporaryError
from rnow.types import ToolContext
from rnow.usercode.bubblewrap import BubblewrapView
from rnow.usercode.containers import (
    Container,
    ContainerFailed,
    limit_arguments,
    mount_arguments,
    sweep,
)
from rnow.usercode.engines import (
    Bubblewrap,
    ContainerEngine,
    find_bubblewrap,
    find_containers,
)
from rnow.usercode.functions import CannotImport, FunctionInfo, package_of
from rnow.usercode.host import CodeHost
from rnow.usercode.images import Images, dockerfile_of
from rnow.usercode.visible import check_project

DEFAULT_IMAGE = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
"""For rows without an image where there is no bubblewrap. It has Python and nothing else."""

MAX_CONTAINERS = 32
"""At once, the one that rollouts without an image may share included. Rollouts that come later wait for one to be released."""

_START_SECONDS = 120.0  # for a container to come up
_WAIT_SECONDS = 1800.0  # for one to become free

_SHARED = ""  # the rollout of what all rollouts share
_TITLE = "No sandbox"
INSTALL_BUBBLEWRAP = "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap)"
INSTALL_CONTAINERS = (
    "install Docker or Podman and start it (`docker info` or `podman info` must work)"
)
_OF_LIMITS = ("cgroup", "controller", "cpu", "pids", "memory limit", "resource limit")


def check_sandbox(
    functions: Iterable[FunctionInfo], images: Mapping[str, str], folder: Path
) -> list[str]:
    """What can be said before anything runs about where sandboxed code will run.

    Args:
        functions: of tools.py and rewards.py.
        images: every image that a row names, with the place of the first (``train.jsonl:12``).
        folder: the project.

    Returns:
        Sentences to show: what the sandbox will be, and what may not be meant.

    Raises:
        InputError: there is nothing that could run them, or a Dockerfile is missing.
    """
    sandboxed = [info for info in functions if info.sandbox]
    notices = []
    containers = find_containers() if images or sandboxed else ""
    for image, where in images.items():
        if isinstance(containers, str):
            raise _no_containers(image, where, containers)
        dockerfile_of(image, folder, where)
    if images and not sandboxed:
        notices.append(
            "rows name images, but no function has sandbox=True: all of them run on this machine"
        )
    if sandboxed:
        check_project(folder)
        bubblewrap = find_bubblewrap()
        if isinstance(bubblewrap, Bubblewrap):
            notices.append("functions with sandbox=True run in bubblewrap, without a network")
        elif isinstance(containers, str):
            raise _no_sandbox(bubblewrap, containers, sandboxed[0].place)
        else:
            notices.append(
                f"functions with sandbox=True run in {containers.name} ({DEFAULT_IMAGE}), where packages of this "
                f"environment are not: {bubblewrap}"
            )
        if images and isinstance(containers, ContainerEngine):
            notices[-1] += f"; in the image of the row ({containers.name}) where it names one"
    return notices


def _no_containers(image: str, where: str | None, reason: str) -> InputError:
    return InputError(
        f'the image "{image}" needs Docker or Podman',
        title=_TITLE,
        where=where,
        why=reason,
        fix=f'{INSTALL_CONTAINERS}, or remove "docker" from the rows',
    )


def _no_sandbox(bubblewrap: str, containers: str, where: str | None) -> InputError:
    return InputError(
        "sandbox=True needs bubblewrap, Docker or Podman",
        title=_TITLE,
        where=where,
        why=f"{bubblewrap}; {containers}",
        fix=f"{INSTALL_BUBBLEWRAP}, or remove sandbox=True to run it in the tool host of this machine",
    )


@dataclass(slots=True, eq=False)
class _Lease:
    """The container of one rollout, and what runs in it. ``starting`` ends when the container is there."""

    image: str
    starting: asyncio.Task[Container]
    hosts: dict[Path, CodeHost] = field(default_factory=dict)


class Sandboxes:
    """The sandboxes of a run. One for tools.py and rewards.py together: in a rollout they share a container, so that a reward
    sees what the tools left. For one event loop at a time.

    Args:
        folder: the project.
        log_dir: where the logs of builds and containers go; None keeps none.
        warn: told when a container cannot be limited as it should.
    """

    def __init__(
        self,
        folder: Path,
        *,
        log_dir: Path | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.folder = folder.absolute()
        self._log_dir = log_dir
        self._warn = warn
        every = limit_arguments()
        # What rootless engines may not be able to limit is left out from the end, and said.
        self._limits: list[Sequence[str]] = [every, every[:-2], []]
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._engine: ContainerEngine | None = None
        self._images: Images | None = None
        self._finding = threading.RLock()
        self._leases: dict[str, _Lease] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._shared: dict[Path, CodeHost] = {}

    @property
    def scratch(self) -> Path:
        """A folder for what only lives as long as this."""
        with self._finding:
            if self._scratch is None:
                self._scratch = tempfile.TemporaryDirectory(prefix="rnow-sandbox-")
                folder = Path(self._scratch.name)
                folder.chmod(0o755)
                (folder / "empty").touch(mode=0o444)
                (folder / "nothing").mkdir(mode=0o555)
            return Path(self._scratch.name)

    async def host(self, host: CodeHost, context: ToolContext) -> CodeHost:
        """``host`` for the sandboxed calls of this rollout: in its container where its row names an image; else in bubblewrap,
        or in a container of ``DEFAULT_IMAGE`` where there is none, shared by all rollouts.

        Raises:
            InputError: there is no sandbox for it, or the image cannot be used.
            TemporaryError: its container does not come up, or none became free.
        """
        if context.docker is not None:
            key, env = context.rollout_id, context.docker_env
            return await self._container_host(host, key, context.docker, env)
        bubblewrap = find_bubblewrap()
        if isinstance(bubblewrap, str):
            containers = find_containers()
            if isinstance(containers, str):
                raise _no_sandbox(bubblewrap, containers, host.file.name)
            return await self._container_host(host, _SHARED, DEFAULT_IMAGE, {})
        if host.file not in self._shared:
            view = BubblewrapView(bubblewrap, self.folder, self.scratch / "empty")
            self._shared[host.file] = host.elsewhere(view.wrap, sys_path=view.sys_path)
        return self._shared[host.file]

    async def prepare(
        self, host: CodeHost, images: Mapping[str, str], *, plain: bool = True
    ) -> None:
        """Import the file of ``host`` once in every sandbox that will be asked for, so that what is wrong shows before training.

        Args:
            images: those that rows name, with the place of the first.
            plain: whether there are rows without one.

        Raises:
            InputError: an image that cannot be built, fetched or used, or the file cannot be imported there.
        """
        if plain:
            inside = await self.host(host, ToolContext(rollout_id=_SHARED))
            await asyncio.to_thread(inside.start)
        for image, where in images.items():
            trial = f"trial of {image}"
            try:
                inside = await self._container_host(host, trial, image, {}, where)
                await asyncio.to_thread(inside.start)
            except asyncio.CancelledError:
                self._stop_images()
                raise
            except CannotImport as error:
                raise CannotImport(
                    f'{error.message}, in the image "{image}"',
                    title=error.title,
                    where=error.where,
                    why=error.why,
                    details=error.details,
                    fix=f"install {package_of(error.module)} in the image, or import it in the functions that use it"
                    if error.module
                    else error.fix,
                ) from None
            finally:
                await self.release(trial)

    def runs(self, context: ToolContext) -> bool:
        """Whether the container for the calls of this rollout lives."""
        lease = self._leases.get(_SHARED if context.docker is None else context.rollout_id)
        return lease is not None and _living(lease)

    async def release(self, rollout_id: str) -> None:
        """The rollout is over: end its container, if it has one, and what runs in it. Never raises."""
        lease = self._leases.pop(rollout_id, None)
        if lease is not None:
            await _end(lease)
            self._wake()

    def _stop_images(self) -> None:
        """End a build or download that runs: nobody waits for it any more."""
        if self._images is not None:
            self._images.stop()

    async def close(self) -> None:
        """End everything; idempotent. What is asked for afterwards starts anew."""
        self._stop_images()
        shared, self._shared = self._shared, {}
        leases = list(self._leases)
        await asyncio.gather(
            *(self.release(rollout_id) for rollout_id in leases),
            *(asyncio.to_thread(host.close) for host in shared.values()),
            return_exceptions=True,
        )
        self._images = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    # -- containers

    async def _container_host(
        self,
        host: CodeHost,
        rollout_id: str,
        image: str,
        env: Mapping[str, str],
        where: str | None = None,
    ) -> CodeHost:
        """``host`` in the container of this rollout, which is started first when it does not run."""
        container, lease = await self._container(rollout_id, image, host.file, where)
        if host.file not in lease.hosts:
            lease.hosts[host.file] = host.elsewhere(container.wrap, env=env)
        return lease.hosts[host.file]

    async def _container(
        self, rollout_id: str, image: str, file: Path, where: str | None
    ) -> tuple[Container, _Lease]:
        lease = self._leases.get(rollout_id)
        if lease is not None and (lease.image != image or not _living(lease)):
            await self.release(rollout_id)
        while (lease := self._leases.get(rollout_id)) is None:
            if await self._room(rollout_id):
                starting = asyncio.ensure_future(asyncio.to_thread(self._start, image, file, where))
                self._leases[rollout_id] = _Lease(image, starting)
        try:
            # Shared by the calls of the rollout: one that is cancelled does not end it for the others.
            return await asyncio.shield(lease.starting), lease
        except Exception:
            if self._leases.get(rollout_id) is lease:
                del self._leases[rollout_id]
                self._wake()
            raise

    async def _room(self, rollout_id: str) -> bool:
        """Wait until there is room for a container. False: look again, things have changed."""
        if rollout_id == _SHARED or len(self._leases) < MAX_CONTAINERS:
            return True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait_for(turn, _WAIT_SECONDS)
        except TimeoutError:
            raise TemporaryError(
                f"no container became free within {_WAIT_SECONDS:g} s: {MAX_CONTAINERS} run at once",
                fix="sample fewer rollouts at a time (data.batch_size, data.group_size)",
            ) from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._wake()  # it was our turn: it is the next one's now
            raise
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(turn)
        return False

    def _wake(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done() and not turn.get_loop().is_closed():
                turn.set_result(None)
                return

    def _start(self, image: str, file: Path, where: str | None) -> Container:
        """In a thread."""
        engine, images = self._found(image, where)
        name = images.ready(image, where=where)
        mounts = mount_arguments(
            self.folder, empty=self.scratch / "empty", nothing=self.scratch / "nothing"
        )
        while True:
            limits = self._limits[0]
            container = Container(
                engine,
                name,
                file=file,
                arguments=[*limits, *mounts],
                log=(self._log_dir or self.scratch) / "containers.log",
            )
            try:
                container.start(timeout=_START_SECONDS, where=where)
            except ContainerFailed as error:
                said = " ".join(error.details).lower()
                if len(self._limits) == 1 or not any(word in said for word in _OF_LIMITS):
                    raise
                if self._limits[0] is limits:  # others may have found out meanwhile
                    del self._limits[0]
                    weaker = self._limits[0]
                    lost = "CPUs" if weaker else "memory, processes and CPUs"
                    self._warn(
                        f"{engine.name} cannot limit the {lost} of a container here: {error.details[-1]}"
                    )
            else:
                return container

    def _found(self, image: str, where: str | None) -> tuple[ContainerEngine, Images]:
        with self._finding:
            if self._engine is None:
                found = find_containers()
                if isinstance(found, str):
                    raise _no_containers(image, where, found)
                sweep(found)
                self._engine = found
            if self._images is None:
                self._images = Images(self._engine, self.folder, (self._log_dir or self.scratch))
            return self._engine, self._images


def _living(lease: _Lease) -> bool:
    starting = lease.starting
    if not starting.done():  # unless the loop that started it has ended meanwhile
        return starting.get_loop() is asyncio.get_running_loop()
    return not starting.cancelled() and starting.exception() is None and starting.result().alive()


async def _end(lease: _Lease) -> None:
    """A start under way is waited for: only then is there something to end."""
    container = None
    with contextlib.suppress(BaseException):
        if lease.starting.done():
            container = lease.starting.result()
        elif lease.starting.get_loop() is asyncio.get_running_loop():
            container = await asyncio.shield(lease.starting)
    work = [asyncio.to_thread(host.close) for host in lease.hosts.values()]
    if container is not None:
        work.append(asyncio.to_thread(container.remove))
    await asyncio.gather(*work, return_exceptions=True)
