"""Recurrent PPO (arXiv 1707.06347) for agents whose memory is a cache.

Segments of what an environment went through are trained as sequences, from the memory that the agent had at their
start (stored, as in R2D2, not computed anew), with gradients through all their steps. Memory never crosses the end of
an episode.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LinearLR
from tqdm.auto import tqdm

from memzoo.modeling.cache import MemoryCache
from memzoo.training.rl.agent import MemoryAgent, MemoryAgentConfig
from memzoo.training.rl.config import PPOConfig
from memzoo.training.rl.curiosity import Curiosity
from memzoo.training.rl.environments import make_environments
from memzoo.training.rl.replay import PrioritizedReplay
from memzoo.training.rl.rollout import Collected, Collector, Rollout, sizes

HISTORY_FILE = "history.json"
ADAM_EPS = 1e-5


def generalized_advantages(
    rewards: Tensor, values: Tensor, dones: Tensor, last_values: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l} within an episode, delta_t = r_t + gamma V_{t+1} - V_t (1506.02438).

    All [N, T], `last_values` [N]; V after the end of an episode is 0.
    """
    nexts = torch.cat([values[:, 1:], last_values[:, None]], dim=1)
    keep = gamma * (~dones).to(values.dtype)
    deltas = rewards + keep * nexts - values
    advantage, advantages = torch.zeros_like(last_values), []
    for delta, kept in zip(reversed(deltas.unbind(1)), reversed(keep.unbind(1))):
        advantage = delta + gae_lambda * kept * advantage
        advantages.append(advantage)
    return torch.stack(advantages[::-1], dim=1)


class PPOTrainer:
    """Trains a `MemoryAgent`; `history` has a dict a rollout.

    Args:
        config: the settings; their `seed` is given to torch and to the environments.
        agent: to go on with, such as `MemoryAgent.from_pretrained(folder)`; None for a new one.
        backbone: of a new agent: `model_type` and fields of a memzoo model's config.

    Raises:
        ValueError: the environment cannot be made, its actions are not discrete, or the agent is not for it.
    """

    def __init__(
        self, config: PPOConfig, agent: MemoryAgent | None = None, backbone: dict[str, Any] | None = None
    ) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        if agent is None:
            one = make_environments(config.env_id, config.env_kwargs, 1)
            agent = MemoryAgent(MemoryAgentConfig(**sizes(one), backbone_config=backbone))
        # the policy that learns is the one that acts: no dropout, no noise of routers, no statistics kept
        self.agent = agent.eval()
        self.collector = Collector(agent, config)
        self.curiosity = Curiosity(agent.config).to(agent.device, agent.dtype) if config.curiosity_coef else None
        self.replay = PrioritizedReplay(config.replay_capacity, config.replay_alpha) if config.imitation_coef else None
        trained = nn.ModuleList([agent, *([self.curiosity] if self.curiosity else [])])
        self.parameters = [p for p in trained.parameters() if p.requires_grad]
        # a policy that always succeeds has tiny gradients, which a smaller eps blows up
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, eps=ADAM_EPS)
        self.schedule = LinearLR(self.optimizer, 1.0, 0.0, config.num_rollouts)
        self.history: list[dict[str, float]] = []

    def train(self, progress: bool = True) -> list[dict[str, float]]:
        """Run to `total_steps`; returns `history`."""
        per_rollout = self.config.num_envs * self.config.num_steps
        rollouts = self.config.num_rollouts
        with tqdm(total=rollouts * per_rollout, unit="step", disable=not progress) as bar:
            for i in range(rollouts):
                collected = self.collector.collect()
                log = collected.log | self.update(collected)
                if self.replay is not None:
                    for episode in collected.episodes:
                        self.replay.add(episode)
                    if len(self.replay):
                        log["imitation_loss"] = self.imitate(i / rollouts)
                self.schedule.step()
                self.history.append({"steps": (i + 1) * per_rollout, **log})
                bar.update(per_rollout)
                bar.set_postfix({name: f"{log[name]:.2f}" for name in ("return", "success") if name in log})
        return self.history

    def update(self, collected: Collected) -> dict[str, float]:
        """The epochs of PPO over a rollout; returns the means of the losses."""
        config, rollout = self.config, collected.rollout
        rewards, log = rollout.rewards, {}
        if self.curiosity is not None:
            bonus = self.curiosity.reward(rollout.hidden_states, rollout.actions, rollout.next_observations)
            rewards = rewards + config.curiosity_coef * bonus
            log["curiosity_reward"] = bonus.mean().item()
        advantages = generalized_advantages(
            rewards, rollout.values, rollout.dones, collected.last_values, config.gamma, config.gae_lambda
        )
        # all environments' first segments, then their second ones, as the memories are joined
        data = [torch.cat(x.split(config.segment_length, dim=1)) for x in (*rollout, advantages)]
        memory = _join(collected.memories)
        logs = []
        for _ in range(config.num_epochs):
            for indices in torch.randperm(config.num_segments).chunk(config.num_minibatches):
                *batch, advantage = (x[indices] for x in data)
                rows = memory.clone()
                rows.batch_select_indices(indices)
                loss, losses = self._loss(Rollout(*batch), advantage, rows)
                self._step(loss)
                logs.append(losses)
        return log | {name: float(np.mean([losses[name] for losses in logs])) for name in logs[0]}

    def imitate(self, progress: float) -> float:
        """Self-imitation (arXiv 1806.05635) of replayed episodes, at a share of the run; returns the mean loss.

        With the return R and G = max(R - V, 0):  -log pi(a) G + value_coef G^2 / 2, G constant in the first term. The
        priority of an episode is its mean G. What would have followed a time limit counts as 0 in R.
        """
        config, losses = self.config, []
        beta = config.replay_beta + (1 - config.replay_beta) * progress
        for _ in range(config.imitation_updates):
            indices, episodes, weights = self.replay.sample(config.imitation_batch, beta)
            observations, actions, returns = (pad_sequence(list(x), batch_first=True) for x in zip(*episodes))
            lengths = torch.tensor([len(episode.actions) for episode in episodes], device=actions.device)
            place = torch.arange(actions.shape[1], device=actions.device)
            starts = ((place == 0) | (not config.carry_memory)).expand_as(actions)
            out = self.agent.unroll(observations, starts, self.agent.start(len(actions)))
            better = (returns - out.value).clamp(min=0) * (place < lengths[:, None])
            log_probs = Categorical(logits=out.logits).log_prob(actions)
            per_step = 0.5 * config.value_coef * better.square() - log_probs * better.detach()
            loss = config.imitation_coef * (weights.to(per_step) * (per_step.sum(1) / lengths)).mean()
            self._step(loss)
            self.replay.update(indices, better.sum(1) / lengths)
            losses.append(loss.item())
        return float(np.mean(losses))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the agent (config.json, model.safetensors), the settings (ppo.json) and history.json."""
        self.agent.save_pretrained(folder)
        self.config.save_pretrained(folder)
        (Path(folder) / HISTORY_FILE).write_text(json.dumps(self.history, indent=2) + "\n")

    def _loss(self, batch: Rollout, advantage: Tensor, memory: MemoryCache) -> tuple[Tensor, dict[str, float]]:
        """-L_clip + value_coef L_V - entropy_coef S (equation 9) of segments [n, S], and its parts."""
        config = self.config
        out = self.agent.unroll(batch.observations, batch.starts, memory)
        policy = Categorical(logits=out.logits)
        log_ratio = policy.log_prob(batch.actions) - batch.log_probs
        ratio = log_ratio.exp()
        normal = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        clipped = torch.minimum(normal * ratio, normal * ratio.clamp(1 - config.clip, 1 + config.clip)).mean()
        value_loss = 0.5 * (out.value - (batch.values + advantage)).square().mean()
        entropy = policy.entropy().mean()
        loss = config.value_coef * value_loss - clipped - config.entropy_coef * entropy
        log = {"policy_loss": -clipped, "value_loss": value_loss, "entropy": entropy}
        log["kl"] = (ratio - 1 - log_ratio).mean()
        log["clipped"] = ((ratio - 1).abs() > config.clip).float().mean()
        if self.curiosity is not None:
            log["surprise"] = self.curiosity(out.last_hidden_state, batch.actions, batch.next_observations).mean()
            loss = loss + log["surprise"]
        return loss, {name: value.item() for name, value in log.items()}

    def _step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()


def _join(memories: list[MemoryCache]) -> MemoryCache:
    """One memory of all rows."""
    joined = memories[0].clone()
    for i in range(len(joined.layers)):
        each = [memory.read(i) for memory in memories]
        joined.write(i, {name: torch.cat([states[name] for states in each]) for name in each[0]}, new_tokens=0)
    return joined
