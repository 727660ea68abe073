"""`generate` gives the same tokens with every cache of the base, whatever the memory keeps in it."""

import contextlib

import pytest
import torch
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

OPTIONS = {
    "bank": {},
    "prefix": {"num_chapters": 4, "top_k_chapters": 2, "routing": "prefix"},
    "neural": {"memory_type": "neural"},
}
OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
SETTINGS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def generate(model, tokens, **settings):
    model.generation_config.eos_token_id = None
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **SETTINGS, **settings)


@OPTION
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_caches_of_a_fixed_size(kind, options, tokens, make_base, make_adapted):
    """Static ones, and those that transformers chooses by the layers' kinds under older names."""
    model = make_adapted(make_base(kind), **options)
    expected = generate(model, tokens)
    names = [n for n in ALL_CACHE_IMPLEMENTATIONS if n not in ("dynamic", "quantized") and "offloaded" not in n]
    assert {"static", "sliding_window", "hybrid"} <= set(names)
    for name in names:
        assert torch.equal(generate(model, tokens, cache_implementation=name), expected), name


BACKENDS = {"fp8": (), "quanto": ("optimum.quanto",), "hqq": ("hqq",)}


@OPTION
@pytest.mark.parametrize("backend", BACKENDS)
def test_quantized_caches(backend, options, tokens, make_base, make_adapted):
    """Keys and values lose precision, the memory's state does not: a model that only remembers says the same."""
    for module in BACKENDS[backend]:
        pytest.importorskip(module)
    base = make_base()
    more = {} if backend == "fp8" else {"nbits": 4, "q_group_size": 32}
    settings = {"cache_implementation": "quantized", "cache_config": {"backend": backend, **more}}
    plain = generate(base, tokens, **settings)
    assert torch.equal(generate(make_adapted(base, awake=False, **options), tokens, **settings), plain)

    model = make_adapted(make_base(), **options)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # what is in the cache of keys and values is of no consequence
    assert torch.equal(generate(model, tokens, **settings), generate(model, tokens))


class _Stream(contextlib.nullcontext):
    def wait_stream(self, other):
        pass


@OPTION
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloaded_caches(name, kind, options, tokens, make_base, make_adapted, monkeypatch):
    """As on an accelerator: what has been moved away and not been fetched in time is not there."""

    def away(layer):
        if layer.keys is not None:
            layer.away = layer.keys, layer.values
            layer.keys, layer.values = (x.to("meta") for x in layer.away)

    def back(layer):
        if getattr(layer, "away", None) is not None:
            (layer.keys, layer.values), layer.away = layer.away, None

    more = {} if kind == "llama" else {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    model = make_adapted(make_base(kind, **more), **options)
    expected = generate(model, tokens)
    monkeypatch.setattr(torch, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Stream())
    for layer in (DynamicLayer, StaticLayer):
        monkeypatch.setattr(layer, "offload", away)
        monkeypatch.setattr(layer, "prefetch", back)
    assert torch.equal(generate(model, tokens, cache_implementation=name), expected)
