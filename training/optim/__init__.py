"""Nested optimizers: torch optimizers in which something that is usually fixed is itself learned or has its own clock.

| class | what learns or waits | paper |
|---|---|---|
| `DeepMomentum` | the momentum is a small network trained on the gradients | Nested Learning, eq. 50 |
| `ContinuumMemory` | groups of parameters updated every C-th step, around any optimizer | Nested Learning, eq. 71 |
| `NestedController` | a multiplier of each group's learning rate | Hypergradient Descent, eq. 4-5 |

`levels_by_name`, `groups_by_depth` make the parameter groups from a model.
"""

import importlib
from typing import Any

_EXPORTS = {
    "ContinuumMemory": "memzoo.training.optim.continuum_memory",
    "DeepMomentum": "memzoo.training.optim.deep_momentum",
    "NestedController": "memzoo.training.optim.nested_controller",
    "groups_by_depth": "memzoo.training.optim.groups",
    "levels_by_name": "memzoo.training.optim.groups",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'memzoo.training.optim' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
