"""One cell of the table: a task, a model, a seed. Hugging Face's Trainer does the training."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from memzoo.training.bench.models import build_config, build_model
from memzoo.training.bench.specs import Spec, parse_length
from memzoo.training.callbacks import peak_memory_mb
from memzoo.training.profiling import add_meters, state_bytes
from memzoo.training.tasks.common import DepthTask, Task, TaskDataset, TextTask, accuracy, answers


@dataclass(frozen=True)
class Protocol:
    """How every cell of a run is trained and measured."""

    steps: int = 1000  # 0 measures only, for pretrained models
    batch_size: int = 32
    learning_rates: list[float] = field(default_factory=lambda: [3e-3])
    parameters: int = 100_000  # to scale every model to; 0 leaves sizes alone
    eval_lengths: list[str] = field(default_factory=lambda: ["1x"])
    eval_depths: list[float] = field(default_factory=list)  # of a task that has a depth
    eval_size: int = 256


def task_trainer(
    model: PreTrainedModel, task: Task, seed: int, output_dir: str, eval_size: int = 256, **training: Any
) -> Trainer:
    """A Trainer on sequences that are seen only once, with held-out ones at the training length.

    `training` goes to TrainingArguments and needs `max_steps`.
    """
    defaults: dict[str, Any] = {
        "seed": seed,
        "eval_strategy": "steps",
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",  # sequences are random already
        "include_num_input_tokens_seen": "all",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    args = TrainingArguments(output_dir, **(defaults | training))
    trainer = Trainer(
        model,
        args,
        train_dataset=TaskDataset(task, max(args.max_steps, 1) * args.train_batch_size, seed=2 * seed + 1),
        eval_dataset=TaskDataset(_held_out(task), eval_size, seed=2 * seed + 2),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=answers,
    )
    add_meters(trainer)
    return trainer


class CellBar(TrainerCallback):
    """One progress bar for all cells: a tick a step, the latest loss and accuracy beside it."""

    def __init__(self, bar: tqdm, name: str) -> None:
        self.bar = bar
        self.shown: dict[str, str] = {}
        bar.set_description(name)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {name: f"{logs[key]:.3f}" for name, key in _SHOWN.items() if key in logs}
        self.bar.set_postfix(self.shown)


_SHOWN = {"loss": "smoothed_loss", "accuracy": "eval_accuracy"}


def eval_tasks(task: Task, protocol: Protocol) -> list[tuple[dict[str, Any], Task]]:
    """Where a trained model is measured: `{"at": "4x"}` or `{"at": "4x", "depth": 0.5}`, and the task there.

    Raises:
        ValueError: the task has no such length.
    """
    variants: list[tuple[dict[str, Any], Task]] = []
    for text in protocol.eval_lengths:
        length = parse_length(text, task.length)
        variant = _held_out(task) if length == task.length else _held_out(task).at_length(length)
        if isinstance(variant, TextTask):
            variant.check_size(protocol.eval_size)
        if isinstance(variant, DepthTask) and protocol.eval_depths:
            variants += [({"at": text, "depth": depth}, variant.at_depth(depth)) for depth in protocol.eval_depths]
        else:
            variants.append(({"at": text}, variant))
    return variants


def run_cell(
    task: Task, spec: Spec, seed: int, learning_rate: float, protocol: Protocol, output_dir: str, bar: tqdm
) -> dict[str, Any]:
    """Trains and measures; returns what results.json holds of a cell."""
    variants = eval_tasks(task, protocol)
    config = build_config(spec, task, protocol.parameters, max(variant.length for _, variant in variants))
    model = build_model(spec, config, seed)
    every = max(protocol.steps // 20, 1)
    trainer = task_trainer(
        model,
        task,
        seed,
        output_dir,
        protocol.eval_size,
        max_steps=protocol.steps,
        per_device_train_batch_size=protocol.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=every,
        eval_steps=2 * every,
        disable_tqdm=True,
        report_to=[],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(CellBar(bar, f"{type(task).__name__}, {spec}, seed {seed}, lr {learning_rate:g}"))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    if protocol.steps:
        trainer.train()
    seconds = time.perf_counter() - start
    model.eval()
    log = trainer.state.log_history
    trained = [entry for entry in log if "loss" in entry]
    return {
        "parameters": model.num_parameters(),
        "hidden_size": config.hidden_size,
        "train_length": task.length,
        "chance": task.chance,
        "train_loss": float(np.mean([entry["loss"] for entry in trained[-2:]])) if trained else None,
        "losses": [(entry["step"], entry["loss"]) for entry in trained],
        "accuracies": [(entry["step"], entry["eval_accuracy"]) for entry in log if "eval_accuracy" in entry],
        "evaluations": [
            {**place, "length": variant.length, **_evaluate(trainer, variant, protocol.eval_size, 2 * seed + 3)}
            for place, variant in variants
        ],
        "tokens_per_second": float(np.median([entry["tokens_per_second"] for entry in trained])) if trained else None,
        # of a GPU only: the peak of a process is that of all the cells it has run
        "peak_memory_mb": peak_memory_mb(model.device) if model.device.type == "cuda" else None,
        "state_bytes": {str(n): state_bytes(model, n) for n in (task.length, 4 * task.length)},
        "seconds": seconds,
    }


def _held_out(task: Task) -> Task:
    """The part that training never shows, of a task that has one; of the others a sequence hardly comes twice."""
    return task.held_out() if isinstance(task, TextTask) else task


def _evaluate(trainer: Trainer, task: Task, size: int, seed: int) -> dict[str, float]:
    """Accuracy on held-out sequences; fewer at once the longer they are."""
    rows = trainer.args.train_batch_size * trainer.train_dataset.task.length // task.length
    trainer.args.per_device_eval_batch_size = min(max(rows, 1), trainer.args.train_batch_size)
    scores = trainer.evaluate(TaskDataset(task, size, seed), metric_key_prefix="at")
    return {"accuracy": scores["at_accuracy"], "exact": scores["at_exact"]}
