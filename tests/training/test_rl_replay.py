"""Prioritized replay, self-imitation and curiosity."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("gymnasium")

from memzoo.training.rl import Curiosity, MemoryAgentConfig, PPOConfig, PPOTrainer, PrioritizedReplay

MAZE = PPOConfig("memzoo/TMaze-v0", {"length": 3}, num_envs=4, num_steps=32, segment_length=8, total_steps=128)
QUICK = replace(MAZE, num_epochs=1, num_minibatches=1)
BACKBONE = {"hidden_size": 16, "state_size": 4, "expand": 1, "memory_num_slots": 8}


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_items_are_drawn_as_often_as_their_priorities_say(alpha):
    replay = PrioritizedReplay(capacity=5, alpha=alpha)
    for name in "abcd":
        replay.add(name)
    priorities = torch.tensor([1.0, 2.0, 4.0, 0.0])
    replay.update(torch.arange(4), priorities)
    expected = (priorities + 1e-6).pow(alpha) / (priorities + 1e-6).pow(alpha).sum()
    draws = replay.sample(40_000, beta=1.0)
    share = torch.bincount(draws.indices, minlength=4) / 40_000
    torch.testing.assert_close(share, expected, atol=0.01, rtol=0)
    assert [draws.items[i] for i in range(9)] == ["abcd"[i] for i in draws.indices[:9].tolist()]


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_importance_weights_are_exact(beta):
    replay = PrioritizedReplay(capacity=3, alpha=0.5)
    for item in range(3):
        replay.add(item)
    replay.update(torch.arange(3), torch.tensor([1.0, 4.0, 9.0]) - 1e-6)
    torch.testing.assert_close(replay.probabilities(), torch.tensor([1, 2, 3]).double() / 6)
    draws = replay.sample(50, beta)
    weights = (3 * torch.tensor([1.0, 2.0, 3.0]) / 6) ** -beta
    torch.testing.assert_close(draws.weights, (weights / weights.max())[draws.indices])


def test_beta_one_undoes_the_priorities():
    """The weighted mean of what is drawn is, up to the scale, that of uniform draws."""
    replay = PrioritizedReplay(capacity=4, alpha=1.0)
    for item in range(4):
        replay.add(item)
    replay.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 8.0]))
    draws = replay.sample(40_000, beta=1.0)
    values = torch.tensor(draws.items).float()
    assert (draws.weights * values).sum() / draws.weights.sum() == pytest.approx(1.5, abs=0.05)


def test_the_oldest_gives_way_and_the_new_is_drawn_first():
    replay = PrioritizedReplay(capacity=2, alpha=1.0)
    for item in "abc":
        replay.add(item)
    assert sorted(replay.items) == ["b", "c"]
    replay.update(torch.arange(2), torch.tensor([0.0, 7.0]))
    replay.add("d")
    assert replay.priorities.max() == replay.priorities[replay.items.index("d")]
    for arguments in ((0, 0.6), (4, -1.0)):
        with pytest.raises(ValueError, match="at least"):
            PrioritizedReplay(*arguments)
    with pytest.raises(ValueError, match="nothing to replay"):
        PrioritizedReplay(3).sample(1, beta=1.0)


def test_imitation_replays_whole_episodes_and_sets_their_priorities():
    trainer = PPOTrainer(replace(MAZE, imitation_coef=0.5, learning_rate=1e-12), backbone=BACKBONE)
    for episode in trainer.collector.collect().episodes:
        trainer.replay.add(episode)
        cue = episode.observations[:, :2].sum(-1)
        assert cue[0] == 1 and cue[1:].sum() == 0
        rewards = episode.returns - 0.99 * torch.cat([episode.returns[1:], torch.zeros(1)])
        assert all(min(abs(r - x) for x in (0.0, -0.05, 1.0)) < 1e-5 for r in rewards.tolist())
    trainer.imitate(0.0)
    for episode, priority in zip(trainer.replay.items, trainer.replay.priorities):
        start = torch.zeros(1, len(episode.actions), dtype=torch.bool)
        out = trainer.agent.unroll(episode.observations[None], start, trainer.agent.start())
        gain = (episode.returns - out.value[0]).clamp(min=0).mean().item() + 1e-6
        assert priority == pytest.approx(gain, rel=1e-4) or priority == 1.0  # drawn, or not yet


def test_imitation_makes_a_good_episode_likelier():
    trainer = PPOTrainer(
        replace(MAZE, imitation_coef=1.0, imitation_updates=20, value_coef=0.0, learning_rate=0.01), backbone=BACKBONE
    )
    episodes = trainer.collector.collect().episodes
    best = max(episodes, key=lambda episode: episode.returns[0].item())
    trainer.replay.add(best)

    def log_prob():
        start = torch.zeros(1, len(best.actions), dtype=torch.bool)
        out = trainer.agent.unroll(best.observations[None], start, trainer.agent.start())
        return torch.distributions.Categorical(logits=out.logits[0]).log_prob(best.actions).sum().item()

    before = log_prob()
    trainer.imitate(0.0)
    assert log_prob() > before + 0.2


def test_what_is_foreseen_is_worth_nothing_and_the_new_is_worth_more():
    config = MemoryAgentConfig(observation_size=2, num_actions=3, backbone_config={"hidden_size": 16})
    curiosity = Curiosity(config)
    h, action = torch.randn(16), torch.tensor(1)
    known, new = torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 3.0])
    first = curiosity.reward(h, action, known.expand(8, 2) + torch.randn(8, 2))
    assert (first > 0).all()
    optimizer = torch.optim.Adam(curiosity.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        curiosity(h, action, known).backward()
        optimizer.step()
    foreseen, surprising = curiosity.reward(h.expand(2, 16), action.expand(2), torch.stack([known, new]))
    assert foreseen < 1e-4 and surprising > 1.0
    curiosity(h.requires_grad_(), action, new).backward()
    assert h.grad is None  # the memory is not trained to be predictable


def test_curiosity_is_added_to_the_rewards_and_off_at_zero():
    plain = PPOTrainer(QUICK, backbone=BACKBONE)
    assert plain.curiosity is None and "surprise" not in plain.train(progress=False)[0]
    curious = PPOTrainer(replace(QUICK, curiosity_coef=0.5, learning_rate=5e-3), backbone=BACKBONE)
    collected = curious.collector.collect()
    seen = collected.rollout.rewards.clone()
    log = curious.update(collected)
    assert torch.equal(collected.rollout.rewards, seen)  # what is replayed and reported is the environment's
    assert log["curiosity_reward"] > 0 and log["surprise"] > 0
    before = log["surprise"]
    for _ in range(10):
        log = curious.update(collected)
    assert log["surprise"] < before
