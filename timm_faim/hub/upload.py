"""One commit to the Hub, and every way it can fail as one line that says what to do."""

import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from timm_faim.hub.package import FILES
from timm_faim.models.published import is_hub_id
from timm_faim.run.errors import UserError
from timm_faim.version import __version__

TRIES = 3  # of a commit that another one has overtaken


class HubError(UserError):
    """A publication that did not happen. Nothing of it is visible on the Hub, and it can be repeated."""


def check_target(repo_id: str) -> None:
    """Raise `HubError` before a training that could not be published: a wrong name, or no token.

    Of the processes of a group only the first one publishes, and needs a token.
    """
    check_repo_id(repo_id)
    if os.environ.get("RANK", "0") == "0":
        check_token()


def check_repo_id(repo_id: str) -> None:
    """Raise `HubError` unless a name has the form ORG/NAME."""
    if "/" not in repo_id or not is_hub_id(repo_id):
        raise HubError(f"{repo_id!r} is no name of a repository. Give ORG/NAME, for example me/faim_resnet50.my_data")


def check_token() -> None:
    """Raise `HubError` where no token is set."""
    if not get_token():
        raise HubError("no token for the Hub. Run `hf auth login`, or set HF_TOKEN to a token with write access")


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    create_pr: bool = False,
    message: str = "Add FAIM model",
) -> tuple[str, str]:
    """Publish a folder of `build_package` as one commit.

    Large files go first, each once: a push that breaks is repeated without sending them again, and nothing can be
    seen before the commit. Files already there in the same form are no change, and without any there is no commit.

    Args:
        folder: whose files among `package.FILES` are published, and no others.
        repo_id: ORG/NAME; made where it does not exist.
        private: whether a repository that is made is private; None: as the organisation has it.
        branch: branch to commit to, made where it does not exist; None is main.
        tag: tag to put on the commit.
        create_pr: open a pull request instead of committing.
        message: of the commit.

    Returns:
        Address of the commit or pull request, and the commit's hash.

    Raises:
        HubError: no token or no right, offline, refused or unreachable; nothing is half published.
    """
    check_target(repo_id)
    api = HfApi(library_name="timm_faim", library_version=__version__)
    step = "make the repository"
    try:
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if branch:
                step = f"make the branch {branch}"
                api.create_branch(repo_id, branch=branch, exist_ok=True)
        step = "upload"
        commit = _commit(api, repo_id, folder, message, branch, create_pr)
        if tag:
            step = f"tag the commit {commit.oid[:8]}, which is published"
            if any(ref.name == tag for ref in api.list_repo_refs(repo_id).tags):
                raise HubError(f"{repo_id}: cannot {step}: there is a tag {tag} already. Choose another --tag")
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    except HubError:
        raise
    except Exception as e:  # beside its own errors the client passes on those of two HTTP libraries
        raise HubError(f"{repo_id}: cannot {step}: {_reason(e)}") from _without_token(e)
    return str(commit.pr_url if create_pr else commit.commit_url), commit.oid


def _commit(api: HfApi, repo_id: str, folder: Path, message: str, branch: str | None, create_pr: bool) -> Any:
    for left in reversed(range(TRIES)):
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
            for name in FILES
            if (folder / name).is_file()
        ]
        try:
            return api.create_commit(repo_id, operations, commit_message=message, revision=branch, create_pr=create_pr)
        except HfHubHTTPError as e:
            if not left or _status(e) not in (409, 412):  # overtaken by another commit: the files are there already
                raise
            time.sleep(TRIES - left)
    raise AssertionError("unreachable")


def _status(error: BaseException | None) -> int | None:
    """Status that the Hub answered with, to the error itself or to the one behind it."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return status
        error = error.__cause__
    return None


def _reason(error: Exception) -> str:
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it, or write the folder alone with --dry-run FOLDER"
    if isinstance(error, HFValidationError):
        return " ".join(str(error).split())
    if status is not None and not isinstance(error, HfHubHTTPError):  # a part of a file, sent to the Hub's storage
        return f"{' '.join(_scrub(str(error)).split()).rstrip('.')} ({status}). Push again: what is there is not resent"
    if status == 401:
        return "the token is not valid (401). Run `hf auth login`, or set HF_TOKEN to a token with write access"
    if status == 403:
        return "the token may not write there (403). Take a token with write access, or a repository of your own"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision (404). Check --branch"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return "there is no such repository, or the token may not see it (404). Check the name and the token"
    if status in (409, 412):
        return f"another commit came first, {TRIES} times ({status}). Push again"
    if status is not None:
        return f"the Hub answered {status}. Push again later: what was uploaded is not sent a second time"
    text = " ".join(_scrub(str(error)).split())[:200]
    return f"{type(error).__name__}: {text}. Push again when the Hub can be reached"


def _scrub(text: str) -> str:
    token = get_token()
    return text.replace(token, "***") if token else text


def _without_token(error: Exception) -> Exception | None:
    """The cause to keep: none whose text holds the token."""
    token = get_token()
    return None if token and token in f"{error!r}{error}" else error
