"""Dual-tier memory: a fast and a deep tier of slots on a state-space or attention backbone."""

from memzoo.modeling.dual_memory.configuration_dual_memory import DualMemoryConfig
from memzoo.modeling.dual_memory.modeling_dual_memory import (
    DualMemoryForCausalLM,
    DualMemoryForSequenceClassification,
    DualMemoryModel,
    DualMemoryPreTrainedModel,
)

__all__ = [
    "DualMemoryConfig",
    "DualMemoryForCausalLM",
    "DualMemoryForSequenceClassification",
    "DualMemoryModel",
    "DualMemoryPreTrainedModel",
]
