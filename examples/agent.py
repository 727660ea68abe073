"""Agents learn a T-maze and CartPole without its velocities, with their memory and without it: minutes on one core.

    python examples/agent.py

Needs `pip install 'memzoo[rl,demo]'`. Draws docs/images/agent.png.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from memzoo.training.rl import PPOConfig, PPOTrainer, evaluate

BACKBONE = {"hidden_size": 32, "state_size": 4, "expand": 1, "memory_num_slots": 16}
LENGTHS = (5, 10, 20, 40, 80)
MAZE = PPOConfig("memzoo/TMaze-v0", total_steps=30_720)
# returns are up to 500 steps; a twentieth of that suits the learning rate
POLE = PPOConfig("memzoo/CartPolePositions-v0", total_steps=61_440, reward_scale=0.05)
KINDS = {"memory carried from step to step": True, "memory emptied at every step": False}
COLORS = dict(zip(KINDS, ("tab:blue", "tab:orange")))


def runs(config: PPOConfig, seeds: int, backbone: dict) -> Iterator[tuple[str, PPOTrainer]]:
    """Trained agents of either kind, `seeds` of each."""
    for name, carry in KINDS.items():
        for seed in range(seeds):
            trainer = PPOTrainer(replace(config, carry_memory=carry, seed=seed), backbone=backbone)
            trainer.train()
            yield name, trainer


def plot(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, marker: str = "") -> None:
    known = axes.get_legend_handles_labels()[1]
    label = None if name in known else name
    axes.plot(x, y, marker=marker, ms=4, lw=1.2, alpha=0.8, color=COLORS[name], label=label)


def learning_curve(axes: Axes, name: str, trainer: PPOTrainer, key: str) -> float:
    """Draws a mean over the episodes of each rollout; returns that of the last five."""
    points = [(log["steps"], log[key]) for log in trainer.history if key in log]
    plot(axes, *zip(*points), name)
    return float(np.mean([value for _, value in points[-5:]]))


def maze(config: PPOConfig, learning: Axes, lengths: Axes, seeds: int, backbone: dict) -> None:
    for name, trainer in runs(config, seeds, backbone):
        last = learning_curve(learning, name, trainer, "success")
        configs = [replace(trainer.config, env_kwargs={"length": length}, seed=1000) for length in LENGTHS]
        success = [evaluate(trainer.agent, config, num_episodes=200)["success"] for config in configs]
        plot(lengths, LENGTHS, success, name, marker="o")
        greedy = ", ".join(f"{length}: {share:.2f}" for length, share in zip(LENGTHS, success))
        print(
            f"T-maze, {name}, seed {trainer.config.seed}: success {last:.3f}; likeliest actions, by length: {greedy}"
        )
    learning.set(title=f"learning a T-maze of {config.env_kwargs['length']} steps", xlabel="steps of all environments")
    lengths.set(title="then in corridors of other lengths", xlabel="steps from the cue to the junction", xscale="log")
    lengths.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    lengths.minorticks_off()
    for axes in (learning, lengths):
        axes.axhline(0.5, color="gray", ls=":", label="chance")
        axes.set(ylabel="episodes that end in the right arm", ylim=(-0.02, 1.05))


def pole(config: PPOConfig, axes: Axes, seeds: int, backbone: dict) -> None:
    for name, trainer in runs(config, seeds, backbone):
        last = learning_curve(axes, name, trainer, "return")
        greedy = evaluate(trainer.agent, replace(trainer.config, seed=1000), num_episodes=100)["return"]
        print(f"CartPole, {name}, seed {trainer.config.seed}: {last:.0f} steps; likeliest actions: {greedy:.0f}")
    axes.set(title="CartPole without its velocities", xlabel="steps of all environments")
    axes.set(ylabel="steps until the pole falls (500 at most)", ylim=(0, 520))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=10, help="of the T-maze's corridor (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="per run (default: 30,720 in the maze, 61,440 for the pole)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--model-type", default="dual_memory", help="family of the backbone (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/agent.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # more only wait for each other at this size
    backbone = {"model_type": args.model_type, **(BACKBONE if args.model_type == "dual_memory" else {})}
    figure, (learning, lengths, cart) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    steps = {"total_steps": args.steps} if args.steps else {}
    maze(replace(MAZE, env_kwargs={"length": args.length}, **steps), learning, lengths, args.seeds, backbone)
    pole(replace(POLE, **steps), cart, args.seeds, backbone)
    for axes in (learning, lengths, cart):
        axes.grid(alpha=0.3)
    learning.legend(loc="lower right")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)
    print(f"drew {args.out}")


if __name__ == "__main__":
    main()
