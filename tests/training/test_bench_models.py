"""Models of one size: counts, what is refused, and that overrides reach the configuration."""

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM

from memzoo.training.bench.mamba import fast_mamba
from memzoo.training.bench.models import TOLERANCE, build_config, build_model, count_parameters
from memzoo.training.bench.specs import Spec, parse_length, parse_specs
from memzoo.training.config import ConfigError
from memzoo.training.tasks import build_task

TASK = build_task("copy_memory", {"delay": 5})


def config_of(words, parameters=30_000, task=TASK):
    (spec,) = parse_specs(words.split(), "model")
    return build_config(spec, task, parameters, longest=64)


@pytest.mark.parametrize("parameters", [30_000, 100_000, 400_000])
@pytest.mark.parametrize("words", ["llama", "mamba", "maru", "maru memory_num_banks=0", "gpt_neox"])
def test_models_have_the_same_number_of_parameters(words, parameters):
    config = config_of(words, parameters)
    assert config.vocab_size == TASK.vocab_size
    assert abs(count_parameters(config) - parameters) <= TOLERANCE * parameters


def test_the_count_is_that_of_the_model():
    config = config_of("llama")
    assert count_parameters(config) == AutoModelForCausalLM.from_config(config).num_parameters()
    assert abs(count_parameters(config) - 30_000) < 100, "the MLP's width takes up what the width leaves over"


def test_overrides_reach_the_configuration():
    config = config_of("maru memory_num_banks=2 memory_dim=16 recurrence=sequential dropout=0.25")
    assert (config.memory_num_banks, config.memory_dim, config.recurrence) == (2, 16, "sequential")
    assert config.dropout == 0.25
    assert config_of("maru preset=no_memory").memory_num_banks == 0
    assert config_of("maru num_memories=3").memory_num_banks == 3


def test_a_width_that_is_given_stays():
    assert config_of("llama hidden_size=24 num_attention_heads=2").hidden_size == 24
    assert config_of("llama", parameters=0).hidden_size == 64


def test_weights_are_drawn_from_the_seed():
    spec, config = Spec("maru"), config_of("maru")
    first, again, other = (build_model(spec, config, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_folder_is_a_model(tmp_path):
    model = build_model(Spec("maru"), config_of("maru"), seed=3)
    model.save_pretrained(tmp_path)
    spec = Spec(str(tmp_path))
    loaded = build_model(spec, build_config(spec, TASK, 100, longest=64), seed=0)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    with pytest.raises(ConfigError, match="has 10 tokens, the task 129"):
        build_config(spec, build_task("associative_recall", {}), 100, longest=64)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lama", "did you mean 'llama'"),
        ("maru memory_num_bank=0", r"did you mean model\.memory_num_banks"),
        ("maru memory_num_banks=many", r"model\.memory_num_banks: expected int"),
        ("maru memory_num_banks=-1", "memory_num_banks=-1"),
        ("maru memory_dim=4096", "nearest to 30,000 parameters is"),
    ],
)
def test_what_cannot_be_built_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        config_of(words)


@pytest.mark.parametrize("use_cache", [False, True])
def test_the_mamba_baseline_is_the_same_on_a_faster_scan(use_cache):
    model = build_model(Spec("mamba"), config_of("mamba"), seed=0).double()
    ids = torch.randint(0, 10, (3, 17))
    outputs, gradients = [], []
    for context in (nullcontext(), fast_mamba()):
        with context:
            output = model(ids, labels=ids, use_cache=use_cache)
            outputs.append(output.logits)
            gradients.append(torch.autograd.grad(output.loss, list(model.parameters())))
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)  # theirs keeps parts of the scan in float32
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_specs():
    specs = parse_specs(["llama", "maru", "memory_num_banks=0", "preset=full", "maru"], "model")
    assert [str(spec) for spec in specs] == ["llama", "maru memory_num_banks=0 preset=full", "maru"]
    assert str(Spec("needle", {"text": "12", "depth": None})) == 'needle text="12" depth=null'
    for words, message in (
        (["a=1", "llama"], "before any name"),
        (["llama", "llama"], "given twice"),
        (["maru", "a=1", "a=2"], "a is given twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_specs(words, "model")


def test_lengths():
    assert (parse_length("4x", 70), parse_length("1.5x", 70), parse_length("512", 70)) == (280, 105, 512)
    for text in ("long", "x", "1"):
        with pytest.raises(ConfigError, match="--eval-lengths"):
            parse_length(text, 70)
