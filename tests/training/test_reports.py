"""What a run says of itself, in its own log and to TensorBoard and Weights & Biases."""

import json
from types import SimpleNamespace

import pytest
from torch.nn import functional as F

from memzoo.training.callbacks import MemoryStatistics
from memzoo.training.trainer import train

FAMILIES = {
    "maru": {"memory_num_banks": 2, "memory_num_slots": 4, "memory_dim": 8, "num_hidden_layers": 1},
    "dual_memory": {"memory_num_slots": 8, "num_hidden_layers": 2},
    "memory_bank_transformer": {"memory_num_tokens": 16, "memory_num_chapters": 4, "memory_top_k_chapters": 2},
    "titan_mac": {"sliding_window": 8, "num_hidden_layers": 1},
    "neural_memory_transformer": {"sliding_window": 8, "num_hidden_layers": 1},
}
SPEED = {"tokens_per_second", "examples_per_second", "peak_memory_mb", "smoothed_loss"}


def history(folder):
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("family", FAMILIES)
def test_speed_peak_memory_and_what_the_memory_does_are_in_the_log(settings, run_config, tmp_path, capsys, family):
    heads = {} if family == "maru" else {"num_attention_heads": 2}
    model = {"model_type": family, "hidden_size": 16, **heads, **FAMILIES[family]}
    config = run_config("maru" if family == "maru" else "llama", training={"max_steps": 4})
    config.model = model
    train(config)
    found = history(tmp_path / "run")
    steps = [entry for entry in found if "loss" in entry]
    assert all(entry[name] > 0 for entry in steps for name in SPEED)
    assert steps[0]["peak_memory_mb"] > 50  # MB, of the process
    memory = [entry for entry in found if any(name.startswith("memory/0/") for name in entry)]
    assert [entry["step"] for entry in memory] == [4]
    numbers = [value for name, value in memory[0].items() if name.startswith("memory/")]
    assert len(numbers) > 2 and all(isinstance(value, float) for value in numbers)
    assert "sample at step 4 (" in capsys.readouterr().out


def test_pads_do_not_count_in_the_statistics_of_the_memory(run_config):
    """A task's rows are padded at their end, and have no mask."""
    trainer, logs = train(run_config("maru", training={"max_steps": 4})), []
    ids = trainer.eval_dataset[0]["input_ids"]
    for row in (ids, F.pad(ids, (0, 9), value=trainer.model.config.pad_token_id)):
        seen = SimpleNamespace(eval_dataset=[{"input_ids": row}], log=logs.append)
        MemoryStatistics(seen).on_evaluate(trainer.args, trainer.state, None, model=trainer.model)
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_tokens_per_second_count_what_was_read(run_config):
    """Without pads; per second of the steps alone."""
    trainer = train(run_config("llama", training={"max_steps": 2, "logging_steps": 1, "eval_strategy": "no"}))
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    blocks, seconds = 4, 4 / entry["examples_per_second"]
    assert entry["tokens_per_second"] * seconds == pytest.approx(entry["num_input_tokens_seen"])
    assert entry["num_input_tokens_seen"] <= blocks * 32


def test_tensorboard_gets_losses_speed_and_memory(run_config, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train(run_config(training={"report_to": "tensorboard"}))
    board = events.EventAccumulator(str(tmp_path / "board")).Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "eval/bits_per_byte", "train/learning_rate"} | {f"train/{name}" for name in SPEED} <= tags
    assert "train/memory/0/router_entropy" in tags
    losses = [entry["loss"] for entry in history(tmp_path / "run") if "loss" in entry]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses)


def test_wandb_gets_them_too_without_a_network(run_config, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = []
    monkeypatch.setattr(wandb.Run, "log", lambda self, data, *args, **kwargs: sent.append(dict(data)))
    train(run_config(training={"report_to": "wandb", "run_name": "tiny"}))
    names = {name for data in sent for name in data}
    assert {"train/loss", "eval/bits_per_byte", "train/memory/0/router_entropy"} | {
        f"train/{n}" for n in SPEED
    } <= names
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    wandb.finish()
