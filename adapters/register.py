"""How PEFT learns of MEMZOO; `memzoo.peft_hook` calls it when PEFT is imported."""

from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from memzoo.adapters.config import MemoryConfig, MemzooPeftType
from memzoo.adapters.model import MemoryModel


def register() -> None:
    """Enter MEMZOO into PEFT's tables. Once is enough, twice does no harm.

    Raises:
        KeyError: another library took the name or the prefix.
    """
    kind: Any = MemzooPeftType.MEMZOO
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) is MemoryConfig:
        return
    if kind in PEFT_TYPE_TO_CONFIG_MAPPING or MemoryModel.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(f"PEFT has another method {kind.value} or another prefix {MemoryModel.prefix!r} already")
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MemoryConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = MemoryModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = MemoryModel.prefix
