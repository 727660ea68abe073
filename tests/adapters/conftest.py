"""Tiny bases of every architecture, and memories on them that do something."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from memzoo import MemoryConfig

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "vocab_size": 61,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
BASES = {
    kind: {**TINY, **more}
    for kind, more in {
        "llama": {},
        "mistral": {"sliding_window": 8},
        "qwen2": {},
        "qwen3": {},
        "smollm3": {},
        "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 4},
        "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 4},
        "olmo2": {},
        "phi3": {},
        "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 512},
    }.items()
}


def make_base(kind="llama", dtype=torch.float32, **more):
    torch.manual_seed(1)
    values = BASES.get(kind, TINY) | more
    if kind == "phi3":
        values = {name: x for name, x in values.items() if name != "head_dim"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).to(dtype).eval()


def make_adapted(base=None, awake=True, **options):
    """A base with a memory; `awake`: as if trained, every weight of the memory away from its first value."""
    base = make_base() if base is None else base
    config = MemoryConfig(**{"num_memory_tokens": 8, "num_heads": 2, "task_type": "CAUSAL_LM"} | options)
    model = get_peft_model(base, config).eval()
    if awake:
        awaken(model)
    return model


@torch.no_grad()
def awaken(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "memzoo_" in name and "gate_proj.bias" not in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


@pytest.fixture
def tokens():
    return torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(name="make_base")
def _make_base():
    return make_base


@pytest.fixture(name="make_adapted")
def _make_adapted():
    return make_adapted


@pytest.fixture(name="awaken")
def _awaken():
    return awaken
