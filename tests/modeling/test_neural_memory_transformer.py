"""Neural memory transformer: the block's equation, options, heads, tools."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TextIteratorStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from memzoo import MaruTokenizer, NeuralMemoryTransformerConfig, NeuralMemoryTransformerForCausalLM

TINY = {
    "vocab_size": 264,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "sliding_window": 6,
    "initializer_range": 0.2,
}
IDS = torch.randint(3, 264, (2, 40), generator=torch.Generator().manual_seed(0))


def tiny(**fields) -> NeuralMemoryTransformerForCausalLM:
    torch.manual_seed(0)
    return NeuralMemoryTransformerForCausalLM(NeuralMemoryTransformerConfig(**{**TINY, **fields})).eval()


@torch.no_grad()
def test_the_block_is_its_equation():
    model = tiny(num_hidden_layers=1)
    layer, x = model.model.layers[0], torch.randn(2, 20, 16)
    y = x + layer.attention(layer.attention_norm(x), {})[0]
    u = layer.memory_norm(y)
    read = layer.memory(u, {})[0]
    y = y + torch.sigmoid(torch.cat([u, read], -1) @ layer.memory_gate.proj.weight.T) * read
    torch.testing.assert_close(layer(x), y + layer.mlp(layer.mlp_norm(y)))


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": None},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"num_key_value_heads": 1},
        {"rope_theta": 100.0},
        {"attention_bias": True, "initializer_range": 0.3},
        {"rms_norm_eps": 0.1},
        {"memory_enabled": False},
        {"memory_update": "never"},
        {"memory_update": "train"},
        {"memory_dim": 8},
        {"memory_num_heads": 4},
        {"memory_depth": 1},
        {"memory_expansion": 1.0},
        {"memory_residual": True},
        {"memory_chunk_size": 1},
        {"memory_conv_kernel": None},
        {"memory_theta_max": 0.02},
        {"memory_theta": 0.1},
        {"memory_alpha": 0.1},
        {"memory_eta": 0.5},
        {"memory_clip": 0.01},
        {"memory_threshold": 0.5},
        {"memory_read_own_write": False},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_option_does_something_and_the_cache_agrees(fields):
    model = tiny(**fields)
    logits = model(IDS).logits
    assert logits.isfinite().all() and not torch.allclose(logits, tiny()(IDS).logits, atol=1e-6)
    first = model(IDS[:, :25], use_cache=True)
    second = model(IDS[:, 25:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits, rtol=1e-4, atol=1e-4)


def test_options_of_training():
    torch.manual_seed(1)
    dropped = tiny(dropout=0.5)
    assert torch.equal(dropped(IDS).logits, tiny()(IDS).logits)  # eval
    dropped.train()
    assert not torch.equal(dropped(IDS).logits, dropped(IDS).logits)
    gradients = []
    for every in (None, 1):
        model = tiny(memory_detach_every=every).train()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(model.model.layers[0].memory.gate_proj.weight.grad)
    assert not torch.allclose(*gradients)
    fixed = tiny(memory_update="train")  # evaluation reads what training has learned to start from
    learning = fixed.train()(IDS).logits
    assert not torch.allclose(fixed.eval()(IDS).logits, learning)
    torch.testing.assert_close(fixed(IDS).logits, tiny(memory_update="never").train()(IDS).logits)
    torch.testing.assert_close(learning, tiny()(IDS).logits)


@torch.no_grad()
def test_generate_stops_at_max_position_embeddings():
    model = tiny(max_position_embeddings=12)
    assert model.generate(IDS[:, :9], do_sample=False, eos_token_id=None).shape[1] == 12
    assert tiny().generate(IDS[:, :9], do_sample=False, eos_token_id=None).shape[1] == 29


@torch.no_grad()
def test_without_its_memory_a_token_sees_its_windows_only():
    changed = IDS.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 264
    reach = slice(3 + 2 * 5 + 1, None)  # two layers of a window of 6
    off, on = tiny(memory_enabled=False), tiny()
    assert torch.equal(off(changed).logits[:, reach], off(IDS).logits[:, reach])
    assert not torch.equal(on(changed).logits[:, reach], on(IDS).logits[:, reach])


def test_auto_classes_and_classification():
    config = AutoConfig.for_model("neural_memory_transformer", **TINY, num_labels=3)
    assert type(AutoModel.from_config(config)).__name__ == "NeuralMemoryTransformerModel"
    classifier = AutoModelForSequenceClassification.from_config(config).eval()
    logits = classifier(IDS, labels=torch.tensor([0, 2])).logits
    assert logits.shape == (2, 3)
    padded = torch.cat([IDS, torch.zeros(2, 4, dtype=torch.long)], 1)  # the last real token decides
    torch.testing.assert_close(classifier(padded, attention_mask=(padded != 0).long()).logits, logits)


def test_trainer_learns_and_the_model_comes_back(tmp_path):
    model = tiny(initializer_range=0.02)
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    args = TrainingArguments(str(tmp_path), max_steps=12, learning_rate=2e-2, report_to=[], use_cpu=True, seed=1)
    trainer = Trainer(model, args, train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before - 0.3
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_pipeline_streamer_and_gradient_checkpointing():
    model, tokenizer = tiny(), MaruTokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = generate(["Hello there", "No"], max_new_tokens=5, do_sample=False, batch_size=2)
    alone = generate("No", max_new_tokens=5, do_sample=False)
    assert texts[1][0]["generated_text"] == alone[0]["generated_text"]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    inputs = tokenizer("Hello", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])

    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
