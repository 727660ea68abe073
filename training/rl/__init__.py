"""Agents with a memory: environments that need one, the agent, recurrent PPO, prioritized replay, curiosity."""

from memzoo.training.rl.agent import AgentOutput, MemoryAgent, MemoryAgentConfig
from memzoo.training.rl.config import PPOConfig
from memzoo.training.rl.curiosity import Curiosity
from memzoo.training.rl.environments import HideVelocities, TMaze, make_environments
from memzoo.training.rl.ppo import PPOTrainer
from memzoo.training.rl.replay import PrioritizedReplay
from memzoo.training.rl.rollout import evaluate

__all__ = [
    "AgentOutput",
    "Curiosity",
    "HideVelocities",
    "MemoryAgent",
    "MemoryAgentConfig",
    "PPOConfig",
    "PPOTrainer",
    "PrioritizedReplay",
    "TMaze",
    "evaluate",
    "make_environments",
]
