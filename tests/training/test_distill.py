"""Distilling a document into a bank: the loss, what trains, what was kept, windows, adapters, errors, the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memzoo import MaruTokenizer, MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM, MemoryConfig
from memzoo.cli import main
from memzoo.modeling.memory_bank_files import load_bank
from memzoo.training.distill.distill import distill, kl_divergence, mean_nats, text_nats
from memzoo.training.distill.settings import Settings
from memzoo.training.distill.study import Writer, encode_document, split_windows

DOCUMENT = "The quick brown fox jumps over the lazy dog. Zwölf Boxkämpfer jagen Viktor."
SMALL = {"continuations": 24, "held_out": 16, "opening": 4, "length": 10, "steps": 50, "bank_learning_rate": 3e-2}
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SIZES |= {"initializer_range": 0.15, "tie_word_embeddings": False}


def bank_model(**fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    fields = {"memory_num_tokens": 16, "memory_zero_init": False, **SIZES, **fields}
    return MemoryBankTransformerForCausalLM(MemoryBankTransformerConfig(**fields)).eval()


def adapted(**options):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    return get_peft_model(base, MemoryConfig(task_type="CAUSAL_LM", num_memory_tokens=16, num_heads=2, **options))


def test_the_divergence_is_exact_with_all_tokens_and_a_lower_bound_with_few():
    p, q = torch.randn(2, 5, 7, 31, dtype=torch.float64)
    whole = torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1)
    bounds = [kl_divergence(*p.log_softmax(-1).topk(k, -1), q) for k in (1, 4, 31)]
    torch.testing.assert_close(bounds[2], whole, atol=1e-12, rtol=0)
    assert (bounds[0] <= bounds[1] + 1e-12).all() and (bounds[1] <= whole + 1e-12).all()
    assert kl_divergence(*p.log_softmax(-1).topk(4, -1), p + 3).abs().max() < 1e-12


def test_the_teacher_says_what_a_forward_with_the_document_says():
    """The cached, sampled distributions are those of one forward over document, separator and text."""
    for model in (bank_model().double(), adapted().double().eval()):
        tokenizer = MaruTokenizer()
        ids = encode_document(DOCUMENT, tokenizer)
        writer = Writer(model, tokenizer, 200, opening=4, length=6, top_k=None, seed=0)
        learn, measure = writer.write(ids, 5, 3, lambda count: None)
        assert (len(learn), len(measure), learn.num_start) == (5, 3, 1)
        prefix = torch.cat([writer.start, ids, writer.separator]).expand(5, -1)
        whole = torch.cat([prefix, learn.ids[:, 1:]], 1)
        log_p = model(input_ids=whole).logits.log_softmax(-1)[:, -10:-1].detach()
        torch.testing.assert_close(log_p.gather(-1, learn.tokens), learn.log_p, rtol=0, atol=1e-9)
        nats = -log_p[:, -6:].gather(-1, learn.ids[:, -6:, None])[..., 0]
        torch.testing.assert_close(nats, learn.nats, rtol=0, atol=1e-9)
        openings = {tuple(row) for row in torch.cat([learn.ids, measure.ids])[:, 1:5].tolist()}
        assert len(openings) == 8 and openings <= {tuple(row) for row in ids.unfold(0, 4, 1).tolist()}


def test_a_bank_learns_a_document_and_nothing_else_changes():
    model = bank_model(memory_num_tokens=32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = distill(model, MaruTokenizer(), DOCUMENT, Settings(**SMALL))
    assert report.with_document < report.with_bank < report.without_memory
    without = text_nats(bank_model(memory_num_tokens=32), report.held_out, 5)
    gain = without - report.held_out.nats.double().mean(1)  # of the document in context, a text each
    assert report.gap_error == pytest.approx((gain.var() / len(gain)).sqrt().item(), abs=1e-6)
    assert report.kept is not None and replace(report, gap_error=0.6 * gain.mean().item()).kept is None
    assert report.kept > 0.25 and sum(report.losses[-5:]) < 0.6 * sum(report.losses[:5])
    changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
    assert changed == ["model.memory_banks.0.weight"]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    # what was measured is what a model gives that has this bank swapped in
    other = bank_model(memory_num_tokens=32)
    other.swap_memory_bank(model.model.memory_banks[0])
    assert mean_nats(other, report.held_out, 5) == pytest.approx(report.with_bank, abs=1e-5)


def test_a_new_adapter_learns_a_document_with_its_projections_and_the_base_stays():
    model = adapted()
    with pytest.raises(ValueError, match=r"output projection is zero.*train='read'"):
        distill(model, MaruTokenizer(), DOCUMENT, Settings(**SMALL))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = distill(model, MaruTokenizer(), DOCUMENT, Settings(**{**SMALL, "read_learning_rate": 1e-2}, train="read"))
    assert report.kept > 0.25
    assert all("memzoo_" in name for name, x in model.state_dict().items() if not torch.equal(x, before[name]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "memzoo_" in name
    }


@pytest.mark.parametrize("how", ["model", "adapters"])
def test_two_tiers_of_different_granularity_learn_together(how):
    """A coarse bank for all layers and a fine one in chapters for the last: in one model, or as two adapters."""
    if how == "model":
        fine = {"memory_num_tokens": 32, "memory_num_chapters": 8, "memory_top_k_chapters": 2}
        model = bank_model(memory_tiers=[{}, {**fine, "memory_placement": "last_k", "memory_placement_k": 1}])
    else:
        model = adapted(sharing="shared")
        fine = {"num_memory_tokens": 32, "num_chapters": 8, "top_k_chapters": 2, "placement": "last_k"}
        model.add_adapter("fine", MemoryConfig(task_type="CAUSAL_LM", num_heads=2, **fine))
        model.base_model.set_adapter(["default", "fine"])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = distill(model, MaruTokenizer(), DOCUMENT, Settings(**{**SMALL, "read_learning_rate": 1e-2}, train="read"))
    assert report.with_bank < report.without_memory
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    banks = [name for name in changed if ".bank.weight" in name or "_banks." in name]
    assert sorted(model.state_dict()[name].shape[0] for name in banks) == [16, 32]


def test_long_documents_are_read_in_windows():
    ids = torch.arange(100)
    windows = split_windows(ids, 40, 10)
    assert [len(window) for window in windows] == [25] * 4 and torch.equal(torch.cat(windows), ids)
    assert len(split_windows(ids, 110, 10)) == 1
    with pytest.raises(ValueError, match=r"context of 10 tokens has no room.* 10 tokens of opening"):
        split_windows(ids, 10, 10)
    model = bank_model(sliding_window=48)
    report = distill(model, MaruTokenizer(), DOCUMENT, Settings(**{**SMALL, "steps": 1}))
    room = 48 - (1 + 2 + 4 + 10)  # start, separator, opening, continuation
    assert report.windows == -(-report.document_tokens // room) > 1
    short = Writer(model, MaruTokenizer(), 17 + 3, 4, 10, None, seed=0)  # windows of two or three tokens
    learn, measure = short.write(torch.arange(50, 61), 4, 4, lambda count: None)
    assert learn.ids.shape == measure.ids.shape == (4, 1 + 2 + 10)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda: bank_model(memory_quantization="int8"), {}, "a bank in int8 is for reading only"),
        (lambda: bank_model(memory_placement="none"), {}, "has no memory bank"),
        (lambda: adapted(memory_type="neural"), {"train": "read"}, "has no memory bank"),
        (bank_model, {"steps": 0}, "steps must be at least 1, not 0"),
        (bank_model, {"held_out": 1}, "held_out must be at least 2, not 1"),
        (bank_model, {"train": "all"}, "train must be 'bank' or 'read', not 'all'"),
    ],
)
def test_what_cannot_be_distilled_is_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        distill(make(), MaruTokenizer(), DOCUMENT, Settings(**{**SMALL, **settings}))


def test_the_command(tmp_path, capsys):
    model, tokenizer = bank_model(), MaruTokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    (tmp_path / "empty.txt").write_text(" \n")
    argv = ["distill", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--steps", "4"]
    argv += ["--continuations", "8", "--held-out", "32", "--length", "10", "--document"]
    assert main([*argv, str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt is empty (2 bytes); there is nothing to distil" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("Zwölf".encode("latin-1"))
    assert main([*argv, str(tmp_path / "latin.txt")]) == 2
    assert "latin.txt is not UTF-8 text (invalid start byte at byte 2)" in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "document.txt"), "--quantize", "int8"]) == 0
    said, saved = capsys.readouterr().out, json.loads((tmp_path / "out/distillation.json").read_text())
    assert f"kept: {saved['kept']:.0%}" in said and saved["settings"]["steps"] == 4
    learned, bank = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), load_bank(tmp_path / "out" / "bank")
    assert re.search(r"bank: 576 bytes, 28.1% of float32; int8 is off by 0\.\d% of its norm", said)
    assert saved["with_quantized_bank"] != saved["with_bank"]
    learned.swap_memory_bank(bank)
    writer = Writer(model, tokenizer, 1024, 8, 10, 64, seed=0)
    held_out = writer.write(encode_document(DOCUMENT, tokenizer), 8, 32, lambda count: None)[1]
    assert mean_nats(learned, held_out, 8) == pytest.approx(saved["with_quantized_bank"], abs=1e-6)
    learned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bank.quantization == "int8" and not torch.equal(
        learned.model.memory_banks[0].tokens(), model.model.memory_banks[0].tokens()
    )
    torch.testing.assert_close(bank.tokens(), learned.model.memory_banks[0].tokens(), atol=1e-3, rtol=0)
    assert main([*argv, str(tmp_path / "document.txt")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_command_gives_a_plain_model_an_adapter_and_goes_on_with_it(tmp_path, capsys):
    adapted().unload().save_pretrained(tmp_path / "base")
    MaruTokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    argv = ["distill", "--steps", "3", "--continuations", "4", "--held-out", "4", "--length", "6"]
    argv += ["--document", str(tmp_path / "document.txt")]
    size = ["--memory-tokens", "8", "--every", "1"]
    assert main([*argv, *size, "--model", str(tmp_path / "base"), "--out", str(tmp_path / "first")]) == 0
    first = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first")
    config = first.active_peft_config
    assert (config.num_memory_tokens, config.layers_to_transform, config.sharing) == (8, [0, 1], "shared")
    assert main([*argv, "--model", str(tmp_path / "first"), "--out", str(tmp_path / "second")]) == 0
    second = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second").state_dict()
    changed = {name for name, x in first.state_dict().items() if not torch.equal(x, second[name])}
    assert changed and all("memzoo_banks" in name for name in changed)  # with a read that works, the bank alone
    assert main(["generate", str(tmp_path / "first"), "--prompt", "The", "--max-new-tokens", "2"]) == 0
