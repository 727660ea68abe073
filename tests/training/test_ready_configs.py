"""Every ready YAML loads, and its model, made small, takes two steps with the file's own settings."""

from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import memzoo
from memzoo.training.config import load_config
from memzoo.training.explain import resolve
from memzoo.training.parts import part_of
from memzoo.training.trainer import train

FOLDER = Path(memzoo.__file__).resolve().parents[2] / "training" / "configs"
CONFIGS = sorted(file for file in FOLDER.glob("*.yaml") if "\nmodel:" in file.read_text())  # not those of adapters
SMALL = ["model.hidden_size=32", "training.max_steps=2", "training.per_device_train_batch_size=2"]
SMALL += ["training.gradient_accumulation_steps=1", "training.eval_strategy=no", "training.save_strategy=no"]
SMALL += ["training.load_best_model_at_end=false", "early_stopping=null", "training.use_cpu=true"]
SMALL += ["training.bf16=false", "training.disable_tqdm=true", "training.logging_steps=1"]
OF_TEXT = ["data.corpus=null", "data.max_eval_bytes=100", "data.block_size=32"]
FEWER = {"num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2, "memory_num_tokens": 16}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_ready_config_takes_two_steps(file, corpus, tmp_path):
    given = load_config(str(file))
    known = CONFIG_MAPPING[given.model["model_type"]]().to_dict()
    overrides = [*SMALL, f"training.output_dir={tmp_path / 'run'}"]
    overrides += [f"model.{key}={value}" for key, value in FEWER.items() if key in known]
    if given.data.task is None:
        overrides += [*OF_TEXT, f"data.path={corpus}"]
    if given.tokenizer.type == "bpe":
        overrides += ["tokenizer.vocab_size=300"]
    trainer = train(load_config(str(file), overrides))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.model_type == given.model["model_type"]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_ready_config_is_what_it_says_in_full(file):
    """All defaults filled in, the settings are still accepted, and none is changed."""
    given, full = load_config(str(file)), resolve(load_config(str(file), ["training.use_cpu=true"]))
    for section in ("data", "tokenizer", "sample", "learning_rates", "early_stopping"):
        assert full[section] == given.to_dict()[section]
    assert {key: full["training"][key] for key in given.training} == given.training


def test_every_file_is_one_of_a_model_or_of_an_adapter():
    adapters = {file.stem for file in FOLDER.glob("*.yaml")} - {file.stem for file in CONFIGS}
    assert {"adapter_qwen2.5_1.5b", "memory_lora_combined"} <= adapters
    for name in adapters:
        assert "\nbase:" in (FOLDER / f"{name}.yaml").read_text()


def test_there_is_one_of_text_for_every_family_under_its_name():
    by_name = {file.stem: load_config(str(file)) for file in CONFIGS}
    for family in memzoo._FAMILIES:
        config = by_name["maru_demo" if family == "maru" else family]
        assert (config.model["model_type"], config.data.corpus) == (family, "sotu")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_ready_config_can_be_built_at_its_full_size(file):
    """Without memory for its weights; what is trained by a rate of its own is there."""
    config = load_config(str(file))
    section = {"vocab_size": config.tokenizer.vocab_size, **config.model}
    model_type, preset = section.pop("model_type"), section.pop("preset", None)
    config_class = CONFIG_MAPPING[model_type]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config_class(**section) if preset is None else config_class.from_preset(preset, **section)
        )
    assert set(config.learning_rates) <= {part_of(name) for name, _ in model.named_parameters()}
    assert model.num_parameters() > 1e5 or config.data.task


def test_the_control_differs_from_the_base_by_its_memory_alone():
    base, control = (load_config(str(FOLDER / f"{name}.yaml")) for name in ("base_small", "vanilla_control"))
    for section in ("data", "tokenizer", "early_stopping"):
        assert base.to_dict()[section] == control.to_dict()[section]
    assert base.training | {"output_dir": ""} == control.training | {"output_dir": ""}
    configs = [CONFIG_MAPPING[c.model["model_type"]](**{**c.model, "vocab_size": 32000}) for c in (base, control)]
    differing = {key for key in configs[0].to_dict() if configs[0].to_dict()[key] != configs[1].to_dict()[key]}
    assert all(key.startswith("memory_") for key in differing)
    with torch.device("meta"):
        sizes = [AutoModelForCausalLM.from_config(config).num_parameters() for config in configs]
    assert f"{sizes[0] / 1e6:.0f} M parameters" in (FOLDER / "base_small.yaml").read_text()
    assert 0 < sizes[0] - sizes[1] < 0.1 * sizes[1]
