"""PEFT learns of memory adapters when it is imported, or now if it was: `import memzoo` does not import PEFT."""

import sys
from importlib.machinery import ModuleSpec
from typing import Any

PARTS = {"memzoo.adapters.config": "MemoryConfig", "memzoo.adapters.model": "MemoryModel"}


def register() -> None:
    """Enter MEMZOO into PEFT's tables. Once is enough, twice does no harm.

    Raises:
        KeyError: another library took the name or the prefix.
    """
    for module, name in PARTS.items():
        if module in sys.modules and not hasattr(sys.modules[module], name):
            return  # it is being imported, and calls `register` at its end
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from memzoo.adapters.config import MemoryConfig, MemzooPeftType
    from memzoo.adapters.model import MemoryModel

    kind: Any = MemzooPeftType.MEMZOO
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) is MemoryConfig:
        return
    if kind in PEFT_TYPE_TO_CONFIG_MAPPING or MemoryModel.prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise KeyError(f"PEFT has another method {kind.value} or another prefix {MemoryModel.prefix!r} already")
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = MemoryConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = MemoryModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = MemoryModel.prefix


class RegisterAfterPeft:
    """A finder that finds nothing by itself, and has `register` run when PEFT has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    register()

            loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """`register` now if PEFT is imported, else when it is."""
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(peft.__spec__, "_initializing", False):
        register()
    else:
        sys.meta_path.insert(0, RegisterAfterPeft())
