"""Known rules as special cases, and the network's inner step against autograd."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from memzoo.training.optim import DeepMomentum
from memzoo.training.optim import deep_momentum as module

from .conftest import same


def trained(problem, make, steps=8):
    p = problem()
    p.train(make(list(p.model.parameters())), steps)
    return p.weights()


def test_one_weight_and_the_dot_product_are_the_heavy_ball(problem):
    one_weight = {"hidden_size": 0, "beta2": 0, "objective": "dot", "momenta": (0.8,)}
    ours = trained(problem, lambda ps: DeepMomentum(ps, lr=0.03, **one_weight))
    assert same(ours, trained(problem, lambda ps: SGD(ps, lr=0.03, momentum=0.8)))


def test_one_weight_and_the_regression_are_the_moving_average(problem):
    p, q = problem(), problem()
    ours = DeepMomentum(list(p.model.parameters()), lr=0.1, hidden_size=0, beta2=0, momenta=(0.8,))
    averages = [torch.zeros_like(x) for x in q.model.parameters()]
    for _ in range(8):
        p.train(ours, 1)
        q.backward()
        with torch.no_grad():
            for x, average in zip(q.model.parameters(), averages):
                average.mul_(0.8).add_(x.grad, alpha=1 - 0.8)
                x.sub_(0.1 * average)
    for a, b in zip(p.weights(), q.weights()):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("network", [{"hidden_size": 0}, {"hidden_size": 4, "inner_lr": 0.0, "inner_decay": 1.0}])
def test_without_inner_learning_it_is_adamw(problem, network):
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    ours = trained(problem, lambda ps: DeepMomentum(ps, **settings, **network))
    for a, b in zip(ours, trained(problem, lambda ps: AdamW(ps, **settings))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", ["regression", "dot"])
@pytest.mark.parametrize("block", [7, 1 << 15])
def test_the_inner_step_is_the_gradient_of_the_objective(objective, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    K, H, n = 3, 5, 40
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in _shapes(K, H).items()}
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    s, u = torch.randn(K, n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    keys, gradient = torch.tensor([[3.0], [0.1], [1e-3]], dtype=torch.float64) * s, 7 * u
    s, u = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (s, u))
    hidden = torch.tanh(leaves["hidden"] @ s)
    answer = leaves["skip"] @ s + leaves["out"] @ hidden
    loss = (answer - u).square().mean() / 2 if objective == "regression" else -(answer * u).mean()
    loss.backward()
    step = 0.3 / (s.square().sum() + hidden.square().sum()).item() * n
    module._learn(state, keys, gradient, {"objective": objective, "inner_lr": 0.3, "inner_decay": 0.9})
    for name, leaf in leaves.items():
        torch.testing.assert_close(state[name], 0.9 * leaf.detach() - step * leaf.grad, rtol=1e-10, atol=1e-12)


def _shapes(K, H):
    return {"skip": (K,), "hidden": (H, K), "out": (H,)}


@pytest.mark.parametrize("objective", ["regression", "dot"])
def test_every_part_of_the_network_learns_and_stays_finite(problem, objective):
    p = problem()
    optimizer = DeepMomentum(list(p.model.parameters()), lr=1e-3, objective=objective, inner_lr=1.9)
    p.train(optimizer, 2)
    before = {q: {name: s[name].clone() for name in _shapes(1, 1)} for q, s in optimizer.state.items()}
    p.train(optimizer, 100)
    for q, names in before.items():
        for name, old in names.items():
            assert optimizer.state[q][name].isfinite().all()
            assert not torch.isclose(optimizer.state[q][name], old).any()


@pytest.mark.parametrize("objective", ["regression", "dot"])
def test_the_network_learns_which_memory_predicts_the_gradient(objective):
    """Gradients with a slow part under strong noise: the long memory should gain weight over the short one."""
    torch.manual_seed(1)
    p = nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    signal = torch.randn_like(p)
    optimizer = DeepMomentum([p], lr=0.0, momenta=(0.5, 0.99), objective=objective, hidden_size=1)
    for _ in range(600):
        p.grad = 0.3 * signal + torch.randn_like(p)
        optimizer.step()
    short, long = optimizer.state[p]["skip"].tolist()
    assert long > 1.5 * abs(short)
    state = optimizer.state[p]
    step = module._direction(state, state["memories"], state["memories"][0])
    learned, plain = (torch.cosine_similarity(x, signal, dim=0) for x in (step, state["memories"][0]))
    assert learned > plain + 0.3


def test_a_network_that_points_backwards_is_not_followed():
    state = {"skip": torch.tensor([-1.0]), "hidden": torch.zeros(1, 1), "out": torch.zeros(1)}
    step = torch.randn(10)
    assert torch.equal(module._direction(state, step[None], step), step)
    state["skip"] = torch.tensor([2.0])
    torch.testing.assert_close(module._direction(state, step[None], step), step)


@pytest.mark.parametrize("objective", ["regression", "dot"])
def test_an_element_without_gradients_does_not_crowd_out_the_others(objective):
    """The long memory outlives the second moment (0.99 > sqrt(0.95)): its key must not grow where nothing happens."""
    p = nn.Parameter(torch.zeros(100, dtype=torch.float64))
    optimizer = DeepMomentum([p], lr=1.0, beta2=0.95, momenta=(0.9, 0.99), objective=objective)
    for step in range(600):
        p.grad = torch.ones_like(p)
        p.grad[0] = float(step == 0)
        optimizer.step()
    state = optimizer.state[p]
    keys = module._keys(state["memories"], state["second_moment"].rsqrt(), optimizer.param_groups[0])
    scaled = keys * module._inverse_size(keys)[:, None]
    assert (scaled[:, 1:] > 0.9).all()


def test_a_parameter_without_dimensions():
    p = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = DeepMomentum([p], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        p.square().backward()
        optimizer.step()
    assert p.abs().item() < 0.2


def test_state_is_of_float32_under_bfloat16_weights(problem):
    p = problem(torch.bfloat16)
    optimizer = DeepMomentum(list(p.model.parameters()))
    p.train(optimizer, 2)
    kept = {name: value.dtype for name, value in optimizer.state[p.model[0].weight].items()}
    assert set(kept.values()) == {torch.float32}
    optimizer.load_state_dict(optimizer.state_dict())
    assert {name: value.dtype for name, value in optimizer.state[p.model[0].weight].items()} == kept


def test_memory_is_linear_in_the_parameters():
    p = nn.Parameter(torch.ones(100, 100))
    p.grad = torch.ones_like(p)
    optimizer = DeepMomentum([p], hidden_size=16)
    optimizer.step()
    assert sum(value.numel() for value in optimizer.state[p].values()) == 3 * p.numel() + 1 + 16 * 2 + 16 + 2
