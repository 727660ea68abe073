"""MARU: a selective state-space block and a GRU with memory banks, byte by byte."""

from memzoo.modeling.maru.configuration_maru import MaruConfig
from memzoo.modeling.maru.modeling_maru import (
    MaruForCausalLM,
    MaruForSequenceClassification,
    MaruModel,
    MaruPreTrainedModel,
)
from memzoo.modeling.maru.tokenization_maru import MaruTokenizer

__all__ = [
    "MaruConfig",
    "MaruForCausalLM",
    "MaruForSequenceClassification",
    "MaruModel",
    "MaruPreTrainedModel",
    "MaruTokenizer",
]
