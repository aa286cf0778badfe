"""`rnow doctor` on machines that are well and on machines that are not: broken packages, old drivers, full cards, no hub."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.models.scripted_hub import ScriptedHub, serve

from rnow.setup import doctor, probes
from rnow.setup.probes import PROBES, Finding
from rnow.text.install import install_command

SMI = """\
#!/bin/sh
case "$1" in
  --query-gpu=driver_version) echo "{driver}";;
  --query-gpu=*) printf '%s\\n' {cards};;
  --query-compute-apps=*) printf '%s\\n' {held};;
esac
"""
CPU_TORCH = """
from types import SimpleNamespace
__version__ = "2.99"
version = SimpleNamespace(cuda={cuda!r})
cuda = SimpleNamespace(is_available=lambda: False)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """``package("torch", "raise OSError")``: a module that hides the real one from processes that are started."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(name: str, text: str) -> None:
        (folder / f"{name}.py").write_text(text)

    return write


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``smi(driver=..., cards=[...], held=[...])``: an nvidia-smi that says so."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def write(driver: str = "580.65.06", cards: list[str] | None = None, held: list[str] | None = None) -> None:  # fmt: skip
        texts = {"cards": cards or [], "held": held or []}
        quoted = {name: " ".join(f"'{line}'" for line in lines) for name, lines in texts.items()}
        (folder / "nvidia-smi").write_text(SMI.format(driver=driver, **quoted))
        (folder / "nvidia-smi").chmod(0o755)

    return write


def examined(folder: Path, *names: str) -> list[Finding]:
    return list(doctor.examine(folder, names))


def in_words(found: list[Finding]) -> list[tuple[str, str]]:
    return [(one.name, one.status) for one in found]


def test_a_machine_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "secret" * 5)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / ".env").write_text("SEARCH_KEY=hush-hush-1\n")
    found = examined(tmp_path, "python", "cards", "disk", "tokens")
    assert [name for name, _ in in_words(found)] == [
        "Python",
        "rnow",
        "models' disk",
        "runs' disk",
        "tokens",
    ]
    assert found[0].text.startswith(f"3.{sys.version_info.minor}.")
    assert str(tmp_path / "hf") in found[2].text
    assert found[-1].text == "HF_TOKEN (environment), SEARCH_KEY (.env)"
    assert not any("secret" in f"{one}" or "hush" in f"{one}" for one in found)


@pytest.mark.parametrize(
    ("torch", "text"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os\nos.kill(os.getpid(), 11)", "signal SIGSEGV"),
        ("import sys\nsys.exit('no')", "SystemExit: no"),
        ("import os, sys\nsys.stderr.write('bad day')\nos._exit(3)", "exit code 3: bad day"),
        ("print('hello')\nx =", "SyntaxError"),
        ("def __getattr__(name): raise RuntimeError('\\ud800 odd')", "odd"),
    ],
)
def test_a_broken_torch_is_one_line_and_ends_nothing(
    tmp_path: Path, package: Callable[[str, str], None], torch: str, text: str
) -> None:
    package("torch", torch)
    found = examined(tmp_path, "torch", "tokens")
    assert in_words(found) == [("torch", "fault"), ("tokens", "ok")]
    assert text in found[0].text
    assert "\n" not in found[0].text
    assert found[0].fix.startswith("pip install --force-reinstall -c ")


def test_a_broken_vllm_beside_a_card(
    tmp_path: Path, package: Callable[[str, str], None], smi: Callable[..., None]
) -> None:
    package("vllm", "print('loading')\nraise ImportError('libcuda.so.1: no such file')")
    unmet, found = examined(tmp_path, "vllm")
    assert unmet.status == "warning"
    assert {"vllm is not installed", "vllm-bnb-plugin is not installed"} == {
        *unmet.text.split("; ")
    }
    assert (found.name, found.status) == ("vLLM", "fault")
    assert "libcuda.so.1" in found.text
    assert found.fix == install_command("vllm")
    (tmp_path / "packages" / "vllm.py").unlink()
    smi(driver="580.65.06")
    (found,) = examined(tmp_path, "vllm")
    assert (found.status, found.fix) == ("warning", install_command("vllm"))


def test_a_probe_that_hangs_is_ended_with_all_that_it_started(
    tmp_path: Path, package: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "child"
    package(
        "torch",
        "import subprocess, time\n"
        f"child = subprocess.Popen(['sleep', '60'])\nopen({str(mark)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)",
    )
    monkeypatch.setattr(doctor, "PROBES", {"torch": replace(PROBES["torch"], seconds=2.0)})
    (found,) = examined(tmp_path, "torch")
    assert (found.status, found.text) == ("fault", "no answer within 2 s")
    deadline = time.monotonic() + 5
    while Path(f"/proc/{mark.read_text()}").exists() and time.monotonic() < deadline:
        state = Path(f"/proc/{mark.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{mark.read_text()}").exists()


def test_ctrl_c_waits_for_none(tmp_path: Path, package: Callable[[str, str], None]) -> None:
    package("torch", "import time\ntime.sleep(60)")
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        examined(tmp_path, "torch")
    assert time.monotonic() - began < 20


def test_a_torch_for_the_cpu_beside_a_card(
    tmp_path: Path, package: Callable[[str, str], None], smi: Callable[..., None]
) -> None:
    smi(driver="580.65.06")
    package("torch", CPU_TORCH.format(cuda=None))
    torch, cuda = examined(tmp_path, "torch")
    assert (torch.status, torch.text) == ("ok", "2.99, built for the CPU")
    assert (cuda.status, cuda.name) == ("warning", "CUDA")
    assert "there is an NVIDIA card (driver 580.65.06)" in cuda.text
    assert "constraints-cuda.txt torch" in cuda.fix


@pytest.mark.parametrize(
    ("cuda", "driver", "fault"),
    [
        ("13.0", "575.51.03", "too old for CUDA 13.0, which torch is built for: 580 or newer"),
        ("12.8", "470.1", "525 or newer"),
        ("12.8", "535.104.05", "torch (CUDA 12.8) sees no card, though there is a driver"),
    ],
)
def test_a_driver_against_the_wheel(
    tmp_path: Path,
    package: Callable[[str, str], None],
    smi: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    cuda: str,
    driver: str,
    fault: str,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    smi(driver=driver)
    package("torch", CPU_TORCH.format(cuda=cuda))
    found = examined(tmp_path, "torch")[1]
    assert found.status == "fault"
    assert fault in found.text
    assert found.fix


def test_cards_that_are_hidden(
    tmp_path: Path,
    package: Callable[[str, str], None],
    smi: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    smi()
    package("torch", CPU_TORCH.format(cuda="13.0"))
    found = examined(tmp_path, "torch")[1]
    assert (found.status, found.fix) == ("warning", "unset CUDA_VISIBLE_DEVICES")


def test_who_holds_a_card(tmp_path: Path, smi: Callable[..., None]) -> None:
    smi(
        cards=[
            "0, GPU-a, NVIDIA H200, 143771, 100000",
            "1, GPU-b, NVIDIA H200, 143771, 600",
            "2, GPU-c, NVIDIA H200, 143771, 90000",
        ],
        held=[f"GPU-a, {os.getpid()}, 99000", "GPU-a, 4194304, [N/A]", "GPU-b, 7, 500"],
    )
    first, second, third = probes.look_at_cards(tmp_path)
    assert (first.name, first.status) == ("memory of cuda:0", "warning")
    assert first.text.startswith("45.9 of 150.8 GB free (NVIDIA H200); held by process")
    assert f"process {os.getpid()} (" in first.text
    assert "103.8 GB" in first.text
    assert f"kill {os.getpid()} 4194304" in first.fix
    assert second.status == "ok"
    assert third.status == "warning"
    assert "cannot be seen from here" in third.text


def test_an_nvidia_smi_that_fails(tmp_path: Path, smi: Callable[..., None]) -> None:
    smi()
    script = tmp_path / "bin" / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'Driver/library version mismatch' >&2\nexit 18\n")
    (found,) = probes.look_at_cards(tmp_path)
    assert found.status == "fault"
    assert "Driver/library version mismatch" in found.text


def test_requirements_that_are_not_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["rich>=999", "no-such-package>=1", "typer>=0.1", "vllm>=1; extra == 'vllm'"]
    monkeypatch.setattr(probes.metadata, "requires", lambda name: wanted)
    found = next(one for one in probes.look_at_python(tmp_path) if one.name == "rnow")
    assert found.status == "fault"
    assert "and rnow needs >=999" in found.text
    assert "no-such-package is not installed" in found.text
    assert "typer" not in found.text
    assert "vllm" not in found.text
    assert found.fix.startswith("pip install -c ")


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((30e9, "ok"), (3e9, "warning"), (1e8, "fault")):
        monkeypatch.setattr("rnow.plan.devices.free_disk", lambda folder, free=free: int(free))
        found = list(probes.look_at_disk(tmp_path))
        assert [one.status for one in found] == [status, status]
    assert "export HF_HOME=" in found[0].fix
    assert "rnow runs clean" in found[1].fix


def test_what_the_hub_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(ScriptedHub(models={}, token="hf_right")) as hub:
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (found,) = examined(tmp_path, "hub")
        assert (found.status, found.text.split(" ", 1)[1][:24]) == (
            "ok",
            "answers; without a token",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        (found,) = examined(tmp_path, "hub")
        assert (found.status, found.text) == ("ok", f"{hub.url} answers, logged in as ann")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        (found,) = examined(tmp_path, "hub")
        assert (found.status, found.fix) == ("warning", "hf auth login")
        assert "hf_wrong" not in found.text
    monkeypatch.delenv("HF_TOKEN")
    (found,) = examined(tmp_path, "hub")
    assert found.status == "warning"
    assert "cannot be reached" in found.text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (found,) = examined(tmp_path, "hub")
    assert (found.status, found.fix) == ("warning", "unset HF_HUB_OFFLINE")


@pytest.mark.slow
def test_all_probes_answer_here(tmp_path: Path) -> None:
    found = examined(tmp_path, *PROBES)
    assert {"Python", "torch", "transformers", "bitsandbytes", "sandbox", "hub"} <= {
        one.name for one in found
    }
    assert all(one.fix for one in found if one.status != "ok")
