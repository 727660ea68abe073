"""Chapters from passages: what is written, and that a router finds the passage that a text comes from."""

import pytest
import torch

from memzoo import MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM
from memzoo.modeling.statistics import record_calls
from memzoo.training.distill.seeding import seed_chapters

CHAPTERS = {"memory_num_tokens": 24, "memory_num_chapters": 6, "memory_num_shared_chapters": 2}


def model_with(**fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    fields = {**CHAPTERS, "memory_routing": "prefix", **fields}
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MemoryBankTransformerConfig(**sizes, intermediate_size=48, initializer_range=0.1, **fields)
    return MemoryBankTransformerForCausalLM(config).eval()


@pytest.fixture
def passages() -> list[torch.Tensor]:
    """Four texts of different lengths, each with five words of its own."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(25 * i, 25 * i + 5, (40 + 3 * i,), generator=generator) for i in range(4)]


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_a_router_prefers_the_chapter_of_the_passage_that_it_reads(passages, sharing):
    model = model_with(memory_sharing=sharing)
    fresh = [model(p[None], output_router_logits=True).router_logits for p in passages]
    before = model.training
    shared = model.model.memory_banks[0].weight[:8].clone()
    seed_chapters(model, passages)
    assert model.training == before and torch.equal(model.model.memory_banks[0].weight[:8], shared)
    for c, (passage, old) in enumerate(zip(passages, fresh)):
        halves = [passage, passage[: len(passage) // 2], passage[len(passage) // 2 :]]
        for text in halves:  # the mean of a part lies near the mean of the whole
            for logits in model(text[None], output_router_logits=True).router_logits:
                p = logits[0, -1].softmax(-1)
                assert p.argmax() == c and p[c] > 0.8
        assert all(logits[0, -1].softmax(-1).amax() < 0.6 for logits in old)


def test_most_tokens_of_a_passage_choose_its_chapter(passages):
    model = model_with(memory_routing="token")
    seed_chapters(model, passages)
    for c, passage in enumerate(passages):
        for logits in model(passage[None], output_router_logits=True).router_logits:
            assert (logits[0].argmax(-1) == c).float().mean() > 0.8


def test_chapters_hold_the_means_of_the_passages_hidden_states(passages):
    model = model_with(memory_sharing="per_layer")
    for bank in model.model.memory_banks:
        torch.nn.init.normal_(bank.weight, std=0.3)
    size = [bank.weight[8:].square().mean() for bank in model.model.memory_banks]
    read = model.model.layers[1].memory
    start = torch.tensor([7, 8])
    with record_calls([read]) as calls:
        model(input_ids=torch.cat([start, passages[2]])[None], use_cache=False)
    hidden = calls[read][0][0][0][0, 2:]
    seed_chapters(model, passages, start)
    for bank, before in zip(model.model.memory_banks, size):
        torch.testing.assert_close(bank.weight[8:].square().mean(), before)
    chapter = model.model.memory_banks[1].weight[16:20].detach()  # two shared chapters of four tokens come first
    pieces = torch.nn.functional.adaptive_avg_pool1d(hidden.mT, 4).mT.detach()
    torch.testing.assert_close(chapter / chapter.norm(), pieces / pieces.norm())


def test_what_cannot_be_seeded_is_refused(passages):
    for fields, given, message in (
        ({}, passages[:3], "3 passages for 4 routed chapters"),
        ({"memory_num_chapters": 1, "memory_num_shared_chapters": 0}, passages, "the bank has no chapters"),
        ({"memory_product_keys": True}, passages, "product keys"),
        ({"memory_dim": 16}, passages, "hidden states of width 32 need a standard bank of that width"),
        ({"memory_bank_type": "factorized", "memory_bank_rank": 8}, passages, "need a standard bank"),
        ({"memory_placement": "none"}, passages, "has no memory bank"),
    ):
        with pytest.raises(ValueError, match=message):
            seed_chapters(model_with(**fields), given)
