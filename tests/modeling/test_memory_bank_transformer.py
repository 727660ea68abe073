"""The memory-bank transformer: placement, sharing, losses, options, statistics, heads."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from memzoo import MaruTokenizer, MemoryBankTransformerConfig, MemoryBankTransformerForCausalLM, MemoryCache
from memzoo.modeling.chapter_router import router_losses

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
TINY |= {"memory_num_tokens": 24, "memory_num_heads": 4, "initializer_range": 0.3, "memory_zero_init": False}
CHAPTERS = {"memory_num_chapters": 6, "memory_top_k_chapters": 2, "memory_num_shared_chapters": 1}


def tiny(**fields) -> MemoryBankTransformerForCausalLM:
    torch.manual_seed(0)
    return MemoryBankTransformerForCausalLM(MemoryBankTransformerConfig(**{**TINY, **fields})).double().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 19), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"memory_placement": "all"}, [0, 1, 2, 3, 4, 5, 6]),
        ({"memory_placement": "first_k", "memory_placement_k": 2}, [0, 1]),
        ({"memory_placement": "last_k"}, [2, 3, 4, 5, 6]),
        ({"memory_placement": "every_n"}, [0, 3, 6]),
        ({"memory_placement": "custom", "memory_layers": [-1, 1, 5]}, [1, 5, 6]),
        ({"memory_placement": "none"}, []),
    ],
)
def test_placement_and_sharing(fields, layers):
    for sharing, banks in (("shared", [0] * 9), ("per_layer", range(9)), ("group", [i // 2 for i in range(9)])):
        model = tiny(num_hidden_layers=7, memory_sharing=sharing, **fields)
        expected = dict(zip(layers, banks))
        assert [layer.bank_indices for layer in model.model.layers] == [
            [expected[i]] if i in expected else [] for i in range(7)
        ]
        assert len(model.model.memory_banks) == len(set(expected.values()))


def test_a_new_memory_changes_nothing_in_either_variant(ids):
    plain = tiny(memory_placement="none")
    for fields in ({}, CHAPTERS, {"memory_quantization": "int4"}, {"memory_projection_rank": 3}):
        model = tiny(memory_zero_init=True, **fields)
        model.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(model(ids).logits, plain(ids).logits)
    model = tiny(memory_zero_init=True, memory_block_variant="B")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.second_mlp.down_proj.weight)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.equal(tiny()(ids).logits, plain(ids).logits)


def test_router_losses_are_in_the_training_loss(ids):
    model = tiny(router_aux_loss_coef=0.3, router_variance_loss_coef=0.7, router_z_loss_coef=0.1, **CHAPTERS)
    plain, out = model(ids, labels=ids), model(ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None and plain.router_logits is None and torch.equal(plain.loss, out.loss)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(2, 19, 5)] * 4
    losses = router_losses(out.router_logits, (5,), 2)
    torch.testing.assert_close(out.aux_loss, 0.3 * losses[0] + 0.7 * losses[1] + 0.1 * losses[2])
    model.config.output_router_logits = True
    assert len(model(ids).router_logits) == 4 and model(ids, output_router_logits=False).router_logits is None
    assert torch.equal(model(ids).aux_loss, out.aux_loss)
    model.config.output_router_logits = False
    model.train()
    trained = model(ids, labels=ids)
    assert trained.router_logits is None
    torch.testing.assert_close(trained.loss, plain.loss + out.aux_loss)
    # of a batch that is accumulated in two halves, normalised by the whole: each half's losses count half
    halves = [model(half[None], labels=half[None], num_items_in_batch=torch.tensor(36)) for half in ids]
    aux = [model(half[None], labels=half[None], output_router_logits=True).aux_loss for half in ids]
    torch.testing.assert_close(sum(half.loss for half in halves), plain.loss + sum(aux) / 2)
    trained.loss.backward()
    assert all(read.router.gate.weight.grad.abs().max() > 0 for read in model.reads())
    assert model(ids).loss is None


def test_pads_and_unrouted_tokens_do_not_count_in_the_losses(ids):
    model = tiny(memory_routing="block", memory_block_size=4, **CHAPTERS)
    padded = torch.cat([torch.full((2, 5), 7), ids], 1)
    mask = torch.cat([torch.zeros(2, 5), torch.ones(2, 19)], 1).long()
    plain = model(ids, output_router_logits=True)
    out = model(padded, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, plain.aux_loss)
    assert plain.router_logits[0][:, :4].eq(-torch.inf).all() and plain.router_logits[0][:, 4:].isfinite().all()


def test_checkpointing_gives_the_same_gradients(ids):
    gradients = []
    for how in ("none", "memory", "layers"):
        model = tiny(memory_gradient_checkpointing=how == "memory", memory_routing="prefix", **CHAPTERS).train()
        if how == "layers":
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(RuntimeError, match='"use_reentrant": False'):
        model(ids, labels=ids, use_cache=False)


def test_dropout_and_quantization_aware_training(ids):
    model = tiny(memory_dropout=0.5).train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    aware, plain = tiny(memory_quantization="int4", memory_quantization_aware=True, memory_init_std=1.0), tiny()
    assert aware.num_parameters() == plain.num_parameters()
    aware(ids, labels=ids).loss.backward()
    assert aware.model.memory_banks[0].weight.grad.abs().max() > 0
    fixed = tiny(memory_quantization="int4")
    fixed.load_state_dict({k: v for k, v in aware.state_dict().items() if "banks" not in k}, strict=False)
    fixed.model.memory_banks[0] = aware.model.memory_banks[0].quantize("int4").double()
    torch.testing.assert_close(fixed(ids).logits, aware(ids).logits, rtol=1e-5, atol=1e-6)


def test_prompt_lengths_in_generation(ids):
    """The prompt that is routed by is what `generate` was given, whatever its length."""
    model = tiny(memory_routing="prompt", memory_block_size=4, memory_init_std=1.0, **CHAPTERS)
    prompt, lengths = ids[:, :11], torch.tensor([11, 9])
    mask = torch.ones_like(prompt)
    mask[1, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(prompt, attention_mask=mask, prompt_lengths=lengths, **options)
    alone = model.generate(prompt[1:, 2:], prompt_lengths=lengths[1:], **options)
    assert torch.equal(out[1, 11:], alone[0, 9:])
    again = model.generate(prompt, attention_mask=mask, prompt_lengths=lengths, use_cache=False, **options)
    assert torch.equal(out, again)
    cache = MemoryCache(model.config)
    first = model(prompt, past_key_values=cache, prompt_lengths=torch.tensor([11, 11])).logits
    whole = model(ids, prompt_lengths=torch.tensor([11, 11])).logits
    torch.testing.assert_close(torch.cat([first, model(ids[:, 11:], past_key_values=cache).logits], 1), whole)


@pytest.mark.parametrize("product_keys", [False, True])
def test_statistics(ids, product_keys):
    fields = {**CHAPTERS, "memory_num_shared_chapters": 0, "memory_product_keys": product_keys}
    model = tiny(memory_placement="every_n", memory_placement_k=2, **fields)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    stats = model.get_memory_stats(ids, mask)
    assert len(stats) == 2
    for found in stats:
        assert found["min_load"] <= 1 / 6 <= found["max_load"] and 0 < found["router_entropy"] <= 1.7918
        assert found["activation"] > 0 and 1 / 6 <= found["chapters_used"] <= 1
    changed = ids.clone()
    changed[1, 12:] = 5
    assert model.get_memory_stats(changed, mask) == stats
    assert list(tiny().get_memory_stats(ids)[0]) == ["activation"]
    assert tiny(memory_placement="none").get_memory_stats(ids) == []


def test_auto_classes_classification_and_pipeline(ids):
    config = MemoryBankTransformerConfig(**{**TINY, **CHAPTERS, "vocab_size": 264, "num_labels": 3})
    assert type(AutoModel.from_config(config)).__name__ == "MemoryBankTransformerModel"
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    logits = classifier(ids).logits
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)  # the last real token decides
    torch.testing.assert_close(classifier(padded, attention_mask=(padded != 0).long()).logits, logits)
    generate = pipeline("text-generation", model=AutoModelForCausalLM.from_config(config), tokenizer=MaruTokenizer())
    texts = generate(["Hello there", "No"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert texts[1][0]["generated_text"] == generate("No", max_new_tokens=5, do_sample=False)[0]["generated_text"]
