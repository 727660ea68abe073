"""An adapted model generates as its full forward says and leaves no trace in itself. Other caches: test_caches.py."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

CHAPTERS = {"num_chapters": 4, "top_k_chapters": 2}
OPTIONS = [
    {},
    {"block_variant": "B", "sharing": "shared"},
    CHAPTERS,
    CHAPTERS | {"routing": "prefix", "num_shared_chapters": 1},
    {"memory_type": "neural"},
]
OPTION = pytest.mark.parametrize("options", OPTIONS, ids=["bank", "B shared", "token", "prefix", "neural"])


def greedy(model, tokens, steps, mask=None):
    """By full forwards, without a cache."""
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return tokens


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded_off"])
@OPTION
def test_generate_equals_the_full_forward(kind, cache, options, tokens, make_base, make_adapted):
    if cache == "static" and kind == "gpt2":
        pytest.skip("the base has no static cache")
    model = make_adapted(make_base(kind, torch.float64), **options)
    before = copy.deepcopy(model.state_dict())
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    settings |= {"use_cache": False} if cache == "offloaded_off" else {"cache_implementation": cache}
    ones = torch.ones_like(tokens)
    model.generation_config.eos_token_id = None
    out = model.generate(input_ids=tokens, attention_mask=ones, **settings)
    assert torch.equal(out, greedy(model, tokens, 6))
    # left pads
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ones], 1)
    assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **settings)[:, 3:], out)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


@OPTION
def test_lazy_caches_and_splits(options, tokens, make_base, make_adapted):
    model = make_adapted(make_base("llama", torch.float64), **options)
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        for make in (DynamicCache, lambda: StaticCache(config=model.config, max_cache_len=16)):
            for sizes in ([12], [1] * 12, [5, 7], [7, 1, 4]):
                cache, out = make(), []
                for piece in tokens.split(sizes, 1):
                    out.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
                torch.testing.assert_close(torch.cat(out, 1), whole, rtol=1e-9, atol=1e-9)
                assert cache.get_seq_length() == 12


@OPTION
def test_beams_and_returned_sequences(options, tokens, make_base, make_adapted):
    model = make_adapted(make_base("llama", torch.float64), **options)
    settings = {"max_new_tokens": 5, "attention_mask": torch.ones_like(tokens)}
    for more in ({"num_beams": 3, "do_sample": False}, {"num_return_sequences": 3, "do_sample": True}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            results.append(model.generate(input_ids=tokens, use_cache=use_cache, **settings, **more))
        assert torch.equal(*results)


def test_banks_that_keep_no_state_leave_the_cache_alone(tokens, make_adapted):
    cache = DynamicCache()
    make_adapted(num_chapters=4, top_k_chapters=2)(input_ids=tokens, past_key_values=cache)
    assert len(cache.layers) == 3


def test_a_cache_of_another_batch_is_refused(tokens, make_adapted):
    model, cache = make_adapted(memory_type="neural"), DynamicCache()
    model(input_ids=tokens, past_key_values=cache)
    with pytest.raises(ValueError, match="holds 2 sequences and the input has 1"), torch.no_grad():
        layer = model.base_model.model.model.layers[0]
        layer.memzoo._now.call.cache = cache
        layer.post_attention_layernorm(torch.zeros(1, 1, 16))
    with pytest.raises(RuntimeError, match="cannot be rolled back"):
        cache.crop(-2)


@pytest.mark.parametrize("lengths", [[5, 9], [12, 3]])
def test_prompt_routing_takes_the_lengths_of_prompts(lengths, tokens, make_base, make_adapted):
    options = CHAPTERS | {"routing": "prompt"}
    model = make_adapted(make_base("llama", torch.float64), **options)
    lengths = torch.tensor(lengths)
    with torch.no_grad():
        unrouted = model(input_ids=tokens).logits  # a prompt is 128 tokens
        whole = model(input_ids=tokens, prompt_lengths=lengths).logits
        cache = DynamicCache()
        first = model(input_ids=tokens[:, :4], past_key_values=cache, prompt_lengths=lengths).logits
        rest = model(input_ids=tokens[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), whole, rtol=1e-9, atol=1e-9)
    for row, length in enumerate(lengths):
        assert torch.equal(whole[row, :length], unrouted[row, :length])
        assert length == 12 or not torch.equal(whole[row, length:], unrouted[row, length:])
