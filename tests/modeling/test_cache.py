"""MemoryCache: what it refuses, offloading, and snapshots that are damaged or of another model."""

import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

from memzoo import MaruConfig, MaruForCausalLM, MemoryCache

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "memory_num_banks": 2,
    "memory_num_slots": 4,
    "memory_dim": 4,
}


@pytest.fixture
def model() -> MaruForCausalLM:
    return MaruForCausalLM(MaruConfig(**TINY)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 12))


@pytest.fixture
def cache(model, ids) -> MemoryCache:
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


def test_snapshot_round_trip(model, cache, ids, tmp_path):
    cache.save_pretrained(tmp_path)
    loaded = MemoryCache.from_pretrained(tmp_path, model.config)
    assert loaded.get_seq_length() == 12 and loaded.batch_size == 2 and loaded.nbytes == cache.nbytes
    assert all(torch.equal(loaded.states[name], state) for name, state in cache.states.items())
    cache.reset()
    cache.save_pretrained(tmp_path)  # an empty memory over a full one
    assert MemoryCache.from_pretrained(tmp_path, model.config).nbytes == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "memory.safetensors"]


def test_snapshot_of_another_model_is_refused(cache, tmp_path):
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="memory_num_slots is 4 there and 8 here"):
        MemoryCache.from_pretrained(tmp_path, MaruConfig(**{**TINY, "memory_num_slots": 8}))
    same = MaruConfig(
        **TINY, use_cache=False, dropout=0.5, memory_balance_rate=0.5
    )  # none of these matters to a state
    assert MemoryCache.from_pretrained(tmp_path, same).get_seq_length() == 12


@pytest.mark.parametrize("keep", [0, 40, 2000])
def test_cut_short_snapshot_is_refused(model, cache, tmp_path, keep):
    cache.save_pretrained(tmp_path)
    weights = tmp_path / "memory.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"memory\.safetensors is cut short.*save the snapshot again"):
        MemoryCache.from_pretrained(tmp_path, model.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.update(format=99), "format 99 and this memzoo reads 1"),
        (lambda index: index.pop("format"), "is damaged"),
        (lambda index: index.pop("states"), "'states' is missing or not a dict"),
        (lambda index: index["states"].pop("0.h"), r"does not hold the states that memory\.json lists"),
        (lambda index: index["states"]["0.h"].update(shape=[7, 7]), "does not hold the states"),
        (lambda index: index["seen_tokens"].pop(), "lists 1 layers of 2"),
    ],
)
def test_wrong_index_is_refused(model, cache, tmp_path, change, message):
    cache.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "memory.json").read_text())
    change(index)
    (tmp_path / "memory.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        MemoryCache.from_pretrained(tmp_path, model.config)


def test_missing_or_garbled_snapshot_is_refused(model, cache, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no memory snapshot: memory\.json"):
        MemoryCache.from_pretrained(tmp_path / "nowhere", model.config)
    cache.save_pretrained(tmp_path)
    (tmp_path / "memory.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        MemoryCache.from_pretrained(tmp_path, model.config)


def test_cache_of_another_model_or_batch_is_refused(model, cache, ids):
    other = MaruForCausalLM(MaruConfig(**{**TINY, "memory_dim": 6}))
    with pytest.raises(ValueError, match="another model: memory_dim is 4 there and 6 here"):
        other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 sequences and the input has 1"):
        model(ids[:1], past_key_values=cache)
    twin = MaruForCausalLM(MaruConfig(**TINY))  # equal by value, not the same object
    assert twin(ids, past_key_values=cache).logits.shape == (2, 12, 61)


def test_foreign_caches_are_refused(model, ids):
    for foreign in (DynamicCache(), StaticCache(config=LlamaConfig(num_hidden_layers=2), max_cache_len=9)):
        with pytest.raises(TypeError, match=rf"past_key_values is a {type(foreign).__name__}"):
            model(ids, past_key_values=foreign)
        with pytest.raises(TypeError, match=rf"past_key_values is a {type(foreign).__name__}"):
            model.generate(ids, past_key_values=foreign, max_new_tokens=2)
    with pytest.raises(TypeError, match="not LlamaConfig"):
        MemoryCache(LlamaConfig())


@pytest.mark.parametrize("implementation", ["static", "quantized", "offloaded"])
def test_other_cache_implementations_are_refused(model, ids, implementation):
    with pytest.raises(ValueError, match=f"has no '{implementation}' cache"):
        model.generate(ids, cache_implementation=implementation, max_new_tokens=2)


def test_a_memory_cannot_be_cropped(cache):
    cache.crop(0)
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        cache.crop(3)
    with pytest.raises(NotImplementedError, match="holds no keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


@torch.no_grad()
def test_offload_moves_states_and_reading_brings_them_back(model, cache, ids):
    before = {name: state.clone() for name, state in cache.states.items()}
    cache.to("meta")
    assert {state.device.type for state in cache.states.values()} == {"meta"}
    cache = model(ids, use_cache=True).past_key_values
    cache.offload()
    assert cache.layers[0]._home == torch.device("cpu")
    cache.offload()  # twice is once
    assert all(torch.equal(state, before[name]) for name, state in cache.states.items())
    model(ids, past_key_values=cache)
    assert cache.layers[0]._home is None and cache.get_seq_length() == 24


def test_generate_goes_on_from_new_tokens_alone(model, cache, ids):
    """The text that the memory has read need not be there any more."""
    new = torch.randint(3, 61, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(torch.cat([ids, new], 1), **options)[:, -6:]
    assert torch.equal(model.generate(new, past_key_values=cache.clone(), **options)[:, -6:], expected)
    whole = model.generate(torch.cat([ids, new], 1), past_key_values=cache.clone(), **options)[:, -6:]
    assert torch.equal(whole, expected)
    longer = torch.cat([new, new, new], 1)  # more new tokens than the memory has seen: the mask says so
    got = model.generate(longer, past_key_values=cache.clone(), attention_mask=torch.ones(2, 27), **options)
    assert torch.equal(got[:, -6:], model.generate(torch.cat([ids, longer], 1), **options)[:, -6:])
