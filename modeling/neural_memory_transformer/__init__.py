"""The neural memory transformer: a decoder with a neural long-term memory in every block."""

from memzoo.modeling.neural_memory_transformer.configuration_neural_memory_transformer import (
    NeuralMemoryTransformerConfig,
)
from memzoo.modeling.neural_memory_transformer.modeling_neural_memory_transformer import (
    NeuralMemoryTransformerForCausalLM,
    NeuralMemoryTransformerForSequenceClassification,
    NeuralMemoryTransformerModel,
    NeuralMemoryTransformerPreTrainedModel,
)

__all__ = [
    "NeuralMemoryTransformerConfig",
    "NeuralMemoryTransformerForCausalLM",
    "NeuralMemoryTransformerForSequenceClassification",
    "NeuralMemoryTransformerModel",
    "NeuralMemoryTransformerPreTrainedModel",
]
