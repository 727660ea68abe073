"""TitanMAC: windowed attention, persistent tokens and a neural memory, in the three arrangements of Titans."""

from memzoo.modeling.titan_mac.configuration_titan_mac import TitanMacConfig
from memzoo.modeling.titan_mac.modeling_titan_mac import (
    TitanMacForCausalLM,
    TitanMacForSequenceClassification,
    TitanMacModel,
    TitanMacPreTrainedModel,
)

__all__ = [
    "TitanMacConfig",
    "TitanMacForCausalLM",
    "TitanMacForSequenceClassification",
    "TitanMacModel",
    "TitanMacPreTrainedModel",
]
