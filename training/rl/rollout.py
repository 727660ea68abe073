"""Acting: an agent in its environments, its memory carried from step to step and emptied where an episode ends."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from memzoo.modeling.cache import MemoryCache
from memzoo.training.rl.agent import MemoryAgent
from memzoo.training.rl.config import PPOConfig
from memzoo.training.rl.environments import make_environments


class Rollout(NamedTuple):
    """Steps [N, T] of N environments, or of N segments."""

    observations: Tensor  # [N, T, O]
    next_observations: Tensor  # [N, T, O], at an episode's end its last one, not the first of the next
    starts: Tensor  # bool: the memory was empty before this step
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    dones: Tensor  # bool: the episode ended with this step
    hidden_states: Tensor  # [N, T, D]


class Episode(NamedTuple):
    observations: Tensor  # [L, O]
    actions: Tensor  # [L]
    returns: Tensor  # [L], discounted sums of the environment's rewards


class Collected(NamedTuple):
    """What `Collector.collect` returns."""

    rollout: Rollout
    last_values: Tensor  # [N], of the observations after the last step
    memories: list[MemoryCache]  # of N rows, at the start of every segment
    episodes: list[Episode]  # that ended
    log: dict[str, float]  # means over those: return, length and, where the environment tells, success


class Collector:
    """Acts in `config.num_envs` environments, from where the last rollout ended.

    Raises:
        ValueError: the environment cannot be made, its actions are not discrete, or the agent is not for it.
    """

    def __init__(self, agent: MemoryAgent, config: PPOConfig) -> None:
        self.agent, self.config = agent, config
        self.envs = make_environments(config.env_id, config.env_kwargs, config.num_envs)
        check_sizes(agent, self.envs)
        self.unfinished: list[list[tuple]] = [[] for _ in range(config.num_envs)]
        self.observations = self._tensor(self.envs.reset(seed=config.seed)[0])
        self.fresh = torch.ones(config.num_envs, dtype=torch.bool, device=agent.device)
        with torch.no_grad():
            self.memory = agent.start(config.num_envs)

    @torch.no_grad()
    def collect(self) -> Collected:
        """Act for `num_steps`. Where a time limit ends an episode, V of what would have followed joins the reward."""
        config, agent = self.config, self.agent
        steps: list[tuple] = []
        memories: list[MemoryCache] = []
        episodes: list[Episode] = []
        ended: dict[str, list[float]] = {}
        start = agent.start()
        for t in range(config.num_steps):
            if t % config.segment_length == 0:
                memories.append(self.memory.clone())
            before, fresh = self.observations, self.fresh
            out = agent.step(before, self.memory)
            policy = Categorical(logits=out.logits)
            actions = policy.sample()
            seen, reward, terminated, truncated, info = self.envs.step(actions.cpu().numpy())
            reward, dones = config.reward_scale * reward, terminated | truncated
            nexts = self._tensor(_last_observations(info, seen))
            rewards, done = self._tensor(reward), self._tensor(dones, torch.bool)
            self.fresh = done if config.carry_memory else torch.ones_like(done)
            if truncated.any():
                memory = self.memory.clone()
                if not config.carry_memory:
                    memory.reset_rows(self.fresh, start)
                rewards = rewards + config.gamma * self._tensor(truncated) * agent.step(nexts, memory).value
            self.memory.reset_rows(self.fresh, start)
            told = (out.value, rewards, done, out.last_hidden_state)
            steps.append((before, nexts, fresh, actions, policy.log_prob(actions), *told))
            episodes += self._finished(before, actions, reward, dones)
            for name, values in episode_statistics(info).items():
                ended.setdefault(name, []).extend(values)
            self.observations = self._tensor(seen)
        rollout = Rollout(*(torch.stack(x, dim=1) for x in zip(*steps)))
        last_values = agent(self.observations[:, None], past_key_values=self.memory.clone()).value[:, 0]
        log = {name: float(np.mean(values)) for name, values in ended.items()}
        return Collected(rollout, last_values, memories, episodes, log)

    def _finished(
        self, observations: Tensor, actions: Tensor, rewards: np.ndarray, dones: np.ndarray
    ) -> list[Episode]:
        """The episodes that this step ends."""
        episodes = []
        for steps, *step, done in zip(self.unfinished, observations, actions, rewards, dones):
            steps.append(tuple(step))
            if done:
                seen, acted, rewarded = zip(*steps)
                total, returns = 0.0, []
                for r in reversed(rewarded):
                    total = r + self.config.gamma * total
                    returns.append(total)
                episodes.append(Episode(torch.stack(seen), torch.stack(acted), self._tensor(returns[::-1])))
                steps.clear()
        return episodes

    def _tensor(self, x: Any, dtype: torch.dtype | None = None) -> Tensor:
        return torch.as_tensor(np.asarray(x), dtype=dtype or self.agent.dtype, device=self.agent.device)


@torch.no_grad()
def evaluate(agent: MemoryAgent, config: PPOConfig, num_episodes: int = 100) -> dict[str, float]:
    """Means over episodes with the agent's likeliest actions: `return`, `length` and, where told, `success`.

    `config` says which environment and whether the memory is carried. Every environment plays one episode, so that
    short ones are not favoured.
    """
    envs = make_environments(config.env_id, config.env_kwargs, num_episodes)
    check_sizes(agent, envs)
    start, memory = agent.start(), agent.start(num_episodes)
    observations = envs.reset(seed=config.seed)[0]
    running = np.ones(num_episodes, dtype=bool)
    ended: dict[str, list[float]] = {}
    while running.any():
        out = agent.step(torch.as_tensor(observations, dtype=agent.dtype, device=agent.device), memory)
        if not config.carry_memory:
            memory.reset_rows(torch.ones(num_episodes, dtype=torch.bool), start)
        observations, _, terminated, truncated, info = envs.step(out.logits.argmax(-1).cpu().numpy())
        for name, values in episode_statistics(info, running).items():
            ended.setdefault(name, []).extend(values)
        running &= ~(terminated | truncated)
    return {name: float(np.mean(values)) for name, values in ended.items()}


def sizes(envs: Any) -> dict[str, Any]:
    """The fields of `MemoryAgentConfig` that an environment decides."""
    return {
        "observation_size": envs.single_observation_space.shape[0],
        "num_actions": int(envs.single_action_space.n),
    }


def check_sizes(agent: MemoryAgent, envs: Any) -> None:
    """Refuse an agent of other observations or actions."""
    for name, size in sizes(envs).items():
        if getattr(agent.config, name) != size:
            raise ValueError(f"the agent's {name} is {getattr(agent.config, name)} and the environment's {size}")


def episode_statistics(info: dict[str, Any], among: np.ndarray | None = None) -> dict[str, list[float]]:
    """Return, length and success of the episodes that a step ended, of environments `among` [N] if given."""
    if "final_info" not in info:
        return {}
    last = info["final_info"]
    found = last["_episode"] if among is None else last["_episode"] & among
    told = {"return": last["episode"]["r"], "length": last["episode"]["l"], "success": last.get("is_success")}
    return {name: values[found].astype(float).tolist() for name, values in told.items() if values is not None}


def _last_observations(info: dict[str, Any], observations: np.ndarray) -> np.ndarray:
    """The last observations of the episodes that a step ended, the given ones elsewhere."""
    if "final_obs" not in info:
        return observations
    return np.stack([other if last is None else last for last, other in zip(info["final_obs"], observations)])
