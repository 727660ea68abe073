"""To the Hub and back: folders of models and adapters, checked before they leave and after they arrive."""

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from memzoo.hub_cards.bundle import bundle
from memzoo.hub_cards.card import is_blank_form, render_card
from memzoo.hub_cards.checks import check_arrival, check_folder
from memzoo.modeling.publish import connection, publish

# what belongs to a model; checkpoints, optimizers and logs of a training run stay at home
PUBLISHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.png", "*.yaml", "*.py", "README.md")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    code: bool = True,
    license: str | None = None,
    message: str = "Upload with memzoo",
) -> str:
    """Publish the model or adapter in `folder` as one commit, with a card and, by default, the code to run it.

    A README.md that is there is kept, unless it is PEFT's empty form. Nothing is visible before the commit, which
    comes after all files are uploaded; an upload that was interrupted is repeated by calling this again.

    Args:
        repo_id: "user/name". private: for a new repository. revision: a branch, made if needed.
        token: of the Hub; without it, the one that `hf auth login` or HF_TOKEN gave.
        code: add the family's code for people without memzoo (`bundle`). license: for the card.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError, UnsafeFolder: there is nothing that may be published (`check_folder`).
        ConnectionError: the connection broke, and five more tries with it.
    """
    folder = Path(folder)
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch) / repo_id.split("/")[-1]
        stage.mkdir()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder")
        for path in folder.iterdir():
            if path.is_file() and any(path.match(pattern) for pattern in PUBLISHED):
                shutil.copy(path, stage / path.name)
        check_folder(stage)
        if code and (stage / "config.json").is_file() and not (stage / "adapter_config.json").is_file():
            bundle(stage)
        described = (stage / "README.md").is_file() and not is_blank_form(stage / "README.md")
        if not described and not (stage / "memory.json").is_file():
            render_card(stage, repo_id, license).save(stage / "README.md")
        return publish(stage, repo_id, message, private, revision, token)


def pull(repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download a model, an adapter or a memory into `folder`, without its code and without anything pickled.

    Raises:
        FileExistsError: the folder holds something already.
        UnsafeFolder: what arrived is not safe or not whole; it is removed again.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder")
    allowed = [pattern for pattern in PUBLISHED if pattern != "*.py"]
    with tempfile.TemporaryDirectory(dir=folder.resolve().parent) as scratch:
        arrived = Path(scratch) / "arrived"
        with connection():
            info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
            snapshot_download(repo_id, revision=info.sha, token=token, local_dir=arrived, allow_patterns=allowed)
        shutil.rmtree(arrived / ".cache", ignore_errors=True)
        for file in info.siblings or []:
            check_arrival(arrived / file.rfilename, file.lfs.sha256 if file.lfs else None)
        check_folder(arrived)
        if folder.exists():
            folder.rmdir()
        arrived.rename(folder)
    return folder
