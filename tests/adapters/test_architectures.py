"""Every architecture trains, saves, loads and generates with a memory."""

import pytest
import torch
from peft import PeftModel

KINDS = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2"]
CHAPTERS = {"num_chapters": 4, "top_k_chapters": 2}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, CHAPTERS, {"memory_type": "neural"}], ids=["bank", "chapters", "neural"])
def test_from_a_step_of_training_to_generation(kind, options, tokens, tmp_path, make_base, make_adapted):
    model = make_adapted(make_base(kind), **options).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained and all("memzoo_" in name for name in trained)
    assert model.eval()(input_ids=tokens, labels=tokens).loss < loss

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(kind), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
    out = []
    for one in (model, again):
        one.generation_config.eos_token_id = None
        for use_cache in (True, False):
            settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": use_cache}
            out.append(one.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings))
    assert all(torch.equal(x, out[0]) for x in out)


def test_a_token_is_decoded_in_one_pass_as_in_many(tokens, make_base, make_adapted):
    """With heads of whole vectors the compiled step decodes; its logits are those of the full forward."""
    pytest.importorskip("numba")
    base = {"hidden_size": 64, "head_dim": 16}
    for options in ({}, {"sharing": "shared", "num_key_value_heads": 1}, CHAPTERS | {"num_shared_chapters": 1}):
        model = make_adapted(make_base("llama", torch.float64, **base), num_memory_tokens=32, num_heads=4, **options)
        reads = [layer.memzoo.memzoo_blocks["default"].memory for layer in model.base_model.model.model.layers]
        with torch.no_grad():
            for factor in (1.0, 0.5):  # and in-place changes are seen
                reads[0].q_proj.weight.mul_(factor)
                whole = model(input_ids=tokens, use_cache=False).logits
                cache = model(input_ids=tokens[:, :9]).past_key_values
                parts = [model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(9, 12)]
                torch.testing.assert_close(torch.cat(parts, 1), whole[:, 9:], rtol=1e-9, atol=1e-9)
            assert all(read._cached is not None and read._cached.step is not None for read in reads)
            with model.disable_adapter():
                off = model(input_ids=tokens[:, 9:10], past_key_values=cache).logits
            on = model(input_ids=tokens[:, 9:10], past_key_values=cache).logits
            assert (on - off).abs().max() > 1e-3
