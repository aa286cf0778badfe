"""Pushing, with the hub's client replaced; the exceptions are huggingface_hub's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from rnow.errors import InputError, RnowError, TemporaryError
from rnow.export.hub import check_repository, push


class ScriptedHub:
    """The calls of HfApi that are used. ``fault`` is raised by the call of the same name."""

    def __init__(self) -> None:
        self.files: list[str] | None = None
        self.faults: dict[str, Exception] = {}
        self.made: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.message = ""

    def _called(self, name: str) -> None:
        if name in self.faults:
            raise self.faults[name]

    def whoami(self) -> dict[str, str]:
        self._called("whoami")
        return {"name": "ann"}

    def list_repo_files(self, repository: str) -> list[str]:
        self._called("list_repo_files")
        if self.files is None:
            raise http_error(RepositoryNotFoundError, 404)
        return self.files

    def create_repo(self, repository: str, **options: Any) -> str:
        self._called("create_repo")
        self.made.append({"repository": repository, **options})
        return f"https://hub.example/{repository}"

    def create_commit(self, repository: str, operations: Any, *, commit_message: str) -> None:
        self._called("create_commit")
        self.message = commit_message
        for operation in operations:
            content = operation.path_or_fileobj
            data = content if isinstance(content, bytes) else Path(content).read_bytes()
            self.uploaded[operation.path_in_repo] = data


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://hub.example")
    return kind(f"status {status}", response=httpx.Response(status, request=request))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> ScriptedHub:
    scripted = ScriptedHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: scripted)
    return scripted


def test_files_go_up_in_one_commit(hub: ScriptedHub, tmp_path: Path) -> None:
    check_repository("ann/tiny", force=False)
    (tmp_path / "a").write_bytes(b"one")
    address = push(
        "ann/tiny", {"a": tmp_path / "a", "b/c": b"two"}, private=True, message="tiny, after step 2"
    )
    assert address == "https://hub.example/ann/tiny"
    assert hub.uploaded == {"a": b"one", "b/c": b"two"}
    assert hub.made == [{"repository": "ann/tiny", "private": True, "exist_ok": True}]
    assert hub.message == "tiny, after step 2"


def test_what_is_there_is_not_overwritten(hub: ScriptedHub) -> None:
    hub.files = [".gitattributes"]
    check_repository("ann/tiny", force=False)
    hub.files.append("config.json")
    with pytest.raises(InputError, match="nothing is overwritten") as caught:
        check_repository("ann/tiny", force=False)
    assert caught.value.details == ("config.json",)
    check_repository("ann/tiny", force=True)


@pytest.mark.parametrize("name", ["tiny", "/tiny", "ann/", "a/b/c"])
def test_names_that_are_none(hub: ScriptedHub, name: str) -> None:
    with pytest.raises(InputError, match="is no repository"):
        check_repository(name, force=False)


FAULTS: list[tuple[Exception, type[RnowError], str]] = [
    (LocalTokenNotFoundError("no token"), InputError, "may not write"),
    (http_error(HfHubHTTPError, 401), InputError, "may not write"),
    (http_error(HfHubHTTPError, 403), InputError, "may not write"),
    (http_error(HfHubHTTPError, 400), InputError, "was not pushed"),
    (http_error(HfHubHTTPError, 503), TemporaryError, "cannot be reached"),
    (ConnectionError("refused"), TemporaryError, "cannot be reached"),
    (OfflineModeIsEnabled("offline"), InputError, "offline mode"),
    (HFValidationError("two dots"), InputError, "is no repository"),
]


@pytest.mark.parametrize(("fault", "kind", "message"), FAULTS)
@pytest.mark.parametrize("call", ["whoami", "create_commit"])
def test_faults_are_told(
    hub: ScriptedHub, fault: Exception, kind: type[RnowError], message: str, call: str
) -> None:
    hub.faults[call] = fault

    def ask() -> None:
        if call == "whoami":
            check_repository("ann/tiny", force=False)
        else:
            push("ann/tiny", {}, private=False, message="m")

    with pytest.raises(kind, match=message):
        ask()


def test_a_mistake_of_ours_goes_on(hub: ScriptedHub) -> None:
    hub.faults["create_repo"] = KeyError("oops")
    with pytest.raises(KeyError):
        push("ann/tiny", {}, private=False, message="m")
