"""A small regression in float64 and the optimizers on it."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from memzoo.training.optim import ContinuumMemory, DeepMomentum, NestedController


class Problem:
    """A tiny network and batches that depend on the step alone; `train(optimizer, steps)` goes on where it stopped."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1)).to(dtype)
        self.steps_done = 0

    def loss(self):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(self.steps_done), dtype=torch.float64)
        x = x.to(self.model[0].weight.dtype)
        return (self.model(x) - torch.sin(x.sum(-1, keepdim=True) / 2)).square().mean()

    def backward(self):
        self.model.zero_grad()
        self.loss().backward()
        self.steps_done += 1

    def train(self, optimizer, steps, scheduler=None):
        for _ in range(steps):
            self.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    def weights(self):
        return [p.detach().clone() for p in self.model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def two_groups(model):
    layers = [list(model[0].parameters()), list(model[2].parameters())]
    return [{"params": params, "lr": lr, "weight_decay": wd} for params, lr, wd in zip(layers, (1e-2, 5e-3), (0.1, 0))]


MAKERS = {
    "deep_momentum": lambda groups: DeepMomentum(groups),
    "deep_momentum_dot": lambda groups: DeepMomentum(groups, objective="dot", lr=1e-3),
    "deep_momentum_linear": lambda groups: DeepMomentum(groups, hidden_size=0, beta2=0),
    "continuum_memory": lambda groups: ContinuumMemory(groups, AdamW, period=3),
    "continuum_around_deep": lambda groups: ContinuumMemory(groups, DeepMomentum, period=2),
    "nested_controller": lambda groups: NestedController(AdamW(groups)),
    "controller_around_continuum": lambda groups: NestedController(ContinuumMemory(groups, period=2)),
}


@pytest.fixture(params=MAKERS)
def make(request):
    """Groups -> optimizer, for every optimizer."""
    return MAKERS[request.param]


@pytest.fixture
def problem():
    return Problem
