"""An adapter as PEFT's users handle it: saved, loaded, swapped, switched off, deleted, merged where it can be."""

import copy
import json
import pickle

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from memzoo import MemoryConfig

OPTIONS = [
    {},
    {"sharing": "shared", "block_variant": "B", "bank_type": "factorized", "bank_rank": 2},
    {"sharing": "group", "num_chapters": 4, "top_k_chapters": 2, "placement": "last_k", "placement_k": 2},
    {"memory_type": "neural", "bank_type": "reduced", "bank_rank": 4},
    {"lora_config": {"r": 2, "target_modules": ["q_proj", "down_proj"]}, "modules_to_save": ["lm_head"]},
]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("options", OPTIONS)
def test_save_and_load(options, tokens, tmp_path, make_base, make_adapted):
    base = make_base()
    base.save_pretrained(tmp_path / "base")
    model = make_adapted(AutoPeft.base(tmp_path / "base"), **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = logits(model, tokens)
    assert not torch.equal(expected, logits(base, tokens))
    model.save_pretrained(tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any("default" in key for key in weights)

    again = PeftModel.from_pretrained(make_base(), tmp_path / "adapter")
    assert torch.equal(logits(again, tokens), expected)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = PeftModel.from_pretrained(make_base(), tmp_path / "adapter", is_trainable=True, adapter_name="other")
    assert {n.replace("other", "default") for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(automatic, tokens), expected)
    assert torch.equal(logits(copy.deepcopy(model), tokens), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), expected)
    assert (
        PeftConfig.from_pretrained(tmp_path / "adapter").to_dict().keys()
        == model.peft_config["default"].to_dict().keys()
    )


def test_an_adapter_saved_before_a_field_was_there(tokens, tmp_path, make_base, make_adapted):
    """What is missing in its configuration has the default, which computes what was computed then."""
    model = make_adapted(num_heads=4)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["num_key_value_heads"]
    path.write_text(json.dumps(values))
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), tmp_path), tokens), logits(model, tokens))
    assert model.get_submodule("base_model.model.model.layers.0.memzoo.memzoo_blocks.default").memory.kv_heads == 1


class AutoPeft:
    @staticmethod
    def base(folder):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_copy_is_independent(tokens, make_adapted, awaken):
    model = make_adapted(sharing="shared")
    before, other = logits(model, tokens), copy.deepcopy(model)
    awaken(other, seed=5)
    assert torch.equal(logits(model, tokens), before)
    assert not torch.equal(logits(other, tokens), before)


def test_adapters_are_swapped(tokens, make_base, make_adapted):
    model = make_adapted(sharing="shared")
    plain = logits(model.get_base_model(), tokens)
    first = logits(model, tokens)
    model.add_adapter("second", MemoryConfig(num_memory_tokens=4, num_heads=4, block_variant="B", init_weights=False))
    assert torch.equal(logits(model, tokens), first)
    model.set_adapter("second")
    second = logits(model, tokens)
    assert not torch.equal(second, first)
    assert {n.split("second")[0] for n, p in model.named_parameters() if p.requires_grad} and not any(
        ".default." in n for n, p in model.named_parameters() if p.requires_grad
    )
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, tokens)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens), first)
    with model.disable_adapter():
        bare = logits(model, tokens)
    assert torch.equal(bare, logits(make_base(), tokens)) and not torch.equal(bare, plain)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, tokens), second)
    assert not any(".default." in name for name in model.state_dict())
    assert torch.equal(logits(model.unload(), tokens), bare)


def test_memories_do_not_merge_and_lora_does(tokens, make_adapted):
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    model = make_adapted(lora_config=lora)
    before = logits(model, tokens)
    for method in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"cannot be merged.*merge_lora"):
            method()
    assert torch.equal(logits(model, tokens), before)
    model.base_model.merge_lora()
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-6)
    assert not any("lora_" in name for name in model.state_dict())
    assert model.peft_config["default"].lora_config is None
    with pytest.raises(ValueError, match="no active adapter has a lora_config"):
        model.base_model.merge_lora()


def test_lora_of_another_adapter_is_not_lost(make_adapted):
    model = make_adapted(lora_config={"r": 2, "target_modules": ["v_proj"]})
    model.add_adapter("second", MemoryConfig(num_heads=2, lora_config={"r": 2, "target_modules": ["v_proj"]}))
    with pytest.raises(ValueError, match="LoRA of second would be lost"):
        model.base_model.merge_lora()


@pytest.mark.parametrize("name", ["", "a.b", "layers", "q_proj", "keys", "memory", "memzoo"])
def test_names_of_adapters(name, make_base, make_adapted):
    base = make_base()
    with pytest.raises(ValueError, match="cannot be an adapter's name"):
        get_peft_model(base, MemoryConfig(num_heads=2), adapter_name=name)
    model = make_adapted(base)
    with pytest.raises(ValueError, match="cannot be an adapter's name"):
        model.add_adapter(name, MemoryConfig(num_heads=2))


def test_weights_that_do_not_fit(tmp_path, make_base, make_adapted):
    make_adapted(num_memory_tokens=4).save_pretrained(tmp_path)
    wide = make_base(hidden_size=32, head_dim=8)
    with pytest.raises(ValueError, match=r"is \[.*16.*\] in the checkpoint and \[.*32.*\] here.*another hidden size"):
        PeftModel.from_pretrained(wide, tmp_path)
    with pytest.raises(ValueError, match=r"tensors for which this model has no place, .*layers.2.*other layers"):
        PeftModel.from_pretrained(make_base(num_hidden_layers=2), tmp_path)
    save_file({"model.layers.0.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="no checkpoint of a memory: none of its 1 tensors"):
        PeftModel.from_pretrained(make_base(), tmp_path)


def test_configuration_is_json(tmp_path):
    config = MemoryConfig(lora_config={"r": 2, "target_modules": ["q_proj"]}, target_modules=["a->b"])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "MEMZOO" and saved["target_modules"] == ["a->b"]
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, MemoryConfig) and again.lora_config.target_modules == {"q_proj"}
