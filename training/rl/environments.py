"""Environments that need a memory, and vectors of environments with errors that say what to do.

- `memzoo/TMaze-v0`: a cue at the start of a corridor says which way to turn at its end (Bakker 2001).
- `memzoo/CartPolePositions-v0`: CartPole whose two velocities are hidden.
"""

from typing import Any

try:
    import gymnasium
except ImportError as error:
    raise ImportError("reinforcement learning needs gymnasium: pip install 'memzoo[rl]'") from error

import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics

FORWARD, LEFT, RIGHT = range(3)
BUMP = -0.05


class TMaze(gymnasium.Env):
    """A corridor of `length` steps with an arm to the left and one to the right at its end.

    Observations are [cue left, cue right, corridor, junction] of zeros and ones; the cue is shown at the first step
    only. Actions are forward, left and right. The arm of the cue gives 1 and the other 0, and both end the episode
    (`info["is_success"]` says how); a step into a wall costs 0.05. Without memory no policy succeeds in more than half
    of the episodes.
    """

    def __init__(self, length: int = 10) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; the corridor needs at least 1 step from the cue to the junction")
        self.length = length
        self.observation_space = spaces.Box(0.0, 1.0, (4,), np.float32)
        self.action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.cue = 0, int(self.np_random.integers(LEFT, RIGHT + 1))
        seen = self._observation()
        seen[self.cue - LEFT] = 1.0
        return seen, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        at_junction = self.place == self.length
        if at_junction and action != FORWARD:
            right = int(action) == self.cue
            return self._observation(), float(right), True, False, {"is_success": right}
        moves = not at_junction and action == FORWARD
        self.place += moves
        return self._observation(), 0.0 if moves else BUMP, False, False, {"is_success": False}

    def _observation(self) -> np.ndarray:
        at_junction = self.place == self.length
        return np.array([0, 0, not at_junction, at_junction], np.float32)


class HideVelocities(gymnasium.ObservationWrapper):
    """CartPole's position and angle, as shares of where an episode ends, without their velocities."""

    def __init__(self, env: CartPoleEnv) -> None:
        super().__init__(env)
        self.limits = np.array([env.x_threshold, env.theta_threshold_radians], np.float32)
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[[0, 2]] / self.limits


def cart_pole_positions(**kwargs: Any) -> gymnasium.Env:
    """CartPole, its velocities hidden; the arguments are CartPole's."""
    return HideVelocities(CartPoleEnv(**kwargs))


def register() -> None:
    """Make the environments known to `gymnasium.make`."""
    gymnasium.register("memzoo/TMaze-v0", "memzoo.training.rl.environments:TMaze", max_episode_steps=200)
    gymnasium.register(
        "memzoo/CartPolePositions-v0", "memzoo.training.rl.environments:cart_pole_positions", max_episode_steps=500
    )


def make_environments(env_id: str, env_kwargs: dict[str, Any], num_envs: int) -> SyncVectorEnv:
    """`num_envs` copies, observations as vectors, statistics of episodes in `info`; a done one starts anew at once.

    Raises:
        ValueError: there is no such environment, what it needs is not installed, or its actions are not discrete.
    """

    def make() -> gymnasium.Env:
        try:
            env = gymnasium.make(env_id, **env_kwargs)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise ValueError(f"environment {env_id!r} cannot be made with {env_kwargs}: {error}") from error
        if not isinstance(env.action_space, spaces.Discrete) or env.action_space.start != 0:
            raise ValueError(
                f"{env_id!r} takes actions {env.action_space}; the policy chooses among n of them: Discrete(n)"
            )
        if not isinstance(flat := spaces.flatten_space(env.observation_space), spaces.Box):
            raise ValueError(f"{env_id!r} shows {flat}; the agent reads observations that are vectors")
        return RecordEpisodeStatistics(FlattenObservation(env))

    return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


register()
