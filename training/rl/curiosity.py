"""Curiosity: what surprises the memory is worth a reward."""

import torch
from gymnasium.wrappers.utils import RunningMeanStd
from torch import Tensor, nn

from memzoo.training.rl.agent import MemoryAgentConfig


class Curiosity(nn.Module):
    """r_t = e_t / std(e),  e_t = 1/2 |f(h_t, a_t) - o_{t+1}|^2 (arXiv 1705.05363, equations 5 and 6).

    f predicts the next observation from the agent's memory: h_t is the backbone's output, so that what the agent
    remembers does not surprise it, and is not trained through. (The paper predicts learned features of images instead;
    observations here are vectors.) The standard deviation runs over all of the training and keeps the reward's scale
    while f learns; the mean is not taken off, as what is foreseen is to be worth 0.
    """

    def __init__(self, config: MemoryAgentConfig) -> None:
        super().__init__()
        self.num_actions, D = config.num_actions, config.backbone_config.hidden_size
        self.predictor = nn.Sequential(
            nn.Linear(D + config.num_actions, D), nn.SiLU(), nn.Linear(D, config.observation_size)
        )
        self.running = RunningMeanStd()

    def forward(self, hidden_states: Tensor, actions: Tensor, next_observations: Tensor) -> Tensor:
        """The surprise e [...] of [..., D], [...] and [..., O]; its mean is the loss of f."""
        chosen = nn.functional.one_hot(actions, self.num_actions).to(hidden_states.dtype)
        predicted = self.predictor(torch.cat([hidden_states.detach(), chosen], dim=-1))
        return 0.5 * (predicted - next_observations).square().sum(-1)

    @torch.no_grad()
    def reward(self, hidden_states: Tensor, actions: Tensor, next_observations: Tensor) -> Tensor:
        """The normalised surprise of a rollout, whose standard deviation is counted first."""
        surprise = self(hidden_states, actions, next_observations)
        self.running.update(surprise.flatten().double().cpu().numpy())
        return surprise / (float(self.running.var) ** 0.5 + 1e-8)
