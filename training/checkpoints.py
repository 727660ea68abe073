"""Checks on folders of weights before anything is loaded: cut short, of another run, not there."""

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from memzoo.training.config import ConfigError, RunConfig

logger = logging.getLogger(__name__)

RUN_FILE = "train.yaml"


class DamagedCheckpoint(ValueError):
    """A file of a checkpoint is cut short or unreadable."""


def check_files(folder: str | Path, remedy: str) -> None:
    """Raises DamagedCheckpoint, naming file and remedy, if a weight or state file in `folder` is incomplete."""
    for file in sorted(Path(folder).iterdir()):
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


def find_checkpoint(config: RunConfig) -> str | None:
    """The checkpoint to resume from, or None for a fresh start.

    Raises ConfigError when `output_dir` holds another run, DamagedCheckpoint when the checkpoint is incomplete.
    """
    folder = Path(config.training["output_dir"])
    resume = config.training.get("resume_from_checkpoint")
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if resume == "auto":
        resume = last
        if last is None:
            logger.warning("no checkpoint in %s: starting from the beginning", folder)
    if resume is None and (last or (folder / "config.json").exists()):
        raise ConfigError(
            f"training.output_dir: {folder} already holds a run; continue it with --resume, "
            "choose another training.output_dir, or delete the folder"
        )
    if resume is not None:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ConfigError(f"training.resume_from_checkpoint: {resume} is not a checkpoint folder of Trainer")
        _refuse_other_run(Path(resume).parent / RUN_FILE, config)
        check_files(resume, f"delete {resume} and resume again: the checkpoint before it is taken")
    return resume


def record_run(config: RunConfig) -> None:
    """Writes the run's settings beside its checkpoints."""
    folder = Path(config.training["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))


def _refuse_other_run(record: Path, config: RunConfig) -> None:
    """A run may go on with other training settings, not with another model or other data."""
    if not record.exists():
        return
    before: dict[str, Any] = yaml.safe_load(record.read_text())
    now = config.to_dict()
    for section in ("model", "tokenizer", "data"):
        for key in sorted({*before[section], *now[section]}):
            old, new = before[section].get(key), now[section].get(key)
            if old != new:
                raise ConfigError(
                    f"{section}.{key}: {new!r} here, but {record.parent} was trained with {old!r}; "
                    "put it back, or choose another training.output_dir"
                )
