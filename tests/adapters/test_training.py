"""Training an adapter: router losses, gradient checkpointing, Trainer, rates by part, quantized bases, compile."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from memzoo import memory_param_groups
from memzoo.adapters.optim import MemoryTrainerMixin
from memzoo.modeling.chapter_router import router_losses

CHAPTERS = {"num_chapters": 4, "top_k_chapters": 2}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_router_losses_are_added_and_pads_do_not_count(tokens, make_base, make_adapted):
    model = make_adapted(make_base("llama", torch.float64), **CHAPTERS, router_aux_loss_coef=0.5).train()
    pads = torch.zeros(2, 4, dtype=torch.long)
    losses = {}
    for side in ("none", "left", "right"):
        order = {"none": [tokens], "left": [pads, tokens], "right": [tokens, pads]}[side]
        ids = torch.cat(order, 1)
        mask, labels = (ids != 0).long(), ids.masked_fill(ids == 0, -100)
        labels[:, ids.shape[1] - 12 if side == "left" else 0] = -100  # nothing before it predicts it
        losses[side] = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(losses["left"], losses["none"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses["right"], losses["none"], rtol=1e-9, atol=1e-9)

    blocks = [layer.memzoo.memzoo_blocks["default"] for layer in model.base_model.model.model.layers]
    logits = []
    hooks = [b.memory.register_forward_hook(lambda m, args, out: logits.append(out[2])) for b in blocks]
    out = model(input_ids=tokens, labels=tokens)
    plain = cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    balance, _, z = router_losses(tuple(logits), blocks[0].memory.router.halves, 2)
    torch.testing.assert_close(out.loss, plain + 0.5 * balance + 0.001 * z)
    torch.testing.assert_close(model.base_model.model.memzoo.last_router_losses["default"], 0.5 * balance + 0.001 * z)
    half = model(input_ids=tokens, labels=tokens, num_items_in_batch=44).loss  # 22 of these 44 labels are here
    torch.testing.assert_close(half, out.loss / 2)
    as_tuple = model(input_ids=tokens, labels=tokens, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, out.loss)
    assert model.eval()(input_ids=tokens, labels=tokens).loss < out.loss - 0.1
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [{}, CHAPTERS, CHAPTERS | {"routing": "prefix", "sharing": "shared"}, {"memory_type": "neural"}],
    ids=["bank", "token", "prefix", "neural"],
)
def test_checkpointing_gives_the_same_gradients(kind, options, tokens, make_base, make_adapted):
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    found = []
    for checkpointing in (False, True):
        model = make_adapted(make_base(kind, torch.float64), **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = [{"input_ids": x, "labels": x, "attention_mask": (x != 0).long()} for x in (padded, tokens)]
        sum(model(**call).loss for call in calls).backward()  # two forwards before their backwards
        found.append(gradients(model))
        assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-9, atol=1e-12)


def test_reentrant_checkpointing_is_refused_with_routers(tokens, make_adapted):
    model = make_adapted(**CHAPTERS).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match='"use_reentrant": False'):
        model(input_ids=tokens, labels=tokens)


def make_arguments(folder, **more):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more,
    )


@pytest.fixture
def data():
    rows = torch.randint(3, 61, (16, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


class MemoryTrainer(MemoryTrainerMixin, Trainer):
    pass


def test_trainer_resumes_where_it_was(tmp_path, data, make_adapted):
    options = CHAPTERS | {"lora_config": {"r": 2, "target_modules": ["q_proj"]}, "sharing": "shared"}
    rates = {"bank": 1e-1, "lora": 1e-3}
    more = {"max_steps": 6, "save_steps": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    more |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    whole = MemoryTrainer(
        make_adapted(**options), make_arguments(tmp_path, **more), train_dataset=data, memory_lrs=rates
    )
    whole.train()
    again = MemoryTrainer(
        make_adapted(**options), make_arguments(tmp_path, **more), train_dataset=data, memory_lrs=rates
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    expected = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    start = dict(make_adapted(**options).named_parameters())
    assert all(not torch.equal(p, start[name]) for name, p in whole.model.named_parameters() if p.requires_grad)


def test_rates_by_part(tmp_path, data, make_adapted):
    lora = {"lora_config": {"r": 2, "target_modules": ["q_proj"]}}
    model = make_adapted(**CHAPTERS, **lora, sharing="shared")
    rates = {"bank": 0.5, "router": 0.0, "lora": 0.25, "base": 0.125}
    groups = memory_param_groups(model, 1.0, weight_decay=0.1, **rates)
    by_part = {group["name"]: group for group in groups}
    assert {name: group["lr"] for name, group in by_part.items()} == {
        "bank, no decay": 0.5, "projections": 1.0, "lora": 0.25, "base": 0.125, "base, no decay": 0.125,
    }  # fmt: skip
    assert by_part["bank, no decay"]["weight_decay"] == 0 and by_part["lora"]["weight_decay"] == 0.1
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".router." in n)
    assert memory_param_groups(make_adapted(memory_type="neural"), 1.0)[0]["name"] == "bank, no decay"
    with pytest.raises(ValueError, match="negative: bank=-1"):
        memory_param_groups(model, 1.0, bank=-1)
    with pytest.raises(ValueError, match="has no memory"):
        memory_param_groups(torch.nn.Linear(2, 2), 1.0)
    with pytest.raises(ValueError, match="memory_lrs names banks; the parts are bank, router"):
        MemoryTrainer(model, make_arguments(tmp_path), memory_lrs={"banks": 1.0})


def test_base_at_zero_is_frozen_and_above_zero_learns(tmp_path, data, make_adapted):
    for rate, changes in ((0.0, False), (1e-2, True)):
        model = make_adapted()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = make_arguments(tmp_path, max_steps=1)
        MemoryTrainer(model, arguments, train_dataset=data, memory_lrs={"base": rate, "projections": 0.0}).train()
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert any("mlp.up_proj" in name for name in changed) is changes
        assert any(".bank." in name for name in changed) and not any("memory.q_proj" in name for name in changed)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_bases(bits, tokens, tmp_path, make_base, make_adapted):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_base(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
    with torch.no_grad():  # with gradients bitsandbytes multiplies otherwise
        before = base(tokens).logits
        model = make_adapted(base, awake=False, **CHAPTERS)
        assert torch.equal(model(input_ids=tokens).logits, before)
    losses, optimizer = [], torch.optim.AdamW(memory_param_groups(model.train(), 1e-2))
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(ValueError, match="a quantized base cannot be trained"):
        memory_param_groups(model, 1.0, base=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, CHAPTERS, {"memory_type": "neural"}], ids=["bank", "chapters", "neural"])
def test_compiled(options, tokens, make_adapted):
    model = make_adapted(**options)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
