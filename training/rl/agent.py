"""An agent whose memory is that of a memzoo model: observations in, a policy and a value out.

It is a transformers model: `save_pretrained` writes config.json and model.safetensors, `from_pretrained` reads them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers import initialization as init
from transformers.utils import ModelOutput

import memzoo  # noqa: F401 (registers the families)
from memzoo.modeling.backbone import MemoryPreTrainedModel
from memzoo.modeling.cache import MemoryCache

POLICY_STD = 0.01  # the first policy is nearly uniform


@strict
class MemoryAgentConfig(PreTrainedConfig):
    r"""Configuration of a `MemoryAgent`.

    Args:
        observation_size: width O of the observations.
        num_actions: A discrete actions.
        backbone_config: of a memzoo family, or a dict of `model_type` and fields; what it leaves out is "dual_memory",
            of width 64, with one layer and an initializer_range of width^-1/2.

    ```python
    >>> from memzoo.training.rl import MemoryAgent, MemoryAgentConfig

    >>> config = MemoryAgentConfig(observation_size=4, num_actions=3, backbone_config={"model_type": "maru"})
    >>> agent = MemoryAgent(config)
    ```
    """

    model_type = "memory_agent"
    sub_configs = {"backbone_config": AutoConfig}

    observation_size: int = 1
    num_actions: int = 2
    backbone_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.backbone_config, PreTrainedConfig):
            fields: dict[str, Any] = {"model_type": "dual_memory", "hidden_size": 64, "num_hidden_layers": 1}
            # there are no tokens
            fields |= {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
            fields |= self.backbone_config or {}
            # narrow: with the 0.02 of language models, what passes through a memory is too faint to be learned soon
            fields.setdefault("initializer_range", fields["hidden_size"] ** -0.5)
            self.backbone_config = AutoConfig.for_model(**fields)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Refuse what cannot be built, before anything is."""
        for name in ("observation_size", "num_actions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        MemoryCache(self.backbone_config)  # refuses what is no memzoo model


@dataclass
class AgentOutput(ModelOutput):
    """
    Args:
        logits: [B, T, A] of the policy.
        value: [B, T], discounted returns that the agent expects.
        last_hidden_state: [B, T, D], the backbone's.
        past_key_values: the memory after the last step.
    """

    logits: Tensor | None = None
    value: Tensor | None = None
    last_hidden_state: Tensor | None = None
    past_key_values: MemoryCache | None = None


class MemoryAgent(MemoryPreTrainedModel):
    """Encoder -> backbone -> policy and value. The memory is a `MemoryCache` beside the agent, a row an environment.

    ```python
    memory = agent.start(num_envs)
    out = agent.step(observations, memory)  # the same cost at every step
    memory.reset_rows(done, agent.start())
    ```
    """

    config_class = MemoryAgentConfig
    config: MemoryAgentConfig
    base_model_prefix = "agent"

    def __init__(self, config: MemoryAgentConfig) -> None:
        super().__init__(config)
        D = config.backbone_config.hidden_size
        self.encoder = nn.Sequential(nn.Linear(config.observation_size, D), nn.SiLU(), nn.Linear(D, D))
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.backbone.get_input_embeddings().requires_grad_(False)  # not read: there are no tokens
        self.policy = nn.Linear(D, config.num_actions)
        self.value = nn.Linear(D, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MemoryAgent):
            for linear in (*self.encoder, self.value):
                if isinstance(linear, nn.Linear):
                    init.normal_(linear.weight, std=linear.in_features**-0.5)
            init.normal_(self.policy.weight, std=POLICY_STD)

    def forward(
        self,
        observations: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
    ) -> AgentOutput:
        """Read observations [B, T, O] of one episode a row, going on from `past_key_values`, which is updated.

        Args:
            attention_mask: [B, T], 0 for pads.

        Raises:
            ValueError: the observations have another width than the agent's.
        """
        if observations.ndim != 3 or observations.shape[-1] != self.config.observation_size:
            raise ValueError(
                f"observations are {list(observations.shape)}; this agent reads [B, T, {self.config.observation_size}]"
            )
        hidden = self.backbone(
            inputs_embeds=self.encoder(observations.to(self.dtype)),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        ).last_hidden_state
        return AgentOutput(self.policy(hidden), self.value(hidden).squeeze(-1), hidden, past_key_values)

    @torch.no_grad()
    def step(self, observations: Tensor, memory: MemoryCache) -> AgentOutput:
        """One observation [B, O] of every environment: logits [B, A], value [B]; `memory` is updated."""
        out = self(observations[:, None], past_key_values=memory)
        return AgentOutput(out.logits[:, 0], out.value[:, 0], out.last_hidden_state[:, 0], memory)

    def start(self, batch_size: int = 1) -> MemoryCache:
        """The memory before the first observation; gradients reach what the family learns of it."""
        memory = MemoryCache(self.backbone.config)
        nothing = torch.zeros(1, 1, self.backbone.config.hidden_size, dtype=self.dtype, device=self.device)
        pad = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        # a pad changes no state: what is written is what a sequence begins with
        self.backbone(inputs_embeds=nothing, attention_mask=pad, past_key_values=memory, use_cache=True)
        memory.batch_repeat_interleave(batch_size)
        return memory

    def unroll(self, observations: Tensor, starts: Tensor, memory: MemoryCache) -> AgentOutput:
        """Read segments [B, T, O] in which episodes begin where `starts` [B, T] is true, all at once.

        What comes before an episode's first step is forgotten exactly: every row is cut there, and its parts are read
        as rows of their own, padded, from the memory [B rows] of the segment's start or an empty one.
        """
        B, T, _ = observations.shape
        cut = starts.clone()
        cut[:, 0] = True
        part = cut.flatten().cumsum(0) - 1  # [B T], the part that a step belongs to
        first = cut.flatten().nonzero().squeeze(-1)  # [P], where the parts begin
        place = torch.arange(B * T, device=part.device) - first[part]
        shape = (len(first), int(place.max()) + 1)
        rows = observations.new_zeros(*shape, observations.shape[-1])
        rows[part, place] = observations.flatten(0, 1)
        mask = torch.zeros(shape, dtype=torch.bool, device=part.device)
        mask[part, place] = True
        memory = memory.clone()
        memory.batch_select_indices(first // T)
        memory.reset_rows(starts.flatten()[first], self.start())
        out = self(rows, mask, memory)
        outputs = (x[part, place].unflatten(0, (B, T)) for x in (out.logits, out.value, out.last_hidden_state))
        return AgentOutput(*outputs)


AutoConfig.register("memory_agent", MemoryAgentConfig, exist_ok=True)
AutoModel.register(MemoryAgentConfig, MemoryAgent, exist_ok=True)
