"""The agent: segments equal steps, memory stays within an episode, every family, saving, what is refused."""

import pytest
import torch
from transformers import AutoModel, LlamaConfig

pytest.importorskip("gymnasium")

from memzoo import MemoryCache
from memzoo.training.rl import MemoryAgent, MemoryAgentConfig

BACKBONES = {
    "dual_memory": {"memory_num_slots": 4},
    "maru": {"memory_num_banks": 2, "memory_num_slots": 4, "memory_dim": 6},
    "neural_memory_transformer": {"num_attention_heads": 2, "sliding_window": 5},
    "titan_mac": {"num_attention_heads": 2, "sliding_window": 16},
    "memory_bank_transformer": {"num_attention_heads": 2, "sliding_window": 4, "memory_num_tokens": 16},
}


def make_agent(family: str = "dual_memory", **fields) -> MemoryAgent:
    torch.manual_seed(0)
    backbone = {"model_type": family, "hidden_size": 16, "initializer_range": 0.2, **BACKBONES[family], **fields}
    return MemoryAgent(MemoryAgentConfig(observation_size=3, num_actions=4, backbone_config=backbone)).double().eval()


@pytest.fixture
def segments():
    """Observations [4, 11, 3], where episodes start, and observations [4, 3] before them."""
    starts = torch.rand(4, 11) < 0.25
    starts[0, 0], starts[1, 0], starts[2] = True, False, False
    return torch.randn(4, 11, 3).double(), starts, torch.randn(4, 3).double()


@pytest.mark.parametrize("family", BACKBONES)
def test_segments_at_once_equal_steps_with_resets(family, segments):
    observations, starts, before = segments
    agent = make_agent(family)
    memory = agent.start(4)
    agent.step(before, memory)
    at_start, steps = memory.clone(), []
    for t in range(11):
        memory.reset_rows(starts[:, t], agent.start())
        steps.append(agent.step(observations[:, t], memory))
    out = agent.unroll(observations, starts, at_start)
    for name in ("logits", "value", "last_hidden_state"):
        expected = torch.stack([step[name] for step in steps], dim=1)
        torch.testing.assert_close(out[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["dual_memory", "maru"])
def test_gradients_and_memory_stay_within_an_episode(family, segments):
    observations, starts, before = segments
    agent = make_agent(family)
    memory = agent.start(4)
    agent.step(before, memory)
    observations.requires_grad_()
    starts = torch.zeros_like(starts)
    starts[:, 6] = True
    (gradient,) = torch.autograd.grad(agent.unroll(observations, starts, memory).value[:, 8].sum(), observations)
    seen = gradient.abs().sum((0, 2)) > 0
    assert seen.tolist() == [False] * 6 + [True] * 3 + [False] * 2
    other = agent.start(4)
    agent.step(2 * before, other)
    a, b = (agent.unroll(observations, starts, each).value for each in (memory, other))
    assert torch.equal(a[:, 6:], b[:, 6:]) and not torch.equal(a[:, :6], b[:, :6])


def test_gradients_reach_every_trained_parameter(segments):
    observations, starts, _ = segments
    agent = make_agent("maru")  # what its banks begin with is learned
    starts[:, 0] = True
    out = agent.unroll(observations, starts, agent.start(4))
    (out.logits.square().sum() + out.value.sum()).backward()
    missing = [n for n, p in agent.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []


def test_reset_rows_is_exact_and_leaves_the_others_alone(segments):
    agent = make_agent()
    memory, start = agent.start(4), agent.start()
    assert all(torch.equal(memory.states[name], x.expand(4, *x.shape[1:])) for name, x in start.states.items())
    agent.step(segments[2], memory)
    before = memory.clone()
    memory.reset_rows(torch.tensor([True, False, False, True]), start)
    for name, state in memory.states.items():
        assert torch.equal(state[1:3], before.states[name][1:3])
        assert torch.equal(state[0], start.states[name][0]) and torch.equal(state[3], start.states[name][0])
    assert not torch.equal(before.states["0.surprise_mean"][0], memory.states["0.surprise_mean"][0])


def test_a_step_costs_the_same_after_a_hundred(segments):
    agent = make_agent()
    memory = agent.start(4)
    sizes = []
    for _ in range(100):
        agent.step(segments[2], memory)
        sizes.append(memory.nbytes)
    assert len(set(sizes)) == 1


def test_saved_and_loaded(tmp_path, segments):
    agent = make_agent("maru")
    agent.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for loaded in (MemoryAgent.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        loaded = loaded.eval()
        assert loaded.config.backbone_config.memory_num_slots == 4
        a, b = (each.step(segments[2], each.start(4)) for each in (agent, loaded))
        assert torch.equal(a.logits, b.logits) and torch.equal(a.value, b.value)


def test_what_is_refused():
    agent = make_agent()
    with pytest.raises(ValueError, match=r"are \[2, 5\]; this agent reads \[B, T, 3\]"):
        agent(torch.zeros(2, 5))
    with pytest.raises(Exception, match="num_actions is 0; it must be at least 1"):
        MemoryAgentConfig(observation_size=3, num_actions=0)
    with pytest.raises(Exception, match="needs the configuration of a memzoo model, not LlamaConfig"):
        MemoryAgentConfig(observation_size=3, num_actions=2, backbone_config=LlamaConfig())
    growing = make_agent("dual_memory", layer_types=["full_attention"], num_attention_heads=2)
    memory = growing.start(2)
    assert isinstance(memory, MemoryCache)
    growing.step(torch.zeros(2, 3), memory)
    with pytest.raises(ValueError, match="it grows with what is read"):
        memory.reset_rows(torch.tensor([True, False]), growing.start())
