from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.conftest import COMMIT, FakeHub
from tests.models.folders import model_folder, write_json, write_safetensors, write_shards

from rnow.errors import ModelError
from rnow.models.resolve import ResolvedModel, resolve_model, tokenizer_hash

REPOSITORY = {
    "config.json": 700,
    "generation_config.json": 100,
    "tokenizer.json": 5000,
    "tokenizer_config.json": 200,
    "README.md": 3000,
    "modeling_custom.py": 400,
    "model-00001-of-00002.safetensors": 4000,
    "model-00002-of-00002.safetensors": 3000,
    "model.safetensors.index.json": 90,
    "pytorch_model.bin": 7000,
    "consolidated.safetensors": 7000,
    "original/model.safetensors": 7000,
}


def resolve(path: str, base_dir: Path, key: str = "teacher.path", **options: Any) -> ResolvedModel:
    return resolve_model(path, key=key, base_dir=base_dir, **options)


def refused(path: str, base_dir: Path, **options: Any) -> ModelError:
    with pytest.raises(ModelError) as caught:
        resolve(path, base_dir, **options)
    return caught.value


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_is_found_from_the_project_and_by_absolute_path(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "models" / "teacher")
    size = (folder / "model.safetensors").stat().st_size
    for path in ("models/teacher", "./models/teacher", "models/teacher/", str(folder)):
        found = resolve(path, tmp_path)
        assert (found.local_dir, found.source, found.revision) == (folder, "local", None)
        assert found.weights_bytes == size
        assert found.name == "teacher"


def test_shards_are_added_up(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    one = (folder / "model.safetensors").stat().st_size
    write_shards(folder, 3, [1, 2, 3])
    assert resolve("m", tmp_path).weights_bytes == 3 * one


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def not_a_model_with_one_inside(folder: Path) -> None:
    shutil.rmtree(folder)
    model_folder(folder / "checkpoint-10")


def gguf(folder: Path) -> None:
    empty(folder)
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qw', encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def half_a_download(folder: Path) -> None:
    write_shards(folder, 4, [1, 3])


def half_a_download_without_index(folder: Path) -> None:
    write_shards(folder, 3, [2], index=False)


def cut_weights(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", cut=1)


def cut_header(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", cut=20)


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def html_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<!DOCTYPE html><html>not found</html>")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(
        b"version https://git-lfs.example/spec/v1\noid sha256:0\n"
    )


def adapter(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA"})


FAULTS = [
    no_config,
    empty,
    not_a_model_with_one_inside,
    gguf,
    broken_config,
    no_tokenizer,
    only_bin,
    no_weights,
    half_a_download,
    half_a_download_without_index,
    cut_weights,
    cut_header,
    empty_weights,
    html_weights,
    lfs_pointer,
    adapter,
]


@pytest.mark.parametrize("damage", FAULTS, ids=lambda f: f.__name__)
def test_faulty_folders(
    tmp_path: Path, check_golden: Callable[..., None], damage: Callable[[Path], None]
) -> None:
    damage(model_folder(tmp_path / "teacher"))
    before = sorted(tmp_path.rglob("*"))
    error = refused("teacher", tmp_path, where="config.yml:7 (teacher.path)")
    check_golden(f"folder_{damage.__name__}", error)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_student_is_called_student(tmp_path: Path) -> None:
    only_bin(model_folder(tmp_path / "m"))
    assert refused("m", tmp_path, key="model.path").title == "Unusable student model"


def test_a_folder_that_does_not_exist_suggests_its_neighbours(
    tmp_path: Path, check_golden: Callable[..., None]
) -> None:
    model_folder(tmp_path / "models" / "teacher-large")
    model_folder(tmp_path / "models" / "zebra")
    (tmp_path / "models" / "teacher-notes").mkdir()
    check_golden("folder_misspelt", refused("models/teacher-lagre", tmp_path))
    check_golden("folder_misspelt_dot", refused("./models/teacher-lagre", tmp_path))
    assert refused(str(tmp_path / "absent" / "m"), tmp_path).fix is not None


def test_a_file_is_no_folder(tmp_path: Path, check_golden: Callable[..., None]) -> None:
    (tmp_path / "teacher.safetensors").write_bytes(b"")
    check_golden("folder_is_a_file", refused("teacher.safetensors", tmp_path))


def test_deep_json_headers_that_are_no_headers_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    for header in (b"[1]", b'{"w": 3}', b'{"w": {"data_offsets": []}}', b"null"):
        content = len(header).to_bytes(8, "little") + header
        (folder / "model.safetensors").write_bytes(content)
        assert "damaged" in refused("m", tmp_path).message


# --- the hub ------------------------------------------------------------------------------------------------------


def downloaded(folder: Path) -> Path:
    """What a finished download of REPOSITORY leaves."""
    write_shards(model_folder(folder), 2, [1, 2])
    return folder


def test_only_needed_files_are_fetched_at_the_commit_that_was_listed(
    tmp_path: Path, hub: FakeHub
) -> None:
    hub.files, hub.local = REPOSITORY, downloaded(tmp_path / "snapshot")
    found = resolve("org/model", tmp_path, revision="main")
    assert (found.revision, found.source, found.weights_bytes) == (COMMIT, "hub", 7000)
    (download,) = hub.downloads
    assert download["revision"] == COMMIT
    assert set(download["allow_patterns"]) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_without_weights_no_weights_are_fetched(tmp_path: Path, hub: FakeHub) -> None:
    hub.files, hub.local = REPOSITORY, downloaded(tmp_path / "snapshot")
    found = resolve("org/model", tmp_path, weights=False)
    assert found.weights_bytes == 7000
    assert not [
        name for name in hub.downloads[0]["allow_patterns"] if name.endswith(".safetensors")
    ]


def test_python_files_come_only_when_asked_for(tmp_path: Path, hub: FakeHub) -> None:
    hub.files, hub.local = REPOSITORY, downloaded(tmp_path / "snapshot")
    resolve("org/model", tmp_path, trust_remote_code=True)
    assert "modeling_custom.py" in hub.downloads[0]["allow_patterns"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("only_bin", {"drop": ("safetensors",)}),
        ("gguf", {"drop": ("json", "safetensors", "bin"), "add": {"model-Q4.gguf": 5}}),
        ("adapter", {"add": {"adapter_config.json": 5}}),
        (
            "missing_shard",
            {"drop": ("00002.safetensors",), "add": {"model-00003-of-00003.safetensors": 1}},
        ),
    ],
)
def test_repositories_that_cannot_work_are_refused_before_any_download(
    tmp_path: Path,
    hub: FakeHub,
    check_golden: Callable[..., None],
    name: str,
    change: dict[str, Any],
) -> None:
    kept = {
        n: size
        for n, size in REPOSITORY.items()
        if not n.endswith(tuple(change.get("drop", ("none",))))
    }
    if name == "missing_shard":
        kept = {n: s for n, s in kept.items() if not n.startswith("model-0000")}
    hub.files = kept | change.get("add", {})
    check_golden(f"hub_{name}", refused("org/model", tmp_path, weights=False))
    assert hub.downloads == []


def test_a_download_larger_than_the_disk_is_not_started(tmp_path: Path, hub: FakeHub) -> None:
    hub.files = REPOSITORY | {"model-00001-of-00002.safetensors": 10**18}
    error = refused("org/model", tmp_path)
    assert "1000000000.0 GB of disk" in error.message
    assert hub.downloads == []


def test_hub_errors(
    tmp_path: Path,
    hub: FakeHub,
    http_error: Callable[..., Exception],
    check_golden: Callable[..., None],
) -> None:
    from huggingface_hub import errors

    listing = {
        "gated": http_error(errors.GatedRepoError, 403),
        "not_found": http_error(errors.RepositoryNotFoundError, 404),
        "no_revision": http_error(errors.RevisionNotFoundError, 404),
        "server_error": http_error(errors.HfHubHTTPError, 503),
        "forbidden": http_error(errors.HfHubHTTPError, 403),
        "offline_mode": errors.OfflineModeIsEnabled("offline"),
        "no_network": ConnectionError("[Errno -3] Temporary failure in name resolution"),
        "bad_id": errors.HFValidationError("Repo id must use alphanumeric chars"),
    }
    for name, error in listing.items():
        hub.listing_error = error
        path = "bad id!" if name == "bad_id" else "org/model"
        found = refused(path, tmp_path, revision="v9" if name == "no_revision" else None)
        check_golden(f"hub_{name}", found)


def test_the_transports_own_errors_mean_no_network(tmp_path: Path, hub: FakeHub) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    transport = __import__(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    for error in (transport.ConnectError("refused"), transport.ReadTimeout("slow")):
        hub.listing_error = error
        assert "cannot be reached" in refused("org/model", tmp_path).message


def test_an_unforeseen_error_is_not_swallowed(tmp_path: Path, hub: FakeHub) -> None:
    hub.listing_error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        resolve("org/model", tmp_path)


def test_without_a_hub_the_cache_will_do(tmp_path: Path, hub: FakeHub) -> None:
    hub.listing_error = ConnectionError("no route")
    hub.cached = downloaded(tmp_path / COMMIT)
    found = resolve("org/model", tmp_path)
    assert (found.local_dir, found.revision, found.source) == (hub.cached, COMMIT, "hub")


def test_without_a_hub_half_a_cache_will_not(tmp_path: Path, hub: FakeHub) -> None:
    hub.listing_error = ConnectionError("no route")
    hub.cached = downloaded(tmp_path / COMMIT)
    (hub.cached / "model-00002-of-00002.safetensors").unlink()
    assert "cannot be reached" in refused("org/model", tmp_path).message


def test_a_gated_model_is_refused_even_when_cached(
    tmp_path: Path, hub: FakeHub, http_error: Callable[..., Exception]
) -> None:
    from huggingface_hub.errors import GatedRepoError

    hub.listing_error = http_error(GatedRepoError, 401)
    hub.cached = downloaded(tmp_path / COMMIT)
    assert "is gated" in refused("org/model", tmp_path).message


def test_the_disk_filling_up_is_named(
    tmp_path: Path, hub: FakeHub, check_golden: Callable[..., None]
) -> None:
    hub.files = REPOSITORY
    hub.download_error = OSError(errno.ENOSPC, "No space left on device")
    check_golden("hub_disk_full", refused("org/model", tmp_path))


def test_a_corrupt_download_is_found(tmp_path: Path, hub: FakeHub) -> None:
    hub.files, hub.local = REPOSITORY, downloaded(tmp_path / "snapshot")
    write_safetensors(hub.local / "model-00002-of-00002.safetensors", cut=2)
    assert "model-00002-of-00002.safetensors" in refused("org/model", tmp_path).message


def test_an_api_spelling_never_reaches_the_hub(tmp_path: Path, hub: FakeHub) -> None:
    hub.listing_error = AssertionError("the hub was asked")
    assert refused("qwen/qwen3-32b", tmp_path).title == "Unsupported teacher model"


# --- tokenizer_hash -----------------------------------------------------------------------------------------------


def test_the_tokenizer_hash_depends_on_tokenizer_and_template_only(tmp_path: Path) -> None:
    first, second = model_folder(tmp_path / "a"), model_folder(tmp_path / "b", num_hidden_layers=9)
    write_safetensors(second / "other.safetensors")
    assert tokenizer_hash(first) == tokenizer_hash(second)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        before = (second / name).read_bytes()
        (second / name).write_bytes(before + b" ")
        assert tokenizer_hash(first) != tokenizer_hash(second)
        (second / name).write_bytes(before)
    (second / "chat_template.jinja").unlink()
    assert tokenizer_hash(first) != tokenizer_hash(second)
    assert len(json.dumps(tokenizer_hash(first))) == 66
