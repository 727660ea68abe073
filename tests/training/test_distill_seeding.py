"""Chapters from passages: what is written, that a router finds the passage that a text comes from, the command."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memzoo import MaruTokenizer, MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM, MemoryConfig
from memzoo.cli import main
from memzoo.modeling.memory_bank import MemoryRead
from memzoo.modeling.statistics import record_calls
from memzoo.training.distill.seeding import cut_for_chapters, seed_chapters

CHAPTERS = {"memory_num_tokens": 24, "memory_num_chapters": 6, "memory_num_shared_chapters": 2}


def model_with(**fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    fields = {**CHAPTERS, "memory_routing": "prefix", **fields}
    sizes = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "initializer_range": 0.1}
    config = MemoryBankTransformerConfig(**{**sizes, **fields})
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
    read = model.reads()[1]
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


def test_an_adapter_finds_passages_by_what_it_sees_after_its_norm(passages):
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, initializer_range=0.3))
    chapters = {"num_memory_tokens": 16, "num_chapters": 4, "num_heads": 2, "sharing": "per_layer"}
    model = get_peft_model(base, MemoryConfig(task_type="CAUSAL_LM", **chapters)).eval()
    seed_chapters(model, passages)
    reads = [module for module in model.modules() if isinstance(module, MemoryRead)]
    for c, passage in enumerate(passages):
        with record_calls(reads) as calls:
            model(input_ids=passage[None], use_cache=False)
        for read in reads:
            ((x, bank, *_), (_, _, logits)) = calls[read][0]
            assert (logits[0].argmax(-1) == c).float().mean() > 0.6
            seen = torch.nn.functional.rms_norm(x[0], x.shape[-1:], eps=read.norm_eps)
            pieces = torch.nn.functional.adaptive_avg_pool1d(seen.mT, 4).mT
            chapter = bank.weight[4 * c : 4 * c + 4]
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


def test_long_passages_are_read_in_parts(passages):
    """A part's hidden states are those of a text of its own after `start`."""
    whole, parts = model_with(), model_with()
    start = torch.tensor([7, 8])
    seed_chapters(whole, passages, start, context=2 + 49)
    seed_chapters(parts, passages, start, context=2 + 25)
    assert not torch.equal(whole.model.memory_banks[0].weight, parts.model.memory_banks[0].weight)
    with record_calls(whole.reads()[:1]) as calls:
        for piece in passages[0].split(20):
            model_with()(input_ids=torch.cat([start, piece])[None])
            whole(input_ids=torch.cat([start, piece])[None])
    hidden = torch.cat([args[0][0, 2:] for args, _ in calls[whole.reads()[0]]])
    pieces = torch.nn.functional.adaptive_avg_pool1d(hidden.mT, 4).mT
    chapter = parts.model.memory_banks[0].weight[8:12]
    torch.testing.assert_close(chapter / chapter.norm(), pieces / pieces.norm())


def test_tiers_are_seeded_each_with_as_many_passages_as_it_has_chapters(passages):
    fine = {"memory_num_tokens": 24, "memory_num_chapters": 12, "memory_num_shared_chapters": 0}
    model = model_with(memory_tiers=[{"memory_num_chapters": 1, "memory_num_shared_chapters": 0}, {}, fine])
    before = [bank.weight.clone() for bank in model.model.memory_banks]
    cut = cut_for_chapters(model, torch.cat(passages))
    assert {count: len(pieces) for count, pieces in cut.items()} == {4: 4, 12: 12}
    for pieces in cut.values():
        assert torch.equal(torch.cat(pieces), torch.cat(passages))
        seed_chapters(model, pieces)
    changed = [(bank.weight != old).any(1).sum().item() for bank, old in zip(model.model.memory_banks, before)]
    assert changed == [0, 16, 24]
    with pytest.raises(ValueError, match="a document of 11 tokens cannot be cut into 12 passages"):
        cut_for_chapters(model, torch.arange(11))


DOCUMENT = "aaaa bbbb cccc dddd. 0123 4567 8901 2345. Zwei und drei sind fuenf. XYZ XYZ XYZ."


def test_the_command_seeds_and_then_learns(tmp_path, capsys):
    model = model_with(vocab_size=264, memory_zero_init=False)
    model.save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    argv = ["distill", "--steps", "1", "--continuations", "4", "--held-out", "4", "--length", "6", "--learning-rate"]
    argv += ["1e-9", "--document", str(tmp_path / "document.txt"), "--model", str(tmp_path / "model")]
    assert main([*argv, "--out", str(tmp_path / "plain")]) == 0
    assert "passages as chapters" not in capsys.readouterr().out
    assert main([*argv, "--out", str(tmp_path / "seeded"), "--seed-chapters"]) == 0
    said, saved = capsys.readouterr().out, json.loads((tmp_path / "seeded" / "distillation.json").read_text())
    assert f"{saved['when_seeded']:.3f} with its passages as chapters" in said and "bank: 3,072 bytes, 100.0%" in said
    plain = json.loads((tmp_path / "plain" / "distillation.json").read_text())
    assert plain["when_seeded"] is None and plain["without_memory"] == saved["without_memory"]  # one teacher
    ids = torch.tensor(MaruTokenizer()(DOCUMENT)["input_ids"])
    seed_chapters(model, list(ids.tensor_split(4)), torch.tensor([1]))
    learned = AutoModelForCausalLM.from_pretrained(tmp_path / "seeded")
    torch.testing.assert_close(learned.model.memory_banks[0].weight, model.model.memory_banks[0].weight)
    for mine, theirs in zip(model.reads(), learned.reads()):
        assert torch.equal(mine.router.gate.weight, theirs.router.gate.weight)
    (tmp_path / "short.txt").write_text("abc")
    argv[argv.index("--document") + 1] = str(tmp_path / "short.txt")
    assert main([*argv, "--out", str(tmp_path / "none"), "--seed-chapters"]) == 2
    assert "a document of 3 tokens cannot be cut into 4 passages" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "none"), "--chapters", "4"]) == 2
    assert "--chapters is of a new adapter, and" in capsys.readouterr().err


def test_the_command_seeds_the_chapters_of_a_new_adapter(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, bos_token_id=1)).save_pretrained(tmp_path / "base")
    MaruTokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    argv = ["distill", "--steps", "2", "--continuations", "4", "--held-out", "4", "--length", "6", "--every", "1"]
    argv += ["--document", str(tmp_path / "document.txt"), "--model", str(tmp_path / "base"), "--seed-chapters"]
    assert main([*argv, "--out", str(tmp_path / "none")]) == 2
    assert "the bank has no chapters" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "out"), "--chapters", "4", "--memory-tokens", "16"]) == 0
    config = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").active_peft_config
    assert (config.num_chapters, config.top_k_chapters, config.num_memory_tokens) == (4, 2, 16)
    saved = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert saved["when_seeded"] == saved["without_memory"]  # what is read still goes through a projection of zeros
