"""Quantized models: smaller, close to the original, loaded like any model, and able to remember."""

import importlib.util

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from memzoo import MaruConfig, MaruForCausalLM, MaruTokenizer
from memzoo.cli import main
from memzoo.hub_cards.quantize import quantize

pytest.importorskip("bitsandbytes")
IDS = torch.arange(3, 40)[None]


@pytest.fixture(params=["parallel", "sequential"])
def model(request, tmp_path):
    torch.manual_seed(0)
    config = MaruConfig(hidden_size=64, num_hidden_layers=1, recurrence=request.param, memory_num_slots=8)
    model = MaruForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    return model


KINDS = ["int8", "nf4", "fp4"]
if importlib.util.find_spec("torchao"):
    KINDS.append("torchao-int8")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_smaller_and_close_and_loads_as_usual(model, kind, tmp_path):
    text = b"The state of the union is good. " * 4
    result = quantize(tmp_path / "model", tmp_path / kind, kind, [text])
    assert result.bytes_after < result.bytes_before
    assert result.bits_per_byte_after == pytest.approx(result.bits_per_byte_before, rel=0.02)
    assert result.bits_per_byte_after != result.bits_per_byte_before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    whole = loaded(IDS).logits
    first = loaded(IDS[:, :20], use_cache=True)
    second = loaded(IDS[:, 20:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=1e-2, atol=1e-2)
    steps = loaded(IDS[:, :20], use_cache=True)
    for token in IDS[:, 20:].split(1, 1):
        steps = loaded(token, past_key_values=steps.past_key_values)
    torch.testing.assert_close(steps.logits, whole[:, -1:], rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_transformers_own_way_and_half_precision(model, tmp_path):
    """What the kernels read as matrices is left alone, so that no layer meets weights that it cannot read."""
    expected = model(IDS).logits
    for options in ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, {"dtype": torch.float16}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
        torch.testing.assert_close(loaded(IDS).logits.float(), expected, rtol=0, atol=0.05)
        assert loaded.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2


HEADS = {"num_attention_heads": 4, "intermediate_size": 128}
FAMILIES = {
    "dual_memory": {},
    "neural_memory_transformer": HEADS,
    "titan_mac": HEADS,
    "memory_bank_transformer": {**HEADS, "memory_num_tokens": 32, "memory_num_chapters": 4, "memory_zero_init": False},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, kind, tmp_path):
    """What a kernel reads as a matrix is not read in its packed form: 8 bits stay close, 4 bits at a distance."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 128, "num_hidden_layers": 2, "initializer_range": 0.05}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **FAMILIES[family])).eval()
    model.save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    result = quantize(tmp_path / "model", tmp_path / "small", kind)
    assert result.bytes_after < 0.7 * result.bytes_before
    expected, found = model(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "small")(IDS).logits
    assert 0 < (found - expected).norm() / expected.norm() < (0.1 if "int8" in kind else 0.7)


def test_the_command_and_what_it_refuses(tmp_path, capsys):
    MaruForCausalLM(MaruConfig(hidden_size=64, num_hidden_layers=1)).save_pretrained(tmp_path / "model")
    MaruTokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some text to measure on. ")
    arguments = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "small")]
    assert main([*arguments, "--data", str(tmp_path / "text.txt")]) == 0
    assert "| int8 |" in capsys.readouterr().out
    assert main(["quantize", str(tmp_path / "small"), "--out", str(tmp_path / "smaller")]) == 2
    assert "quantized already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no kind 'int3'"):
        quantize(tmp_path / "model", tmp_path / "other", "int3")
