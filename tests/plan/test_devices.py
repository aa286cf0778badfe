"""How much main memory is left, as the kernel says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rnow.plan import devices
from rnow.plan.devices import cpu_memory

GB = 10**9


class Kernel:
    """A machine of 64 GB, 60 of them free, and its control groups."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root, self._own = folder / "cgroup", folder / "own"
        self._root.mkdir()
        monkeypatch.setattr(devices, "GROUPS", self._root)
        monkeypatch.setattr(devices, "OWN_GROUPS", self._own)
        monkeypatch.setattr(devices, "_meminfo_available", lambda: 60 * GB)
        pages = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 64 * GB // 1000}
        monkeypatch.setattr(devices.os, "sysconf", pages.__getitem__)

    def inside(self, *lines: str) -> None:
        """What /proc/self/cgroup says."""
        self._own.write_text("".join(f"{line}\n" for line in lines))

    def group(self, path: str, **files: str) -> None:
        """The files of a group, by their names with _ for the first dot."""
        folder = self._root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(tmp_path, monkeypatch)


def test_without_control_groups_it_is_the_machines(kernel: Kernel) -> None:
    assert cpu_memory() == (64 * GB, 60 * GB)
    kernel.inside("0::/user.slice", "strange", "")
    assert cpu_memory() == (64 * GB, 60 * GB)


def test_files_that_are_kept_in_memory_are_free(kernel: Kernel) -> None:
    """Of a streamed teacher's weights a container's memory is soon full; the next start must not take that for used."""
    kernel.inside("0::/")
    kernel.group(
        "",
        memory_max=str(32 * GB),
        memory_current=str(31 * GB),
        memory_stat=f"anon {2 * GB}\nactive_file {20 * GB}\ninactive_file {9 * GB}\nshmem 0",
    )
    assert cpu_memory() == (32 * GB, 30 * GB)


def test_the_older_interface_is_read_too(kernel: Kernel) -> None:
    kernel.inside("5:cpu,cpuacct:/", "3:memory:/docker/abc", "0::/elsewhere")
    kernel.group(
        "memory",  # a container sees its own group here, whatever it is called outside
        memory_limit_in_bytes=str(16 * GB),
        memory_usage_in_bytes=str(10 * GB),
        memory_stat=f"active_file 5\ntotal_active_file {1 * GB}\ntotal_inactive_file {3 * GB}",
    )
    assert cpu_memory() == (16 * GB, 10 * GB)


def test_every_group_around_the_process_counts(kernel: Kernel) -> None:
    kernel.inside("0::/user.slice/run-7.scope")
    kernel.group("", memory_stat="active_file 0")  # the root has no limit
    kernel.group("user.slice", memory_max=str(40 * GB), memory_current=str(39 * GB))
    kernel.group("user.slice/run-7.scope", memory_max=str(8 * GB), memory_current=str(2 * GB))
    assert cpu_memory() == (8 * GB, 1 * GB)
    kernel.group("user.slice", memory_max="max")
    assert cpu_memory() == (8 * GB, 6 * GB)
    kernel.group("user.slice/run-7.scope", memory_current=str(9 * GB))
    assert cpu_memory() == (8 * GB, 0)


def test_a_limit_above_what_there_is_changes_nothing(kernel: Kernel) -> None:
    kernel.inside("3:memory:/", "0::/")
    kernel.group("", memory_max="max", memory_current="5")
    kernel.group("memory", memory_limit_in_bytes=str(2**63 - 4096), memory_usage_in_bytes="5")
    assert cpu_memory() == (64 * GB, 60 * GB)
