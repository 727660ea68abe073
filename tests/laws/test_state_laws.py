"""Laws 7 to 10: what a memory is: of constant size, batch first, persistent, precise."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from memzoo import MemoryCache

RESUME = """
import json, sys, torch
import memzoo
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
answers = {}
for name, folder in json.load(open(sys.argv[1])).items():
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    cache = memzoo.MemoryCache.from_pretrained(folder + "/snapshot", model.config)
    new = torch.tensor([[5], [6]])
    answers[name] = model.generate(new, past_key_values=cache, max_new_tokens=6, do_sample=False).tolist()
json.dump(answers, open(sys.argv[2], "w"))
"""


@torch.no_grad()
@pytest.mark.parametrize("tokens", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_7_constant_state_and_10_precision(row, tokens):
    """Long texts in bfloat16 at depth 4: every output and state is finite, and the memory has not grown.

    With full attention, whose keys and values grow and whose cost is quadratic, 5 k tokens.
    """
    model = row.build(torch.bfloat16, num_hidden_layers=4)
    cache = MemoryCache(model.config)
    sizes = []
    generator = torch.Generator().manual_seed(2)
    lengths = [1_000, *[(tokens - 1_000) // 3] * 3] if row.constant_state else [1_000, 2_000, 2_000]
    for length in lengths:
        ids = torch.randint(3, 61, (1, length), generator=generator)
        out = model.model(ids, past_key_values=cache)
        assert out.last_hidden_state.isfinite().all()
        sizes.append(cache.nbytes)
    assert cache.get_seq_length() == sum(lengths)
    assert sizes[0] > 0 and (len(set(sizes)) == 1) == row.constant_state
    assert all(state.isfinite().all() for state in cache.states.values())


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "least"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_10_state_dtypes(row, ids, dtype, least):
    """What accumulates is kept in float32 or better; only copies of inputs (a convolution's tail, keys) are not."""
    cache = row.build(dtype)(ids, use_cache=True).past_key_values
    for name, state in cache.states.items():
        copied = name.endswith((".conv", ".keys", ".values"))
        assert not state.is_floating_point() or state.dtype == (dtype if copied else least), name


@torch.no_grad()
def test_8_batch_operations(row, ids):
    model = row.build()
    order = torch.tensor([2, 0, 0])

    def after(change) -> torch.Tensor:
        cache = model(ids[:, :20], use_cache=True).past_key_values
        assert all(state.shape[0] == 3 for state in cache.states.values())
        index = change(cache)
        assert cache.batch_size == len(index)
        logits = model(ids[index, 20:], past_key_values=cache).logits
        torch.testing.assert_close(logits, model(ids[index]).logits[:, 20:], rtol=1e-10, atol=1e-10)

    after(lambda cache: cache.reorder_cache(order) or order)
    after(lambda cache: cache.batch_repeat_interleave(2) or torch.arange(3).repeat_interleave(2))
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])) or torch.tensor([1]))
    after(lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])) or torch.tensor([0, 2]))

    cache = model(ids, use_cache=True).past_key_values
    copy = cache.clone()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert copy.get_seq_length() == 37 and copy.nbytes > 0
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_8_beam_search_and_sampling(row, ids):
    """With the cache or without, generate gives the same tokens."""
    model = row.build()
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    for options in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 5},
    ):
        outputs = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            options = {**options, "use_cache": use_cache, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
            outputs.append(model.generate(ids[:, :7], attention_mask=mask, **options))
        assert torch.equal(*outputs), options


@torch.no_grad()
def test_9_model_round_trip_is_bit_equal(row, ids, tmp_path):
    model = row.build(torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_9_a_memory_resumes_in_another_process(table, ids, tmp_path):
    """Every family's memory, saved here, goes on there as if it had never stopped."""
    expected, folders = {}, {}
    for name, row in table.items():
        model = row.build(torch.float32)
        folders[name] = str(tmp_path / name)
        model.save_pretrained(folders[name])
        cache = model(ids[:2], use_cache=True).past_key_values
        cache.save_pretrained(tmp_path / name / "snapshot")
        new = torch.tensor([[5], [6]])
        expected[name] = model.generate(new, past_key_values=cache, max_new_tokens=6, do_sample=False).tolist()
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    paths = [str(tmp_path / "folders.json"), str(tmp_path / "answers.json")]
    subprocess.run([sys.executable, "-c", RESUME, *paths], check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "answers.json").read_text()) == expected
