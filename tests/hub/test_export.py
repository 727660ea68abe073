"""ONNX graphs and torch.export programs of a model's recurrent step compute what torch computes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import memzoo
from memzoo.cli import main
from memzoo.hub_cards.export import RecurrentStep

onnxruntime = pytest.importorskip("onnxruntime")
IDS = torch.arange(3, 30)[None]
TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 0.2}
WINDOW = {"num_attention_heads": 2, "intermediate_size": 24, "sliding_window": 8}
FAMILIES = {
    "maru": {"memory_num_slots": 5, "memory_dim": 6},
    "dual_memory": WINDOW,
    "dual_memory, attention": {**WINDOW, "layer_types": ["sliding_attention"]},
    "neural_memory_transformer": WINDOW,
    "titan_mac": {**WINDOW, "memory_segment_size": 4},
    "titan_mac, gate": {**WINDOW, "titans_variant": "mag"},
    "titan_mac, layer": {**WINDOW, "titans_variant": "mal"},
    "memory_bank_transformer": {**WINDOW, "memory_num_tokens": 8, "memory_zero_init": False},
    "memory_bank_transformer, chapters": {
        **WINDOW,
        "memory_num_tokens": 8,
        "memory_num_chapters": 4,
        "memory_zero_init": False,
    },
}
SLOW = [name for name in FAMILIES if name != "maru"]  # 10 to 20 s each


def make(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split(",")[0], **TINY, **FAMILIES[name])
    return AutoModelForCausalLM.from_config(config).eval()


def test_every_family_is_here():
    assert {name.split(",")[0] for name in FAMILIES} == set(memzoo._FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("name", ["maru", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_command_writes_graphs_that_continue_each_other(name, tmp_path, capsys):
    model = make(name)
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--onnx", str(tmp_path / "onnx")]) == 0
    assert "prefill.onnx: logits within" in capsys.readouterr().out
    step, prefill = (onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx") for name in ("step", "prefill"))
    states = {name: x.numpy() for name, x in load_file(tmp_path / "onnx" / "state.safetensors").items()}
    described = json.loads((tmp_path / "onnx" / "state.json").read_text())
    assert {name: list(x.shape) for name, x in states.items()} == {k: v["shape"] for k, v in described.items()}
    parts = []
    for session, piece in ((prefill, IDS[:, :20]), (step, IDS[:, 20:21]), (prefill, IDS[:, 21:])):
        logits, *new = session.run(None, {"input_ids": piece.numpy(), **states})
        states = dict(zip(described, new))
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), model(IDS).logits.numpy(), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_torch_export_of_the_step(name):
    model = make(name)
    step = RecurrentStep(model)
    program = torch.export.export(step, step.example()).module()
    states, parts = tuple(step.before.values()), []
    for token in IDS.split(1, 1):
        logits, *states = program(token, *states)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_memory_that_grows_is_refused():
    config = AutoConfig.for_model("neural_memory_transformer", **TINY, num_attention_heads=2, sliding_window=None)
    with pytest.raises(ValueError, match=r"keys grows with the text .*Use sliding windows"):
        RecurrentStep(AutoModelForCausalLM.from_config(config))
