"""Neural memory transformer: the configuration, and what it refuses."""

import pickle

import pytest
import torch

from memzoo import NeuralMemoryTransformerConfig, NeuralMemoryTransformerForCausalLM

TINY = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "sliding_window": 6,
    "initializer_range": 0.2,
}


def test_names_of_the_original_are_accepted():
    config = NeuralMemoryTransformerConfig(
        d_model=32,
        n_layers=3,
        n_heads=4,
        ffn_dim=48,
        max_seq_len=128,
        pad_idx=5,
        memory_dim=24,
        lmm_layers=3,
        lmm_learning_rate=0.5,
        lmm_momentum_decay=0.8,
        lmm_weight_decay=0.02,
        lmm_gradient_clip=2.0,
        lmm_update_loss_threshold=0.1,
        update_lmm_at_test_time=False,
    )
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert (config.intermediate_size, config.max_position_embeddings, config.pad_token_id) == (48, 128, 5)
    assert (config.memory_depth, config.memory_clip, config.memory_threshold) == (3, 2.0, 0.1)
    assert config.memory_update == "train" and config.lmm_layers == 3
    assert NeuralMemoryTransformerConfig(update_lmm_at_test_time=True).memory_update == "always"
    config.update_lmm_at_test_time = True
    assert config.memory_update == "always" and config.update_lmm_at_test_time
    config.update_lmm_at_test_time = False
    assert "update_lmm_at_test_time" not in config.to_dict() and config.memory_update == "train"
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    model = NeuralMemoryTransformerForCausalLM(config)
    memory = model.model.layers[0].memory
    alpha, eta, theta = memory.gate_proj.bias.sigmoid().chunk(3)  # what the gates start from
    torch.testing.assert_close(alpha, torch.full((4,), 0.02))
    torch.testing.assert_close(eta, torch.full((4,), 0.8))
    torch.testing.assert_close(theta * memory.theta_max, torch.full((4,), 0.01))
    assert memory.theta_max == 0.5 and [tuple(w.shape) for w in memory.initial_weights] == [(4, 12, 6)] + [
        (4, 12, 12),
        (4, 6, 12),
    ]
    model(torch.randint(0, 100, (1, 7)))
    small = NeuralMemoryTransformerConfig(lmm_learning_rate=0.01)  # the first step leaves room on both sides
    assert small.memory_theta == 0.005


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_chunksize": 2}, "did you mean 'memory_chunk_size'"),
        ({"memory_chunk_size": 0}, "memory_chunk_size is 0; it must be at least 1"),
        ({"memory_depth": 0}, "memory_depth is 0; it must be at least 1"),
        ({"memory_detach_every": 0}, "memory_detach_every is 0"),
        ({"num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads 2 is not a multiple of num_key_value_heads 3"),
        ({"memory_num_heads": 5}, "memory_dim 16 is not a multiple of memory_num_heads 5"),
        ({"num_attention_heads": 16}, "heads of odd width 1"),
        ({"memory_expansion": 0.1}, "memory_expansion 0.1 leaves"),
        ({"memory_theta_max": 0.0}, "memory_theta_max is 0.0; it must be positive"),
        ({"memory_clip": -1.0}, "memory_clip is -1.0"),
        ({"memory_threshold": -0.1}, "memory_threshold is -0.1"),
        ({"memory_alpha": [0.1, 1.0]}, r"memory_alpha \[0.1, 1.0\]"),
        ({"memory_eta": 1.0}, "memory_eta 1.0"),
        ({"memory_update": "sometimes"}, "memory_update"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "sliding_window is None"),
        ({"layer_types": ["linear_attention"] * 2}, "'sliding_attention' or 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        NeuralMemoryTransformerConfig(**{**TINY, **fields})
