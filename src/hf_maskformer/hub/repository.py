"""A repository of the Hugging Face Hub that may be written: its checks, its errors as one sentence, its one commit."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

LOGIN = "run `hf auth login` or set HF_TOKEN to a token with write access"
NETWORK = "check the network, or HF_ENDPOINT where it is set"
CARD_FILE = "README.md"
# What an earlier push left and this one does not write again: pictures that are no longer wanted, and weights that
# `from_pretrained` would take for those of the new model.
REPLACED = ("samples/step-*.png", "training_curves.png", "model*.safetensors", "model.safetensors.index.json")


def open_repository(repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """The full id of a repository that this login may write to, created where it does not exist.

    Nothing is written to it: the Hub is asked how it would take a file, which it only tells those who may commit.

    Args:
        repo_id: owner/name; a name alone goes to the owner of the token.
        private: create the repository for its owner only; one that exists keeps its visibility.
        revision: branch that is to be written, created from the main one where it does not exist; None: the main one.

    Raises:
        ValueError: a bad repository id, no login, a token that the Hub does not know, no right to write there, or the
            Hub cannot be reached.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise ValueError(f"cannot publish {repo_id}, not logged in to the Hugging Face Hub: {LOGIN}")
    api = HfApi()
    with hub_errors(repo_id, api.endpoint):
        api.whoami()
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # create_repo is content with a repository that exists, whoever owns it.
        api.preupload_lfs_files(repo_id, [CommitOperationAdd(CARD_FILE, b"a card")], revision=revision)
    return repo_id


def upload(folder: Path, repo_id: str, *, message: str, revision: str | None = None) -> str:
    """Send the files of `folder` as one commit, which succeeds or fails as a whole; returns its address.

    Files of an earlier push that this one replaces (`REPLACED`) are deleted, all others stay.

    Raises:
        ValueError: the Hub refuses the files or the head of the card, or cannot be reached.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    api = HfApi()
    with hub_errors(repo_id, api.endpoint):
        there = api.list_repo_files(repo_id, revision=revision)
        old = [name for name in there if name not in files and any(fnmatch(name, kind) for kind in REPLACED)]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in old),
        ]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Raises ValueError for what cannot be the id of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repository id {repo_id!r} cannot be used: it must be owner/name. {error}") from error


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what the Hub or the way to it answers into a ValueError that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise ValueError(f"{endpoint} does not accept the token, {repo_id} was not published: {LOGIN}") from error
        if status == 403:
            raise ValueError(f"the token has no right to write {repo_id} at {endpoint}: {LOGIN}") from error
        raise ValueError(f"{endpoint} refused {repo_id}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError(f"cannot publish {repo_id} while HF_HUB_OFFLINE is set") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: how the upload of large files reports
        raise ValueError(f"{repo_id} was not published, {endpoint} could not be used ({error}): {NETWORK}") from error
