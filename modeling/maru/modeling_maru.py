"""MARU, the memory-augmented recurrent unit: per layer a selective state-space mixer, then a GRU with memory banks.

x = x + Mixer(norm x);  x = x + W_o Cell(norm x)

The memory of a layer is `conv` and `ssm` (the mixer), `h` and `banks` (the cell): its size does not depend on what was
read, so a token costs the same at any context length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.inputs import embed_and_check
from memzoo.modeling.maru.configuration_maru import MaruConfig
from memzoo.modeling.memory_gru import MemoryCell, ParallelMemoryGRU, RouterBalance, SequentialMemoryGRU
from memzoo.modeling.padding import compaction
from memzoo.modeling.state_space import SelectiveStateSpace
from memzoo.modeling.statistics import router_statistics, slot_statistics


@dataclass
class MaruModelOutput(MoeModelOutputWithPast):
    """transformers' output, `router_logits` being [B, T, Kr] a layer, with `output_router_logits=True`, and

    Args:
        memory_writes: [B, T, K, S] a layer, the write weight of every slot, with `output_memory_writes=True`.
    """

    memory_writes: tuple[Tensor, ...] | None = None


@dataclass
class MaruCausalLMOutput(MoeCausalLMOutputWithPast):
    """As `MaruModelOutput`, with the loss [] in nats per token and the logits [B, T, V]. No auxiliary loss."""

    memory_writes: tuple[Tensor, ...] | None = None


class MaruBlock(GradientCheckpointingLayer):
    def __init__(self, config: MaruConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = SelectiveStateSpace(
            config.hidden_size,
            config.state_size,
            config.conv_kernel,
            config.expand,
            config.time_step_rank,
            config.time_step_min,
            config.time_step_max,
            config.use_bias,
        )
        self.cell_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.cell = (ParallelMemoryGRU if config.recurrence == "parallel" else SequentialMemoryGRU)(config)
        self.out_proj = nn.Linear(config.cell_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        output_memory_writes: bool = False,
    ) -> Tensor:
        state = past_key_values.read(self.layer_idx) if past_key_values is not None else {}
        mixed, mixer_state = self.mixer(self.mixer_norm(hidden_states), state, mask)
        hidden_states = hidden_states + mixed
        x = self.dropout(self.cell_norm(hidden_states))
        h, cell_state, *_ = self.cell(x, state, mask, output_memory_writes)
        if past_key_values is not None:
            past_key_values.write(self.layer_idx, {**mixer_state, **cell_state}, new_tokens=hidden_states.shape[1])
        return hidden_states + self.dropout(self.out_proj(h))


class MaruPreTrainedModel(PreTrainedModel):
    config: MaruConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MaruBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["balance"]
    _is_stateful = True
    _can_record_outputs = {
        "hidden_states": MaruBlock,
        "router_logits": OutputRecorder(MemoryCell, index=2),
        "memory_writes": OutputRecorder(MemoryCell, index=3),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RouterBalance):
            module.init_weights()
        elif isinstance(module, (SelectiveStateSpace, MemoryCell)):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


class MaruModel(MaruPreTrainedModel):
    """The backbone. See `MaruForCausalLM` for the head."""

    def __init__(self, config: MaruConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        same = config.embedding_size == config.hidden_size
        self.embed_proj = nn.Identity() if same else nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MaruBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaruModelOutput:
        """Read a batch of sequences, going on from `past_key_values`.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, embedding_size].
            attention_mask: [B, T], or [B, past + T]; 0 marks pads, wherever they are.
            past_key_values: the memory to go on from; it is updated.
            use_cache: start a memory when none is given, and return it.
        """
        hidden_states = embed_and_check(self, input_ids, inputs_embeds, past_key_values)
        B, T, _ = hidden_states.shape
        if use_cache and past_key_values is None:
            past_key_values = MemoryCache(self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        move = compaction(attention_mask, B, T, seen)
        hidden_states = self.dropout(self.embed_proj(hidden_states))
        if move is not None:
            hidden_states = move.apply(hidden_states)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                mask=None if move is None else move.mask,
                past_key_values=past_key_values,
                output_memory_writes=bool(kwargs.get("output_memory_writes")),
            )
        hidden_states = self.norm(hidden_states)
        if move is not None:
            hidden_states = move.undo(hidden_states)
        return MaruModelOutput(last_hidden_state=hidden_states, past_key_values=past_key_values)


class MaruForCausalLM(MaruPreTrainedModel, MemoryGenerationMixin):
    """MARU with a language-model head.

    ```python
    >>> import memzoo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")  # doctest: +SKIP
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MaruConfig) -> None:
        super().__init__(config)
        self.model = MaruModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaruCausalLMOutput:
        """As `MaruModel.forward`; `labels` [B, T] (shifted inside, -100 ignored) add the loss in nats per token."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaruCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_logits=outputs.router_logits,
            memory_writes=outputs.memory_writes,
        )

    @torch.no_grad()
    def _observe(self, input_ids: torch.LongTensor, attention_mask: Tensor | None) -> MaruModelOutput:
        """Read a text in eval mode and return all that the memory did."""
        was_training = self.training
        self.eval()
        flags = {"output_router_logits": True, "output_memory_writes": True, "use_cache": False}
        out = self.model(input_ids, attention_mask=attention_mask, **flags)
        self.train(was_training)
        return out

    def memory_trace(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """How strongly every token writes every slot: [B, T, K, S] a layer (empty when the memory is off)."""
        return self._observe(input_ids, attention_mask).memory_writes or ()

    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, float]]:
        """What the memory does with a text, a dict a layer: the router's statistics and the slots' use."""
        out = self._observe(input_ids, attention_mask)
        stats = []
        for layer, logits, writes in zip(self.model.layers, out.router_logits or (), out.memory_writes or ()):
            router = layer.cell.router
            p = ((logits + router.balance.bias) / router.balance.temperature).softmax(-1)
            stats.append(
                {
                    **router_statistics(p, attention_mask),
                    "balance_bias_norm": router.balance.bias.norm().item(),
                    **slot_statistics(writes, attention_mask),
                }
            )
        return stats


class MaruForSequenceClassification(GenericForSequenceClassification, MaruPreTrainedModel):
    """MARU with a classification head on the last real token."""
