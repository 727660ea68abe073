"""The memory-bank transformer's configuration: names of the original, refusals."""

import pickle

import pytest

from memzoo import MemoryBankTransformerConfig

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
TINY |= {"memory_num_tokens": 24, "memory_num_heads": 4, "initializer_range": 0.3, "memory_zero_init": False}
CHAPTERS = {"memory_num_chapters": 6, "memory_top_k_chapters": 2, "memory_num_shared_chapters": 1}


def test_names_and_switches_of_the_original_are_accepted():
    config = MemoryBankTransformerConfig(
        d_model=32, num_layers=3, num_heads=4, num_memory_tokens=200, memory_layer_placement="last_k"
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert (config.memory_num_tokens, config.memory_placement, config.memory_placement_k) == (200, "last_k", 5)
    names = {"num_chapters": 100, "memory_size": 400, "top_k_chapters": 20, "routing_window_size": 64}
    names |= {"routing_strategy": "sequence-rolling", "memory_sharing": "every_k_layers", "memory_sharing_k": 3}
    names |= {"use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_rank": 48, "quantize_memory": 8}
    names |= {"use_low_rank_projections": True, "projection_rank": 16, "wo_init_zero": False, "use_chapters": True}
    config = MemoryBankTransformerConfig(**names)
    assert (config.memory_num_chapters, config.memory_top_k_chapters, config.memory_block_size) == (100, 20, 64)
    assert (config.memory_routing, config.memory_sharing, config.memory_group_size) == ("block", "group", 3)
    assert (config.memory_bank_type, config.memory_bank_rank, config.memory_width) == ("reduced", 48, 48)
    assert (config.memory_quantization, config.memory_projection_rank) == ("int8", 16)
    assert not config.memory_zero_init and config.memory_num_heads == 12
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    off = {"use_low_rank_memory": False, "low_rank_mode": "factorized", "use_low_rank_projections": False}
    config = MemoryBankTransformerConfig(
        vanilla_mode=True, use_chapters=False, num_chapters=7, projection_rank=3, **off
    )
    assert (config.memory_placement, config.memory_num_chapters, config.memory_bank_type) == ("none", 1, "standard")
    assert config.memory_projection_rank is None and config.memory_layer_indices == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_num_token": 8}, "did you mean 'memory_num_tokens'"),
        ({"memory_routing": "sequence"}, "memory_routing"),
        ({"memory_num_chapters": 7}, "memory_num_tokens 24 is not a multiple of memory_num_chapters 7"),
        (
            {"memory_num_chapters": 6, "memory_top_k_chapters": 7},
            "memory_top_k_chapters 7 is more than the 6 chapters",
        ),
        ({**CHAPTERS, "memory_top_k_chapters": 6}, "6 is more than the 5 chapters to route to: 6 less 1 shared"),
        ({"memory_num_heads": 5}, "memory_num_heads 5 does not divide the width 16"),
        ({"memory_num_key_value_heads": 3}, "memory_num_heads 4 is not a multiple of memory_num_key_value_heads 3"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        (
            {"memory_bank_type": "reduced", "memory_bank_rank": 17, "memory_num_heads": 1},
            "17 is more than memory_dim 16",
        ),
        ({"memory_placement": "custom"}, "belong together"),
        ({"memory_layers": [1]}, "belong together"),
        ({"memory_placement": "custom", "memory_layers": [4]}, "names layer 4 of a model with 4 layers"),
        ({"memory_placement_k": 0}, "memory_placement_k is 0"),
        ({"memory_projection_rank": 0}, "memory_projection_rank is 0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"memory_num_shared_chapters": -1}, "memory_num_shared_chapters -1"),
        ({"memory_routed_scaling_factor": 0.0}, "memory_routed_scaling_factor 0.0 must be positive"),
        ({"memory_quantization": "int2"}, "memory_quantization"),
        ({"memory_quantization_aware": True}, "needs memory_quantization"),
        ({"memory_dropout": 1.0}, r"memory_dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        MemoryBankTransformerConfig(**{**TINY, **fields})
