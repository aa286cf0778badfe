"""What this machine has left: memory of its devices, main memory, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rnow.disk.folder import nearest

MARGIN = 0.05
"""Of a card, kept free."""
GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """A device and its memory in bytes; ``free_bytes`` is what this process could still take."""

    device: str
    name: str
    total_bytes: int
    free_bytes: int

    @property
    def on_gpu(self) -> bool:
        """Whether this is a CUDA card, or several."""
        return self.device != "cpu"

    @property
    def margin(self) -> int:
        """Bytes that no plan fills: what an allocator loses between its blocks, and what no estimate knows."""
        return round(MARGIN * self.total_bytes) if self.on_gpu else 0

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        return self.free_bytes - self.margin


def describe_device(name: str, cards: Sequence[int] = ()) -> DeviceInfo:
    """Name and memory of a torch device; any other name stands for ``cards`` together."""
    import torch

    if name == "cpu" or not torch.cuda.is_available():
        total, free = cpu_memory()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return DeviceInfo(
            device=name, name=f"CPU, {cores} cores", total_bytes=total, free_bytes=free
        )
    if name.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(name)
        title = torch.cuda.get_device_name(name)
        return DeviceInfo(device=name, name=title, total_bytes=total, free_bytes=free)
    found = [torch.cuda.mem_get_info(card) for card in cards]
    return DeviceInfo(
        device=name,
        name=f"{len(found)} GPUs",
        total_bytes=sum(total for _, total in found),
        free_bytes=sum(free for free, _ in found),
    )


def cpu_memory() -> tuple[int, int]:
    """(total, available) bytes for this process: the machine's, or those of its container or control group if that is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo_available() or page * os.sysconf("SC_AVPHYS_PAGES")
    lower = [(limit, left) for limit, left in _limits() if limit < total]
    return (
        min([total, *(limit for limit, _ in lower)]),
        max(0, min([free, *(left for _, left in lower)])),
    )


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that ``folder`` is on, or will be."""
    return shutil.disk_usage(nearest(folder)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether two folders are, or will be, on one disk."""
    return nearest(one).stat().st_dev == nearest(other).stat().st_dev


def _meminfo_available() -> int | None:
    """The kernel's own figure, which counts caches it would give up."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _limits() -> Iterator[tuple[int, int]]:
    """Of each control group around this process, in either version of the kernel's interface: its limit, and how much of that may
    still be taken. Files that the kernel keeps in memory count as free: it gives them up."""
    try:
        lines = OWN_GROUPS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            base, limit_name, used_name, prefix = GROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base, prefix = GROUPS / "memory", "total_"
            limit_name, used_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be one of outside, and only the base is there.
        own = base / path.strip("/")
        for group in (own, *(parent for parent in own.parents if parent.is_relative_to(base))):
            limit, used = _numbers(group / limit_name), _numbers(group / used_name)
            if "" in limit and "" in used:
                kept = _numbers(group / "memory.stat")
                files = sum(kept.get(f"{prefix}{kind}", 0) for kind in ("active_file", "inactive_file"))  # fmt: skip
                yield limit[""], limit[""] - max(0, used[""] - files)


def _numbers(file: Path) -> dict[str, int]:
    """The numbers in a file of the kernel by their names; that of a line without one is called "". Empty where it does not say."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return {}
    named = (line.rpartition(" ") for line in lines)
    return {name: int(number) for name, _, number in named if number.isdecimal()}
