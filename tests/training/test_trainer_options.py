"""Options of a run that must really act: rates by part, schedules, early stopping, accumulation, precision."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from memzoo.modeling.memory_gru import MemoryCell
from memzoo.training.config import ConfigError
from memzoo.training.metrics import BitsPerByte
from memzoo.training.parts import PARTS, freeze_parts, part_of
from memzoo.training.sources import load_tokenizer
from memzoo.training.trainer import build_model, train

QUIET = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}


def log_of(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("maru", {"memory_num_banks": 2}, set(PARTS)),
        ("dual_memory", {}, {"memory", "embeddings", "rest"}),
        ("memory_bank_transformer", {"memory_num_chapters": 4, "memory_top_k_chapters": 2}, set(PARTS)),
        ("titan_mac", {}, set(PARTS) - {"router"}),
        ("neural_memory_transformer", {}, set(PARTS) - {"router"}),
        ("llama", {"intermediate_size": 64}, {"embeddings", "rest"}),
    ],
)
def test_every_parameter_of_every_family_has_its_part(family, fields, expected):
    heads = {} if family == "maru" else {"num_attention_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=32, num_hidden_layers=2, **heads, **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parts = {name: part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == expected
    assert all((parts[name] == "rest") for name in parts if ".mlp." in name or ".attention." in name)
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze_parts(model, dict.fromkeys(expected, 0.0))


def test_parts_learn_at_their_own_rates_and_a_rate_of_zero_freezes(run_config):
    rates = {"bank": 0.05, "router": 0.0, "memory": 0.002}
    training = {**QUIET, "max_steps": 2, "lr_scheduler_type": "linear"}
    trainer = train(run_config(learning_rates=rates, training=training))
    start = build_model(run_config(), load_tokenizer(run_config()), trainer.args.seed)
    assert log_of(trainer, "learning_rate/bank") == pytest.approx([0.05, 0.025])
    assert log_of(trainer, "learning_rate/memory") == pytest.approx([0.002, 0.001])
    assert log_of(trainer, "learning_rate/rest") == pytest.approx([0.01, 0.005])
    assert "learning_rate/router" not in trainer.state.log_history[0]
    trained, first = dict(trainer.model.named_parameters()), dict(start.named_parameters())
    unchanged = {name for name in trained if torch.equal(trained[name], first[name])}
    assert unchanged == {name for name in trained if part_of(name) == "router"}


def test_a_part_that_the_model_lacks_is_refused(run_config):
    with pytest.raises(ConfigError, match=r"learning_rates.router: this model has no such part; it has embeddings, r"):
        train(run_config("llama", learning_rates={"router": 1e-3}))


@pytest.mark.parametrize(
    ("schedule", "kwargs", "expected"),
    [
        ("constant", None, [1, 1, 1, 1, 1, 1]),
        ("linear", None, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("polynomial", {"lr_end": 5e-3, "power": 1.0}, [1, 11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12]),
        ("cosine_with_min_lr", {"min_lr_rate": 0.5}, [1, 0.9665, 0.875, 0.75, 0.625, 0.5335]),
        (
            "warmup_stable_decay",
            {"num_decay_steps": 4, "min_lr_ratio": 0.2, "decay_type": "linear"},
            [1, 1, 1, 0.8, 0.6, 0.4],
        ),
    ],
)
def test_schedules_with_a_floor_come_through(run_config, schedule, kwargs, expected):
    training = {**QUIET, "max_steps": 6, "lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs}
    trainer = train(run_config("llama", training=training))
    assert log_of(trainer, "learning_rate") == pytest.approx([1e-2 * share for share in expected], rel=1e-3)


def test_early_stopping_waits_for_its_patience(run_config, monkeypatch):
    scores = iter([3.0, 2.0, 1.99, 2.5, 2.4, 1.0])
    monkeypatch.setattr(BitsPerByte, "__call__", lambda self, prediction: {"bits_per_byte": next(scores)})
    training = {"max_steps": 6, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = train(run_config("llama", early_stopping={"patience": 3, "threshold": 0.1}, training=training))
    assert trainer.state.global_step == 5  # 1.99 is no improvement by 0.1, nor are the two after it
    assert next(scores) == 1.0


def test_the_patience_of_a_resumed_run_goes_on(run_config, monkeypatch):
    scores = iter([2.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    monkeypatch.setattr(BitsPerByte, "__call__", lambda self, prediction: {"bits_per_byte": next(scores)})
    training = {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    train(run_config("llama", training={**training, "max_steps": 3}, early_stopping={"patience": 4}))
    training["resume_from_checkpoint"] = "auto"
    trainer = train(run_config("llama", training=training, early_stopping={"patience": 4}))
    assert trainer.state.global_step == 5  # two evaluations before the interruption, two after it


@pytest.mark.parametrize("family", ["maru", "llama"])
def test_accumulated_micro_batches_equal_one_batch(run_config, tmp_path, family):
    """With documents of unlike lengths: every token counts the same, whatever the micro-batch it falls into."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        training = {**QUIET, **sizes, "max_steps": 3, "output_dir": str(tmp_path / f"run{size}")}
        runs.append(train(run_config(family, data={"block_size": 400}, training=training)))
    lengths = {len(block["input_ids"]) for block in runs[0].train_dataset}
    assert len(lengths) > 2
    losses = [log_of(run, "loss") for run in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert log_of(runs[1], "grad_norm") == pytest.approx(log_of(runs[0], "grad_norm"), rel=1e-3)


def test_bf16_computes_in_bf16_and_keeps_float32_weights(run_config, monkeypatch):
    seen = set()
    linear = torch.nn.functional.linear

    def spy(*args):
        out = linear(*args)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    trainer = train(run_config("llama", training={**QUIET, "bf16": True}))
    assert torch.bfloat16 in seen
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert log_of(trainer, "loss")[-1] < log_of(trainer, "loss")[0]


def test_gradient_checkpointing_runs_layers_again_and_changes_no_weight(run_config, tmp_path, monkeypatch):
    calls = []
    forward = MemoryCell.forward
    monkeypatch.setattr(MemoryCell, "forward", lambda self, *a, **k: (calls.append(1), forward(self, *a, **k))[1])
    counts = []
    for name in ("plain", "again"):
        folder = str(tmp_path / name)
        train(run_config(training={**QUIET, "gradient_checkpointing": name == "again", "output_dir": folder}))
        counts.append(len(calls))
        calls.clear()
    assert counts == [8, 16]
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again"))
    assert all(torch.equal(a[key], b[key]) for key in a if "balance.total" not in key and "balance.count" not in key)


@pytest.mark.parametrize("family", ["maru", "llama"])
def test_a_compiled_run_has_the_losses_of_one_that_is_not(run_config, tmp_path, family):
    """Through TorchDynamo and AOTAutograd, with ragged batches."""
    losses = []
    for compiled in (False, True):
        counters.clear()
        options = {"torch_compile": compiled, "output_dir": str(tmp_path / str(compiled)), "max_steps": 4}
        options |= {"torch_compile_backend": "aot_eager"} if compiled else {}
        losses.append(log_of(train(run_config(family, training={**QUIET, **options})), "loss"))
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_best_model_is_the_one_that_is_left(run_config, tmp_path, monkeypatch):
    scores = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(BitsPerByte, "__call__", lambda self, prediction: {"bits_per_byte": next(scores)})
    training = {"max_steps": 6, "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = train(run_config("llama", training=training))
    run = tmp_path / "run"
    best, last = run / "checkpoint-4", run / "checkpoint-6"
    assert trainer.state.best_model_checkpoint == str(best)
    left, best, last = (load_file(folder / "model.safetensors") for folder in (run, best, last))
    assert all(torch.equal(left[name], best[name]) for name in best)
    assert not all(torch.equal(left[name], last[name]) for name in last)


def test_no_more_checkpoints_are_kept_than_asked_for(run_config, tmp_path):
    train(run_config("llama", training={**QUIET, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
