"""Models from the hub, with its two calls replaced; the exceptions are huggingface_hub's own."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.conftest import COMMIT, FakeHub
from tests.models.folders import model_folder, write_safetensors, write_shards

from rnow.errors import ModelError
from rnow.models.resolve import resolve_model
from rnow.models.resolved import ResolvedModel

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


def downloaded(folder: Path) -> Path:
    """What a finished download of REPOSITORY leaves."""
    write_shards(model_folder(folder), 2, [1, 2])
    return folder


def test_only_needed_files_are_fetched_at_the_commit_that_was_listed(
    tmp_path: Path, hub: FakeHub
) -> None:
    hub.files, hub.local = REPOSITORY, downloaded(tmp_path / "snapshot")
    found = resolve("org/model", tmp_path, revision="main")
    assert (found.revision, found.weights_bytes) == (COMMIT, 7000)
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
    assert (found.local_dir, found.revision) == (hub.cached, COMMIT)


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


def test_a_gate_or_a_lost_network_in_mid_download(
    tmp_path: Path, hub: FakeHub, http_error: Callable[..., Exception]
) -> None:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    hub.files = REPOSITORY
    hub.download_error = http_error(GatedRepoError, 403)
    assert "is gated" in refused("org/model", tmp_path).message
    for lost in (ConnectionError("reset"), LocalEntryNotFoundError("no connection")):
        hub.download_error = lost
        assert "cannot be reached" in refused("org/model", tmp_path).message
    hub.download_error = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        resolve("org/model", tmp_path)
