"""The table that drives the ten laws: one row per family and option. A new family adds rows, nothing else."""

from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import memzoo  # noqa: F401 (registers the families)


class Row(NamedTuple):
    model_type: str
    fields: dict[str, Any]
    constant_state: bool = True  # False for options with full attention, whose keys and values grow

    def build(self, dtype: torch.dtype = torch.float64, **overrides: Any) -> PreTrainedModel:
        """A tiny model in eval mode, its weights large enough that every part matters."""
        common = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
        config = AutoConfig.for_model(self.model_type, **{**common, **self.fields, **overrides})
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


_MARU = {"memory_num_banks": 3, "memory_num_slots": 5, "memory_dim": 6, "memory_router_hidden_size": 4}
_LIMITS = {"memory_decay": 0.9, "memory_slot_norm_cap": 0.5}
_ROUTING = {"memory_top_k": 1, "memory_shared_bank": True, "memory_router_temperature": 0.5}

_NEURAL = {"num_attention_heads": 2, "intermediate_size": 12, "sliding_window": 5, "memory_chunk_size": 16}
_LINEAR_WIDTH = {"memory_depth": 1, "memory_dim": 12, "memory_num_heads": 3, "memory_conv_kernel": None}
_RULE = {"memory_threshold": 0.05, "memory_read_own_write": False, "memory_residual": True, "memory_theta_max": 0.1}

_TITAN = {"num_attention_heads": 2, "intermediate_size": 24, "sliding_window": 32, "num_persistent_tokens": 3}
_TITAN |= {"memory_chunk_size": 16, "memory_theta_max": 0.1, "memory_expansion": 1.0}
_LINEAR = {"memory_depth": 1, "memory_residual": True, "memory_clip": None, "memory_conv_kernel": None}
_STRICT = {"memory_read_own_write": False, "memory_clip": 0.5, "memory_threshold": 0.1, "num_key_value_heads": 1}
_BANK = {"memory_bank": True, "memory_bank_size": 24, "memory_bank_top_k": 3, "memory_bank_decay": 0.5}
_MAG = {"titans_variant": "mag", "sliding_window": 16}
_MAL = {"titans_variant": "mal", "sliding_window": 16}

_DUAL = {"memory_num_slots": 5, "memory_dim": 12, "memory_num_heads": 2, "memory_surprise_threshold": 0.45}
_DUAL |= {"num_attention_heads": 2, "intermediate_size": 12, "sliding_window": 4, "memory_layers": [0, 1]}
_NO_EMA = {"memory_deep_rate": 1.0, "memory_top_k": 2, "memory_decay": 0.9, "memory_confidence": False}
_PLAIN_KEYS = {"memory_query_proj": False, "memory_conv_kernel": None, "memory_residual": False}
_SINKHORN = {"memory_assignment": "sinkhorn", "memory_block_size": 4}

_BANKS = {"num_attention_heads": 2, "intermediate_size": 12, "sliding_window": 4, "memory_zero_init": False}
_BANKS |= {"memory_num_tokens": 24, "memory_num_heads": 4, "memory_num_key_value_heads": 2, "memory_init_std": 1.0}
_CHAPTERS = {"memory_num_chapters": 6, "memory_top_k_chapters": 2, "memory_block_size": 5}
_SHARED = {"memory_num_shared_chapters": 1, "memory_mixing": "separate", "memory_routed_scaling_factor": 0.7}
_REDUCED = {"memory_bank_type": "reduced", "memory_bank_rank": 8, "memory_sharing": "group"}
_FACTORIZED = {"memory_bank_type": "factorized", "memory_bank_rank": 5, "memory_projection_rank": 6}
_COARSE = {"memory_num_chapters": 6, "memory_num_shared_chapters": 1, "memory_routing": "prefix"}
_FINE = {"memory_num_chapters": 12, "memory_top_k_chapters": 3, "memory_routing": "block", "memory_block_size": 5}
_FINE |= {"memory_num_tokens": 36, "memory_placement": "last_k", "memory_placement_k": 1, "memory_dim": 8}
_VARIANT_B = {"memory_block_variant": "B", "memory_sharing": "per_layer"}

TABLE = {
    "dual-memory": Row("dual_memory", {**_DUAL, "memory_fast_rate": 0.7}),
    "dual-memory-no-ema-top-k": Row("dual_memory", {**_DUAL, **_NO_EMA, "memory_layers": [-1]}),
    "dual-memory-sinkhorn": Row("dual_memory", {**_DUAL, **_SINKHORN, "tie_word_embeddings": True}),
    "dual-memory-sinkhorn-top-k": Row("dual_memory", {**_DUAL, **_SINKHORN, **_NO_EMA, **_PLAIN_KEYS}),
    "dual-memory-window": Row("dual_memory", {**_DUAL, **_PLAIN_KEYS, "layer_types": ["sliding_attention"]}),
    "dual-memory-mamba": Row("dual_memory", {**_DUAL, "memory_layers": [], "use_bias": True}),
    "dual-memory-transformer": Row(
        "dual_memory", {**_DUAL, "memory_layers": [], "layer_types": ["full_attention"]}, False
    ),
    "dual-memory-mixed": Row(
        "dual_memory",
        {**_DUAL, "layer_types": ["linear_attention", "full_attention"], "num_key_value_heads": 1},
        False,
    ),
    "maru-parallel": Row("maru", _MARU),
    "maru-parallel-limits": Row("maru", {**_MARU, **_LIMITS, "cell_size": 10, "use_bias": True}),
    "maru-parallel-routing": Row("maru", {**_MARU, **_ROUTING, "tie_word_embeddings": True}),
    "maru-parallel-no-memory": Row("maru", {**_MARU, "memory_num_banks": 0, "embedding_size": 7}),
    "maru-sequential": Row("maru", {**_MARU, "recurrence": "sequential"}),
    "maru-sequential-limits": Row("maru", {**_MARU, **_LIMITS, "recurrence": "sequential", "cell_size": 10}),
    "maru-sequential-routing": Row("maru", {**_MARU, **_ROUTING, "recurrence": "sequential"}),
    "maru-sequential-no-memory": Row("maru", {**_MARU, "recurrence": "sequential", "memory_num_banks": 0}),
    "memory-bank": Row("memory_bank_transformer", _BANKS),
    "memory-bank-full": Row("memory_bank_transformer", {**_BANKS, **_VARIANT_B, "sliding_window": None}, False),
    "memory-bank-token": Row("memory_bank_transformer", {**_BANKS, **_CHAPTERS}),
    "memory-bank-token-product": Row(
        "memory_bank_transformer", {**_BANKS, **_CHAPTERS, **_FACTORIZED, "memory_product_keys": True}
    ),
    "memory-bank-prefix": Row(
        "memory_bank_transformer", {**_BANKS, **_CHAPTERS, **_SHARED, **_VARIANT_B, "memory_routing": "prefix"}
    ),
    "memory-bank-block": Row(
        "memory_bank_transformer", {**_BANKS, **_CHAPTERS, **_REDUCED, "memory_routing": "block"}
    ),
    "memory-bank-prompt": Row(
        "memory_bank_transformer", {**_BANKS, **_CHAPTERS, **_SHARED, "memory_routing": "prompt"}
    ),
    "memory-bank-int8": Row("memory_bank_transformer", {**_BANKS, **_CHAPTERS, "memory_quantization": "int8"}),
    "memory-bank-int4": Row("memory_bank_transformer", {**_BANKS, **_FACTORIZED, "memory_quantization": "int4"}),
    "memory-bank-tiers": Row("memory_bank_transformer", {**_BANKS, "memory_tiers": [_COARSE, _FINE]}),
    "memory-bank-none": Row("memory_bank_transformer", {**_BANKS, "memory_placement": "none"}),
    "neural-memory-transformer": Row("neural_memory_transformer", _NEURAL),
    "neural-memory-transformer-linear": Row("neural_memory_transformer", {**_NEURAL, **_LINEAR_WIDTH, **_RULE}),
    "neural-memory-transformer-no-update": Row("neural_memory_transformer", {**_NEURAL, "memory_update": "train"}),
    "neural-memory-transformer-no-memory": Row("neural_memory_transformer", {**_NEURAL, "memory_enabled": False}),
    "neural-memory-transformer-full": Row(
        "neural_memory_transformer", {**_NEURAL, "sliding_window": None, "num_key_value_heads": 1}, False
    ),
    "titan-mac": Row("titan_mac", {**_TITAN, "memory_segment_size": 24, "memory_chunk_size": 12}),
    "titan-mac-linear-tokens": Row("titan_mac", {**_TITAN, **_LINEAR, "memory_num_tokens": 5}),
    "titan-mac-bank": Row("titan_mac", {**_TITAN, **_BANK, **_STRICT, "memory_segment_size": 28}),
    "titan-mag": Row("titan_mac", {**_TITAN, **_MAG, **_STRICT}),
    "titan-mag-linear-bank": Row("titan_mac", {**_TITAN, **_MAG, **_LINEAR, **_BANK}),
    "titan-mal": Row("titan_mac", {**_TITAN, **_MAL, "num_persistent_tokens": 0}),
    "titan-mal-linear": Row("titan_mac", {**_TITAN, **_MAL, **_LINEAR, "memory_num_heads": 1}),
    "titan-window": Row("titan_mac", {**_TITAN, "memory_enabled": False, "sliding_window": 16}),
    "titan-window-bank": Row("titan_mac", {**_TITAN, **_BANK, "memory_enabled": False, "sliding_window": 16}),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", TABLE.values(), ids=TABLE.keys())


@pytest.fixture(scope="session")
def table() -> dict[str, Row]:
    return TABLE


@pytest.fixture
def ids() -> torch.Tensor:
    """[3, 37] tokens: several chunks of every kernel and a remainder; no pads."""
    return torch.randint(3, 61, (3, 37), generator=torch.Generator().manual_seed(1))
