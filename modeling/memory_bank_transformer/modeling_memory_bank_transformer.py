"""The memory-bank transformer: a decoder whose layers read learned memory tokens by cross-attention.

A: x = x + Attention(norm x);  x = x + Read(norm x);  x = x + SwiGLU(norm x)
B: x = x + Attention(norm x);  x = x + SwiGLU(norm x);  x = x + Read(norm x);  x = x + SwiGLU_2(norm x)

The banks are parameters, shared between layers or not; what a sequence leaves behind is the self-attention's keys and
values and what the router pools.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from memzoo.modeling.attention import CausalSelfAttention
from memzoo.modeling.backbone import MemoryBackbone, MemoryCausalLM, MemoryPreTrainedModel
from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.chapter_router import ChapterRouter, choose, router_losses
from memzoo.modeling.memory_bank import MemoryBank, MemoryRead
from memzoo.modeling.memory_bank_transformer.configuration_memory_bank_transformer import MemoryBankTransformerConfig
from memzoo.modeling.mlp import GatedMLP
from memzoo.modeling.statistics import masked_mean, record_calls, router_statistics


def build_read(config: MemoryBankTransformerConfig) -> MemoryRead:
    return MemoryRead(
        config.hidden_size,
        config.memory_width,
        config.memory_num_heads,
        config.memory_num_key_value_heads,
        config.memory_num_chapters,
        config.memory_routing,
        config.memory_top_k_chapters,
        config.memory_num_shared_chapters,
        config.memory_mixing,
        config.memory_routed_scaling_factor,
        config.memory_block_size,
        config.memory_normalize_weights,
        config.memory_product_keys,
        config.memory_projection_rank,
        config.memory_dropout,
        config.memory_zero_init,
    )


def build_bank(config: MemoryBankTransformerConfig) -> MemoryBank:
    return MemoryBank(
        config.memory_num_tokens,
        config.memory_dim,
        config.memory_bank_type,
        config.memory_bank_rank,
        config.memory_num_chapters,
        config.memory_quantization,
        config.memory_quantization_aware,
    )


class MemoryBankTransformerBlock(GradientCheckpointingLayer):
    def __init__(self, config: MemoryBankTransformerConfig, layer_idx: int, bank_idx: int | None) -> None:
        super().__init__()
        self.layer_idx, self.bank_idx = layer_idx, bank_idx
        D, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = nn.RMSNorm(D, eps)
        self.attention = CausalSelfAttention(
            D,
            config.num_attention_heads,
            config.num_key_value_heads,
            window=config.sliding_window,
            rope_theta=config.rope_theta,
            dropout=config.dropout,
        )
        self.mlp_norm = nn.RMSNorm(D, eps)
        self.mlp = GatedMLP(D, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)
        self.memory, self.read_first = None, config.memory_block_variant == "A"
        if bank_idx is not None:
            self.memory_norm, self.memory = nn.RMSNorm(D, eps), build_read(config)
            if not self.read_first:
                self.second_mlp_norm, self.second_mlp = nn.RMSNorm(D, eps), GatedMLP(D, config.intermediate_size)
        self.checkpoint_memory = config.memory_gradient_checkpointing

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        banks: nn.ModuleList | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        state = past_key_values.read(self.layer_idx) if past_key_values is not None else {}
        own = {name: x for name, x in state.items() if name.startswith(("router", "prompt"))}
        attention_state = {name: x for name, x in state.items() if name not in own}
        y, new_state = self.attention(self.attention_norm(hidden_states), attention_state, mask)
        hidden_states = hidden_states + self.dropout(y)
        if self.memory is not None and self.read_first:
            hidden_states, memory_state = self.read(hidden_states, banks, own, mask, prompt_lengths)
            new_state = {**new_state, **memory_state}
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        if self.memory is not None and not self.read_first:
            hidden_states, memory_state = self.read(hidden_states, banks, own, mask, prompt_lengths)
            new_state = {**new_state, **memory_state}
            hidden_states = hidden_states + self.dropout(self.second_mlp(self.second_mlp_norm(hidden_states)))
        if past_key_values is not None:
            past_key_values.write(self.layer_idx, new_state, new_tokens=hidden_states.shape[1])
        return hidden_states

    def read(
        self,
        x: Tensor,
        banks: nn.ModuleList,
        state: dict[str, Tensor],
        mask: Tensor | None,
        prompt_lengths: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x + Read(norm x), and the router's new state."""
        arguments = (self.memory_norm(x), banks[self.bank_idx], state, mask, prompt_lengths)
        if self.checkpoint_memory and self.training and torch.is_grad_enabled():
            y, new_state, _ = checkpoint(self.memory, *arguments, use_reentrant=False)
        else:
            y, new_state, _ = self.memory(*arguments)
        return x + self.dropout(y), new_state


class MemoryBankTransformerPreTrainedModel(MemoryPreTrainedModel):
    config: MemoryBankTransformerConfig
    _no_split_modules = ["MemoryBankTransformerBlock"]
    _can_record_outputs = {
        "hidden_states": MemoryBankTransformerBlock,
        "router_logits": OutputRecorder(MemoryRead, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryBank):
            module.init_weights(self.config.memory_init_std)
        elif isinstance(module, (MemoryRead, ChapterRouter, CausalSelfAttention)):
            module.init_weights(self.config.initializer_range)
        else:
            super()._init_weights(module)


class MemoryBankTransformerModel(MemoryBackbone, MemoryBankTransformerPreTrainedModel):
    """The backbone. See `MemoryBankTransformerForCausalLM` for the head."""

    output_class = MoeModelOutputWithPast

    def __init__(self, config: MemoryBankTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        readers = config.memory_layer_indices
        span = {"shared": max(len(readers), 1), "per_layer": 1, "group": config.memory_group_size}
        bank_of = {layer: i // span[config.memory_sharing] for i, layer in enumerate(readers)}
        self.memory_banks = nn.ModuleList(build_bank(config) for _ in set(bank_of.values()))
        self.layers = nn.ModuleList(
            MemoryBankTransformerBlock(config, i, bank_of.get(i)) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def enter(self, embeddings: Tensor) -> Tensor:
        return self.dropout(embeddings)

    def layer_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"banks": self.memory_banks, "prompt_lengths": kwargs.get("prompt_lengths")}


class MemoryBankTransformerForCausalLM(MemoryCausalLM, MemoryBankTransformerPreTrainedModel, MemoryGenerationMixin):
    """The memory-bank transformer with a language-model head.

    ```python
    >>> import memzoo
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer

    >>> model = AutoModelForCausalLM.from_pretrained("path/to/model")  # doctest: +SKIP
    ```
    """

    output_class = MoeCausalLMOutputWithPast

    def __init__(self, config: MemoryBankTransformerConfig) -> None:
        super().__init__(config)
        self.model = MemoryBankTransformerModel(config)
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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_lengths: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """As `MemoryBankTransformerModel.forward`; `labels` [B, T] (shifted inside, -100 ignored) add the loss.

        While training the loss, in nats per token, includes the router's losses. With `output_router_logits` these
        are `aux_loss` too, and `router_logits` are [B, T, C] a memory layer, each row's real tokens first and -inf
        where a token is a pad or not routed. `prompt_lengths` [B] are the real tokens of each row's prompt, for
        "prompt" routing; pass them with the first tokens of a sequence.
        """
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        training = self.training and labels is not None and self.config.memory_num_chapters > 1
        out = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_router_logits=wanted or training,
            prompt_lengths=prompt_lengths,
            return_dict=True,
            **kwargs,
        )
        if out.router_logits:
            out.aux_loss = self.router_loss(out.router_logits).to(out.logits.device)
            if training:
                out.loss = out.loss + out.aux_loss * _share_of_batch(labels, kwargs.get("num_items_in_batch"))
        if not wanted:
            out.router_logits = None
        return out

    def router_loss(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """The weighted sum of the routers' losses, each a mean over the memory layers."""
        config = self.config
        router = next(layer.memory.router for layer in self.model.layers if layer.memory is not None)
        trained = self.training and torch.is_grad_enabled() and router.gate.weight.requires_grad
        if trained and not router_logits[0].requires_grad:
            raise RuntimeError(
                "the router's logits have no gradient, so its losses would not train it; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        balance, variance, z = router_losses(router_logits, router.halves, router.top_k)
        coefficients = (config.router_aux_loss_coef, config.router_variance_loss_coef, config.router_z_loss_coef)
        return (torch.stack([balance, variance, z]) * balance.new_tensor(coefficients)).sum()

    def swap_memory_bank(self, bank: MemoryBank, index: int = 0) -> MemoryBank:
        """Read another bank from now on, and return the one that was there.

        Raises:
            ValueError: the bank is of another width or has other chapters, or of another kind than the model's others.
        """
        banks: Any = self.model.memory_banks
        old, config = banks[index], self.config
        if bank.width != old.width or bank.num_chapters != old.num_chapters:
            raise ValueError(
                f"the new bank has {bank.num_chapters} chapters of tokens {bank.width} wide; this model reads "
                f"{old.num_chapters} chapters of tokens {old.width} wide"
            )
        new, present = bank.description(), old.description()
        if new != present and len(banks) > 1:
            differs = ", ".join(
                f"{name} {x!r} instead of {present[name]!r}" for name, x in new.items() if x != present[name]
            )
            raise ValueError(f"all banks of a model are of one kind; this one has {differs}")
        banks[index] = bank
        config.memory_num_tokens, config.memory_bank_type = bank.num_memory_tokens, bank.bank_type
        config.memory_bank_rank = new["bank_rank"] or config.memory_bank_rank
        config.memory_dim = max(bank.width, config.memory_dim or 0) if bank.bank_type == "reduced" else bank.width
        config.memory_quantization, config.memory_quantization_aware = new["quantization"], new["quantization_aware"]
        return old

    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, float]]:
        """What the memory does with a text, a dict a memory layer; pads do not count.

        `activation` is the mean norm of what is read relative to the layer's input; with chapters, the statistics of
        `router_statistics` and `chapters_used`, the share of the routed chapters that any token chose.
        """
        reads = [layer.memory for layer in self.model.layers if layer.memory is not None]
        with record_calls(reads) as calls:
            self.observe(input_ids, attention_mask)
        stats = []
        for read in reads:
            (((x, _, _, mask, _), (y, _, logits)),) = calls[read]
            found: dict[str, Any] = {"activation": masked_mean(y.norm(dim=-1) / x.norm(dim=-1), mask)}
            if logits is not None:
                routed = logits[..., 0].isfinite()
                p = _probabilities(torch.where(routed[..., None], logits, 0.0), read.router)
                chosen = choose(logits[routed], read.router.halves, read.router.top_k)[0]
                found |= router_statistics(p, routed)
                found["chapters_used"] = len(chosen.unique()) / read.router.num_chapters
            stats.append(found)
        return stats


def _share_of_batch(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """What part of an accumulated batch this call is; the loss is normalised by the whole batch's tokens."""
    return 1.0 if num_items_in_batch is None else labels[..., 1:].ne(-100).sum() / num_items_in_batch


def _probabilities(logits: Tensor, router: ChapterRouter) -> Tensor:
    """[B, T, C] of the chapters."""
    if len(router.halves) == 1:
        return logits.softmax(-1)
    a, b = (x.softmax(-1) for x in logits.split(router.halves, -1))
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


class MemoryBankTransformerForSequenceClassification(
    GenericForSequenceClassification, MemoryBankTransformerPreTrainedModel
):
    """The memory-bank transformer with a classification head on the last real token."""
