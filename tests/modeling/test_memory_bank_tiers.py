"""Tiers: banks of several kinds in one model, each with its own size, chapters and placement."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from memzoo import MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM, MemoryCache
from memzoo.modeling.chapter_router import router_losses
from memzoo.modeling.memory_bank import MemoryBank

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SIZES |= {"memory_num_heads": 4, "initializer_range": 0.3, "memory_zero_init": False, "memory_init_std": 1.0}
COARSE = {"memory_num_tokens": 8}
FINE = {"memory_num_tokens": 48, "memory_num_chapters": 12, "memory_top_k_chapters": 3, "memory_routing": "block"}
FINE |= {"memory_placement": "last_k", "memory_placement_k": 2, "memory_sharing": "per_layer", "memory_block_size": 4}
MIDDLE = {"num_memory_tokens": 24, "num_chapters": 4, "memory_routing": "prefix", "memory_placement": "every_n"}


def tiny(*tiers, **fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    options = {**SIZES, **fields, **({"memory_tiers": list(tiers)} if tiers else {})}
    return MemoryBankTransformerForCausalLM(MemoryBankTransformerConfig(**options)).double().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))


def test_every_tier_has_its_own_size_chapters_and_layers():
    model = tiny(COARSE, FINE, MIDDLE)
    assert [layer.bank_indices for layer in model.model.layers] == [[0, 3], [0], [0, 1], [0, 2, 3]]
    assert model.model.tier_of_bank == [0, 1, 1, 2]
    kinds = [(bank.num_memory_tokens, bank.num_chapters) for bank in model.model.memory_banks]
    assert kinds == [(8, 1), (48, 12), (48, 12), (24, 4)]
    assert [tier.memory_routing for tier in model.config.tiers] == ["token", "block", "prefix"]
    assert tiny(memory_num_tokens=8).config.tiers[0].memory_num_tokens == 8
    assert not tiny(COARSE, FINE, memory_placement="none").reads() and not tiny(FINE, vanilla_mode=True).reads()


def test_what_a_tier_does_not_name_is_the_models():
    fields = {"memory_placement": "first_k", "memory_placement_k": 1, "memory_num_tokens": 40, "memory_dim": 16}
    tiers = ({}, {"memory_placement": "every_n"}, {"memory_dim": 6}, {"memory_num_heads": 8})
    config = MemoryBankTransformerConfig(**SIZES, **fields, memory_num_key_value_heads=4, memory_tiers=list(tiers))
    assert [tier.memory_placement_k for tier in config.tiers] == [1, 3, 1, 1]
    assert [tier.memory_num_heads for tier in config.tiers] == [4, 4, 2, 8]  # of a width, what divides it
    assert [tier.memory_num_key_value_heads for tier in config.tiers] == [4, 4, 2, 8]
    assert all(tier.memory_num_tokens == 40 and tier.hidden_size == 16 for tier in config.tiers)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_a_layer_adds_up_what_it_reads(ids, variant):
    """Without its output projection a tier is not there; one tier alone is a model without tiers."""
    both = tiny(COARSE, FINE, memory_block_variant=variant)
    coarse, fine = tiny(memory_block_variant=variant, **COARSE), tiny(memory_block_variant=variant, **FINE)
    assert torch.equal(tiny(FINE, memory_block_variant=variant)(ids).logits, fine(ids).logits)
    without_fine = copy.deepcopy(both)
    for layer in without_fine.model.layers[2:]:
        torch.nn.init.zeros_(layer.memory[1].o_proj.weight)
    weights = {name: w for name, w in both.state_dict().items() if name in coarse.state_dict()}
    coarse.load_state_dict(weights)
    torch.testing.assert_close(without_fine(ids).logits, coarse(ids).logits, rtol=1e-12, atol=1e-12)
    assert (both(ids).logits - coarse(ids).logits).abs().max() > 0.01
    layer, banks = both.model.layers[3], both.model.memory_banks
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = x + sum(read(layer.memory_norm(x), banks[i], {})[0] for read, i in zip(layer.memory, [0, 2]))
    torch.testing.assert_close(layer.read(x, banks, {}, None, None)[0], expected)


def test_routers_of_all_tiers_are_remembered_and_balanced(ids):
    model = tiny(FINE, MIDDLE, router_aux_loss_coef=0.3, router_variance_loss_coef=0.7, router_z_loss_coef=0.1)
    whole = model(ids, labels=ids, output_router_logits=True)
    cache = MemoryCache(model.config)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 11], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole.logits)
    names = {name for name in cache.read(3) if name.startswith("memory.")}
    assert {"memory.0.router_query", "memory.0.router_sum", "memory.1.router_sum"} <= names
    assert [x.shape[-1] for x in whole.router_logits] == [4, 12, 12, 4]
    each = [router_losses((x,), (x.shape[-1],), {4: 1, 12: 3}[x.shape[-1]]) for x in whole.router_logits]
    balance, variance, z = (sum(kind) / 4 for kind in zip(*each))
    torch.testing.assert_close(whole.aux_loss, 0.3 * balance + 0.7 * variance + 0.1 * z)
    model.train()
    torch.testing.assert_close(model(ids, labels=ids).loss, whole.loss + whole.aux_loss)
    assert [len(stats) for stats in tiny(COARSE, FINE).get_memory_stats(ids)] == [1, 1, 1, 6, 1, 6]


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_bank_of_a_tier_is_swapped_and_saved(ids, tmp_path, quantization):
    model = tiny(COARSE, {**FINE, "memory_sharing": "shared"}).float()
    bank = MemoryBank(96, 16, num_chapters=12)
    torch.nn.init.normal_(bank.weight)
    before = model(ids).logits
    old = model.swap_memory_bank(bank if quantization is None else bank.quantize(quantization), 1)
    after = model(ids).logits
    assert not torch.equal(before, after) and old.num_memory_tokens == 48
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, after)
    assert [tier.memory_num_tokens for tier in again.config.tiers] == [8, 96]
    model.swap_memory_bank(old, 1)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="no memory bank 2: this model has 2"):
        model.swap_memory_bank(bank, 2)
    with pytest.raises(ValueError, match="all banks of a tier are of one kind; this one has num_memory_tokens 96"):
        tiny(COARSE, FINE).swap_memory_bank(bank, 2)


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([], "memory_tiers is empty"),
        ([COARSE, {"hidden_size": 8}], r"memory_tiers\[1\] sets hidden_size, which all tiers of a model share"),
        ([{"memory_block_variant": "B"}], r"memory_tiers\[0\] sets memory_block_variant, which all tiers"),
        ([{"memory_tiers": [COARSE]}], r"memory_tiers\[0\] sets memory_tiers"),
        ([{"memory_num_token": 8}], r"memory_tiers\[0\]: .*did you mean 'memory_num_tokens'"),
        ([{"granularity": 8}], r"memory_tiers\[0\] sets granularity, which is no field of a bank"),
        (
            [COARSE, {**FINE, "memory_num_tokens": 50}],
            r"memory_tiers\[1\]: (.|\n)*50 is not a multiple of .* 12; every",
        ),
        ([{"memory_num_tokens": "8"}], r"memory_tiers\[0\]: (.|\n)*memory_num_tokens"),
        ([{"memory_placement": "custom", "memory_layers": [4]}], r"memory_tiers\[0\]: (.|\n)*layer 4 .* 4 layers"),
    ],
)
def test_wrong_tiers_are_refused(tiers, message):
    with pytest.raises(Exception, match=message):
        MemoryBankTransformerConfig(**SIZES, memory_tiers=tiers)
