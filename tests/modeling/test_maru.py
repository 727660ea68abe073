"""MARU: configuration, bad input, router, statistics, heads."""

import pickle
from functools import partial

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TextIteratorStreamer,
    pipeline,
)

from memzoo import MaruConfig, MaruForCausalLM, MaruTokenizer, parameter_breakdown
from memzoo.modeling.maru.configuration_maru import PRESETS

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "memory_num_banks": 3, "memory_num_slots": 4, "memory_dim": 4}


def tiny(**fields) -> MaruForCausalLM:
    return MaruForCausalLM(MaruConfig(**{**TINY, **fields}))


def test_names_of_the_original_are_accepted():
    config = MaruConfig(d_model=32, n_layers=3, num_memories=2, memory_size=7, mamba_d_state=8, router_hidden_dim=5)
    assert (config.hidden_size, config.num_hidden_layers, config.memory_num_banks) == (32, 3, 2)
    assert (config.memory_num_slots, config.state_size, config.memory_router_hidden_size) == (7, 8, 5)
    assert config.cell_size == 32 and config.d_model == 32
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory_num_bank": 2}, "no field 'memory_num_bank'; did you mean 'memory_num_banks'"),
        ({"recurrance": "parallel"}, "did you mean 'recurrence'"),
        ({"recurrence": "both"}, "recurrence"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
        ({"memory_num_banks": -1}, "memory_num_banks=-1"),
        ({"memory_num_banks": 1, "memory_shared_bank": True}, "leaves no bank to route to"),
        ({"memory_top_k": 5}, "memory_top_k=5 must be between 1 and the 4 routed banks"),
        ({"memory_decay": 0.2}, "memory_decay=0.2"),
        ({"memory_slot_norm_cap": -1.0}, "memory_slot_norm_cap"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"time_step_min": 0.5}, "time_step_min=0.5 must be below"),
        ({"memory_router_temperature_min": 2.0}, "memory_router_temperature_min"),
        ({"memory_router_temperature_decay": 1.5}, "memory_router_temperature_decay=1.5"),
        ({"tie_word_embeddings": True, "embedding_size": 8}, "tie_word_embeddings needs embedding_size"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message):
        MaruConfig(**fields)


def test_presets():
    assert all(MaruConfig.from_preset(name).model_type == "maru" for name in PRESETS)
    original = MaruForCausalLM(MaruConfig.from_preset("maru_6.7m"))
    assert 6.0e6 < sum(p.numel() for p in original.parameters()) < 7.2e6
    assert MaruConfig.from_preset("full", hidden_size=8).hidden_size == 8
    with pytest.raises(ValueError, match="there is no preset 'huge'; the presets are baseline"):
        MaruConfig.from_preset("huge")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
        ({"input_ids": torch.tensor([[3, 264]])}, "hold 264, outside the vocabulary of 264"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "hold -1"),
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 3)}, r"attention_mask is \[1, 3\]"),
        ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 1, 2, 2)}, "attention_mask is"),
    ],
)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**inputs)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, partial(torch.optim.AdamW, fused=True)])
def test_balance_counts_optimizer_steps_and_pads_do_not_count(optimizer_class):
    model = tiny(memory_balance_rate=0.1, memory_balance_momentum=0.0).train()
    router = model.model.layers[0].cell.router
    with torch.no_grad():
        router.out_proj.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))  # bank 0 gets nearly all
    optimizer = optimizer_class(model.parameters(), lr=1e-4)
    ids, mask = torch.randint(3, 264, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[:, 5:] = 0
    for step in range(3):
        assert router.balance.steps == max(step - 1, 0) or step == 0
        for _ in range(2):  # two micro-batches are one step
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        assert router.balance.count == 2 * 10  # real tokens of both micro-batches
        optimizer.step()
        optimizer.zero_grad()
    model(ids)
    assert router.balance.steps == 3
    assert router.balance.bias[0] < 0 < router.balance.bias[1]
    assert abs(router.balance.load.sum() - 1) < 1e-5 and router.balance.load[0] > 0.8
    frozen = router.balance.bias.clone()
    model.eval()(ids)
    assert torch.equal(router.balance.bias, frozen) and not frozen.requires_grad


@pytest.mark.parametrize("recurrence", ["parallel", "sequential"])
def test_noise_temperature_and_balance_options(recurrence, tmp_path):
    ids = torch.randint(3, 264, (1, 8))
    plain = tiny(recurrence=recurrence, dropout=0.0, memory_balance_rate=0.0).train()
    assert torch.equal(plain(ids).logits, plain(ids).logits)
    noisy = tiny(recurrence=recurrence, dropout=0.0, memory_router_noise="gumbel").train()
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    assert torch.equal(noisy.eval()(ids).logits, noisy(ids).logits)

    model = tiny(recurrence=recurrence, memory_router_temperature_decay=0.5, memory_router_temperature_min=0.2).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    temperatures = []
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        temperatures.append(float(model.model.layers[1].cell.router.balance.temperature))
        optimizer.step()
    assert temperatures == pytest.approx([1.0, 0.5, 0.25, 0.2, 0.2])
    model.save_pretrained(tmp_path)  # the schedule and the bias are saved
    balance = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[1].cell.router.balance
    assert float(balance.temperature) == pytest.approx(0.2)
    saved = model.model.layers[1].cell.router.balance
    assert torch.equal(balance.bias, saved.bias) and balance.count == saved.count > 0


@pytest.mark.parametrize("recurrence", ["parallel", "sequential"])
def test_slot_norm_cap_holds(recurrence):
    model = tiny(recurrence=recurrence, memory_slot_norm_cap=0.05, initializer_range=1.0).eval()
    cache = model(torch.randint(3, 264, (1, 200)), use_cache=True).past_key_values
    assert cache.states["0.banks"].norm(dim=-1).max() <= 0.05 * (1 + 1e-5)
    free = tiny(recurrence=recurrence, initializer_range=1.0).eval()
    cache = free(torch.randint(3, 264, (1, 200)), use_cache=True).past_key_values
    assert cache.states["0.banks"].norm(dim=-1).max() > 0.05


@pytest.mark.parametrize("recurrence", ["parallel", "sequential"])
def test_statistics_and_trace(recurrence):
    model = tiny(recurrence=recurrence, output_router_logits=True).eval()
    ids, mask = torch.randint(3, 264, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 4:] = 0
    out = model(ids)
    assert [tuple(l.shape) for l in out.router_logits] == [(2, 9, 3)] * 2
    stats = model.get_memory_stats(ids, mask)
    assert len(stats) == 2 and 0 < stats[0]["router_entropy"] <= 1.0987
    assert stats[0]["min_load"] <= 1 / 3 <= stats[0]["max_load"] and stats[0]["balance_bias_norm"] == 0
    assert 0 < stats[0]["slots_in_use"] <= 1 and 1 / 12 <= stats[0]["address_peak"] <= 1
    trace = model.memory_trace(ids, mask)
    assert [tuple(w.shape) for w in trace] == [(2, 9, 3, 4)] * 2
    assert trace[0][1, 4:].abs().max() == 0 < trace[0][1, :4].min()
    assert tiny(memory_num_banks=0).memory_trace(ids) == ()


def test_parameter_breakdown_counts_every_parameter_once():
    model = tiny(tie_word_embeddings=True)
    parts = parameter_breakdown(model)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())
    assert {"mixer.in_proj", "cell.router", "embed_tokens"} <= parts.keys() and "lm_head" not in parts


def test_auto_classes_and_classification():
    config = AutoConfig.for_model("maru", **TINY)
    assert type(AutoModel.from_config(config)).__name__ == "MaruModel"
    config.num_labels = 3
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.randint(3, 264, (2, 9))
    logits = classifier(ids, labels=torch.tensor([0, 2])).logits
    assert logits.shape == (2, 3)
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], 1)  # the last real token decides
    mask = (padded != 0).long()
    torch.testing.assert_close(classifier(padded, attention_mask=mask).logits, logits)


def test_pipeline_streamer_and_gradient_checkpointing():
    torch.manual_seed(1)
    model, tokenizer = tiny().eval(), MaruTokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = generate(["Hello there", "No"], max_new_tokens=5, do_sample=False, batch_size=2)
    alone = generate("No", max_new_tokens=5, do_sample=False)
    assert texts[1][0]["generated_text"] == alone[0]["generated_text"]
    assert texts[0][0]["generated_text"].startswith("Hello there")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer("Hello", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])

    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        torch.manual_seed(2)
        model(inputs["input_ids"], labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads.append(model.model.layers[0].mixer.in_proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
