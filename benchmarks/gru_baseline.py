"""A plain GRU language model with the interface of memzoo's families, for comparison. Not a family of the zoo.

Importing this file registers it: AutoConfig.for_model("gru_baseline", hidden_size=256, num_hidden_layers=2).
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults

from memzoo.modeling.cache import MemoryCache, MemoryGenerationMixin
from memzoo.modeling.configuration import MemoryModelConfig
from memzoo.modeling.inputs import embed_and_check
from memzoo.modeling.padding import compaction


@strict
class GruBaselineConfig(MemoryModelConfig):
    model_type = "gru_baseline"
    vocab_size: int = 264
    hidden_size: int = 256
    num_hidden_layers: int = 2
    dropout: float | int = 0.1
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False


class GruBaselineForCausalLM(PreTrainedModel, MemoryGenerationMixin):
    """Embedding, torch.nn.GRU, head (Cho et al., arXiv 1406.1078). The memory is h, [B, H] a layer."""

    config: GruBaselineConfig
    _is_stateful = True

    def __init__(self, config: GruBaselineConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.gru = nn.GRU(
            config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True, dropout=config.dropout
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T] -> logits [B, T, V]; pads may be anywhere."""
        x = embed_and_check(self, input_ids, inputs_embeds, past_key_values)
        B, T, _ = x.shape
        if use_cache and past_key_values is None:
            past_key_values = MemoryCache(self.config)
        states = past_key_values.read(0) if past_key_values is not None else {}
        move = compaction(attention_mask, B, T, past_key_values.get_seq_length() if past_key_values is not None else 0)
        start = torch.stack([past_key_values.read(i)["h"] for i in range(len(past_key_values))]) if states else None
        lengths = torch.full((B,), T) if move is None else move.mask.sum(1).cpu()
        if move is not None:
            x = move.apply(x)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        h, last = self.gru(packed, start)
        h, _ = nn.utils.rnn.pad_packed_sequence(h, batch_first=True, total_length=T)
        if (empty := lengths == 0).any():  # rows without a real token keep their state
            last = torch.where(
                empty[:, None].to(last.device), torch.zeros_like(last) if start is None else start, last
            )
        if move is not None:
            h = move.undo(h)
        if past_key_values is not None:
            for i, state in enumerate(last):
                past_key_values.write(i, {"h": state}, new_tokens=T)
        logits = self.lm_head(slice_logits_to_keep(h, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register("gru_baseline", GruBaselineConfig, exist_ok=True)
AutoModelForCausalLM.register(GruBaselineConfig, GruBaselineForCausalLM, exist_ok=True)
