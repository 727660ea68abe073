"""The multiplier moves the right way, stays in its bounds and out of the scheduler's way."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

from memzoo.training.optim import NestedController

from .conftest import same, two_groups

CURVATURE = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)


def descend(make, lr, steps=100):
    """Loss on a quadratic with largest curvature 1 after every step."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = make(SGD([p], lr=lr))
    losses, multipliers = [], []
    for _ in range(steps):
        loss = (CURVATURE * p.square()).sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        multipliers.append(optimizer.param_groups[0].get("lr_multiplier"))
    return losses, multipliers


def test_a_learning_rate_that_is_too_small_is_raised_to_the_bound():
    plain, _ = descend(lambda base: base, lr=1e-3)
    losses, multipliers = descend(NestedController, lr=1e-3)
    assert multipliers == sorted(multipliers)
    assert multipliers[0] == 1 and multipliers[-1] == pytest.approx(2)
    assert losses[-1] < plain[-1]


def test_a_learning_rate_that_is_too_large_is_lowered():
    plain, _ = descend(lambda base: base, lr=2.05)
    losses, multipliers = descend(NestedController, lr=2.05)
    assert plain[-1] > plain[0]  # diverges
    assert min(multipliers) < 0.8
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize(("lr", "bounds"), [(1e-3, (0.5, 1.5)), (3.0, (0.9, 1.0)), (30.0, (0.1, 2.0))])
def test_bounds_are_reached_and_hold(lr, bounds):
    low, high = bounds
    settings = {"min_multiplier": low, "max_multiplier": high, "meta_lr": 1.0}
    _, multipliers = descend(lambda base: NestedController(base, **settings), lr=lr, steps=30)
    assert all(low * (1 - 1e-12) <= m <= high * (1 + 1e-12) for m in multipliers)
    assert min(abs(multipliers[-1] - low), abs(multipliers[-1] - high)) < 1e-9


def test_from_the_upper_bound_it_comes_down_at_once():
    p = nn.Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = NestedController(SGD([p], lr=0.1))
    for _ in range(200):  # always downhill in one direction
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.param_groups[0]["lr_multiplier"] == pytest.approx(2)
    seen = []
    for i in range(10):  # now to and fro: every step goes too far
        p.grad = torch.full_like(p, (-1.0) ** (i + 1))
        optimizer.step()
        seen.append(optimizer.param_groups[0]["lr_multiplier"])
    assert seen == sorted(seen, reverse=True) and seen[-1] < 1.5


def test_the_hypergradient_is_the_derivative_of_the_next_loss():
    """Finite differences: d loss(w - mu lr g) / d log mu at mu = 1, scaled by the two norms."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = NestedController(SGD([p], lr=0.7))
    start = p.detach().clone()
    p.grad = CURVATURE * start
    optimizer.step()
    up, down = ((CURVATURE * (start - mu * 0.7 * CURVATURE * start).square()).sum() / 2 for mu in (1 + 1e-6, 1 - 1e-6))
    numeric = (up - down) / 2e-6
    p.grad = CURVATURE * p.detach()
    slope = optimizer._measure()[0][1]["slope"]
    scale = p.grad.norm() * (p.detach() - start).norm()
    assert slope == pytest.approx((numeric / scale).item(), rel=1e-6)


def test_its_own_step_is_the_gradient_of_its_objective(problem):
    p = problem()
    optimizer = NestedController(AdamW(two_groups(p.model)), meta_lr=0.1)
    torch.manual_seed(0)
    optimizer.controller = {name: 0.1 * torch.randn_like(value) for name, value in optimizer.controller.items()}
    leaves = {name: value.clone().requires_grad_() for name, value in optimizer.controller.items()}
    features, slopes = [[0.1, -0.2, 0.0, 0.3], [0.5, 0.1, 1.0, -0.1]], [0.4, -0.7]
    for group, f in zip(optimizer.param_groups, features):
        group["features"] = f
    f = torch.tensor(features)
    answers = torch.tanh(f @ leaves["hidden"].T + leaves["bias"]) @ leaves["out"] + leaves["shift"]
    (answers * torch.tensor(slopes)).mean().backward()
    optimizer._learn(list(zip(optimizer.param_groups, slopes)))
    for name, leaf in leaves.items():
        expected = leaf.detach() - 0.1 * leaf.grad
        torch.testing.assert_close(optimizer.controller[name], expected)


def test_every_weight_of_the_network_learns(problem):
    p = problem()
    optimizer = NestedController(AdamW(two_groups(p.model)))
    before = {name: value.clone() for name, value in optimizer.controller.items()}
    p.train(optimizer, 20)
    for name, value in before.items():
        assert not torch.isclose(optimizer.controller[name], value, rtol=0, atol=1e-9).any()
    one, two = optimizer.param_groups
    assert one["lr_multiplier"] != two["lr_multiplier"]


def test_without_meta_learning_it_is_the_base_optimizer(problem):
    p, q = problem(), problem()
    p.train(NestedController(AdamW(two_groups(p.model)), meta_lr=0.0), 6)
    q.train(AdamW(two_groups(q.model)), 6)
    assert same(p.weights(), q.weights())


def test_the_multiplier_does_not_compound_with_a_scheduler(problem):
    p = problem()
    optimizer = NestedController(AdamW(two_groups(p.model)), meta_lr=1.0)
    used = []
    optimizer.base.register_step_pre_hook(lambda opt, *_: used.append([g["lr"] for g in opt.param_groups]))
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(12):
        p.train(optimizer, 1)
        for group, rate, lr in zip(optimizer.param_groups, (1e-2, 5e-3), used[-1]):
            assert group["lr"] == pytest.approx(rate * 0.9**step, rel=1e-12)
            assert lr == group["lr"] * group["lr_multiplier"]
        scheduler.step()
    assert any(group["lr_multiplier"] != 1 for group in optimizer.param_groups)


def test_the_learning_rate_is_put_back_when_the_step_fails(problem, monkeypatch):
    p = problem()
    optimizer = NestedController(AdamW(two_groups(p.model)), meta_lr=1.0)
    p.train(optimizer, 4)
    monkeypatch.setattr(optimizer.base, "step", lambda: 1 / 0)
    p.backward()
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-3]
