"""A merged LoRA computes what the adapter computed; banks that were taken out are the model's, and go into another."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memzoo import (
    MaruConfig,
    MaruForCausalLM,
    MaruTokenizer,
    MemoryBankTransformerConfig,
    MemoryBankTransformerForCausalLM,
    MemoryConfig,
)
from memzoo.cli import main
from memzoo.modeling.memory_bank_files import load_bank
from memzoo.training.distill.distill import banks_of

IDS = torch.arange(3, 30)[None]
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 264,
}
LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def make_adapter(tmp_path):
    """Writes an adapter as if trained; returns its folder and the logits."""

    def make(config):
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "base")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        MaruTokenizer().save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            return str(tmp_path / "adapter"), model(IDS).logits

    return make


def memory(**fields):
    return MemoryConfig(num_memory_tokens=8, num_heads=2, task_type="CAUSAL_LM", **fields)


@torch.no_grad()
def test_the_lora_beside_a_memory_is_merged_and_the_memory_stays(make_adapter, tmp_path):
    folder, expected = make_adapter(memory(lora_config=LORA))
    assert main(["merge-lora", folder, "--out", str(tmp_path / "out")]) == 0
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()
    assert merged.active_peft_config.lora_config is None
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert not torch.allclose(base(IDS).logits, before(IDS).logits)
    assert main(["merge-lora", str(tmp_path / "out" / "adapter"), "--out", str(tmp_path / "again")]) == 2


@torch.no_grad()
def test_an_adapter_that_is_only_a_lora_leaves_a_plain_model(make_adapter, tmp_path):
    folder, expected = make_adapter(LoraConfig(**LORA, task_type="CAUSAL_LM"))
    assert main(["merge-lora", folder, "--out", str(tmp_path / "out")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base").eval()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_is_said(make_adapter, tmp_path, capsys):
    folder, _ = make_adapter(memory())
    assert main(["merge-lora", folder, "--out", str(tmp_path / "out")]) == 2
    assert "has no LoRA" in capsys.readouterr().err
    assert main(["merge-lora", str(tmp_path / "base"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no adapter_config.json" in capsys.readouterr().err
    assert main(["merge-lora", folder, "--out", folder]) == 2
    assert "is not empty" in capsys.readouterr().err


@torch.no_grad()
def test_the_banks_of_a_model_go_into_another(tmp_path):
    config = MemoryBankTransformerConfig(**SIZES, memory_num_tokens=8, memory_zero_init=False)
    one, other = MemoryBankTransformerForCausalLM(config).eval(), MemoryBankTransformerForCausalLM(config).eval()
    other.load_state_dict(one.state_dict())
    for bank in banks_of(other):
        for parameter in bank.parameters():
            torch.nn.init.normal_(parameter)
    assert not torch.allclose(one(IDS).logits, other(IDS).logits)
    one.save_pretrained(tmp_path / "model")
    assert main(["extract-bank", str(tmp_path / "model"), "--out", str(tmp_path / "banks")]) == 0
    folders = sorted((tmp_path / "banks").iterdir())
    assert len(folders) == len(banks_of(one)) > 0
    for index, folder in enumerate(folders):
        other.swap_memory_bank(load_bank(folder), index)
    assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_the_banks_of_an_adapter(make_adapter, tmp_path, capsys):
    folder, _ = make_adapter(memory(sharing="shared"))
    assert main(["extract-bank", folder, "--out", str(tmp_path / "banks")]) == 0
    (expected,) = banks_of(AutoPeftModelForCausalLM.from_pretrained(folder))
    found = load_bank(tmp_path / "banks" / "bank_0").state_dict()
    assert all(torch.equal(found[name], x) for name, x in expected.state_dict().items())
    MaruForCausalLM(MaruConfig(hidden_size=16, num_hidden_layers=1)).save_pretrained(tmp_path / "maru")
    assert main(["extract-bank", str(tmp_path / "maru"), "--out", str(tmp_path / "none")]) == 2
    assert "reads no memory banks" in capsys.readouterr().err
