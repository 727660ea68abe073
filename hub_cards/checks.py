"""Is a model's folder safe and whole? Only safetensors, complete, and of the family that its config says."""

import hashlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz", ".joblib", ".msgpack", ".h5"}


class UnsafeFolder(ValueError):
    """A folder that must not be loaded or published; the message names the file and what to do."""


def check_folder(folder: str | Path) -> None:
    """Refuse a folder of a model, an adapter or a memory that is unsafe or not whole.

    Raises:
        FileNotFoundError: the folder does not exist or holds no weights.
        UnsafeFolder: a pickle, a link that leaves the folder, a damaged, oversized or foreign safetensors file, an
            index that names files elsewhere or files that are missing, a config that names another class.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if not path.resolve().is_relative_to(root):
            raise UnsafeFolder(f"{path} leads out of {folder}; replace the link by a copy of the file")
        if path.suffix in PICKLED:
            raise UnsafeFolder(
                f"{path} may run code when it is loaded; memzoo reads safetensors only. "
                "Where you trust it, load it and save_pretrained it again"
            )
        if path.suffix == ".safetensors":
            _check_weights(path)
        elif path.name.endswith(".safetensors.index.json"):
            _check_index(path)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} holds no *.safetensors; save a model, an adapter or a memory there first")
    config = folder / "config.json"
    if config.is_file():
        _check_classes(config)


def check_arrival(path: Path, sha256: str | None) -> None:
    """Refuse a downloaded file whose content is not what the Hub says that it has; None where it says nothing."""
    if sha256 is None or not path.is_file():
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UnsafeFolder(
            f"{path.name} was changed on its way: its SHA-256 begins with {found[:8]}, the Hub's with {sha256[:8]}; "
            "download it again, and do not load it"
        )


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise UnsafeFolder(
            f"{path} is cut short, changed or not a safetensors file ({error}); copy or download it again"
        ) from error


def _check_index(path: Path) -> None:
    try:
        names = set(json.loads(path.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise UnsafeFolder(f"{path} is not an index of weights ({error}); copy or download it again") from error
    for name in sorted(names):
        if Path(name).name != name:
            raise UnsafeFolder(f"{path} names {name!r}, which is not a file beside it; do not load this model")
        if not (path.parent / name).is_file():
            raise UnsafeFolder(f"{path} names {name}, which is missing; copy or download it again")


def _check_classes(path: Path) -> None:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UnsafeFolder(f"{path} is not JSON ({error}); copy or download it again") from error
    config_class = CONFIG_MAPPING[config["model_type"]] if config.get("model_type") in CONFIG_MAPPING else None
    if config_class is None or not config_class.__module__.startswith("memzoo."):
        return  # transformers' own checks apply
    prefix = config_class.__name__.removesuffix("Config")
    tables = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    known = {getattr(table[config_class], "__name__", "") for table in tables if config_class in table}
    known.add(f"{prefix}Model")
    for name in config.get("architectures") or []:
        if name not in known:
            raise UnsafeFolder(
                f"{path} names the class {name!r} for model_type {config['model_type']!r}, whose classes are "
                f"{', '.join(sorted(known))}; it is not a model of this family"
            )
    for auto, name in (config.get("auto_map") or {}).items():
        if "--" in name or name.split(".")[-1] not in {*known, f"{prefix}Config"}:
            raise UnsafeFolder(f"{path} maps {auto} to {name!r}, which is not code of this family; do not load it")
