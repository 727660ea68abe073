"""TitanMAC: the arrangements against plain loops, options, statistics, heads."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

from memzoo import MaruTokenizer, MemoryCache, TitanMacConfig, TitanMacForCausalLM
from memzoo.modeling.titan_mac.memory_as_context import MemoryAsContext

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY |= {"sliding_window": 8, "memory_segment_size": 8, "memory_chunk_size": 4, "num_persistent_tokens": 2}
TINY |= {"initializer_range": 0.3, "memory_theta_max": 0.1, "memory_expansion": 1.0}
TINY |= {"memory_bank_size": 12, "memory_bank_top_k": 2}
VARIANTS = ["mac", "mag", "mal"]


def tiny(**fields) -> TitanMacForCausalLM:
    torch.manual_seed(0)
    return TitanMacForCausalLM(TitanMacConfig(**{**TINY, **fields})).double().eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 29), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [None, 3])
def test_memory_as_context_is_a_loop_over_tokens(tokens):
    """Token by token with plain softmax attention, for a memory that is read as it was before the segment."""
    torch.manual_seed(0)
    config = TitanMacConfig(**TINY, memory_num_tokens=tokens, num_key_value_heads=1)
    layer = MemoryAsContext(config).double()
    for part in (layer, layer.memory):
        part.init_weights(0.3)
    S, heads, d = 8, 2, 8
    x = torch.randn(1, 21, 16, dtype=torch.float64)
    cos, sin = (a[0] for a in layer._rotary(torch.zeros(1), S, torch.float64))

    def rotated(vector, place):  # [h, d]
        half = torch.cat([-vector[:, d // 2 :], vector[:, : d // 2]], 1)
        return vector * cos[place] + half * sin[place]

    state, outputs = {}, []
    for i in range(x.shape[1]):
        if i % S == 0:
            before = [state[f"weights_{l}"] if state else w[None] for l, w in enumerate(layer.memory.initial_weights)]
            keys, values = list(layer.persistent[0].transpose(0, 1)), list(layer.persistent[1].transpose(0, 1))
            if tokens is not None:
                h = layer.token_proj(layer.memory.read(layer.memory.unit(layer.queries), before))[0]
                keys += list(layer.k_proj(h).view(tokens, 1, d))
                values += list(layer.v_proj(h).view(tokens, 1, d))
        seen = [x[:, i]]
        if tokens is None:
            queries = layer.memory.unit(layer.recall_proj(x[:, i : i + 1]))
            seen.append(layer.token_proj(layer.memory.read(queries, before))[:, 0])
        for token in seen:
            keys.append(rotated(layer.k_proj(token).view(1, d), i % S))
            values.append(layer.v_proj(token).view(1, d))
        q = rotated(layer.q_proj(x[:, i]).view(heads, d), i % S)
        k, v = torch.cat(keys), torch.cat(values)  # [L, d], one head for both
        y = layer.o_proj(((q @ k.T / d**0.5).softmax(-1) @ v).view(1, 1, -1))
        gate, state = layer.memory(layer.norm(x[:, i : i + 1] + y), state)
        outputs.append(y * gate.sigmoid())
    whole, _ = layer(x, {})
    torch.testing.assert_close(whole, torch.cat(outputs, 1), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_memory_reaches_beyond_the_window(variant, ids):
    """One layer, window 8: token 0 changes the last output through the memory, and not at all without it."""
    changed = ids.clone()
    changed[:, 0] = 3 + (ids[:, 0] - 2) % 58
    for fields, reaches in (
        ({}, True),
        ({"memory_depth": 1}, True),
        ({"memory_update": "never"}, False),
        ({"memory_enabled": False}, False),
        ({"memory_enabled": False, "memory_bank": True}, True),
    ):
        model = tiny(titans_variant=variant, **fields)
        assert torch.equal(model(changed).logits[:, -1], model(ids).logits[:, -1]) != reaches, fields


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        *(("mac", {"memory_num_tokens": n}) for n in (1, 4)),
        ("mac", {"memory_segment_size": 4}),
        *((v, {"num_persistent_tokens": 0}) for v in VARIANTS),
        *((v, {"memory_bank": True}) for v in VARIANTS),
        ("mag", {"sliding_window": 4}),
        ("mal", {"rope_theta": 100.0}),
        ("mal", {"memory_depth": 3}),
        ("mal", {"memory_expansion": 2.0}),
        ("mal", {"memory_num_heads": 1}),
        ("mal", {"memory_dim": 8}),
        ("mal", {"memory_conv_kernel": None}),
        ("mal", {"memory_residual": True}),
        ("mal", {"memory_theta_max": 0.2}),
        ("mal", {"memory_alpha": 0.1}),
        ("mal", {"memory_eta": 0.5}),
        ("mag", {"memory_chunk_size": 2}),
        ("mag", {"memory_clip": 0.01}),
        ("mag", {"memory_threshold": 1.0}),
        ("mag", {"memory_read_own_write": False}),
        *(("mag", {"memory_bank": True, name: n}) for name, n in (("memory_bank_dim", 3), ("memory_bank_top_k", 1))),
        *(
            ("mag", {"memory_bank": True, name: n})
            for name, n in (("memory_bank_size", 9), ("memory_bank_decay", 0.1))
        ),
    ],
)
def test_every_option_changes_the_model(variant, fields, ids):
    base = {"memory_bank": True} if len(fields) > 1 else {}
    assert not torch.equal(
        tiny(titans_variant=variant, **base)(ids).logits, tiny(titans_variant=variant, **fields)(ids).logits
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_update_in_training_only(variant, ids):
    always, train, never = (
        tiny(titans_variant=variant, memory_update=update) for update in ("always", "train", "never")
    )
    assert torch.equal(train(ids).logits, never(ids).logits)
    assert torch.equal(train.train()(ids).logits, always(ids).logits)
    assert not torch.equal(never(ids).logits, always(ids).logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_detach_every_cuts_the_past(variant, ids):
    """The last segment's loss: the first segment's embeddings get a gradient through the memory, unless it is cut."""
    for every, reaches in ((None, True), (2, False)):
        model = tiny(titans_variant=variant, memory_detach_every=every)
        embeddings = model.model.embed_tokens(ids).detach().requires_grad_()
        model(inputs_embeds=embeddings).logits[:, -1].square().sum().backward()
        assert bool(embeddings.grad[:, :8].any()) == reaches
        assert bool(embeddings.grad[:, -4:].any())


def test_learned_memory_tokens_differ():
    layer = tiny(memory_num_tokens=6).model.layers[0].mixer
    directions = F.normalize(layer.queries[0].unflatten(-1, (2, -1)), dim=-1)  # [6, heads, d]
    similarity = torch.einsum("ihd,jhd->hij", directions, directions) - torch.eye(6)
    assert similarity.abs().max() < 0.999


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_changes_nothing(variant, ids):
    grads = []
    for checkpoint in (False, True):
        model = tiny(titans_variant=variant, memory_bank=True, num_hidden_layers=2).train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics(variant, ids):
    model = tiny(titans_variant=variant, memory_bank=True, num_hidden_layers=2)
    padded, mask = F.pad(ids, (5, 0)), F.pad(torch.ones_like(ids), (5, 0))
    stats, plain = model.get_memory_stats(padded, mask), model.get_memory_stats(ids)
    assert len(stats) == 2 and stats[0].keys() == plain[0].keys()
    for name, value in plain[0].items():  # pads do not count
        assert stats[0][name] == pytest.approx(value, rel=1e-9), name
    assert stats[0]["update_rate"] == 1 and stats[0]["surprise"] > 0 and stats[0]["gradient_norm"] > 0
    assert 0 < stats[0]["capacity"] <= 1 and stats[0]["weight_change"] > 0 and stats[0]["activation"] > 0
    assert stats[0]["bank_use"] == 1  # 29 tokens, 12 places
    assert tiny(memory_enabled=False).get_memory_stats(ids) == []
    ids[0, 7] = model.config.pad_token_id  # a zero embedding, where no mask tells
    assert 0 < model.get_memory_stats(ids)[0]["activation"] < 10


def test_heads_and_pipeline(tmp_path, ids):
    config = TitanMacConfig(**{**TINY, "vocab_size": 264}, num_labels=3)
    model = TitanMacForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    MaruTokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path))
    out = generate("to be or not to be, ", max_new_tokens=12, do_sample=False, return_full_text=False)
    assert isinstance(out[0]["generated_text"], str)
    assert torch.equal(AutoModel.from_pretrained(tmp_path).embed_tokens.weight, model.lm_head.weight)

    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    ids = ids.clone()
    ids[1, 20:] = 0
    mask = (ids != 0).long()
    scores = classifier(ids, attention_mask=mask).logits
    alone = classifier(ids[1:, :20]).logits
    torch.testing.assert_close(scores[1:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_memory_of_another_arrangement_is_refused(ids):
    cache = MemoryCache(tiny(titans_variant="mag").config)
    with pytest.raises(ValueError, match="titans_variant is 'mag' there and 'mac' here"):
        tiny()(ids, past_key_values=cache)


def test_loads_as_any_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), TitanMacForCausalLM)
