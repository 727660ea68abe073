"""The neural memory transformer: a decoder with a neural long-term memory (Titans, arXiv 2501.00663) in every block.

x = x + Attention(norm x);  u = norm x, r = Memory(u), x = x + sigmoid(W_gate [u; r]) * r;  x = x + SwiGLU(norm x)

The memory of a layer is the keys and values of its attention window and the networks that its neural memory has
learned: with sliding windows its size does not depend on what was read.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer

from memzoo.modeling.attention import CausalSelfAttention
from memzoo.modeling.backbone import MemoryBackbone, MemoryCausalLM, MemoryPreTrainedModel
from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.mlp import GatedMLP
from memzoo.modeling.neural_memory import NeuralMemory
from memzoo.modeling.neural_memory_transformer.configuration_neural_memory_transformer import (
    NeuralMemoryTransformerConfig,
)
from memzoo.modeling.statistics import masked_mean, neural_memory_statistics, record_calls


class MemoryGate(nn.Module):
    """sigmoid(W [u; r] + b) * r: each channel of the read r [B, T, D] passes as far as the input u asks for it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, u: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """The gated read and the gate, both [B, T, D]."""
        gate = self.proj(torch.cat([u, r], dim=-1)).sigmoid()
        return gate * r, gate


class NeuralMemoryTransformerBlock(GradientCheckpointingLayer):
    def __init__(self, config: NeuralMemoryTransformerConfig, layer_idx: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.layer_idx = layer_idx
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.attention_norm = nn.RMSNorm(D, eps)
        self.attention = CausalSelfAttention(
            D,
            config.num_attention_heads,
            config.num_key_value_heads,
            window=config.sliding_window if sliding else None,
            rope_theta=config.rope_theta,
            bias=config.attention_bias,
            dropout=config.dropout,
        )
        self.memory: NeuralMemory | None = None
        if config.memory_enabled:
            self.memory_norm = nn.RMSNorm(D, eps)
            self.memory = NeuralMemory.from_config(config)
            self.memory_gate = MemoryGate(D)
        self.mlp_norm = nn.RMSNorm(D, eps)
        self.mlp = GatedMLP(D, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, past_key_values: MemoryCache | None = None
    ) -> Tensor:
        state = past_key_values.read(self.layer_idx) if past_key_values is not None else {}
        keys = {name: state[name] for name in ("keys", "values", "tokens") if name in state}
        attended, new_state = self.attention(self.attention_norm(hidden_states), keys, mask)
        hidden_states = hidden_states + self.dropout(attended)
        if self.memory is not None:
            u = self.memory_norm(hidden_states)
            learned = {name: value for name, value in state.items() if name not in new_state}
            read, learned = self.memory(u, learned, mask)
            read, _ = self.memory_gate(u, read)
            hidden_states, new_state = hidden_states + self.dropout(read), {**new_state, **learned}
        if past_key_values is not None:
            past_key_values.write(self.layer_idx, new_state, new_tokens=hidden_states.shape[1])
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class NeuralMemoryTransformerPreTrainedModel(MemoryPreTrainedModel):
    config: NeuralMemoryTransformerConfig
    _no_split_modules = ["NeuralMemoryTransformerBlock"]
    _can_record_outputs = {"hidden_states": NeuralMemoryTransformerBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (NeuralMemory, CausalSelfAttention)):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


class NeuralMemoryTransformerModel(MemoryBackbone, NeuralMemoryTransformerPreTrainedModel):
    """The backbone. See `NeuralMemoryTransformerForCausalLM` for the head."""

    def __init__(self, config: NeuralMemoryTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(NeuralMemoryTransformerBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def enter(self, embeddings: Tensor) -> Tensor:
        return self.dropout(embeddings)


class NeuralMemoryTransformerForCausalLM(
    MemoryCausalLM, NeuralMemoryTransformerPreTrainedModel, MemoryGenerationMixin
):
    """The neural memory transformer with a language-model head.

    ```python
    >>> import memzoo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")  # doctest: +SKIP
    ```
    """

    def __init__(self, config: NeuralMemoryTransformerConfig) -> None:
        super().__init__(config)
        self.model = NeuralMemoryTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, float]]:
        """What the memory does with a text, a dict a layer (none when the memory is off); pads do not count.

        `activation` is the mean norm of what is read relative to the residual stream's, `gate` the mean output gate;
        the others are those of `neural_memory_statistics`.
        """
        layers = [layer for layer in self.model.layers if layer.memory is not None]
        parts = [part for layer in layers for part in (layer.memory_norm, layer.memory, layer.memory_gate)]
        with record_calls(parts) as calls:
            self.observe(input_ids, attention_mask)
        stats = []
        for layer in layers:
            (((stream,), _),), ((inputs, _),), ((_, (read, gate)),) = (
                calls[part] for part in (layer.memory_norm, layer.memory, layer.memory_gate)
            )
            mask = inputs[2]
            activation = read.norm(dim=-1) / stream.norm(dim=-1).clamp(min=1e-12)  # a pad's embedding is zero
            stats.append(
                {
                    "activation": masked_mean(activation, mask),
                    "gate": masked_mean(gate.mean(-1), mask),
                    **neural_memory_statistics(layer.memory, *inputs),
                }
            )
        return stats


class NeuralMemoryTransformerForSequenceClassification(
    GenericForSequenceClassification, NeuralMemoryTransformerPreTrainedModel
):
    """The neural memory transformer with a classification head on the last real token."""
