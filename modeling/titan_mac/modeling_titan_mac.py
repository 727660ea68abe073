"""TitanMAC: a decoder with windowed attention, persistent tokens and the neural memory of Titans (arXiv 2501.00663).

x = x + Mixer(norm x) [+ Bank(norm x)];  x = x + SwiGLU(norm x)

The paper's three arrangements of attention and memory (section 4): "mac" and "mag" are mixers, memory as context and
as gate; "mal" is a memory as a layer of its own before the mixer. The state of a layer is the memory's weights, the
keys and values of a window or a segment, and the bank's pairs: its size does not depend on what was read.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer

from memzoo.modeling.attention import CausalSelfAttention
from memzoo.modeling.backbone import MemoryBackbone, MemoryCausalLM, MemoryPreTrainedModel
from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.key_value_memory import KeyValueMemory
from memzoo.modeling.mlp import GatedMLP
from memzoo.modeling.neural_memory import NeuralMemory
from memzoo.modeling.norm import RMSNorm, narrow
from memzoo.modeling.statistics import masked_mean, neural_memory_statistics, record_calls
from memzoo.modeling.titan_mac.configuration_titan_mac import TitanMacConfig
from memzoo.modeling.titan_mac.memory_as_context import MemoryAsContext


class WindowAttention(CausalSelfAttention):
    """Attention over [persistent; the last `sliding_window` tokens], without a neural memory."""

    def __init__(self, config: TitanMacConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            window=config.sliding_window,
            num_persistent_tokens=config.num_persistent_tokens,
            rope_theta=config.rope_theta,
            dropout=config.dropout,
        )


class MemoryAsGate(WindowAttention):
    """Section 4.2 (eq. 26-28): o = y * sigmoid(M(x)), y the windowed attention on x."""

    def __init__(self, config: TitanMacConfig) -> None:
        super().__init__(config)
        self.memory = NeuralMemory.from_config(config)

    def forward(
        self, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, attention_state = super().forward(hidden_states, state, mask)
        gate, memory_state = self.memory(hidden_states, state, mask)
        return y * gate.sigmoid(), {**memory_state, **attention_state}


class TitanMacBlock(GradientCheckpointingLayer):
    def __init__(self, config: TitanMacConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        D, eps = config.hidden_size, config.rms_norm_eps
        variant = config.titans_variant if config.memory_enabled else None
        self.memory = None
        if variant == "mal":  # section 4.3 (eq. 29-31): the attention reads the memory's output
            self.memory_norm, self.memory = RMSNorm(D, eps), NeuralMemory.from_config(config)
        self.mixer_norm = RMSNorm(D, eps)
        self.mixer = {"mac": MemoryAsContext, "mag": MemoryAsGate}.get(variant, WindowAttention)(config)
        self.bank = None
        if config.memory_bank:
            self.bank = KeyValueMemory(
                D,
                config.memory_bank_dim,
                config.memory_bank_size,
                config.memory_bank_top_k,
                config.memory_bank_decay,
                config.memory_segment_size,
            )
        self.mlp_norm = RMSNorm(D, eps)
        self.mlp = GatedMLP(D, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    @property
    def neural_memory(self) -> NeuralMemory | None:
        """The layer's neural memory, wherever it is."""
        return self.mixer.memory if isinstance(self.mixer, (MemoryAsContext, MemoryAsGate)) else self.memory

    @property
    def memory_input(self) -> nn.Module:
        """The norm whose output the neural memory reads; "mac" calls it for every segment."""
        if isinstance(self.mixer, MemoryAsContext):
            return self.mixer.norm
        return self.mixer_norm if self.memory is None else self.memory_norm

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None = None, past_key_values: MemoryCache | None = None
    ) -> Tensor:
        state = past_key_values.read(self.layer_idx) if past_key_values is not None else {}
        new_state: dict[str, Tensor] = {}
        if self.memory is not None:
            y, new_state = self.memory(narrow(self.memory_norm(hidden_states)), state, mask)
            hidden_states = hidden_states + self.dropout(y)
        x = narrow(self.mixer_norm(hidden_states))
        y, mixer_state = self.mixer(x, state, mask)
        new_state |= mixer_state
        if self.bank is not None:
            found, bank_state = self.bank(x, state, mask)
            y, new_state = y + found, new_state | bank_state
        if past_key_values is not None:
            past_key_values.write(self.layer_idx, new_state, new_tokens=hidden_states.shape[1])
        hidden_states = hidden_states + self.dropout(y)
        return hidden_states + self.dropout(self.mlp(narrow(self.mlp_norm(hidden_states))))


class TitanMacPreTrainedModel(MemoryPreTrainedModel):
    config: TitanMacConfig
    _no_split_modules = ["TitanMacBlock"]
    _can_record_outputs = {"hidden_states": TitanMacBlock}

    def __init__(self, config: TitanMacConfig) -> None:
        config.validate_architecture()  # fields may have been set since it was made, by from_pretrained too
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (NeuralMemory, CausalSelfAttention)):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, KeyValueMemory):
            module.init_weights()
        else:
            super()._init_weights(module)


class TitanMacModel(MemoryBackbone, TitanMacPreTrainedModel):
    """The backbone. See `TitanMacForCausalLM` for the head."""

    def __init__(self, config: TitanMacConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(TitanMacBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def enter(self, embeddings: Tensor) -> Tensor:
        return self.dropout(embeddings)


class TitanMacForCausalLM(MemoryCausalLM, TitanMacPreTrainedModel, MemoryGenerationMixin):
    """TitanMAC with a language-model head.

    ```python
    >>> import memzoo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")  # doctest: +SKIP
    ```
    """

    def __init__(self, config: TitanMacConfig) -> None:
        super().__init__(config)
        self.model = TitanMacModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, float]]:
        """What the memory does with a text, a dict a layer (none when the memory is off); pads do not count.

        `activation` is the mean norm of the memory's output relative to that of its input; the others are those of
        `neural_memory_statistics`. With a bank, `bank_use` is the share of its places that hold a pair.
        """
        layers = [layer for layer in self.model.layers if layer.neural_memory is not None or layer.bank is not None]
        parts = [part for x in layers for part in (x.memory_input, x.mixer, x.bank) if part is not None]
        with record_calls(parts) as calls:
            self.observe(input_ids, attention_mask)
        stats: list[dict[str, float]] = []
        for layer in layers:
            found: dict[str, float] = {}
            (((_, _, mask), _),) = calls[layer.mixer]
            if (memory := layer.neural_memory) is not None:
                x = torch.cat([output for _, output in calls[layer.memory_input]], 1)
                y, _ = memory.eval()(x, {}, mask)
                memory.train(self.training)
                out, given = (masked_mean(z.norm(dim=-1), mask) for z in (y, x))
                found["activation"] = out / max(given, 1e-12)  # of means: an unmasked pad's embedding is zero
                found |= neural_memory_statistics(memory, x, {}, mask)
            if layer.bank is not None:
                ((_, (_, state)),) = calls[layer.bank]
                found["bank_use"] = (state["bank.usage"] > 0).double().mean().item()
            stats.append(found)
        return stats


class TitanMacForSequenceClassification(GenericForSequenceClassification, TitanMacPreTrainedModel):
    """TitanMAC with a classification head on the last real token."""
