"""Where memories hang: nothing changes at first, and then exactly what the equations say."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memzoo import MemoryConfig

KINDS = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2"]
VARIANTS = list(itertools.product("AB", ("shared", "per_layer", "group")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_memory_changes_no_bit(kind, tokens, make_base, make_adapted):
    base = make_base(kind)
    before = base(tokens).logits
    for variant, sharing in VARIANTS:
        model = make_adapted(base, awake=False, block_variant=variant, sharing=sharing)
        assert torch.equal(model(input_ids=tokens).logits, before)
        base = model.unload()
    for options in ({"num_chapters": 4, "top_k_chapters": 2}, {"memory_type": "neural"}):
        model = make_adapted(base, awake=False, **options)
        assert torch.equal(model(input_ids=tokens).logits, before)
        base = model.unload()
    assert not any("memzoo" in name for name, _ in base.named_modules())
    assert torch.equal(base(tokens).logits, before)


def mean_read(x, layer, bank):
    """Equation 2 of a bank, in the plainest form."""
    memory, M = layer.memzoo.memzoo_blocks["default"].memory, bank.tokens()
    q = memory.q_proj(x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt())
    k, v = memory.k_proj(M), memory.v_proj(M)
    out, (H, G) = [], (memory.num_heads, memory.num_heads // memory.kv_heads)
    d = q.shape[-1] // H
    for h in range(H):
        own = slice(h // G * d, h // G * d + d)
        out.append(F.softmax(q[..., h * d : h * d + d] @ k[:, own].T / d**0.5, -1) @ v[:, own])
    return memory.o_proj(torch.cat(out, -1))


@pytest.mark.parametrize("heads", [{"num_heads": 2}, {"num_heads": 4}, {"num_heads": 4, "num_key_value_heads": 2}])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "olmo2", "phi3"])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_equations(kind, variant, heads, tokens, make_base, make_adapted):
    base = make_base(kind, torch.float64)
    model = make_adapted(base, block_variant=variant, **heads)
    layer = base.model.layers[1]
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    class Stream(nn.Module):  # attention that adds nothing
        def forward(self, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states), None

    layer.self_attn = Stream()
    y = layer(x, attention_mask=None, position_ids=None)
    model.disable_adapter_layers()
    feed_forward = lambda x: layer(x, attention_mask=None, position_ids=None) - x  # noqa: E731
    read = lambda x: mean_read(x, layer, layer.memzoo.memzoo_blocks["default"].bank)  # noqa: E731
    without = x + feed_forward(x)
    if variant == "A":
        x = x + read(x)
        expected = x + feed_forward(x)
    else:
        expected = x + feed_forward(x)
        expected = expected + read(expected)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert (y - without).abs().max() > 1e-2


@pytest.mark.parametrize(
    "options, layers",
    [
        ({"placement": "all"}, [0, 1, 2]),
        ({"placement": "first_k", "placement_k": 2}, [0, 1]),
        ({"placement": "last_k", "placement_k": 2}, [1, 2]),
        ({"placement": "every_n", "placement_k": 2}, [0, 2]),
        ({"placement": "custom", "layers_to_transform": [1]}, [1]),
        ({"layers_to_transform": 2}, [2]),
        ({"exclude_modules": ["layers.0.post_attention_layernorm"]}, [1, 2]),
    ],
)
def test_placement(options, layers, make_base, make_adapted):
    base = make_base()
    make_adapted(base, **options)
    assert [i for i, layer in enumerate(base.model.layers) if hasattr(layer, "memzoo")] == layers


def test_groups_count_memory_layers(make_base, make_adapted):
    model = make_adapted(make_base(num_hidden_layers=6), placement="every_n", placement_k=2, sharing="group")
    layers = [layer.memzoo for layer in model.base_model.model.model.layers if hasattr(layer, "memzoo")]
    assert [layer.groups["default"] for layer in layers] == [0, 0, 1]
    assert sorted(model.base_model.model.memzoo.memzoo_banks["default"]) == ["0", "1"]


def test_structure_is_recognised(tokens, make_base, make_adapted):
    base = make_base("mixtral", num_local_experts=2, num_experts_per_tok=1)
    before = base(tokens).logits
    assert torch.equal(make_adapted(base, awake=False)(input_ids=tokens).logits, before)


def test_other_architectures_are_refused_unless_the_sites_are_named(tokens, make_base, make_adapted):
    for kind in ("gpt_neox", "granite", "cohere"):
        with pytest.raises(ValueError, match=rf"memory to a '{kind}' is not known.*target_modules=\['ENTRY->EXIT'\]"):
            make_adapted(make_base(kind))
    base = make_base("gpt_neox", use_parallel_residual=False)
    before = base(tokens).logits
    model = make_adapted(base, awake=False, target_modules=["post_attention_layernorm->mlp"])
    assert torch.equal(model(input_ids=tokens).logits, before)
    with pytest.raises(ValueError, match=r"has no module 'feed_forward'.*it has .*mlp"):
        make_adapted(make_base(), target_modules=["post_attention_layernorm->feed_forward"])
    with pytest.raises(ValueError, match=r"enters at 'post_attention_layernorm'.*'input_layernorm->EXIT'"):
        make_adapted(make_base(), target_modules=["input_layernorm"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_chapters": 4, "top_k_chapters": 5}, "top_k_chapters 5 is more than the 4 chapters"),
        ({"num_chapters": 4, "num_shared_chapters": 3, "top_k_chapters": 2}, "num_chapters 4 less num_shared_.* 3"),
        ({"num_chapters": 3}, "num_chapters 3 does not divide num_memory_tokens 8"),
        ({"routing": "prefix"}, "num_chapters is 1"),
        ({"num_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_heads 4"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be at least 1, not 0"),
        ({"memory_type": "neural", "num_key_value_heads": 2}, "num_key_value_heads 2 belongs to banks"),
        ({"num_heads": 3}, "num_heads 3 does not divide the memory's width 16"),
        ({"bank_type": "reduced", "bank_rank": 32}, "bank_rank 32 is more than the base's hidden size 16"),
        ({"bank_type": "reduced", "bank_rank": 3}, "num_heads 2 does not divide bank_rank 3"),
        ({"placement": "middle"}, "placement must be one of 'all'.*not 'middle'"),
        ({"placement": "custom"}, "needs layers_to_transform"),
        ({"memory_type": "neural", "num_chapters": 2}, "no chapters"),
        ({"memory_type": "neural", "bank_type": "factorized"}, "'reduced' to bank_rank"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save='mlp' would copy 'model.layers.0.mlp'"),
        ({"modules_to_save": ["layers"]}, "would copy 'model.layers.0.post_attention_layernorm'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"group_size": 0}, "group_size must be at least 1, not 0"),
        ({"router_z_loss_coef": -1}, "router_z_loss_coef must not be negative"),
    ],
)
def test_errors_name_the_numbers(options, message, make_adapted):
    with pytest.raises(ValueError, match=message):
        make_adapted(**options)


def test_every_option_is_read(make_adapted):
    """An option that no test varies would be dead; here are those that change only sizes."""
    count = lambda **options: sum(  # noqa: E731
        p.numel() for n, p in make_adapted(awake=False, **options).named_parameters() if "memzoo_" in n
    )
    full = count()
    assert count(bank_type="factorized", bank_rank=2) == full - 3 * 8 * 16 + 3 * (8 + 16) * 2
    assert count(bank_type="reduced", bank_rank=4) < full / 3
    assert count(num_memory_tokens=10) == full + 3 * 2 * 16
    assert count(num_heads=4) < full  # they share a head of keys and values
    assert count(num_heads=4, num_key_value_heads=2) == full  # half as wide as with two heads, and twice as many
    assert MemoryConfig(dropout=0.5).dropout == 0.5
