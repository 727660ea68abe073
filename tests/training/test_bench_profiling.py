"""Meters in Trainer's log, profile and analysis, against what can be counted by hand."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from memzoo.training.profiling import SmoothedLossCallback, add_meters, analyze, profile_model, state_bytes
from memzoo.training.tasks import build_task
from memzoo.training.tasks.common import TaskDataset

TASK = build_task("copy_memory", {"delay": 3, "num_items": 2})


def model_of(model_type):
    sizes = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 2}
    if model_type == "llama":
        sizes |= {"num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


class Reporter(TrainerCallback):
    """Keeps what TensorBoard would be given."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def test_meters_are_in_the_log_and_reach_reporters(tmp_path):
    reporter = Reporter()
    args = TrainingArguments(
        tmp_path,
        max_steps=4,
        logging_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(model_of("llama"), args, train_dataset=TaskDataset(TASK, 64, 0), callbacks=[reporter])
    add_meters(trainer, smoothing=0.5)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        assert entry["tokens_per_second"] == pytest.approx(entry["examples_per_second"] * TASK.length)
        assert entry["peak_memory_mb"] > 0
        reported = next(seen for seen in reporter.entries if seen.get("loss") == entry["loss"])
        assert reported.items() <= entry.items() and "smoothed_loss" in reported
    first, second = (entry["loss"] for entry in entries)
    assert entries[0]["smoothed_loss"] == pytest.approx(first)
    assert entries[1]["smoothed_loss"] == pytest.approx((0.5 * first + second) / 1.5)


def test_smoothing_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"smoothing=1\.0"):
        SmoothedLossCallback(1.0)


def test_flops_of_a_transformer_are_those_of_its_matrices():
    model = model_of("llama")
    length = 8
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 2 * 2 * length * 16  # per layer: scores and read, of all positions
    analysis = analyze(model, length)
    assert analysis.flops_per_token == pytest.approx(2 * matrices + 2 * attention)
    assert sum(analysis.parameters.values()) == model.num_parameters()
    assert f"{model.num_parameters():,}" in str(analysis)


def test_state_grows_with_a_transformer_and_not_with_a_memory():
    llama, maru, mamba = (model_of(name) for name in ("llama", "maru", "mamba"))
    assert state_bytes(llama, 8) == 8 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, width, float32
    assert analyze(llama, 8).state_bytes_per_token == 2 * 2 * 16 * 4
    output = maru(torch.zeros(1, 8, dtype=torch.long), use_cache=True)
    assert analyze(maru, 8).state_bytes == output.past_key_values.nbytes > 0
    assert analyze(maru, 8).state_bytes_per_token == analyze(mamba, 8).state_bytes_per_token == 0
    assert mamba.training


@pytest.mark.parametrize("model_type", ["llama", "maru"])
def test_a_profile_adds_up(model_type):
    model = model_of(model_type)
    costs = {cost.name: cost for cost in profile_model(model, torch.zeros(2, 32, dtype=torch.long)).modules}
    root = type(model).__name__
    layers = [cost for name, cost in costs.items() if name in (f"{root}.model.layers.0", f"{root}.model.layers.1")]
    assert [cost.calls for cost in layers] == [1, 1]
    assert 0 < sum(cost.milliseconds for cost in layers) <= costs[f"{root}.model"].milliseconds
    assert costs[f"{root}.model"].milliseconds <= costs[root].milliseconds
    parts = costs[f"{root}.model"].megaflops + costs[f"{root}.lm_head"].megaflops
    assert costs[root].megaflops == pytest.approx(parts)
    assert not any(module._forward_hooks for module in model.modules())
