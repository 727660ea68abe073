"""A folder to the Hub, as one commit."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

HTTP_ERROR: Any = HfHubHTTPError.__bases__[0]  # of the HTTP client, which depends on the version of huggingface_hub


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Make the repository and the branch if needed, upload the folder; returns the commit's address.

    Raises:
        ConnectionError: the connection broke, and five more tries with it; nothing is half visible.
    """
    api = HfApi(token=token)
    with connection():
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(folder_path=folder, repo_id=repo_id, revision=revision, commit_message=message)
    return str(done.commit_url)


@contextmanager
def connection() -> Iterator[None]:
    """Errors of the connection as ConnectionError: the client has several kinds, and wraps them in RuntimeError."""
    try:
        yield
    except OSError:  # the Hub's own answers are among these
        raise
    except Exception as error:
        cause = error.__cause__ or error
        if not isinstance(cause, HTTP_ERROR):
            raise
        raise ConnectionError(
            f"the connection to the Hub broke ({cause}); nothing is half visible, run the same again"
        ) from error
