"""Learning-rate range test (Smith 2015, arXiv 1506.01186): the rate grows exponentially, and the loss says which do.

The loss is smoothed (a mean with exponential weights, without a bias towards its start) and the run ends when it is
four times its lowest value, or no number. Two rates are suggested: where the loss falls most steeply in the logarithm
of the rate, and a tenth of the rate where it is lowest. With rates by part, all of them grow together.
"""

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from memzoo.training.config import ConfigError, RunConfig
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.trainer import build_trainer, source_of, training_arguments

SMOOTHING = 0.9
DIVERGED = 4.0  # times the lowest loss


@dataclass
class Finding:
    rates: list[float]
    losses: list[float]  # of a step, before its update
    smoothed: list[float]

    @property
    def lowest(self) -> int:
        """The step with the lowest smoothed loss."""
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    @property
    def a_tenth(self) -> float:
        return self.rates[self.lowest] / 10

    @property
    def steepest(self) -> float:
        """Up to the lowest loss; the slope is taken over four steps."""
        half = 2
        steps = range(half, max(self.lowest, half + 1))
        slopes = {i: self._slope(i - half, min(i + half, len(self.rates) - 1)) for i in steps}
        return self.rates[min(slopes, key=slopes.__getitem__)]

    def _slope(self, first: int, last: int) -> float:
        return (self.smoothed[last] - self.smoothed[first]) / math.log(self.rates[last] / self.rates[first])


class _Sweep(MemzooTrainer):
    """Trainer whose rate is `start` at its first step and `end` at its last."""

    span: tuple[float, float]

    def create_scheduler(self, num_training_steps, optimizer=None):
        start, end = self.span
        base = self.args.learning_rate
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: start / base * (end / start) ** (step / max(num_training_steps - 1, 1)),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler


class _Bar(ProgressCallback):
    def on_log(self, *args, **kwargs):
        """The curve says it."""


class _Watch(TrainerCallback):
    """Collects the losses, and ends the run when they diverge."""

    def __init__(self):
        self.finding, self.mean, self.weight = Finding([], [], []), 0.0, 0.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        loss, found = float(logs["loss"]), self.finding
        self.mean = SMOOTHING * self.mean + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        smoothed = self.mean / self.weight
        if not math.isfinite(smoothed) or smoothed > DIVERGED * min(found.smoothed, default=math.inf):
            control.should_training_stop = True
            return
        found.rates.append(float(logs["learning_rate"]))
        found.losses.append(loss)
        found.smoothed.append(smoothed)


def find_learning_rate(config: RunConfig, start: float = 1e-7, end: float = 1.0, steps: int = 100) -> Finding:
    """Trains a new model for up to `steps` steps with a growing rate; nothing of it is kept.

    Raises:
        ConfigError: the rates do not grow, there are too few steps, or the loss diverged before the tenth.
    """
    if not 0 < start < end:
        raise ConfigError(f"--start {start:g} must be above 0 and below --end {end:g}")
    if steps < 10:
        raise ConfigError(f"--steps {steps}: a curve needs 10 or more")
    with tempfile.TemporaryDirectory() as folder:
        training = config.training | {
            "output_dir": folder,
            "max_steps": steps,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "lr_scheduler_kwargs": None,
            "eval_strategy": "no",
            "save_strategy": "no",
            "load_best_model_at_end": False,
            "logging_steps": 1,
            "logging_strategy": "steps",
            "logging_nan_inf_filter": False,
            "report_to": "none",
        }
        config = replace(config, training=training, early_stopping={})
        source_class = source_of(config)
        args = training_arguments(training, source_class.defaults)
        trainer, _ = build_trainer(_Sweep, config, args, source_class(config, args))
        trainer.span = (start, end)
        watch = _Watch()
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        if trainer.pop_callback(ProgressCallback):
            trainer.add_callback(_Bar)
        trainer.train()
    if len(watch.finding.rates) < 10:
        raise ConfigError(f"--start {start:g}: the loss diverged within {len(watch.finding.rates)} steps; start lower")
    return watch.finding


def plot_finding(finding: Finding, path: Path, title: str) -> None:
    """Loss of every step and smoothed against the rate, with both suggestions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(finding.rates, finding.losses, color="tab:blue", lw=0.8, alpha=0.4, label="loss")
    axes.plot(finding.rates, finding.smoothed, color="tab:blue", lw=1.8, label="smoothed")
    axes.axvline(finding.steepest, color="tab:orange", label=f"steepest descent, {finding.steepest:.1e}")
    axes.axvline(finding.a_tenth, color="tab:green", ls="--", label=f"a tenth of the lowest, {finding.a_tenth:.1e}")
    low, high = min(finding.losses), finding.smoothed[0]
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)", title=title)
    axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) or None)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)
