"""The learning curve of a run as a picture."""

from pathlib import Path


def plot_loss(log_history: list[dict], train_bits_per_nat: float | None, path: Path, title: str) -> None:
    """Bits per byte on the training and the held-out text against the step, from Trainer's `state.log_history`.

    Without bytes, that is for a task, the loss in nats and the share of held-out problems that are answered right.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    unit, metric = ("bits per byte", "eval_bits_per_byte") if train_bits_per_nat else ("loss (nats)", "eval_exact")
    scale = train_bits_per_nat or 1.0
    train = [(log["step"], log["loss"] * scale) for log in log_history if "loss" in log]
    held_out = [(log["step"], log[metric]) for log in log_history if metric in log]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        axes.plot(*zip(*train), color="tab:blue", lw=1, alpha=0.8, label="training")
    right = axes if train_bits_per_nat else axes.twinx()
    if held_out:
        right.plot(*zip(*held_out), "o-", color="tab:orange", ms=4, label="held out")
        step, value = held_out[-1]
        right.annotate(f"{value:.2f}", (step, value), xytext=(0, 8), textcoords="offset points", ha="right")
    if right is not axes:
        right.set(ylabel="answered right, held out", ylim=(0, 1.08))
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.grid(alpha=0.3)
    if train or held_out:
        figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)
    plt.close(figure)
