"""The small Hub with its Xet storage, and the real client pointed at it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import minicas  # noqa: F401 (its routes)
import minihub
import pytest
import transformers
from huggingface_hub.utils._xet import abort_xet_session


@contextmanager
def serve(root: Path) -> Iterator[minihub.Hub]:
    server = minihub.Hub(root)
    yield server
    server.shutdown()
    server.server_close()


def point_client_at(server: minihub.Hub, folder: Path, patch: pytest.MonkeyPatch, xet: bool = False) -> None:
    """Let the client talk to this Hub: its addresses are constants of huggingface_hub."""
    server.xet = xet
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet,
    }.items():
        patch.setattr(huggingface_hub.constants, name, value)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    patch.setattr(transformers.utils.hub, "_hf_api", None)  # made once a process, with the address of its first Hub
    patch.setenv("HF_TOKEN", "hf_test")
    patch.setenv("HF_XET_CACHE", str(folder / "xet-cache"))
    patch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    abort_xet_session()  # the next one reads these, and does not remember what another Hub had
