"""Quantized models: smaller, close to the original, loaded like any model, and able to remember."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
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


@torch.no_grad()
def test_transformers_own_way_and_half_precision(model, tmp_path):
    """What the kernels read as matrices is left alone, so that no layer meets weights that it cannot read."""
    expected = model(IDS).logits
    for options in ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, {"dtype": torch.float16}):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
        torch.testing.assert_close(loaded(IDS).logits.float(), expected, rtol=0, atol=0.05)
        assert loaded.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2


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
