"""The memory-bank transformer: a decoder whose layers read learned memory tokens by cross-attention.

A: x = x + Attention(norm x);  x = x + Read(norm x);  x = x + SwiGLU(norm x)
B: x = x + Attention(norm x);  x = x + SwiGLU(norm x);  x = x + Read(norm x);  x = x + SwiGLU_2(norm x)

Read is the sum over the tiers of banks that are placed at the layer, one unless there are `memory_tiers`. The banks
are parameters, shared between layers or not; what a sequence leaves behind is the self-attention's keys and values and
what the routers pool.
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
from memzoo.modeling.bank_tiers import bank_of_layer
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
    """`sources` are the banks that the layer reads: their tiers' configurations, and their places in the model."""

    def __init__(
        self,
        config: MemoryBankTransformerConfig,
        layer_idx: int,
        sources: list[tuple[MemoryBankTransformerConfig, int]],
    ) -> None:
        super().__init__()
        self.layer_idx, self.bank_indices = layer_idx, [index for _, index in sources]
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
        self.memory, self.variant = nn.ModuleList(build_read(tier) for tier, _ in sources), config.memory_block_variant
        if sources:
            self.memory_norm = nn.RMSNorm(D, eps)
            if self.variant == "B":
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
        attention_state = {name: x for name, x in state.items() if not name.startswith("memory.")}
        y, new_state = self.attention(self.attention_norm(hidden_states), attention_state, mask)
        hidden_states = hidden_states + self.dropout(y)
        if self.memory and self.variant == "A":
            hidden_states, memory_state = self.read(hidden_states, banks, state, mask, prompt_lengths)
            new_state = {**new_state, **memory_state}
        hidden_states = hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))
        if self.memory and self.variant == "B":
            hidden_states, memory_state = self.read(hidden_states, banks, state, mask, prompt_lengths)
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
        """x + sum_i Read_i(norm x), and the routers' new states, `memory.i.<name>`."""
        again = self.checkpoint_memory and self.training and torch.is_grad_enabled()
        query = self.memory_norm(x)
        new_state: dict[str, Tensor] = {}
        for i, (memory, index) in enumerate(zip(self.memory, self.bank_indices)):
            place = f"memory.{i}."
            own = {name.removeprefix(place): s for name, s in state.items() if name.startswith(place)}
            arguments = (query, banks[index], own, mask, prompt_lengths)
            y, own, _ = checkpoint(memory, *arguments, use_reentrant=False) if again else memory(*arguments)
            x = x + self.dropout(y)
            new_state |= {place + name: s for name, s in own.items()}
        return x, new_state


class MemoryBankTransformerPreTrainedModel(MemoryPreTrainedModel):
    config: MemoryBankTransformerConfig
    _no_split_modules = ["MemoryBankTransformerBlock"]
    _can_record_outputs = {
        "hidden_states": MemoryBankTransformerBlock,
        "router_logits": OutputRecorder(MemoryRead, index=2),
    }

    def __init__(self, config: MemoryBankTransformerConfig) -> None:
        super().__init__(config)
        # read as matrices, or in float: quantization leaves these alone, as it does whatever is listed here
        tiers = [tier for tier in config.tiers if tier.memory_layer_indices]
        names = ["k_proj", "v_proj"] if tiers else []
        names += ["router.*"] if any(tier.memory_num_chapters > 1 for tier in tiers) else []
        self._keep_in_fp32_modules = [rf".*memory\.\d+\.{name}" for name in names]

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
        self.memory_banks, self.tier_of_bank = nn.ModuleList(), []  # those of a tier stand together
        sources: list[list[tuple[MemoryBankTransformerConfig, int]]] = [[] for _ in range(config.num_hidden_layers)]
        for number, tier in enumerate(config.tiers):
            first, bank_of = len(self.memory_banks), bank_of_layer(tier)
            for layer, i in bank_of.items():
                sources[layer].append((tier, first + i))
            for _ in set(bank_of.values()):
                self.memory_banks.append(build_bank(tier))
                self.tier_of_bank.append(number)
        self.layers = nn.ModuleList(MemoryBankTransformerBlock(config, i, read) for i, read in enumerate(sources))
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
        training = self.training and labels is not None and any(read.router is not None for read in self.reads())
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

    def reads(self) -> list[MemoryRead]:
        """What reads a bank, layer by layer, and within a layer tier by tier."""
        return [read for layer in self.model.layers for read in layer.memory]

    def router_loss(self, router_logits: tuple[Tensor, ...]) -> Tensor:
        """The weighted sum of the routers' losses, each a mean over the routers."""
        config, routers = self.config, [read.router for read in self.reads() if read.router is not None]
        trained = self.training and torch.is_grad_enabled() and routers[0].gate.weight.requires_grad
        if trained and not router_logits[0].requires_grad:
            raise RuntimeError(
                "the router's logits have no gradient, so its losses would not train it; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        losses = [router_losses((x,), router.halves, router.top_k) for x, router in zip(router_logits, routers)]
        balance, variance, z = (torch.stack(kind).mean() for kind in zip(*losses))
        return (
            config.router_aux_loss_coef * balance
            + config.router_variance_loss_coef * variance
            + config.router_z_loss_coef * z
        )

    def swap_memory_bank(self, bank: MemoryBank, index: int = 0) -> MemoryBank:
        """Read another bank from now on in place of `model.memory_banks[index]`, which is returned.

        Raises:
            ValueError: the bank is of another width or has other chapters, or of another kind than others of its tier.
        """
        banks: Any = self.model.memory_banks
        tiers: Any = self.model.tier_of_bank
        if not 0 <= index < len(banks):
            raise ValueError(f"there is no memory bank {index}: this model has {len(banks)}")
        old, tier = banks[index], tiers[index]
        if bank.width != old.width or bank.num_chapters != old.num_chapters:
            raise ValueError(
                f"the new bank has {bank.num_chapters} chapters of tokens {bank.width} wide; this model reads "
                f"{old.num_chapters} chapters of tokens {old.width} wide"
            )
        new, present = bank.description(), old.description()
        if new != present and tiers.count(tier) > 1:
            differs = ", ".join(
                f"{name} {x!r} instead of {present[name]!r}" for name, x in new.items() if x != present[name]
            )
            kind = "model" if self.config.memory_tiers is None else "tier"
            raise ValueError(f"all banks of a {kind} are of one kind; this one has {differs}")
        banks[index] = bank
        config = self.config.tiers[tier]
        now = {
            "memory_num_tokens": bank.num_memory_tokens,
            "memory_bank_type": bank.bank_type,
            "memory_bank_rank": new["bank_rank"] or config.memory_bank_rank,
            "memory_dim": max(bank.width, config.memory_dim or 0) if bank.bank_type == "reduced" else bank.width,
            "memory_quantization": new["quantization"],
            "memory_quantization_aware": new["quantization_aware"],
        }
        if self.config.memory_tiers is None:
            for name, value in now.items():
                setattr(self.config, name, value)
        else:
            heads = ("memory_num_heads", "memory_num_key_value_heads")
            now |= {name: getattr(config, name) for name in heads}
            self.config.memory_tiers = [
                own | now if i == tier else own for i, own in enumerate(self.config.memory_tiers)
            ]
        return old

    def get_memory_stats(
        self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None
    ) -> list[dict[str, float]]:
        """What the memory does with a text, a dict for each of `reads()`; pads do not count.

        `activation` is the mean norm of what is read relative to the layer's input; with chapters, the statistics of
        `router_statistics` and `chapters_used`, the share of the routed chapters that any token chose.
        """
        reads = self.reads()
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
