"""A decoder that reads banks of learned memory tokens, whole or by chapters that a router chooses."""

from memzoo.modeling.memory_bank_transformer.configuration_memory_bank_transformer import MemoryBankTransformerConfig
from memzoo.modeling.memory_bank_transformer.modeling_memory_bank_transformer import (
    MemoryBankTransformerForCausalLM,
    MemoryBankTransformerForSequenceClassification,
    MemoryBankTransformerModel,
    MemoryBankTransformerPreTrainedModel,
)

__all__ = [
    "MemoryBankTransformerConfig",
    "MemoryBankTransformerForCausalLM",
    "MemoryBankTransformerForSequenceClassification",
    "MemoryBankTransformerModel",
    "MemoryBankTransformerPreTrainedModel",
]
