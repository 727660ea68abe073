"""`optimizer:` in the YAML of a run: strict, trained, saved, resumed."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from memzoo.training.config import ConfigError, parse_config
from memzoo.training.optim import ContinuumMemory, DeepMomentum, NestedController
from memzoo.training.optim.factory import build_optimizer
from memzoo.training.trainer import train

SECTIONS = {
    "deep_momentum": {"name": "deep_momentum", "hidden_size": 4, "momenta": [0.9, 0.5]},
    "continuum_memory": {"name": "continuum_memory", "levels": {"embed": 3}, "period": 2},
    "nested_controller": {"name": "nested_controller", "meta_lr": 0.2},
}
CLASSES = {
    "deep_momentum": DeepMomentum,
    "continuum_memory": ContinuumMemory,
    "nested_controller": NestedController,
}
SHORT = {"max_steps": 7, "eval_strategy": "no", "save_steps": 4, "weight_decay": 0.1, "logging_steps": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and trainer of one finished run per optimizer."""
    runs = {}

    def get(run_config, name):
        if name not in runs:
            folder = tmp_path_factory.mktemp("runs") / name
            section = {"optimizer": SECTIONS[name], "training": {**SHORT, "output_dir": str(folder)}}
            runs[name] = folder, train(run_config("llama", **section))
        return runs[name]

    return get


@pytest.mark.parametrize("name", SECTIONS)
def test_the_named_optimizer_trains(run_config, finished, name):
    _, trainer = finished(run_config, name)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is CLASSES[name]
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    rates = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert rates == pytest.approx([1e-2 * (1 - i / 7) for i in range(7)])


@pytest.mark.parametrize("name", SECTIONS)
def test_a_resumed_run_ends_with_the_same_weights(run_config, finished, tmp_path, name):
    whole, _ = finished(run_config, name)
    part = tmp_path / "part"
    shutil.copytree(whole / "checkpoint-4", part / "checkpoint-4")
    shutil.copy(whole / "train.yaml", part)
    again = {**SHORT, "output_dir": str(part), "resume_from_checkpoint": "auto"}
    train(run_config("llama", optimizer=SECTIONS[name], training=again))
    a, b = load_file(whole / "model.safetensors"), load_file(part / "model.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_optimizer_does_not_go_on_with_a_run(run_config, finished):
    whole, _ = finished(run_config, "deep_momentum")
    again = {**SHORT, "output_dir": str(whole), "resume_from_checkpoint": "auto"}
    with pytest.raises(ConfigError, match=r"optimizer\.\w+: .* was trained with"):
        train(run_config("llama", optimizer=SECTIONS["nested_controller"], training=again))
    with pytest.raises(ConfigError, match=r"optimizer\.\w+: None here, but .* was trained with"):
        train(run_config("llama", training=again))


def test_levels_that_do_not_fit_the_model_are_refused_before_training(run_config, tmp_path):
    section = {"name": "continuum_memory", "levels": {"experts": 2}}
    with pytest.raises(ConfigError, match="optimizer: no parameter's name matches 'experts'"):
        train(run_config("llama", optimizer=section))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "adam"}, "optimizer.name: no optimizer 'adam'; known here: deep_momentum, continuum_memory"),
        ({"hidden_size": 4}, "optimizer.name: expected str, got None"),
        ({"name": "deep_momentum", "hiden_size": 4}, "did you mean optimizer.hidden_size?"),
        ({"name": "deep_momentum", "lr": 1e-3}, "optimizer.lr: unknown key"),
        ({"name": "deep_momentum", "hidden_size": "big"}, "optimizer.hidden_size: expected int"),
        ({"name": "deep_momentum", "objective": "max"}, "optimizer.objective: expected"),
        ({"name": "deep_momentum", "momenta": [1.5]}, "optimizer: momenta must lie in [0, 1), got 1.5"),
        ({"name": "continuum_memory", "levels": {"embed": "slow"}}, "optimizer.levels: expected"),
        ({"name": "continuum_memory", "levels": {"embed": 0}}, "level 'embed': period must be a positive number"),
        ({"name": "nested_controller", "min_multiplier": 3.0}, "optimizer: the multiplier starts at 1"),
    ],
)
def test_mistakes_are_refused_by_name(settings, section, message):
    with pytest.raises(ConfigError) as error:
        parse_config(settings("llama", optimizer=section))
    assert message in str(error.value)


def test_two_optimizers_are_refused(settings):
    with pytest.raises(ConfigError, match=r"training\.optim: optimizer\.name already chooses"):
        parse_config(settings(optimizer={"name": "deep_momentum"}, training={"optim": "adafactor"}))


def test_adams_settings_come_from_the_training_section(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    adam = {"learning_rate": 3e-3, "weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6}
    args = TrainingArguments(str(tmp_path), use_cpu=True, **adam)
    for group in build_optimizer(model, "deep_momentum", args).param_groups:
        assert (group["lr"], group["momenta"], group["beta2"], group["eps"]) == (3e-3, (0.8, 0.99), 0.9, 1e-6)
    slow_first = build_optimizer(model, "continuum_memory", args, levels={"embed": 8}, period=2).param_groups
    assert [(g["period"], g["weight_decay"]) for g in slow_first] == [(8, 0.2), (2, 0.2), (2, 0.0)]
    assert all((g["lr"], g["betas"], g["eps"]) == (3e-3, (0.8, 0.9), 1e-6) for g in slow_first)
    by_depth = build_optimizer(model, "nested_controller", args).param_groups
    assert [g["depth"] for g in by_depth] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])
    assert [g["weight_decay"] for g in by_depth] == [0.2, 0.2, 0, 0.2, 0, 0.2, 0]
