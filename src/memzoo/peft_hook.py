"""PEFT learns of memory adapters when it is imported, or now if it was: `import memzoo` does not import PEFT."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from typing import Any


class RegisterAfterPeft:
    """A finder that finds nothing by itself, and has memzoo's method registered when PEFT has been imported."""

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
                    _register()

            loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """Register now if PEFT is imported, else when it is."""
    peft = sys.modules.get("peft")
    if peft is not None and not getattr(peft.__spec__, "_initializing", False):
        _register()
    else:
        sys.meta_path.insert(0, RegisterAfterPeft())


def _register() -> None:
    importlib.import_module("memzoo.adapters.register").register()
