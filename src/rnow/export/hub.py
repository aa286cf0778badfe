"""Files to a repository of the HuggingFace hub, in one commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rnow.errors import SAME_COMMAND, InputError, RnowError, TemporaryError
from rnow.models.hub import is_unreachable
from rnow.models.refusal import one_line, shorten

WHERE = "--push"
_MADE_BY_THE_HUB = frozenset({".gitattributes"})


def check_repository(repository: str, *, force: bool) -> None:
    """Whether the user may write to a repository, before anything is computed for it.

    Raises:
        InputError: it is no name of one, nobody is logged in, or it holds files already and ``force`` is not given.
        TemporaryError: the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    hub = HfApi()
    owner, _, name = repository.partition("/")
    if not (owner and name) or "/" in name:
        raise InputError(
            f"'{repository}' is no repository",
            where=WHERE,
            fix="--push OWNER/NAME, the owner being your user name on the hub or an organisation of yours",
        )
    try:
        hub.whoami()
        held = hub.list_repo_files(repository)
    except RepositoryNotFoundError:
        return  # it will be made
    except Exception as error:
        raise _hub_fault(error, repository) from error
    if (there := sorted({*held} - _MADE_BY_THE_HUB)) and not force:
        raise InputError(
            f"{repository} holds files already, and nothing is overwritten",
            where=WHERE,
            details=shorten(there),
            fix="name another repository, or add --force: files of the same names are replaced, the others stay",
        )


def push(repository: str, files: Mapping[str, Path | bytes], *, private: bool, message: str) -> str:
    """Upload files by their names there; the address of the repository, which is made where it does not exist.

    Args:
        private: of a new one.
        message: of the commit.

    Raises:
        InputError: this user may not write there.
        TemporaryError: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub = HfApi()
    operations = [
        CommitOperationAdd(
            path_in_repo=name,
            path_or_fileobj=content if isinstance(content, bytes) else str(content),
        )
        for name, content in files.items()
    ]
    try:
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.create_commit(repository, operations, commit_message=message)
    except Exception as error:
        raise _hub_fault(error, repository) from error
    return str(address)


def _hub_fault(error: Exception, repository: str) -> RnowError:
    """The report about a failure of the hub or its client. Any other error is a mistake of ours and goes on."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return InputError(
            "nothing can be pushed in offline mode", where=WHERE, fix="unset HF_HUB_OFFLINE"
        )
    if isinstance(error, HFValidationError):
        return InputError(
            f"'{repository}' is no repository",
            where=WHERE,
            why=one_line(error),
            fix="--push OWNER/NAME",
        )
    if is_unreachable(error):
        return TemporaryError(
            "the HuggingFace hub cannot be reached: nothing was pushed",
            why=one_line(error),
            fix=f"check the network and any proxy, then {SAME_COMMAND} with --force: what was written stays",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return InputError(
            f"you may not write to {repository}",
            where=WHERE,
            why=one_line(error),
            fix="log in with a token that may write: hf auth login (or set HF_TOKEN); is the owner you, or an organisation of yours?",
        )
    if isinstance(error, HfHubHTTPError | OSError):
        return InputError(
            f"{repository} was not pushed",
            where=WHERE,
            why=one_line(error),
            fix=f"mend what it says, then {SAME_COMMAND} with --force: what was written stays",
        )
    raise error
