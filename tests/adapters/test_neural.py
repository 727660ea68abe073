"""A neural memory beside a frozen model's attention, held to the laws of a memory."""

import pytest
import torch
from transformers import DynamicCache

from memzoo.adapters.states import AdapterState

OPTIONS = {"memory_type": "neural", "bank_type": "reduced", "bank_rank": 8}


@pytest.fixture
def model(make_base, make_adapted):
    return make_adapted(make_base("llama", torch.float64), **OPTIONS)


@torch.no_grad()
def read(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


def states(cache):
    return {
        f"{i}.{n}": s for i, x in enumerate(cache.layers) if isinstance(x, AdapterState) for n, s in x.states.items()
    }


def test_it_remembers(model, tokens):
    """What is written changes what is read: the same tokens, another past, and keys and values dropped."""
    cache = DynamicCache()
    read(model, tokens, past_key_values=cache)
    memory = model.base_model.memory_of(cache)
    blank = read(model, tokens[:, :4])
    assert memory.nbytes > 0
    for layer in memory.layers:
        assert any(s.abs().sum() > 0 for n, s in layer.states.items() if "momentum" in n)
    fresh = model.base_model.recall(memory)
    assert (read(model, tokens[:, :4], past_key_values=fresh) - blank).abs().max() > 1e-6


def test_causality_and_isolation(model, tokens):
    before = read(model, tokens)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 5) % 50 + 3
    assert torch.equal(read(model, changed)[:, :7], before[:, :7])
    alone = torch.cat([read(model, row[None]) for row in tokens])
    torch.testing.assert_close(alone, before, rtol=1e-12, atol=1e-12)
    other = tokens.clone()
    other[1] = 5
    assert torch.equal(read(model, other)[0], before[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_no_output_and_no_state(side, model, tokens):
    pads = torch.zeros(2, 5, dtype=torch.long)
    ids = torch.cat([pads, tokens] if side == "left" else [tokens, pads], 1)
    real = slice(5, None) if side == "left" else slice(12)
    plain, padded = DynamicCache(), DynamicCache()
    before = read(model, tokens, past_key_values=plain)
    after = read(model, ids, attention_mask=(ids != 0).long(), past_key_values=padded)[:, real]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)  # the base's rotary tables are float32
    for name, state in states(plain).items():
        torch.testing.assert_close(states(padded)[name], state, rtol=1e-6, atol=1e-7)


def test_state_is_constant_and_batch_first(model):
    sizes = []
    for length in (40, 400):
        cache = DynamicCache()
        read(model, torch.randint(3, 61, (2, length)), past_key_values=cache)
        memory = model.base_model.memory_of(cache)
        sizes.append(memory.nbytes)
        assert all(state.shape[0] == 2 for state in states(cache).values())
    assert sizes[0] == sizes[1] and memory.get_seq_length() == 400


def test_operations_on_the_batch(model, tokens):
    cache = DynamicCache()
    read(model, tokens, past_key_values=cache)
    before = {name: x.clone() for name, x in states(cache).items()}
    cache.batch_repeat_interleave(3)
    assert all(torch.equal(x, before[name].repeat_interleave(3, 0)) for name, x in states(cache).items())
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert all(torch.equal(x, before[name]) for name, x in states(cache).items())
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(torch.equal(x, before[name].flip(0)) for name, x in states(cache).items())
    cache.reset()
    assert not states(cache)


def test_snapshot_goes_on(model, tokens, tmp_path, make_base, make_adapted):
    cache = DynamicCache(config=model.config)
    read(model, tokens, past_key_values=cache)
    model.base_model.memory_of(cache).save_pretrained(tmp_path)
    expected = model.base_model.recall(model.base_model.memory_of(cache).clone())
    question = tokens[:, :3]
    settings = {"attention_mask": torch.ones_like(question), "max_new_tokens": 5, "do_sample": False}
    recalled = model.base_model.recall(tmp_path)
    assert recalled.get_seq_length() == 0
    assert torch.equal(
        read(model, question, past_key_values=recalled), read(model, question, past_key_values=expected)
    )
    out = model.generate(input_ids=question, past_key_values=model.base_model.recall(tmp_path), **settings)
    assert out.shape[1] > 3
    with pytest.raises(ValueError, match=r"another model: default.bank_rank is 8 there and 4 here"):
        make_adapted(make_base(), **OPTIONS | {"bank_rank": 4}).base_model.recall(tmp_path)
    with pytest.raises(ValueError, match="holds no memory"):
        model.base_model.memory_of(DynamicCache(config=model.config))


def test_precision_and_no_side_effects(make_base, make_adapted):
    model = make_adapted(make_base("llama", torch.bfloat16), **OPTIONS)
    cache, before = DynamicCache(), {name: x.clone() for name, x in model.state_dict().items()}
    ids = torch.randint(3, 61, (1, 300))
    first = read(model, ids, past_key_values=cache)
    assert first.isfinite().all() and torch.equal(read(model, ids), first)
    assert all(s.dtype == torch.float32 for n, s in states(cache).items() if "weights" in n or "momentum" in n)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_gradients_reach_every_parameter_and_cross_segments(model, tokens):
    model.train()
    cache = DynamicCache()
    first = model(input_ids=tokens[:, :6], past_key_values=cache).logits
    second = model(input_ids=tokens[:, 6:], past_key_values=cache).logits
    second.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert first.requires_grad


def test_two_adapters_keep_their_states_apart(model, tokens):
    from memzoo import MemoryConfig

    model.add_adapter("second", MemoryConfig(num_heads=2, init_weights=False, **OPTIONS))
    cache = DynamicCache()
    read(model, tokens, past_key_values=cache)
    model.base_model.set_adapter(["default", "second"])
    read(model, tokens, past_key_values=cache)
    names = {name.split(".")[1] for name in states(cache)}
    assert names == {"default", "second"} and cache.layers[-1].seen_tokens == 24
