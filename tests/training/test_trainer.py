"""A run from YAML to a model folder, and what comes back from it."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from memzoo.training.checkpoints import DamagedCheckpoint
from memzoo.training.config import ConfigError
from memzoo.training.metrics import BitsPerByte
from memzoo.training.sources import load_tokenizer
from memzoo.training.trainer import build_model, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of one finished run per model, trained once for all tests that only look at it."""
    runs = {}

    def get(run_config, model):
        if model not in runs:
            folder = tmp_path_factory.mktemp("runs") / model
            runs[model] = folder, train(run_config(model, training={"output_dir": str(folder)}))
        return runs[model]

    return get


@pytest.mark.parametrize("model", ["maru", "llama"])
def test_the_run_folder_loads_in_one_line_and_generates(run_config, finished, model):
    folder, trainer = finished(run_config, model)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    out = pipeline("text-generation", model=str(folder))("The", max_new_tokens=5, do_sample=False)
    assert out[0]["generated_text"].startswith("The")
    for file in ("loss.png", "train.yaml", "trainer_state.json", "model.safetensors"):
        assert (folder / file).stat().st_size > 0


@pytest.mark.parametrize("model", ["maru", "llama"])
def test_use_cache_survives_training(run_config, finished, model):
    folder, trainer = finished(run_config, model)
    for config in [folder / "config.json", *folder.glob("checkpoint-*/config.json")]:
        assert json.loads(config.read_text())["use_cache"] is True
    assert trainer.model.config.use_cache is True


@pytest.mark.parametrize("model", ["maru", "llama"])
def test_training_learns_and_logs_speed(run_config, finished, model):
    _, trainer = finished(run_config, model)
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    assert any("train_tokens_per_second" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("model", ["maru", "llama"])
def test_bits_per_byte_by_hand(run_config, finished, model):
    _, trainer = finished(run_config, model)
    blocks = trainer.eval_dataset
    nats = 0.0
    for block in blocks:
        with torch.no_grad():
            logits = trainer.model.eval()(block["input_ids"][None]).logits[0]
        nats += F.cross_entropy(logits[:-1], block["labels"][1:], reduction="sum").item()
    logged = [log["eval_bits_per_byte"] for log in trainer.state.log_history if "eval_bits_per_byte" in log]
    assert logged[-1] == pytest.approx(nats / math.log(2) / blocks.num_bytes, rel=1e-5)


@pytest.mark.parametrize("model", ["maru", "llama"])
def test_a_resumed_run_ends_with_the_same_weights(run_config, finished, tmp_path, model):
    whole, _ = finished(run_config, model)
    part = tmp_path / "part"
    shutil.copytree(whole / "checkpoint-4", part / "checkpoint-4")
    shutil.copy(whole / "train.yaml", part)
    train(run_config(model, training={"output_dir": str(part), "resume_from_checkpoint": "auto"}))
    a, b = load_file(whole / "model.safetensors"), load_file(part / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sampling_does_not_change_training(run_config, finished, tmp_path):
    whole, _ = finished(run_config, "maru")
    train(run_config(sample={"prompts": []}, training={"output_dir": str(tmp_path / "silent")}))
    a, b = load_file(whole / "model.safetensors"), load_file(tmp_path / "silent" / "model.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sample_is_written_at_every_evaluation(run_config, capsys, temperature):
    train(run_config(sample={"prompts": ["The", "Zwölf"], "temperature": temperature}))
    out = capsys.readouterr().out
    assert [out.count(f"sample at step {step} (") for step in (4, 8)] == [2, 2]
    assert "\nZwölf" in out


@pytest.mark.parametrize("model", ["maru", "llama"])
def test_statistics_of_the_memory_are_logged_at_every_evaluation(run_config, finished, model):
    _, trainer = finished(run_config, model)
    logged = [log for log in trainer.state.log_history if any(key.startswith("memory/") for key in log)]
    if model == "llama":
        assert not logged
        return
    assert [log["step"] for log in logged] == [4, 8]
    stats = trainer.model.eval().get_memory_stats(trainer.eval_dataset[0]["input_ids"][None])
    assert {key: value for key, value in logged[-1].items() if key.startswith("memory/")} == pytest.approx(
        {f"memory/0/{name}": value for name, value in stats[0].items()}, rel=1e-4
    )


def test_the_best_model_is_kept(run_config, tmp_path, monkeypatch):
    """Three evaluations, the second of which is given the best score."""
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(BitsPerByte, "__call__", lambda self, prediction: {"bits_per_byte": next(scores)})
    every_step = {"max_steps": 3, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = train(run_config("llama", training=every_step))
    assert trainer.state.best_global_step == 2
    saved = load_file(tmp_path / "run" / "model.safetensors")
    best, last = (load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3))
    assert all(torch.equal(saved[name], best[name]) for name in saved)
    assert not all(torch.equal(saved[name], last[name]) for name in saved)


def test_continuing_from_a_pretrained_folder(run_config, finished, tmp_path):
    folder, _ = finished(run_config, "maru")
    config = run_config(training={"output_dir": str(tmp_path / "second")})
    config.model = {"pretrained": str(folder), "dropout": 0.2}
    model = build_model(config, load_tokenizer(config), seed=0)
    assert model.config.dropout == 0.2
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items() if name in saved)


def test_presets_and_fields(run_config):
    config = run_config()
    config.model = {"model_type": "maru", "preset": "no_memory", "hidden_size": 16, "num_hidden_layers": 1}
    model = build_model(config, load_tokenizer(config), seed=0)
    assert (model.config.memory_num_banks, model.config.hidden_size) == (0, 16)
    assert model.config.eos_token_id == load_tokenizer(config).eos_token_id


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vocab_size": 100}, "model.vocab_size: 100 is below the 264 tokens of the tokenizer"),
        ({"memory_top_k": 9}, "model: .*memory_top_k"),
        ({"preset": "huge"}, "model: .*no preset 'huge'"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(run_config, section, message):
    with pytest.raises(ConfigError, match=message):
        train(run_config(model=section))


def test_an_output_folder_with_another_run_is_refused(run_config, finished):
    folder, _ = finished(run_config, "llama")
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume"):
        train(run_config("llama", training={"output_dir": str(folder)}))
    again = {"output_dir": str(folder), "resume_from_checkpoint": "auto"}
    with pytest.raises(ConfigError, match=r"data.block_size: 16 here, but .* was trained with 32"):
        train(run_config("llama", data={"block_size": 16}, training=again))
    with pytest.raises(ConfigError, match="is not a checkpoint folder"):
        train(run_config("llama", training={**again, "resume_from_checkpoint": str(folder.parent)}))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_cut_short_is_named(run_config, finished, tmp_path, name):
    whole, _ = finished(run_config, "llama")
    part = tmp_path / "part" / "checkpoint-8"
    shutil.copytree(whole / "checkpoint-8", part)
    content = (part / name).read_bytes()
    (part / name).write_bytes(content[: len(content) // 2])
    config = run_config("llama", training={"output_dir": str(part.parent), "resume_from_checkpoint": "auto"})
    with pytest.raises(DamagedCheckpoint, match=r"is cut short or damaged .*delete .*checkpoint-8") as error:
        train(config)
    assert str(part / name) in str(error.value)


def test_evaluation_without_a_held_out_text_is_refused(run_config):
    with pytest.raises(ConfigError, match=r"data\.eval_fraction: 0 of this text holds nothing out"):
        train(run_config(data={"eval_fraction": 0.0}))
    with pytest.raises(ConfigError, match=r"data\.eval_fraction: 1e-09 of this text holds nothing out"):
        train(run_config(data={"eval_fraction": 1e-9}))


def test_a_run_without_evaluation(run_config, tmp_path):
    train(run_config("llama", data={"eval_fraction": 0.0}, training={"eval_strategy": "no"}))
    assert (Path(tmp_path) / "run" / "loss.png").exists()
