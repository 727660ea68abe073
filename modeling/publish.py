"""A folder to the Hub, as one commit."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]  # of the HTTP client, which depends on the version of huggingface_hub
TRIES = 6


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Make the repository and the branch if needed, upload the folder; returns the commit's address.

    All files are in one commit, however many they are: `upload_folder` would make several of many files or after a
    commit that failed, and half of a model would be visible between them. What has not changed is left out.

    Raises:
        ConnectionError: the connection broke, and five more tries with it; nothing is half visible.
    """
    api = HfApi(token=token)
    with connection():
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        for tries_left in reversed(range(TRIES)):
            files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
            operations = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
            api.preupload_lfs_files(repo_id, operations, revision=revision)  # the client's own tries
            try:
                done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
                break
            except HTTP_ERROR as error:
                if isinstance(error, HfHubHTTPError) or not tries_left:
                    raise
                time.sleep(2 ** (TRIES - tries_left - 1))
    return str(done.commit_url)


@contextmanager
def connection() -> Iterator[None]:
    """Errors of the connection as ConnectionError: the clients have several kinds, and wrap some in RuntimeError."""
    try:
        yield
    except Exception as error:
        broken = (ConnectionError, HTTP_ERROR)
        # Xet's downloads have no other kind of error
        of_xet = type(error) is RuntimeError and str(error).startswith("Task error")
        cause = error if isinstance(error, broken) or of_xet else error.__cause__
        answered = isinstance(error, HfHubHTTPError)  # the Hub's own answers say enough
        if answered or not (of_xet or isinstance(cause, broken)):
            raise
        raise ConnectionError(
            f"the connection to the Hub broke ({cause}); nothing is half visible, run the same again"
        ) from error
