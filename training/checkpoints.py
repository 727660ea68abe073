"""Checks on folders of weights before anything is loaded: cut short, of another run, not there."""

import json
import logging
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import SafetensorError, safe_open

from memzoo.training.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from memzoo.training.adapt.settings import AdaptConfig

logger = logging.getLogger(__name__)

RUN_FILE = "train.yaml"
DISTRIBUTED_METADATA = ".metadata"  # of a folder of torch.distributed.checkpoint


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is cut short or unreadable."""


def check_files(folder: str | Path, remedy: str) -> None:
    """Raises DamagedCheckpoint, naming file and remedy, if a weight or state file in `folder` is incomplete."""
    for file in sorted(Path(folder).iterdir()):
        if file.is_dir() and (any(file.glob("*.distcp")) or (file / DISTRIBUTED_METADATA).exists()):
            _check_distributed(file, remedy)
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(file).close()
        except (SafetensorError, ValueError, zipfile.BadZipFile) as error:
            raise DamagedCheckpoint(f"{file} is cut short or damaged ({error}); {remedy}") from error


def _check_distributed(folder: Path, remedy: str) -> None:
    """torch.distributed.checkpoint writes `.metadata` last; it says where in which file every piece lies."""
    from torch.distributed.checkpoint import FileSystemReader

    metadata = folder / DISTRIBUTED_METADATA
    try:
        pieces = FileSystemReader(folder).read_metadata().storage_data.values()
    except (OSError, EOFError, UnpicklingError) as error:
        raise DamagedCheckpoint(f"{metadata} is cut short or missing ({error}); {remedy}") from error
    for piece in pieces:
        file = folder / piece.relative_path
        if not file.is_file() or file.stat().st_size < piece.offset + piece.length:
            raise DamagedCheckpoint(f"{file} is cut short or missing; {remedy}")


def find_checkpoint(config: "RunConfig | AdaptConfig") -> str | None:
    """The checkpoint to resume from, or None for a fresh start. "auto" is the last one that is whole.

    Raises ConfigError when `output_dir` holds another run, DamagedCheckpoint when the named checkpoint, or every one,
    is incomplete.
    """
    folder = Path(config.training["output_dir"])
    resume = config.training.get("resume_from_checkpoint")
    finished = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    if resume is None and (_checkpoints(folder) or finished):
        raise ConfigError(
            f"training.output_dir: {folder} already holds a run; continue it with --resume, "
            "choose another training.output_dir, or delete the folder"
        )
    if resume == "auto":
        resume = _last_whole(folder)
        if resume is None:
            logger.warning("no checkpoint in %s: starting from the beginning", folder)
    elif resume is not None:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ConfigError(f"training.resume_from_checkpoint: {resume} is not a checkpoint folder of Trainer")
        check_files(resume, f"delete {resume} and resume again: the checkpoint before it is taken")
    if resume is not None:
        _refuse_other_run(Path(resume).parent / RUN_FILE, config)
    return resume


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, the last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[len("checkpoint-") :].isdigit()]
    return sorted(found, key=lambda path: int(path.name[len("checkpoint-") :]), reverse=True)


def _last_whole(folder: Path) -> str | None:
    """Trainer writes trainer_state.json last, so a process that was killed while it wrote a checkpoint left none."""
    damages = []
    for checkpoint in _checkpoints(folder):
        try:
            if not (checkpoint / "trainer_state.json").is_file():
                raise DamagedCheckpoint(f"{checkpoint} has no trainer_state.json: its writing was cut off")
            check_files(checkpoint, f"delete {checkpoint} and resume again: the checkpoint before it is taken")
        except DamagedCheckpoint as damage:
            damages.append(damage)
            continue
        for passed_over in damages:
            logger.warning("%s; going on from %s", str(passed_over).partition(";")[0], checkpoint)
        return str(checkpoint)
    if any((checkpoint / "trainer_state.json").exists() for checkpoint in _checkpoints(folder)):
        raise damages[0]
    return None  # killed while it wrote its first checkpoint: there is nothing to lose


def record_run(config: "RunConfig | AdaptConfig") -> None:
    """Writes the run's settings beside its checkpoints."""
    folder = Path(config.training["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def _refuse_other_run(record: Path, config: "RunConfig | AdaptConfig") -> None:
    """A run may go on with other training settings, not with another model, other data or another optimizer."""
    if not record.exists():
        return
    before: dict[str, Any] = yaml.safe_load(record.read_text())
    now = config.to_dict()
    kept = ("model", "tokenizer", "data", "optimizer", "learning_rates", "base", "memory", "lora")
    for section in (name for name in kept if name in now):
        recorded = before.get(section, {})  # runs from before there was an `optimizer` section have none
        for key in sorted({*recorded, *now[section]}):
            old, new = recorded.get(key), now[section].get(key)
            if old != new:
                raise ConfigError(
                    f"{section}.{key}: {new!r} here, but {record.parent} was trained with {old!r}; "
                    "put it back, or choose another training.output_dir"
                )
