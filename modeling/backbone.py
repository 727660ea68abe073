"""What the families share: the walk through the layers, and the language-model head.

A family writes its configuration and its layers, and three short classes:

    class <X>PreTrainedModel(MemoryPreTrainedModel): config, _no_split_modules, _init_weights
    class <X>Model(MemoryBackbone, <X>PreTrainedModel): embed_tokens, layers, norm
    class <X>ForCausalLM(MemoryCausalLM, <X>PreTrainedModel, MemoryGenerationMixin): model, lm_head

(transformers looks for `GenerationMixin` in the names of a class's direct bases.)
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from memzoo.modeling.cache import MemoryCache
from memzoo.modeling.inputs import embed_and_check
from memzoo.modeling.padding import compaction


class MemoryPreTrainedModel(PreTrainedModel):
    """The flags that every family has."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    _supports_sdpa = True

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # transformers skips modules of code outside it that have no parameter of their own, and with them what they
        # set in their children. It need not: all our initialization respects its marks on loaded parameters.
        super()._initialize_weights(module, is_custom_code=False)


# mixins of PreTrainedModels; a second PreTrainedModel base would hide the family's configuration class
if TYPE_CHECKING:
    _Model = MemoryPreTrainedModel
else:
    _Model = object


class MemoryBackbone(_Model):
    """Embedding, layers and final norm, under the names that transformers' decoders give them.

    A layer is called with the hidden states [B, T, D] (each row's real tokens first), `mask` [B, T] or None, the
    `past_key_values` that it reads and writes, and what `layer_arguments` returns.
    """

    output_class: type[ModelOutput] = BaseModelOutputWithPast
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module

    def enter(self, embeddings: Tensor) -> Tensor:
        """What happens between the embedding and the first layer."""
        return embeddings

    def layer_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """More keyword arguments of every layer, from those of the call."""
        return {}

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
    ) -> ModelOutput:
        """Read a batch of sequences, going on from `past_key_values`.

        Args:
            input_ids: [B, T]; or inputs_embeds [B, T, E].
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
        hidden_states = self.enter(hidden_states)
        if move is not None:
            hidden_states = move.apply(hidden_states)
        arguments = self.layer_arguments(kwargs)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, mask=None if move is None else move.mask, past_key_values=past_key_values, **arguments
            )
        hidden_states = self.norm(hidden_states)
        if move is not None:
            hidden_states = move.undo(hidden_states)
        return self.output_class(last_hidden_state=hidden_states, past_key_values=past_key_values)


class MemoryCausalLM(_Model):
    """A backbone `model` with the head `lm_head`; outputs that the backbone records are passed on."""

    output_class: type[ModelOutput] = CausalLMOutputWithPast
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model: MemoryBackbone
    lm_head: nn.Linear

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
    ) -> ModelOutput:
        """As the backbone's; `labels` [B, T] (shifted inside, -100 ignored) add the loss in nats per token."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        recorded = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return self.output_class(loss=loss, logits=logits, **recorded)

    @torch.no_grad()
    def observe(self, input_ids: torch.LongTensor, attention_mask: Tensor | None = None, **flags: Any) -> Any:
        """Read a text in eval mode, from an empty memory; returns the backbone's output."""
        was_training = self.training
        self.eval()
        out = self.model(input_ids, attention_mask=attention_mask, **{"use_cache": False, **flags})
        self.train(was_training)
        return out
