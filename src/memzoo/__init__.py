"""memzoo: memory-augmented language models that behave like any Hugging Face model.

`import memzoo` registers every family with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` and `pipeline("text-generation")` know them. Everything else is imported on
first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "MaruConfig": "memzoo.modeling.maru.configuration_maru",
    "MaruModel": "memzoo.modeling.maru.modeling_maru",
    "MaruForCausalLM": "memzoo.modeling.maru.modeling_maru",
    "MaruForSequenceClassification": "memzoo.modeling.maru.modeling_maru",
    "MaruTokenizer": "memzoo.modeling.maru.tokenization_maru",
    "MemoryCache": "memzoo.modeling.cache",
    "MemoryGenerationMixin": "memzoo.modeling.generation",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'memzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


def _register_families() -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    from memzoo.modeling import maru

    AutoConfig.register("maru", maru.MaruConfig, exist_ok=True)
    AutoModel.register(maru.MaruConfig, maru.MaruModel, exist_ok=True)
    AutoModelForCausalLM.register(maru.MaruConfig, maru.MaruForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(maru.MaruConfig, maru.MaruForSequenceClassification, exist_ok=True)
    AutoTokenizer.register(maru.MaruConfig, maru.MaruTokenizer, exist_ok=True)


_register_families()
