"""The dual-memory family: configuration, presets, bad input, statistics, heads, and what the memory is good for."""

import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from memzoo import DualMemoryConfig, DualMemoryForCausalLM, MemoryCache, parameter_breakdown
from memzoo.modeling.dual_memory.configuration_dual_memory import PRESETS

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "memory_num_slots": 4}
TINY |= {"initializer_range": 0.2}  # so that every part matters
ATTENTION = {"layer_types": ["sliding_attention"], "sliding_window": 5}


def tiny(**fields) -> DualMemoryForCausalLM:
    torch.manual_seed(0)
    return DualMemoryForCausalLM(DualMemoryConfig(**{**TINY, **fields})).eval()


def test_names_of_the_original_are_accepted():
    config = DualMemoryConfig(
        d_model=32, n_layers=3, n_heads=2, d_state=8, mem_slots=16, memory_n_heads=4, temperature=0.5, lr_fast=0.9,
        lr_deep=0.4, decay_rate=0.99, memory_decay_interval=10, surprise_threshold=0.6, use_query_proj=False,
        use_adaptive_retrieval=False, use_memory_residual=False, top_k_retrieval=3,
    )  # fmt: skip
    assert (config.hidden_size, config.num_hidden_layers, config.state_size) == (32, 3, 8)
    assert (config.memory_num_slots, config.memory_num_heads, config.memory_temperature) == (16, 4, 0.5)
    assert (config.memory_fast_rate, config.memory_deep_rate, config.memory_decay) == (0.9, 0.4, 0.99)
    assert (config.memory_surprise_threshold, config.memory_top_k, config.mem_slots) == (0.6, 3, 16)
    assert not (config.memory_query_proj or config.memory_confidence or config.memory_residual)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    memory = tiny(memory_decay=0.99, memory_decay_interval=10).model.layers[1].memory
    assert memory.decay**10 == pytest.approx(0.99)


def test_switches_of_the_original_become_fields():
    on = DualMemoryConfig(hidden_size=32, use_decay=True, use_sparse_attention=True, use_memory_compression=True)
    assert (on.memory_decay, on.memory_top_k, on.memory_dim) == (0.999, 8, 16)
    given = DualMemoryConfig(
        hidden_size=32, use_decay=True, decay_rate=0.9, use_sparse_attention=True, top_k_retrieval=3,
        use_memory_compression=True, compression_ratio=0.25,
    )  # fmt: skip
    assert (given.memory_decay, given.memory_top_k, given.memory_dim) == (0.9, 3, 8)
    off = DualMemoryConfig(
        hidden_size=32, use_decay=False, decay_rate=0.9, use_sparse_attention=False, top_k_retrieval=3
    )
    assert (off.memory_decay, off.memory_top_k, off.memory_dim) == (1.0, None, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_num_slot": 2}, "no field 'memory_num_slot'; did you mean 'memory_num_slots'"),
        ({"memory_top_k": 5}, "memory_top_k 5 must be between 1 and memory_num_slots 4"),
        ({"memory_block_size": 5}, "memory_block_size 5 must be between 1 and memory_num_slots 4"),
        ({"memory_num_heads": 3}, "memory_dim 16 is not a multiple of memory_num_heads 3"),
        ({**ATTENTION, "num_attention_heads": 3}, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({**ATTENTION, "num_attention_heads": 16}, "odd width"),
        ({**ATTENTION, "num_key_value_heads": 4}, "num_attention_heads 2 is not a multiple of num_key_value_heads 4"),
        (
            {"layer_types": ["hybrid"]},
            "layer_types may be .linear_attention., .sliding_attention. or .full_attention., not",
        ),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, but num_hidden_layers is 2"),
        ({"memory_layers": [2]}, "memory_layers names layer 2, but num_hidden_layers is 2"),
        ({"memory_layers": [-3]}, "memory_layers names layer -1"),
        ({"memory_decay": 1.5}, r"memory_decay=1.5 must be in \(0, 1\]"),
        ({"memory_deep_rate": 0.0}, "memory_deep_rate=0.0"),
        ({"memory_temperature": 0}, "memory_temperature=0 must be positive"),
        ({"memory_num_slots": 0}, "memory_num_slots is 0; it must be at least 1"),
        ({"memory_assignment": "random"}, "memory_assignment"),
        ({"time_step_min": 0.5}, "time_step_min=0.5 must be below"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        DualMemoryConfig(**{**TINY, **fields})


def test_presets():
    built = {name: DualMemoryForCausalLM(DualMemoryConfig.from_preset(name, **TINY)).eval() for name in PRESETS}
    parts = {name: set(parameter_breakdown(model, depth=1)) for name, model in built.items()}
    assert "memory" not in parts["transformer"] | parts["mamba"]
    assert "memory" in parts["mamba_dualmem"] & parts["window_dualmem"]
    assert "mlp" in parts["transformer"] & parts["window_dualmem"] and "mlp" not in parts["mamba"]
    mixers = {name: type(model.model.layers[1].mixer).__name__ for name, model in built.items()}
    assert mixers["mamba"] == mixers["mamba_dualmem"] == "SelectiveStateSpace"
    assert mixers["transformer"] == mixers["window_dualmem"] == "CausalSelfAttention"
    ids, grown = torch.randint(3, 61, (1, 90)), {}
    for name, model in built.items():
        cache = MemoryCache(model.config)
        for piece in ids.split([80, 10], 1):
            model(piece, past_key_values=cache)
            grown.setdefault(name, []).append(cache.nbytes)
    assert {name for name, (a, b) in grown.items() if a != b} == {"transformer"}  # only full attention grows
    with pytest.raises(ValueError, match="there is no preset 'huge'; the presets are transformer, mamba"):
        DualMemoryConfig.from_preset("huge")


@torch.no_grad()
def test_every_field_of_the_memory_and_the_mixers_is_read():
    ids = torch.randint(3, 61, (1, 40))
    for common, changes in (
        (
            {},
            {
                "memory_layers": [0], "memory_num_slots": 5, "memory_num_heads": 2, "memory_dim": 8,
                "memory_query_proj": False, "memory_conv_kernel": None, "memory_temperature": 0.3,
                "memory_fast_rate": 0.5, "memory_deep_rate": 0.9, "memory_decay": 0.9, "memory_top_k": 2,
                "memory_surprise_threshold": 0.3, "memory_surprise_momentum": 0.5,
                "memory_surprise_temperature": 1.0, "memory_confidence": False, "memory_assignment": "sinkhorn",
                "memory_residual": False, "state_size": 4, "conv_kernel": 2, "expand": 1, "time_step_rank": 2,
                "time_step_max": 0.9, "use_bias": True, "rms_norm_eps": 0.1,
            },
        ),
        ({"memory_decay": 0.5}, {"memory_decay_interval": 7}),
        ({"memory_assignment": "sinkhorn"}, {"memory_block_size": 1}),
        (ATTENTION, {"sliding_window": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 10.0,
                     "intermediate_size": 24}),
    ):  # fmt: skip
        plain = tiny(**common)(ids).logits
        for name, value in changes.items():
            assert not torch.allclose(tiny(**{**common, name: value})(ids).logits, plain), name
    noisy = tiny(dropout=0.5).train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)


def test_statistics_of_a_text():
    model = tiny(memory_layers=[1])
    ids, mask = torch.randint(3, 61, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    ids[1, :12], mask[1, :12] = 0, 0
    (stats,) = model.get_memory_stats(ids, mask)
    assert stats["layer"] == 1 and 0 < stats["gate"] < 1 and 0 < stats["deep_writes"] <= 1
    assert 0 < stats["peak_deep"] <= 1 and 0 <= stats["entropy_deep"] <= torch.tensor(4.0).log()
    other = ids.clone()
    other[1, :12] = 7
    assert model.get_memory_stats(other, mask) == [pytest.approx(stats)]
    assert tiny(memory_layers=[]).get_memory_stats(ids) == []


def test_auto_classes_and_classification():
    config = AutoConfig.for_model("dual_memory", **TINY)
    assert type(AutoModel.from_config(config)).__name__ == "DualMemoryModel"
    config.num_labels = 3
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.randint(3, 61, (2, 9))
    logits = classifier(ids, labels=torch.tensor([0, 2])).logits
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)  # the last real token decides
    torch.testing.assert_close(classifier(padded, attention_mask=(padded != 0).long()).logits, logits)


@pytest.mark.slow
def test_the_memory_earns_its_place():
    """Copying 10 symbols over 100 blanks, past the fast tier's 64 slots: solved with the memory, not without."""
    from memzoo.training.tasks.copy_memory import CopyMemoryTask

    task = CopyMemoryTask(delay=100)
    scores = {}
    for preset in ("mamba", "mamba_dualmem"):
        torch.manual_seed(0)
        sizes = {"vocab_size": task.vocab_size, "hidden_size": 64, "num_hidden_layers": 2, "dropout": 0.0}
        model = DualMemoryForCausalLM(DualMemoryConfig.from_preset(preset, **sizes))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=300, pct_start=0.1)
        for step in range(300):
            ids, labels = task.sample(32, seed=step)
            model(ids, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ids, labels = task.sample(128, seed=10_000)
        with torch.no_grad():
            guesses = model.eval()(ids).logits[:, -task.num_items - 1 : -1].argmax(-1)
        scores[preset] = (guesses == labels[:, -task.num_items :]).float().mean().item()
    assert scores["mamba_dualmem"] > 0.99 and scores["mamba"] < 0.5, scores
