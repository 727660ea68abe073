"""Settings of a run of recurrent PPO."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIG_FILE = "ppo.json"


@dataclass
class PPOConfig:
    """Settings of a run.

    Args:
        env_id, env_kwargs: what `gymnasium.make` is given.
        num_envs, num_steps: steps of all environments between two updates are num_envs num_steps.
        segment_length: steps that gradients pass through; a divisor of num_steps.
        total_steps: steps of all environments together.
        num_epochs, num_minibatches: passes over the segments of a rollout, and parts of it per pass.
        learning_rate, max_grad_norm: of Adam; the rate falls to 0 over the run.
        reward_scale: of the environment's rewards in training; returns of about 1 suit the learning rate. What is
            logged has the environment's scale.
        gamma, gae_lambda: discount, and lambda of generalized advantage estimation (arXiv 1506.02438).
        clip, entropy_coef, value_coef: of the loss.
        carry_memory: False empties the memory before every step, for comparison.
        imitation_coef: weight of self-imitation (arXiv 1806.05635): finished episodes that went better than expected
            are replayed, by priority. 0 turns it off; then `imitation_updates` batches of `imitation_batch` episodes a
            rollout, of the last `replay_capacity`, drawn with `replay_alpha`; `replay_beta` rises to 1 over the run.
        curiosity_coef: weight of the reward for surprise (`Curiosity`); 0 turns it off.

    Raises:
        ValueError: sizes that are not positive or do not divide, coefficients out of range.
    """

    env_id: str
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    num_envs: int = 16
    num_steps: int = 64
    segment_length: int = 32
    total_steps: int = 100_000
    num_epochs: int = 4
    num_minibatches: int = 4
    learning_rate: float = 1e-3
    max_grad_norm: float = 0.5
    reward_scale: float = 1.0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    carry_memory: bool = True
    imitation_coef: float = 0.0
    imitation_updates: int = 4
    imitation_batch: int = 16
    replay_capacity: int = 1000
    replay_alpha: float = 0.6
    replay_beta: float = 0.4
    curiosity_coef: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ["num_envs", "num_steps", "segment_length", "total_steps", "num_epochs", "num_minibatches"]
        for name in [*positive, "imitation_updates", "imitation_batch", "replay_capacity"]:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_steps % self.segment_length:
            raise ValueError(
                f"num_steps {self.num_steps} is not a multiple of segment_length {self.segment_length}; "
                "a rollout is cut into segments of one length"
            )
        if self.num_segments % self.num_minibatches:
            raise ValueError(
                f"{self.num_segments} segments (num_envs num_steps / segment_length) do not divide into "
                f"num_minibatches {self.num_minibatches} of one size"
            )
        if self.total_steps < self.num_envs * self.num_steps:
            raise ValueError(
                f"total_steps {self.total_steps} is less than one rollout of {self.num_envs * self.num_steps} steps"
            )
        for name in ("gamma", "gae_lambda", "replay_beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("learning_rate", "clip", "max_grad_norm", "reward_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("entropy_coef", "value_coef", "imitation_coef", "replay_alpha", "curiosity_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def num_segments(self) -> int:
        return self.num_envs * self.num_steps // self.segment_length

    @property
    def num_rollouts(self) -> int:
        return self.total_steps // (self.num_envs * self.num_steps)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `ppo.json`."""
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "PPOConfig":
        """The settings of the run that `PPOTrainer.save_pretrained` wrote to a folder."""
        return cls(**json.loads((Path(folder) / CONFIG_FILE).read_text()))
