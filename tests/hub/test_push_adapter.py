"""A PEFT adapter of MemoryConfig goes to the Hub and comes back: by PEFT's own way, and by memzoo push and pull."""

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from memzoo import MemoryConfig
from memzoo.cli import main
from memzoo.hub_cards.push import push

IDS = torch.arange(3, 30)[None]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture
def base(hub):
    """A base that is on the Hub, loaded from there."""
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=61)).push_to_hub("tester/base")
    return AutoModelForCausalLM.from_pretrained("tester/base").eval()


def adapted(base, **options):
    """With a memory that does something, as if trained."""
    fields = {"num_memory_tokens": 8, "num_heads": 2, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, MemoryConfig(**{**fields, **options})).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"memory_type": "neural"}, {"lora_config": {"r": 2, "target_modules": ["q_proj"]}, "num_chapters": 4}],
    ids=["bank", "neural", "lora and chapters"],
)
def test_pefts_own_way(hub, base, options):
    plain = base(IDS).logits
    model = adapted(base, **options)
    model.push_to_hub("tester/adapter")
    expected = model(IDS).logits
    assert not torch.allclose(expected, plain)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} == set(hub.files("tester/adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tester/base"), "tester/adapter").eval()
    assert torch.equal(again(IDS).logits, expected)
    by_itself = AutoPeftModelForCausalLM.from_pretrained("tester/adapter").eval()  # finds its base on the Hub
    assert torch.equal(by_itself(IDS).logits, expected)


@torch.no_grad()
def test_the_commands_with_a_card_a_branch_and_a_private_repository(hub, base, tmp_path, monkeypatch):
    model = adapted(base)
    model.save_pretrained(tmp_path / "adapter")  # PEFT leaves a README.md whose fields are all empty
    arguments = ["--license", "mit", "--private", "--revision", "v2"]
    assert main(["push", str(tmp_path / "adapter"), "tester/mine", *arguments]) == 0
    assert not hub.files("tester/mine") and hub.repos["tester/mine"]["private"]
    card = ModelCard.load(huggingface_hub.hf_hub_download("tester/mine", "README.md", revision="v2"))
    assert card.data.base_model == "tester/base" and card.data.library_name == "peft"
    assert card.data.license == "mit" and {"memzoo", "adapter"} <= set(card.data.tags)
    assert "More Information Needed" not in card.text and "AutoPeftModelForCausalLM" in card.text
    assert main(["pull", "tester/mine", str(tmp_path / "pulled"), "--revision", "v2"]) == 0
    for place, options in ((tmp_path / "pulled", {}), ("tester/mine", {"revision": "v2"})):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tester/base"), place, **options)
        assert torch.equal(loaded.eval()(IDS).logits, model(IDS).logits)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert main(["pull", "tester/mine", str(tmp_path / "stolen"), "--revision", "v2"]) == 2


def test_a_base_that_is_a_folder_is_not_named_on_the_card(hub, tmp_path):
    """The Hub refuses a card whose base_model is a path."""
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=61)).save_pretrained(tmp_path / "base")
    adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
    push(tmp_path / "adapter", "tester/adapter")
    card = ModelCard.load("tester/adapter")
    assert card.data.base_model is None and str(tmp_path) not in card.content


def test_a_connection_that_breaks(hub, base, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    adapted(base).save_pretrained(tmp_path / "adapter")
    hub.drop = 1000
    with pytest.raises(ConnectionError, match="run the same again"):
        push(tmp_path / "adapter", "tester/adapter")
    assert not hub.files("tester/adapter")
    hub.drop = 2
    push(tmp_path / "adapter", "tester/adapter")
    assert hub.drop == 0 and "adapter_model.safetensors" in hub.files("tester/adapter")
