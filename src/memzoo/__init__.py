"""memzoo: memory-augmented language models that behave like any Hugging Face model.

`import memzoo` registers every family with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained` and `pipeline("text-generation")` know them. Everything else is imported on
first use.
"""

import importlib
from typing import Any

from memzoo.peft_hook import register_when_imported

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "DualMemoryConfig": "memzoo.modeling.dual_memory.configuration_dual_memory",
    "DualMemoryModel": "memzoo.modeling.dual_memory.modeling_dual_memory",
    "DualMemoryForCausalLM": "memzoo.modeling.dual_memory.modeling_dual_memory",
    "DualMemoryForSequenceClassification": "memzoo.modeling.dual_memory.modeling_dual_memory",
    "MaruConfig": "memzoo.modeling.maru.configuration_maru",
    "MaruModel": "memzoo.modeling.maru.modeling_maru",
    "MaruForCausalLM": "memzoo.modeling.maru.modeling_maru",
    "MaruForSequenceClassification": "memzoo.modeling.maru.modeling_maru",
    "MaruTokenizer": "memzoo.modeling.maru.tokenization_maru",
    "MemoryBankTransformerConfig": "memzoo.modeling.memory_bank_transformer.configuration_memory_bank_transformer",
    "MemoryBankTransformerModel": "memzoo.modeling.memory_bank_transformer.modeling_memory_bank_transformer",
    "MemoryBankTransformerForCausalLM": "memzoo.modeling.memory_bank_transformer.modeling_memory_bank_transformer",
    "MemoryBankTransformerForSequenceClassification": (
        "memzoo.modeling.memory_bank_transformer.modeling_memory_bank_transformer"
    ),
    "MemoryCache": "memzoo.modeling.cache",
    "MemoryConfig": "memzoo.adapters.config",
    "MemoryGenerationMixin": "memzoo.modeling.cache",
    "MemoryModel": "memzoo.adapters.model",
    "NeuralMemoryTransformerConfig": (
        "memzoo.modeling.neural_memory_transformer.configuration_neural_memory_transformer"
    ),
    "NeuralMemoryTransformerModel": "memzoo.modeling.neural_memory_transformer.modeling_neural_memory_transformer",
    "NeuralMemoryTransformerForCausalLM": (
        "memzoo.modeling.neural_memory_transformer.modeling_neural_memory_transformer"
    ),
    "NeuralMemoryTransformerForSequenceClassification": (
        "memzoo.modeling.neural_memory_transformer.modeling_neural_memory_transformer"
    ),
    "TitanMacConfig": "memzoo.modeling.titan_mac.configuration_titan_mac",
    "TitanMacModel": "memzoo.modeling.titan_mac.modeling_titan_mac",
    "TitanMacForCausalLM": "memzoo.modeling.titan_mac.modeling_titan_mac",
    "TitanMacForSequenceClassification": "memzoo.modeling.titan_mac.modeling_titan_mac",
    "memory_param_groups": "memzoo.adapters.optim",
    "parameter_breakdown": "memzoo.modeling.statistics",
}

# package of each family -> its classes' common prefix
_FAMILIES = {
    "dual_memory": "DualMemory",
    "maru": "Maru",
    "neural_memory_transformer": "NeuralMemoryTransformer",
    "titan_mac": "TitanMac",
    "memory_bank_transformer": "MemoryBankTransformer",
}

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
register_when_imported()
