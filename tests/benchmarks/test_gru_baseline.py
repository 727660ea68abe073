"""The GRU that the families are compared with keeps the same contract, or the comparison would not be fair."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memzoo import MemoryCache

PATH = Path(__file__).parents[2] / "benchmarks" / "gru_baseline.py"


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.spec_from_file_location("gru_baseline", PATH)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    config = AutoConfig.for_model("gru_baseline", vocab_size=61, hidden_size=16)
    return AutoModelForCausalLM.from_config(config).double().eval()


@torch.no_grad()
def test_splits_pads_and_generation(model):
    ids = torch.randint(3, 61, (2, 11))
    whole = model(ids, use_cache=True)
    cache = MemoryCache(model.config)
    pieces = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split([4, 6, 1], 1)], 1)
    torch.testing.assert_close(pieces, whole.logits, rtol=1e-10, atol=1e-10)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, [0, 5]], mask[1, 7:] = 0, 0
    padded = model(ids, attention_mask=mask, use_cache=True)
    for b in range(2):
        alone = model(ids[b, mask[b].bool()][None], use_cache=True)
        torch.testing.assert_close(padded.logits[b, mask[b].bool()], alone.logits[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(padded.past_key_values.states["1.h"][b], alone.past_key_values.states["1.h"][0])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_a_row_of_pads_keeps_its_state(model):
    cache = model(torch.randint(3, 61, (2, 5)), use_cache=True).past_key_values
    before = cache.clone()
    model(torch.randint(3, 61, (2, 3)), attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]]), past_key_values=cache)
    for name, state in cache.states.items():
        assert torch.equal(state[0], before.states[name][0]) and not torch.equal(state[1], before.states[name][1])
