"""The loss curve of a run as a picture."""

from pathlib import Path


def plot_loss(log_history: list[dict], train_bits_per_nat: float, path: Path, title: str) -> None:
    """Bits per byte on the training and the held-out text against the step, from Trainer's `state.log_history`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(log["step"], log["loss"] * train_bits_per_nat) for log in log_history if "loss" in log]
    held_out = [(log["step"], log["eval_bits_per_byte"]) for log in log_history if "eval_bits_per_byte" in log]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    if train:
        axes.plot(*zip(*train), color="tab:blue", lw=1, alpha=0.8, label="training text")
    if held_out:
        axes.plot(*zip(*held_out), "o-", color="tab:orange", ms=4, label="held-out text")
        step, value = held_out[-1]
        axes.annotate(f"{value:.2f}", (step, value), xytext=(0, 8), textcoords="offset points", ha="right")
    axes.set(title=title, xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
