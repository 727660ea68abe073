"""Dual-tier memory: a state-space or attention backbone whose layers read and write a fast and a deep tier of slots.

    x = x + Mixer(norm x)
    h = norm x;  v = Memory(h);  g = sigmoid(W [h; v]);  x = x + (1 - g) v
    x = x + SwiGLU(norm x)

The mixer is a selective state space or attention, which alone has the feed-forward part. Without full attention the
state of a layer has a constant size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer

from memzoo.modeling.attention import CausalSelfAttention
from memzoo.modeling.backbone import MemoryBackbone, MemoryCausalLM, MemoryPreTrainedModel
from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.dual_memory.configuration_dual_memory import DualMemoryConfig
from memzoo.modeling.mlp import GatedMLP
from memzoo.modeling.slot_memory import DualTierMemory
from memzoo.modeling.state_space import SelectiveStateSpace
from memzoo.modeling.statistics import masked_mean, record_calls

MIXER_STATES = {"conv", "ssm", "keys", "values", "tokens"}


class MemoryFusion(nn.Module):
    """g = sigmoid(W [h; v] + b);  x + (1 - g) v, or g x + (1 - g) v without the residual. All [B, T, D]."""

    def __init__(self, hidden_size: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.proj = nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, x: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The new residual stream, and g."""
        g = self.proj(torch.cat([h, v], dim=-1)).sigmoid()
        return (x if self.residual else g * x) + (1 - g) * v, g


class DualMemoryBlock(GradientCheckpointingLayer):
    def __init__(self, config: DualMemoryConfig, layer_idx: int) -> None:
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.layer_idx = layer_idx
        kind = config.layer_types[layer_idx]
        self.mixer_norm = nn.RMSNorm(D, eps)
        self.mixer: SelectiveStateSpace | CausalSelfAttention
        self.mlp = None
        if kind == "linear_attention":
            self.mixer = SelectiveStateSpace(
                D,
                config.state_size,
                config.conv_kernel,
                config.expand,
                config.time_step_rank,
                config.time_step_min,
                config.time_step_max,
                config.use_bias,
            )
        else:
            self.mixer = CausalSelfAttention(
                D,
                config.num_attention_heads,
                config.num_key_value_heads,
                window=config.sliding_window if kind == "sliding_attention" else None,
                rope_theta=config.rope_theta,
                bias=config.use_bias,
                dropout=config.dropout,
            )
            self.mlp_norm = nn.RMSNorm(D, eps)
            self.mlp = GatedMLP(D, config.intermediate_size)
        self.memory = None
        if layer_idx in config.memory_layers:
            self.memory_norm = nn.RMSNorm(D, eps)
            self.memory = DualTierMemory(
                D,
                config.memory_num_heads,
                config.memory_num_slots,
                config.memory_dim,
                query_proj=config.memory_query_proj,
                conv_kernel=config.memory_conv_kernel,
                temperature=config.memory_temperature,
                fast_rate=config.memory_fast_rate,
                deep_rate=config.memory_deep_rate,
                decay=config.memory_decay ** (1 / config.memory_decay_interval),
                top_k=config.memory_top_k,
                surprise_threshold=config.memory_surprise_threshold,
                surprise_momentum=config.memory_surprise_momentum,
                surprise_temperature=config.memory_surprise_temperature,
                confidence=config.memory_confidence,
                assignment=config.memory_assignment,
                block_size=config.memory_block_size,
            )
            self.memory_fusion = MemoryFusion(D, config.memory_residual)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, past_key_values: MemoryCache | None = None
    ) -> Tensor:
        state = past_key_values.read(self.layer_idx) if past_key_values is not None else {}
        mixed, new_state = self.mixer(
            self.mixer_norm(hidden_states), {name: x for name, x in state.items() if name in MIXER_STATES}, mask
        )
        hidden_states = hidden_states + self.dropout(mixed)
        if self.memory is not None:
            h = self.memory_norm(hidden_states)
            slots = {name: x for name, x in state.items() if name not in MIXER_STATES}
            read, slots = self.memory(h, slots, mask)
            hidden_states, _ = self.memory_fusion(hidden_states, h, self.dropout(read))
            new_state = {**new_state, **slots}
        if past_key_values is not None:
            past_key_values.write(self.layer_idx, new_state, new_tokens=hidden_states.shape[1])
        if self.mlp is not None:
            hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        return hidden_states


class DualMemoryPreTrainedModel(MemoryPreTrainedModel):
    config: DualMemoryConfig
    _no_split_modules = ["DualMemoryBlock"]
    _keep_in_fp32_modules = ["dt_proj"]  # read as a matrix: quantization leaves alone what is listed here
    _can_record_outputs = {"hidden_states": DualMemoryBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (SelectiveStateSpace, DualTierMemory)):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


class DualMemoryModel(MemoryBackbone, DualMemoryPreTrainedModel):
    """The backbone. See `DualMemoryForCausalLM` for the head."""

    def __init__(self, config: DualMemoryConfig) -> None:
        super().__init__(config)
        # no padding_idx: pads are left out by the mask, and a pad that is also a token of the text must be learned
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(DualMemoryBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def enter(self, embeddings: Tensor) -> Tensor:
        return self.dropout(embeddings)


class DualMemoryForCausalLM(MemoryCausalLM, DualMemoryPreTrainedModel, MemoryGenerationMixin):
    """The dual-tier memory model with a language-model head.

    ```python
    >>> import memzoo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")  # doctest: +SKIP
    ```
    """

    def __init__(self, config: DualMemoryConfig) -> None:
        super().__init__(config)
        self.model = DualMemoryModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """What the memories do with a text, a dict for every layer that has one.

        `layer` is its index and `gate` the mean of g; the others are those of `DualTierMemory.statistics`.
        """
        layers = [layer for layer in self.model.layers if layer.memory is not None]
        with record_calls([part for layer in layers for part in (layer.memory, layer.memory_fusion)]) as calls:
            self.observe(input_ids, attention_mask)
        stats = []
        for layer in layers:
            ((inputs, _),), ((_, (_, gate)),) = calls[layer.memory], calls[layer.memory_fusion]
            gate = masked_mean(gate.mean(-1), inputs[2])
            stats.append({"layer": layer.layer_idx, "gate": gate, **layer.memory.statistics(*inputs)})
        return stats


class DualMemoryForSequenceClassification(GenericForSequenceClassification, DualMemoryPreTrainedModel):
    """The dual-tier memory model with a classification head on the last real token."""
