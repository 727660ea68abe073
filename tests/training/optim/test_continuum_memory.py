"""Levels on their clocks, and the groups that make them."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from memzoo.training.optim import ContinuumMemory, groups_by_depth, levels_by_name
from memzoo.training.optim.groups import split_by_decay

from .conftest import same, two_groups


@pytest.mark.parametrize("base", [AdamW, SGD])
def test_period_one_is_the_base_optimizer(problem, base):
    p, q = problem(), problem()
    p.train(ContinuumMemory(two_groups(p.model), base), 6)
    q.train(base(two_groups(q.model)), 6)
    assert same(p.weights(), q.weights())


@pytest.mark.parametrize("base", [AdamW, SGD])
def test_period_c_is_the_base_optimizer_on_the_mean_of_c_gradients(problem, base):
    p, q = problem(), problem()
    p.train(ContinuumMemory(two_groups(p.model), base, period=4), 12)
    optimizer = base(two_groups(q.model))
    for _ in range(3):
        sums = [torch.zeros_like(x) for x in q.model.parameters()]
        for _ in range(4):
            q.backward()
            sums = [total + x.grad for total, x in zip(sums, q.model.parameters())]
        for x, total in zip(q.model.parameters(), sums):
            x.grad = total / 4
        optimizer.step()
    assert same(p.weights(), q.weights())


def test_off_schedule_nothing_of_a_level_changes(problem):
    p = problem()
    slow, fast = two_groups(p.model)
    slow["period"] = 3
    optimizer = ContinuumMemory([slow, fast], AdamW)
    p.train(optimizer, 3)
    for step in range(4, 10):
        before = p.weights()
        state = {k: v.clone() for k, v in optimizer.state[p.model[0].weight].items()}
        p.train(optimizer, 1)
        moved = [not torch.equal(x, y) for x, y in zip(before, p.weights())]
        assert moved == [step % 3 == 0] * 2 + [True] * 2
        now = optimizer.state[p.model[0].weight]
        assert all(torch.equal(now[k], v) for k, v in state.items()) is (step % 3 != 0)


def test_gradients_are_given_back_after_the_step(problem):
    p = problem()
    optimizer = ContinuumMemory(two_groups(p.model), period=2)
    p.backward()
    before = [x.grad.clone() for x in p.model.parameters()]
    optimizer.step()
    assert same(before, [x.grad for x in p.model.parameters()])


def test_a_gradient_that_is_missing_at_one_step_counts_as_zero():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = ContinuumMemory([p, q], SGD, lr=1.0, period=2)
    p.grad = torch.full((2,), 0.5)
    optimizer.step()
    p.grad = None
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((2,), 0.75))
    assert torch.equal(q.detach(), torch.ones(2))


def test_half_a_period_of_bfloat16_gradients_is_summed_in_float32():
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = ContinuumMemory([p], SGD, lr=1.0, period=256)
    for _ in range(255):
        p.grad = torch.full((1,), 1.0, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.own[p]["gradient_sum"].item() == 255.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.own[p]["gradient_sum"].dtype == torch.float32


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.layers = nn.ModuleList(nn.ModuleDict({"memory": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)}) for _ in "ab")
        self.head = nn.Linear(2, 4)
        self.head.weight = self.embed.weight
        self.layers[0].mlp.bias.requires_grad_(False)


def names(group):
    return [name for name, _ in group["params"]]


def test_levels_by_name_cover_every_trained_parameter_once():
    levels = levels_by_name(Model(), {"embed": 8, r"\.memory\.": 1}, default=2)
    assert [group["period"] for group in levels] == [8, 1, 2]
    assert names(levels[0]) == ["embed.weight"]
    assert names(levels[1]) == [f"layers.{i}.memory.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    assert names(levels[2]) == ["layers.0.mlp.weight", "layers.1.mlp.weight", "layers.1.mlp.bias", "head.bias"]
    optimizer = ContinuumMemory(levels)
    assert [group["period"] for group in optimizer.param_groups] == [8, 1, 2]


@pytest.mark.parametrize(
    ("levels", "default", "message"),
    [
        ({"embed": 8}, None, r"layers\.0\.memory\.weight is in no level; add a pattern for it, or a default period"),
        ({"layers": 2, "memory": 1}, 1, r"layers\.0\.memory\.weight is in two levels, 'layers' and 'memory'"),
        ({"embed(": 2}, 1, r"'embed\(' is not a regular expression: missing \)"),
        ({"experts": 2}, 1, "no parameter's name matches 'experts'; names look like 'embed.weight'"),
    ],
)
def test_levels_that_do_not_fit_the_model_are_refused(levels, default, message):
    with pytest.raises(ValueError, match=message):
        levels_by_name(Model(), levels, default)


def test_groups_by_depth_follow_the_layers():
    groups = groups_by_depth(Model())
    assert [group["depth"] for group in groups] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [names(group)[0].partition(".")[0] for group in groups] == ["embed", "layers", "layers", "head"]
    assert all(name.startswith("layers.1.") for name in names(groups[2]))


def test_split_by_decay_keeps_every_parameter():
    groups = split_by_decay(groups_by_depth(Model()), {"embed.weight", "layers.0.memory.weight"}, 0.1)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.1, 1),
        (0.1, 1),
        (0.0, 2),
        (0.0, 4),
        (0.0, 1),
    ]
