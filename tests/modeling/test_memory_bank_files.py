"""A memory bank on its own: saved, loaded, swapped in, refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from memzoo import MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM
from memzoo.modeling.memory_bank import MemoryBank
from memzoo.modeling.memory_bank_files import load_bank, save_bank

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
TINY |= {"memory_num_tokens": 24, "memory_num_heads": 4, "initializer_range": 0.3, "memory_zero_init": False}
CHAPTERS = {"memory_num_chapters": 6, "memory_top_k_chapters": 2, "memory_num_shared_chapters": 1}


def tiny(**fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    return MemoryBankTransformerForCausalLM(MemoryBankTransformerConfig(**{**TINY, **fields})).double().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("bank_type", ["standard", "factorized", "reduced"])
def test_a_bank_is_shipped_on_its_own_and_swapped_in(ids, tmp_path, bank_type, quantization):
    fields = {**CHAPTERS, "memory_bank_type": bank_type, "memory_bank_rank": 8}
    donor, model = tiny(**fields).float(), tiny(**fields).float()
    torch.nn.init.normal_(donor.model.memory_banks[0].weight)
    bank = donor.model.memory_banks[0] if quantization is None else donor.model.memory_banks[0].quantize(quantization)
    save_bank(bank, tmp_path / "bank")
    loaded = load_bank(tmp_path / "bank")
    assert loaded.description() == bank.description() and loaded.footprint() == bank.footprint()
    before = model(ids).logits
    old = model.swap_memory_bank(loaded)
    donor.swap_memory_bank(bank)
    assert torch.equal(model(ids).logits, donor(ids).logits) and not torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path / "model")  # the configuration says what the bank now is
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    model.swap_memory_bank(old)
    assert torch.equal(model(ids).logits, before)


def test_banks_that_do_not_fit_or_are_damaged_are_refused(ids, tmp_path):
    model = tiny(memory_sharing="per_layer", **CHAPTERS)
    with pytest.raises(
        ValueError, match="6 chapters of tokens 32 wide; this model reads 6 chapters of tokens 16 wide"
    ):
        model.swap_memory_bank(MemoryBank(24, 32, num_chapters=6))
    with pytest.raises(ValueError, match="4 chapters of tokens 16 wide"):
        model.swap_memory_bank(MemoryBank(24, 16, num_chapters=4))
    with pytest.raises(ValueError, match="of one kind; this one has num_memory_tokens 48 instead of 24"):
        model.swap_memory_bank(MemoryBank(48, 16, num_chapters=6))
    larger = tiny(**CHAPTERS)
    larger.swap_memory_bank(MemoryBank(48, 16, num_chapters=6).double())
    assert larger.config.memory_num_tokens == 48 and larger(ids).logits.isfinite().all()
    with pytest.raises(FileNotFoundError, match=r"bank\.json is missing"):
        load_bank(tmp_path)
    save_bank(model.model.memory_banks[0], tmp_path)
    index, text = tmp_path / "bank.json", (tmp_path / "bank.json").read_text()
    for old, new, message in (
        ('"format": 1', '"format": 2', "bank format 2 and this memzoo reads 1"),
        ('"quantization": null', '"quantization": "nf4"', "unknown quantization format 'nf4'"),
        ('"num_memory_tokens": 24', '"num_memory_tokens": 48', "damaged bank"),
        ('"width": 16', '"breadth": 16', "damaged bank"),
        ("{", "[", "bank.json is damaged"),
    ):
        index.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            load_bank(tmp_path)
    index.write_text(text)
    (tmp_path / "bank.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged bank"):
        load_bank(tmp_path)
