"""Settings that are right one by one and contradict each other, refused before a model or a text is read."""

import difflib
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_utils import SchedulerType

from memzoo.training.config import ConfigError, RunConfig

# a number of steps, the setting that it goes with, and what that is when left out
_STEPS = (
    ("eval_steps", "eval_strategy", "no"),
    ("save_steps", "save_strategy", "steps"),
    ("logging_steps", "logging_strategy", "steps"),
)
_METRICS = {"text": ["bits_per_byte", "loss"], "task": ["exact", "accuracy", "loss"]}


def check_run(config: RunConfig) -> None:
    """Raises ConfigError, naming the keys that contradict each other."""
    training = config.training
    for steps, strategy, default in _STEPS:
        value = training.get(strategy, default)
        switched_off = training.get(strategy) == "no"  # as overrides do, and the number then waits
        if training.get(steps) is not None and value in ("no", "epoch", "best") and not switched_off:
            raise ConfigError(f"training.{steps}: goes with training.{strategy} steps, not with {value}")
    evaluates = training.get("eval_strategy", "no") != "no"
    for key, used in (
        ("training.load_best_model_at_end", training.get("load_best_model_at_end")),
        ("training.save_strategy best", training.get("save_strategy") == "best"),
        ("training.metric_for_best_model", training.get("metric_for_best_model")),
        ("early_stopping", config.early_stopping),
    ):
        if used and not evaluates:
            raise ConfigError(f"{key}: needs evaluations; set training.eval_strategy to steps or epoch")
    if config.early_stopping and not training.get("load_best_model_at_end"):
        raise ConfigError(
            "early_stopping: the last model is worse than the best one; set training.load_best_model_at_end"
        )
    _check_metric(training.get("metric_for_best_model"), "task" if config.data.task else "text")
    if config.data.streaming and training.get("train_sampling_strategy") not in (None, "random"):
        raise ConfigError("training.train_sampling_strategy: a stream has its own order; see data.shuffle_buffer")
    if config.optimizer and training.get("fsdp"):
        raise ConfigError("training.fsdp: the optimizers of the section optimizer take whole weights; leave one out")
    if config.optimizer and config.learning_rates:
        raise ConfigError(
            "learning_rates: the optimizer section has groups of its own; leave one of the two sections out"
        )


def _check_metric(metric: str | None, kind: str) -> None:
    known = _METRICS[kind]
    if metric is not None and metric.removeprefix("eval_") not in known:
        near = difflib.get_close_matches(metric.removeprefix("eval_"), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        raise ConfigError(f"training.metric_for_best_model: a {kind} has no metric {metric!r}; {hint}")


def check_schedule(args: TrainingArguments) -> None:
    """The schedule is built once on a toy: Trainer would build it only after the text is tokenized.

    Raises ConfigError.
    """
    steps = args.max_steps if args.max_steps > 0 else 1000
    warmup = args.get_warmup_steps(steps)
    if args.lr_scheduler_type == SchedulerType.CONSTANT and (args.lr_scheduler_kwargs or warmup):
        raise ConfigError(
            "training.lr_scheduler_type: constant has no warmup and no arguments; "
            "use constant_with_warmup, or leave training.warmup_steps and training.lr_scheduler_kwargs out"
        )
    options: Any = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]  # a string was parsed by then
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and args.max_steps > 0:
        phases = warmup + options.get("num_decay_steps", 0) + (options.get("num_stable_steps") or 0)
        if phases > steps:
            raise ConfigError(
                f"training.lr_scheduler_kwargs: warmup, stable and decay are {phases} steps of {steps} in "
                "training.max_steps"
            )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate or 1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training.lr_scheduler_kwargs: {args.lr_scheduler_type}: {error}") from error
