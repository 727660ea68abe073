"""TitanMAC: the configuration, and what it refuses."""

import pickle

import pytest
import torch

from memzoo import TitanMacConfig, TitanMacForCausalLM

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY |= {"sliding_window": 8, "memory_segment_size": 8, "memory_chunk_size": 4}


def test_names_of_the_original_are_accepted():
    config = TitanMacConfig(
        d_model=32, n_heads=4, n_layers=3, d_ff=48, window_size=64, n_persistent=5, norm_eps=1e-4, tie_weights=False
    )
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (32, 4, 3)
    assert (config.intermediate_size, config.sliding_window, config.num_persistent_tokens) == (48, 64, 5)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.d_model) == (1e-4, False, 32)
    names = {"use_neural_memory": True, "n_memory_layers": 3, "d_memory": 320, "memory_theta_lr": 0.02}
    assert config.memory_segment_size == 64
    names |= {"titans_variant": "MAC", "segment_size": 256, "n_memory_tokens": 32}
    names |= {"use_memory_bank": True, "memory_capacity": 99, "memory_lambda_decay": 0.9}
    config = TitanMacConfig(**names)
    assert (config.memory_enabled, config.memory_depth, config.memory_dim) == (True, 3, 320)
    assert (config.memory_theta_max, config.titans_variant, config.memory_segment_size) == (0.02, "mac", 256)
    assert (config.memory_num_tokens, config.memory_bank, config.memory_bank_size) == (32, True, 99)
    assert config.memory_bank_decay == 0.9 and config.memory_bank_dim == 160
    config = TitanMacConfig(memory_rank_ratio=0.5, max_seq_len=70)
    assert (config.memory_bank_dim, config.max_position_embeddings) == (320, 70)
    assert TitanMacConfig(memory_rank_ratio=0.5, memory_bank_dim=7).memory_bank_dim == 7
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_names_that_set_nothing_here_are_told_and_dropped(caplog):
    names = {"use_dmgd": True, "dmgd_hidden_dim": 64, "dmgd_n_groups": 2, "cms_frequencies": [1, 4]}
    config = TitanMacConfig(**names, use_cms=False, block_size=64, memory_eta_lr=0.01)
    for name in (*names, "block_size", "memory_eta_lr"):
        assert f"reads no {name}: " in caplog.text and not hasattr(config, name)
    assert "use_cms" not in caplog.text


def test_fields_that_are_set_later_count_and_are_checked(tmp_path):
    config = TitanMacConfig(**TINY)
    config.titans_variant, config.memory_alpha = "MAG", 0.25
    assert TitanMacForCausalLM(config).model.layers[0].neural_memory.first_gates[0] == (0.25, 0.25)
    TitanMacForCausalLM(TitanMacConfig(**TINY)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding_window 4 is smaller than memory_segment_size 8"):
        TitanMacForCausalLM.from_pretrained(tmp_path, sliding_window=4)


def test_generate_stops_at_max_position_embeddings():
    model = TitanMacForCausalLM(TitanMacConfig(**TINY, max_position_embeddings=12))
    assert model.generate(torch.full((1, 9), 5), do_sample=False, eos_token_id=None).shape == (1, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"titans_variant": "mab"}, "titans_variant"),
        ({"sliding_windw": 8}, "did you mean 'sliding_window'"),
        ({"memory_chunk_size": 0}, "memory_chunk_size is 0; it must be at least 1"),
        ({"memory_depth": 0}, "memory_depth is 0"),
        ({"memory_segment_size": 0}, "memory_segment_size is 0"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "odd width 3"),
        ({"memory_num_heads": 3}, "memory_dim 640 is not a multiple of memory_num_heads 3"),
        ({"num_key_value_heads": 3}, "num_attention_heads 10 is not a multiple of num_key_value_heads 3"),
        ({"memory_segment_size": 513}, "sliding_window 512 is smaller than memory_segment_size 513"),
        ({"num_persistent_tokens": -1}, "num_persistent_tokens is -1"),
        ({"titans_variant": "mag", "memory_num_tokens": 4}, "memory_num_tokens=4 is for titans_variant 'mac'"),
        ({"memory_num_tokens": 0}, "memory_num_tokens is 0"),
        ({"max_seq_len": 0}, "max_position_embeddings is 0"),
        ({"memory_bank_top_k": 600}, "memory_bank_top_k 600 is more than memory_bank_size 512"),
        ({"memory_bank_decay": 0.0}, "memory_bank_decay 0.0"),
        ({"memory_clip": 0.0}, "memory_clip is 0.0; it must be positive"),
        ({"memory_theta_max": 0.0}, "memory_theta_max is 0.0"),
        ({"memory_threshold": -1.0}, "memory_threshold is -1.0"),
        ({"memory_alpha": 1.5}, r"memory_alpha \[1.5, 1.5\]"),
        ({"memory_expansion": 0.001}, "memory_expansion 0.001 leaves"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        TitanMacConfig(**fields)


def test_a_window_may_be_shorter_than_a_segment_where_no_segment_is_attended_to():
    for fields in ({"titans_variant": "mag"}, {"titans_variant": "mal"}, {"memory_enabled": False}):
        assert TitanMacConfig(sliding_window=64, memory_segment_size=512, **fields).sliding_window == 64
