"""Recurrent PPO: advantages, what a rollout holds, what is refused, and that memory is what solves the T-maze."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium")

import gymnasium

from memzoo.training.rl import MemoryAgent, PPOConfig, PPOTrainer, TMaze, evaluate, make_environments
from memzoo.training.rl.ppo import generalized_advantages

BACKBONE = {"hidden_size": 16, "state_size": 4, "expand": 1, "memory_num_slots": 8}
MAZE = PPOConfig("memzoo/TMaze-v0", {"length": 3}, num_envs=4, num_steps=32, segment_length=8, total_steps=128)


def test_advantages_equal_their_definition():
    rewards, values, last = torch.randn(2, 6).double(), torch.randn(2, 6).double(), torch.randn(2).double()
    dones = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    got = generalized_advantages(rewards, values, dones, last, gamma=0.9, gae_lambda=0.8)
    for n in range(2):
        for t in range(6):
            expected, discount = 0.0, 1.0
            for k in range(t, 6):
                after = 0.0 if dones[n, k] else (values[n, k + 1] if k < 5 else last[n])
                expected += discount * (rewards[n, k] + 0.9 * after - values[n, k])
                discount *= 0.9 * 0.8
                if dones[n, k]:
                    break
            assert math.isclose(got[n, t], expected, abs_tol=1e-12)


def test_the_first_update_sees_the_policy_that_acted():
    """Recomputed in segments, log-probabilities and values are those of the rollout: memory is where it was."""
    config = replace(MAZE, num_epochs=1, num_minibatches=1, learning_rate=1e-12)
    for family in ("dual_memory", "maru"):
        trainer = PPOTrainer(config, backbone={"model_type": family, "hidden_size": 16})
        trainer.agent.policy.weight.data.normal_()
        for _ in range(2):  # the second rollout begins within episodes
            collected = trainer.collector.collect()
            rollout = collected.rollout
            expected = generalized_advantages(
                rollout.rewards, rollout.values, rollout.dones, collected.last_values, config.gamma, config.gae_lambda
            )
            log = trainer.update(collected)
            assert abs(log["kl"]) < 1e-6 and log["clipped"] == 0
            assert log["value_loss"] == pytest.approx(0.5 * expected.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("carry", [True, False])
def test_a_rollout_marks_episodes_and_cuts_their_memory(carry):
    trainer = PPOTrainer(replace(MAZE, carry_memory=carry), backbone=BACKBONE)
    rollout = trainer.collector.collect().rollout
    assert rollout.dones.any()
    if carry:
        assert rollout.starts[:, 0].all() and torch.equal(rollout.starts[:, 1:], rollout.dones[:, :-1])
    else:
        assert rollout.starts.all()
    cue = rollout.observations[..., :2].sum(-1) > 0
    assert torch.equal(cue[:, 1:], rollout.dones[:, :-1])  # a cue is shown at first steps, and there alone
    ended = rollout.next_observations[rollout.dones]
    assert torch.equal(ended, torch.tensor([0.0, 0, 0, 1]).expand_as(ended))  # at the junction, not the next cue


def test_a_time_limit_is_not_an_end():
    """V of what would have followed joins the last reward: with V = 1 / (1 - gamma) everywhere and reward 1."""

    class Endless(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Discrete(3), gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 1, 1.0, False, False, {}

    gymnasium.register("memzoo/Endless-v0", Endless, max_episode_steps=5)
    trainer = PPOTrainer(replace(MAZE, env_id="memzoo/Endless-v0", env_kwargs={}), backbone=BACKBONE)
    trainer.agent.value.weight.data.zero_()
    trainer.agent.value.bias.data.fill_(100.0)
    rollout, last, *_, log = trainer.collector.collect()
    assert rollout.dones[0].nonzero().squeeze(-1).tolist() == [4, 9, 14, 19, 24, 29]
    advantages = generalized_advantages(rollout.rewards, rollout.values, rollout.dones, last, 0.99, 0.95)
    assert advantages.abs().max() < 1e-3
    assert log == {"return": 5.0, "length": 5.0}


def test_rewards_are_scaled_for_training_and_told_as_they_are():
    pole = replace(MAZE, env_id="memzoo/CartPolePositions-v0", env_kwargs={}, imitation_coef=1.0)
    plain, scaled = (
        PPOTrainer(replace(pole, reward_scale=scale), backbone=BACKBONE).collector.collect() for scale in (1.0, 0.05)
    )
    assert (plain.rollout.rewards == 1).all()
    torch.testing.assert_close(scaled.rollout.rewards, 0.05 * plain.rollout.rewards)
    assert scaled.log == plain.log and scaled.log["return"] == scaled.log["length"]
    for mine, theirs in zip(scaled.episodes, plain.episodes, strict=True):
        torch.testing.assert_close(mine.returns, 0.05 * theirs.returns)


def test_environments():
    maze = TMaze(length=2)
    maze.reset(seed=3)
    cue = maze.cue
    assert maze.step(cue)[1] < 0  # a wall
    maze.step(0), maze.step(0)
    assert maze.step(0)[1] < 0  # another
    assert maze.step(3 - cue)[1:4] == (0.0, True, False)
    maze.place = 2
    assert maze.step(cue)[1:] == (1.0, True, False, {"is_success": True})
    with pytest.raises(ValueError, match="length is 0"):
        TMaze(length=0)
    pole = make_environments("memzoo/CartPolePositions-v0", {}, 1)
    seen = pole.reset(seed=0)[0]
    whole = gymnasium.make("CartPole-v1").reset(seed=0)[0]
    np.testing.assert_allclose(seen[0], whole[[0, 2]] / [2.4, np.radians(12)], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 30}, "num_steps 30 is not a multiple of segment_length 8"),
        ({"num_minibatches": 3}, "16 segments .* do not divide into num_minibatches 3"),
        ({"total_steps": 100}, "total_steps 100 is less than one rollout of 128"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"imitation_batch": 0}, "imitation_batch is 0"),
        ({"gamma": 1.5}, r"gamma=1.5 must be in \[0, 1\]"),
        ({"clip": 0.0}, "clip=0.0 must be positive"),
        ({"reward_scale": 0.0}, "reward_scale=0.0 must be positive"),
        ({"curiosity_coef": -1.0}, "curiosity_coef=-1.0 must not be negative"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(MAZE, **fields)


def test_environments_that_cannot_be_are_refused(tmp_path):
    for env_id, message in (
        ("NoSuchThing-v0", "'NoSuchThing-v0' cannot be made .*NoSuchThing"),
        ("Pendulum-v1", "takes actions Box.*chooses among n of them"),
        ("nowhere:Nothing-v0", "'nowhere:Nothing-v0' cannot be made"),
    ):
        with pytest.raises(ValueError, match=message):
            PPOTrainer(replace(MAZE, env_id=env_id, env_kwargs={}), backbone=BACKBONE)
    with pytest.raises(ValueError, match=r"cannot be made with .*width"):
        PPOTrainer(replace(MAZE, env_kwargs={"width": 1}), backbone=BACKBONE)
    trainer = PPOTrainer(MAZE, backbone=BACKBONE)
    with pytest.raises(ValueError, match="the agent's observation_size is 4 and the environment's 2"):
        evaluate(trainer.agent, replace(MAZE, env_id="memzoo/CartPolePositions-v0", env_kwargs={}))


def test_saved_and_gone_on_with(tmp_path):
    trainer = PPOTrainer(MAZE, backbone=BACKBONE)
    history = trainer.train(progress=False)
    assert [log["steps"] for log in history] == [128]
    trainer.save_pretrained(tmp_path)
    assert PPOConfig.from_pretrained(tmp_path) == MAZE
    again = PPOTrainer(MAZE, MemoryAgent.from_pretrained(tmp_path))
    for mine, theirs in zip(trainer.agent.parameters(), again.agent.parameters()):
        assert torch.equal(mine, theirs)
    assert evaluate(trainer.agent, MAZE, 8) == evaluate(again.agent, MAZE, 8)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dual_memory", "maru"])
def test_memory_solves_the_maze_and_its_absence_does_not(family):
    config = PPOConfig("memzoo/TMaze-v0", {"length": 4}, total_steps=20_480)
    backbone = {"model_type": family, "hidden_size": 32, "state_size": 4, "memory_num_slots": 8}
    success = {}
    for carry in (True, False):
        run = replace(config, carry_memory=carry)
        trainer = PPOTrainer(run, backbone=backbone)
        trainer.train(progress=False)
        success[carry] = evaluate(trainer.agent, run, 200)["success"]
    assert success[True] > 0.95 and 0.35 < success[False] < 0.65


@pytest.mark.slow
def test_memory_balances_a_pole_whose_velocities_are_hidden():
    config = PPOConfig("memzoo/CartPolePositions-v0", total_steps=61_440, reward_scale=0.05)
    backbone = {"hidden_size": 32, "state_size": 4, "expand": 1, "memory_num_slots": 16}
    steps = {}
    for carry in (True, False):
        run = replace(config, carry_memory=carry)
        trainer = PPOTrainer(run, backbone=backbone)
        trainer.train(progress=False)
        steps[carry] = evaluate(trainer.agent, run, 100)["return"]
    assert steps[True] > 200 and steps[False] < 100, steps
