"""MARU, the memory-augmented recurrent unit: per layer a selective state-space mixer, then a GRU with memory banks.

x = x + Mixer(norm x);  x = x + W_o Cell(norm x)

The memory of a layer is `conv` and `ssm` (the mixer), `h` and `banks` (the cell): its size does not depend on what was
read, so a token costs the same at any context length.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.output_capturing import OutputRecorder

from memzoo.kernels.maru_step import BlockState, BlockWeights, maru_step
from memzoo.modeling.backbone import MemoryBackbone, MemoryCausalLM, MemoryPreTrainedModel
from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.maru.configuration_maru import MaruConfig
from memzoo.modeling.memory_gru import MemoryCell, ParallelMemoryGRU, RouterBalance, SequentialMemoryGRU
from memzoo.modeling.norm import RMSNorm
from memzoo.modeling.state_space import SelectiveStateSpace
from memzoo.modeling.statistics import router_statistics, slot_statistics
from memzoo.modeling.untouched import untouched


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
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        self.cell_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        if state and mask is None and hidden_states.shape[1] == 1 and not output_memory_writes:
            stepped = self._step(hidden_states[:, 0], state)
            if stepped is not None:
                past_key_values.write(self.layer_idx, stepped[1], new_tokens=1)
                return stepped[0][:, None]
        mixed, mixer_state = self.mixer(self.mixer_norm(hidden_states), state, mask)
        hidden_states = hidden_states + mixed
        x = self.dropout(self.cell_norm(hidden_states))
        h, cell_state, *_ = self.cell(x, state, mask, output_memory_writes)
        if past_key_values is not None:
            past_key_values.write(self.layer_idx, {**mixer_state, **cell_state}, new_tokens=hidden_states.shape[1])
        return hidden_states + self.dropout(self.out_proj(h))

    def _step(self, hidden_states: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]] | None:
        """One token [B, D] in one compiled pass, or None where that is not possible."""
        parts = self._modules
        norms, out_proj = (parts["mixer_norm"], parts["cell_norm"]), parts["out_proj"]
        plain = untouched(parts["mixer"], SelectiveStateSpace) and untouched(parts["cell"], ParallelMemoryGRU)
        plain = plain and untouched(out_proj, nn.Linear) and all(untouched(norm, RMSNorm) for norm in norms)
        if self.training or not plain:
            return None
        mixer, cell = parts["mixer"].weights(), parts["cell"].weights()
        if mixer is None or cell is None:
            return None
        x_proj, x_bias, cell, router_bias, options = cell
        weights = BlockWeights(
            norms[0].weight, mixer, norms[1].weight, x_proj, x_bias, cell, router_bias, out_proj.weight
        )
        states = BlockState(state["conv"], state["ssm"], state["h"], state["banks"])
        stepped = maru_step(self, hidden_states, weights, states, norms[0].eps, **options)
        return None if stepped is None else (stepped[0], stepped[1]._asdict())


class MaruPreTrainedModel(MemoryPreTrainedModel):
    config: MaruConfig
    _no_split_modules = ["MaruBlock"]
    _keep_in_fp32_modules_strict = ["balance"]
    _can_record_outputs = {
        "hidden_states": MaruBlock,
        "router_logits": OutputRecorder(MemoryCell, index=2),
        "memory_writes": OutputRecorder(MemoryCell, index=3),
    }

    def __init__(self, config: MaruConfig) -> None:
        super().__init__(config)
        # read as matrices by the kernels: quantization leaves these alone, as it does whatever is listed here
        names = ["dt_proj", *(["gates_h"] if config.recurrence == "sequential" else [])]
        if config.memory_num_banks:
            names += ["router.out_proj", "gates_c"]
            names += ["router.h_proj", "query_h", "write_proj"] if config.recurrence == "sequential" else []
        self._keep_in_fp32_modules = names

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RouterBalance):
            module.init_weights()
        elif isinstance(module, (SelectiveStateSpace, MemoryCell)):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


class MaruModel(MemoryBackbone, MaruPreTrainedModel):
    """The backbone. See `MaruForCausalLM` for the head."""

    output_class = MaruModelOutput

    def __init__(self, config: MaruConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        same = config.embedding_size == config.hidden_size
        self.embed_proj = nn.Identity() if same else nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MaruBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def enter(self, embeddings: Tensor) -> Tensor:
        return self.dropout(self.embed_proj(embeddings))

    def layer_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"output_memory_writes": bool(kwargs.get("output_memory_writes"))}


class MaruForCausalLM(MemoryCausalLM, MaruPreTrainedModel, MemoryGenerationMixin):
    """MARU with a language-model head.

    ```python
    >>> import memzoo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")  # doctest: +SKIP
    ```
    """

    output_class = MaruCausalLMOutput

    def __init__(self, config: MaruConfig) -> None:
        super().__init__(config)
        self.model = MaruModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def memory_trace(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """How strongly every token writes every slot: [B, T, K, S] a layer (empty when the memory is off)."""
        return self.observe(input_ids, attention_mask, output_memory_writes=True).memory_writes or ()

    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, float]]:
        """What the memory does with a text, a dict a layer: the router's statistics and the slots' use."""
        out = self.observe(input_ids, attention_mask, output_router_logits=True, output_memory_writes=True)
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
