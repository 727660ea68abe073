"""`memzoo adapt` from a YAML file to an adapter that answers: learns, resumes, and refuses."""

import json

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from memzoo.adapters.optim import part_of
from memzoo.cli import main
from memzoo.training.adapt.run import adapt
from memzoo.training.adapt.settings import parse_adapt_config
from memzoo.training.config import ConfigError

MEMORY = {"num_memory_tokens": 8, "num_heads": 2}
LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory, make_base):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def settings(base, tmp_path):
    """Settings of a run of six steps on twelve questions, four of them held out."""
    rows = [
        [{"role": "user", "content": f"{i} plus one?"}, {"role": "assistant", "content": str(i + 1)}]
        for i in range(12)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 6, "save_steps": 3, "learning_rate": 1e-2}
    training |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4, "logging_steps": 1}

    def make(**sections):
        given = {
            "base": {"name": base, "dtype": "float32"},
            "memory": MEMORY,
            "data": {"path": str(tmp_path / "chat.jsonl"), "eval_fraction": 0.34},
            "training": training,
        }
        return {name: {**given.get(name, {}), **(sections.get(name) or {})} for name in {*given, *sections}} | {
            name: {} for name, section in sections.items() if section is None
        }

    return make


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    "sections",
    [{}, {"memory": None, "lora": LORA}, {"lora": LORA, "learning_rates": {"bank": 0.1, "lora": 1e-3}}],
    ids=["memory", "lora", "both"],
)
def test_an_adapter_is_trained_evaluated_saved_and_loaded(settings, sections, base):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    trainer = adapt(parse_adapt_config(settings(**sections)))
    assert losses(trainer)[-1] < losses(trainer)[0]
    parts = {part_of(name) for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert parts == ({"bank", "projections"} if "memory" not in sections else set()) | (
        {"lora"} if "lora" in sections else set()
    )
    folder = trainer.args.output_dir
    loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
    for name, value in loaded.unload().state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    loaded, rows = AutoPeftModelForCausalLM.from_pretrained(folder), trainer.eval_dataset
    assert len(rows) == 4
    nats, count = 0.0, 0
    for row in rows:
        targets = row["labels"][1:]
        log_p = loaded(input_ids=row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
        chosen = targets >= 0
        nats -= log_p[chosen].gather(-1, targets[chosen, None]).sum().item()
        count += int(chosen.sum())
    found = [log["eval_perplexity"] for log in trainer.state.log_history if "eval_perplexity" in log][-1]
    assert found == pytest.approx(torch.tensor(nats / count).exp().item(), rel=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None


def test_plain_text_is_learned_in_blocks(settings, corpus):
    data = {"path": str(corpus), "max_length": 32, "eval_fraction": 0.1}
    trainer = adapt(parse_adapt_config(settings(data=data)))
    log = trainer.state.log_history[-1] | trainer.state.log_history[-2]
    assert losses(trainer)[-1] < losses(trainer)[0]
    tokens, size = trainer.compute_metrics.num_tokens, trainer.eval_dataset.num_bytes
    bits = torch.tensor(log["eval_perplexity"]).log2().item() * tokens / size
    assert log["eval_bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_a_run_goes_on_where_it_was_and_is_not_overwritten(settings, tmp_path):
    """Stopped after three of six steps, and continued: the weights are those of a run that never stopped."""
    constant = {"lr_scheduler_type": "constant", "eval_strategy": "no"}
    whole = adapt(parse_adapt_config(settings(training=constant)))
    parts = settings(training={**constant, "output_dir": str(tmp_path / "parts"), "max_steps": 3})
    adapt(parse_adapt_config(parts))
    with pytest.raises(ConfigError, match="already holds a run"):
        adapt(parse_adapt_config(parts))
    parts["training"] |= {"max_steps": 6, "resume_from_checkpoint": "auto"}
    again = adapt(parse_adapt_config(parts))
    expected = dict(whole.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"memory.num_memory_tokens: 16 here, .* was trained with 8"):
        adapt(parse_adapt_config({**parts, "memory": {**MEMORY, "num_memory_tokens": 16}}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"base": {"name": "./nowhere"}}, "base.name: ./nowhere is neither a folder that holds a model nor"),
        ({"base": {"chat_template": "no.jinja"}}, "base.chat_template: no.jinja is not a file"),
        ({"memory": {"num_heads": 3}}, "memory: num_heads 3 does not divide the memory's width 32"),
        ({"memory": {"num_memory_token": 8}}, "did you mean memory.num_memory_tokens"),
        ({"memory": {"dropout": "much"}}, "memory.dropout: expected float, got 'much'"),
        ({"memory": {"num_chapters": 3}}, "memory: num_chapters 3 does not divide num_memory_tokens 8"),
        ({"memory": None}, "give fields of MemoryConfig, a section `lora`"),
        ({"lora": {"rank": 2}}, "lora.rank: unknown key"),
        ({"lora": {"target_modules": ["nothing"]}}, "Target modules .*nothing.* not found"),
        ({"learning_rates": {"lora": 1e-3}}, "learning_rates.lora: there is no section `lora`"),
        ({"learning_rates": {"bank": -1}}, "learning_rates.bank: must not be negative"),
        ({"base": {"quantization": "int4"}}, "base.quantization: expected"),
        ({"data": {"dataset": "a"}}, "data.path or data.dataset, one of the two"),
        ({"data": {"eval_path": "a.txt"}}, "a.txt is text, but the training data is conversations"),
        ({"data": {"eval_fraction": 0.0}, "training": {"eval_strategy": "epoch"}}, "holds nothing out"),
    ],
)
def test_mistakes_are_named_before_any_work(settings, sections, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        adapt(parse_adapt_config(settings(**sections)))
    assert not (tmp_path / "run").exists()


def test_a_base_without_a_chat_template(settings, tmp_path, make_base, make_tokenizer):
    plain = make_base(tmp_path / "plain", template=False)
    with pytest.raises(ConfigError, match="the tokenizer has none; take a base that was tuned for chat"):
        adapt(parse_adapt_config(settings(base={"name": plain})))
    (tmp_path / "chat.jinja").write_text(make_tokenizer().chat_template)
    trainer = adapt(parse_adapt_config(settings(base={"name": plain, "chat_template": str(tmp_path / "chat.jinja")})))
    assert AutoTokenizer.from_pretrained(trainer.args.output_dir).chat_template == make_tokenizer().chat_template


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_base(settings, tmp_path, kind, make_base):
    pytest.importorskip("bitsandbytes")
    wide = make_base(tmp_path / "wide", hidden_size=64)  # 4-bit weights are scaled in blocks of 64
    sections = settings(base={"name": wide, "quantization": kind}, lora=LORA)
    trainer = adapt(parse_adapt_config(sections))
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert trainer.model.base_model.model.is_quantized
    with pytest.raises(ConfigError, match="quantized weights cannot be trained"):
        parse_adapt_config({**sections, "learning_rates": {"base": 1e-4}})


def test_the_command(settings, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings()))
    words = ["adapt", str(tmp_path / "run.yaml"), "memory.num_memory_tokens=4"]
    assert main([*words, "training.max_steps=3"]) == 0
    assert main([*words, "training.max_steps=4", "--resume"]) == 0
    out = capsys.readouterr().out
    assert "perplexity on what was held out: " in out
    assert f"the adapter and its tokenizer are in {tmp_path / 'run'}" in out
    config = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").active_peft_config
    assert config.num_memory_tokens == 4
    assert main([*words, "data.path=missing.jsonl", f"training.output_dir={tmp_path / 'other'}"]) == 2
    assert "data.path: missing.jsonl is not a file" in capsys.readouterr().err
