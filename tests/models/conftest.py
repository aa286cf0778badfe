"""Golden error reports and a hub made of monkeypatches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rnow.errors import EXIT_BAD_INPUT, RnowError

GOLDEN = Path(__file__).with_name("golden")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def check_golden(tmp_path: Path) -> Callable[[str, RnowError], None]:
    """Compare a report with golden/<name>.txt, exit code 2 included. RNOW_UPDATE_GOLDEN=1 rewrites the files."""

    def check(name: str, error: RnowError) -> None:
        report = error.render().replace(str(tmp_path), "<tmp>") + "\n"
        file = GOLDEN / f"{name}.txt"
        if os.environ.get("RNOW_UPDATE_GOLDEN"):
            file.write_text(report, encoding="utf-8")
        assert report == file.read_text(encoding="utf-8")
        assert error.exit_code == EXIT_BAD_INPUT

    return check


class FakeHub:
    """Stands in for the two calls that reach the hub. ``files`` are names and sizes of the repository; ``local`` is the
    folder a download gives; ``listing_error`` and ``download_error`` are raised instead."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.local: Path | None = None
        self.cached: Path | None = None
        self.listing_error: Exception | None = None
        self.download_error: Exception | None = None
        self.downloads: list[dict[str, Any]] = []

    def model_info(self, _api: Any, repo_id: str, **_: Any) -> Any:
        if self.listing_error is not None:
            raise self.listing_error
        siblings = [
            SimpleNamespace(rfilename=name, size=size, blob_id=f"blob-of-{name}", lfs=None)
            for name, size in self.files.items()
        ]
        return SimpleNamespace(siblings=siblings, sha=COMMIT)

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.downloads.append({"repo_id": repo_id, **options})
        if options.get("local_files_only"):
            if self.cached is None:
                raise LocalEntryNotFoundError("not in the cache")
            return str(self.cached)
        if self.download_error is not None:
            raise self.download_error
        assert self.local is not None
        return str(self.local)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    import huggingface_hub
    from huggingface_hub import constants

    fake = FakeHub()
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "model_info",
        lambda api, repo_id, **kw: fake.model_info(api, repo_id, **kw),
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    return fake


@pytest.fixture
def http_error() -> Callable[..., Exception]:
    """``http_error(cls, status)``: one of huggingface_hub's own HTTP errors."""

    def make(cls: type[Exception], status: int) -> Exception:
        response = SimpleNamespace(status_code=status, headers={}, request=None, text="", url="")
        headers: Mapping[str, str] = {}
        response.headers = headers
        return cls(f"{status} from the hub", response=response)  # type: ignore[call-arg]

    return make
