"""An agent learns to remember a cue, with its memory and without it: `python examples/agent.py` (minutes on one core).

Needs `pip install 'memzoo[rl,demo]'`. Draws docs/images/agent.png.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from memzoo.training.rl import MemoryAgent, PPOConfig, PPOTrainer, evaluate

BACKBONE = {"hidden_size": 32, "state_size": 4, "expand": 1, "memory_num_slots": 16}
LENGTHS = (5, 10, 20, 40, 80)


def lengths_of(agent: MemoryAgent, config: PPOConfig) -> list[float]:
    """Success in corridors of LENGTHS, 200 episodes each."""
    configs = [replace(config, env_kwargs={"length": length}, seed=1000) for length in LENGTHS]
    return [evaluate(agent, each, num_episodes=200)["success"] for each in configs]


def draw(results: dict[str, list[tuple[list[dict], list[float]]]], length: int, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for (name, runs), color in zip(results.items(), ("tab:blue", "tab:orange")):
        for run, (history, success) in enumerate(runs):
            label = name if run == 0 else None
            steps, learned = zip(*[(log["steps"], log["success"]) for log in history if "success" in log])
            left.plot(steps, learned, color=color, lw=1.2, alpha=0.8, label=label)
            right.plot(LENGTHS, success, "o-", color=color, ms=4, lw=1.2, alpha=0.8, label=label)
    left.set(title=f"learning a T-maze of {length} steps", xlabel="steps of all environments")
    right.set(title="then in corridors of other lengths", xlabel="steps from the cue to the junction", xscale="log")
    right.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    right.minorticks_off()
    for axes in (left, right):
        axes.axhline(0.5, color="gray", ls=":", label="chance")
        axes.set(ylabel="episodes that end in the right arm", ylim=(-0.02, 1.05))
        axes.grid(alpha=0.3)
    left.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=10, help="of the corridor (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30_720, help="per run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--model-type", default="dual_memory", help="family of the backbone (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/images/agent.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # more only wait for each other at this size
    backbone = {"model_type": args.model_type, **(BACKBONE if args.model_type == "dual_memory" else {})}
    config = PPOConfig("memzoo/TMaze-v0", {"length": args.length}, total_steps=args.steps)
    results: dict[str, list[tuple[list[dict], list[float]]]] = {}
    for name, carry in (("memory carried from step to step", True), ("memory emptied at every step", False)):
        for seed in range(args.seeds):
            trainer = PPOTrainer(replace(config, carry_memory=carry, seed=seed), backbone=backbone)
            history = trainer.train()
            success = lengths_of(trainer.agent, trainer.config)
            results.setdefault(name, []).append((history, success))
            last = np.mean([log["success"] for log in history[-5:] if "success" in log])
            greedy = ", ".join(f"{length}: {share:.2f}" for length, share in zip(LENGTHS, success))
            print(f"{name}, seed {seed}: success {last:.3f} over the last 5 rollouts; greedy, by length: {greedy}")
    draw(results, args.length, args.out)
    print(f"drew {args.out}")


if __name__ == "__main__":
    main()
