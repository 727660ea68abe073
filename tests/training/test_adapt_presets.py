"""Every preset of `memzoo adapt` builds its adapter on a tiny model of the architecture that it names."""

from pathlib import Path

import pytest
import torch
import yaml

import memzoo
from memzoo.adapters.optim import part_of
from memzoo.training.adapt.run import BEST, add_adapter, load_base
from memzoo.training.adapt.settings import load_adapt_config
from memzoo.training.trainer import training_arguments

FOLDER = Path(memzoo.__file__).resolve().parents[2] / "training" / "configs"
PRESETS = [file for file in sorted(FOLDER.glob("*.yaml")) if "base" in yaml.safe_load(file.read_text())]


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_preset_is_built_on_its_architecture_made_small(file, tmp_path, make_base):
    """With the file's own placement, sharing and chapters, on as many layers as the real model has."""
    config = load_adapt_config(str(file))
    kind, layers = {
        "smollm2": ("llama", 30),
        "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", 28),
        "meta-llama/Meta-Llama-3-8B-Instruct": ("llama", 32),
        "mistralai/Mistral-7B-Instruct-v0.3": ("mistral", 32),
    }[config.base.name]
    training_arguments({**config.training, "output_dir": str(tmp_path), "use_cpu": True}, {}, BEST)
    config.base.quantization = None
    config.memory |= {"num_memory_tokens": 16, "bank_rank": 32}
    folder = make_base(tmp_path, kind, num_hidden_layers=layers)
    model = add_adapter(load_base(config.base, folder), config)
    ids = torch.randint(0, 200, (2, 8))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {part_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert set(config.learning_rates) <= trained
    number = sum(name.endswith(".memzoo") and ".layers." in name for name, _ in model.named_modules())
    placed = {"every_n": -(-layers // config.memory["placement_k"]), "last_k": config.memory["placement_k"]}
    assert number == placed[config.memory["placement"]]
