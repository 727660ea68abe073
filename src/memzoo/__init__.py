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
    "MemoryGenerationMixin": "memzoo.modeling.cache",
    "parameter_breakdown": "memzoo.modeling.statistics",
}

# package of each family -> its classes' common prefix
_FAMILIES = {"maru": "Maru"}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'memzoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


def _register_families() -> None:
    """Tell transformers' Auto classes, and its tables of class names, about every family.

    The tables of names are what Trainer's label smoothing and the pipelines look a class up in.
    """
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from transformers.models.auto import modeling_auto as names

    heads = {
        "Model": (AutoModel, names.MODEL_MAPPING_NAMES),
        "ForCausalLM": (AutoModelForCausalLM, names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "ForSequenceClassification": (
            AutoModelForSequenceClassification,
            names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
    }
    for model_type, prefix in _FAMILIES.items():
        family = importlib.import_module(f"memzoo.modeling.{model_type}")
        config_class = getattr(family, f"{prefix}Config")
        AutoConfig.register(model_type, config_class, exist_ok=True)
        for suffix, (auto_class, table) in heads.items():
            if (model_class := getattr(family, prefix + suffix, None)) is not None:
                auto_class.register(config_class, model_class, exist_ok=True)
                table[model_type] = prefix + suffix
        if (tokenizer := getattr(family, f"{prefix}Tokenizer", None)) is not None:
            AutoTokenizer.register(config_class, tokenizer, exist_ok=True)


_register_families()
