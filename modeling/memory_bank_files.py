"""A memory bank on its own, for any model of its width: `bank.safetensors` has its tensors, `bank.json` its kind."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memzoo.modeling.memory_bank import MemoryBank
from memzoo.modeling.quantized_bank import check_format

BANK_FORMAT = 1
BANK_WEIGHTS = "bank.safetensors"
BANK_INDEX = "bank.json"


def save_bank(bank: MemoryBank, folder: str | os.PathLike) -> None:
    """Write the bank to a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in bank.state_dict().items()}
    save_file(tensors, folder / BANK_WEIGHTS, metadata={"format": "pt"})
    (folder / BANK_INDEX).write_text(json.dumps({"format": BANK_FORMAT, **bank.description()}, indent=2) + "\n")


def load_bank(folder: str | os.PathLike) -> MemoryBank:
    """Read a bank, in the data type that it was saved in.

    Raises:
        FileNotFoundError: the folder holds no bank.
        ValueError: it is of another format, of an unknown quantization, or damaged; the message says which.
    """
    folder = Path(folder)
    for name in (BANK_INDEX, BANK_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no memory bank: {name} is missing")
    try:
        index: dict[str, Any] = json.loads((folder / BANK_INDEX).read_text())
        version = index.pop("format")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / BANK_INDEX} is damaged ({error}); save the bank again") from error
    if version != BANK_FORMAT:
        raise ValueError(
            f"{folder / BANK_INDEX} has bank format {version!r} and this memzoo reads {BANK_FORMAT}; "
            "load it with the memzoo version that wrote it"
        )
    check_format(index.get("quantization"))
    try:
        bank, tensors = MemoryBank(**index), load_file(folder / BANK_WEIGHTS)
        for name, x in tensors.items():
            if name in dict(bank.named_parameters()):
                bank.get_parameter(name).data = bank.get_parameter(name).data.to(x.dtype)
        bank.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, TypeError, OSError) as error:
        raise ValueError(f"{folder} holds a damaged bank ({error}); save it again") from error
    return bank
