"""State dicts: resume bit for bit, refuse what belongs to another optimizer or model."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from memzoo.training.optim import ContinuumMemory
from memzoo.training.optim.checks import kind

from .conftest import MAKERS, same, two_groups


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_same_bit_for_bit(make, problem, dtype, stop):
    whole, part = problem(dtype), problem(dtype)
    whole.train(make(two_groups(whole.model)), 10)
    first = make(two_groups(part.model))
    part.train(first, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(two_groups(part.model))
    second.load_state_dict(torch.load(file, weights_only=True))
    part.train(second, 10 - stop)
    assert same(whole.weights(), part.weights())


def test_a_loaded_state_is_a_copy(make, problem):
    a, b = problem(), problem()
    first, second = make(two_groups(a.model)), make(two_groups(b.model))
    a.train(first, 4)
    saved = first.state_dict()
    second.load_state_dict(saved)
    b.train(second, 5)
    after = problem()
    after.model.load_state_dict(a.model.state_dict())
    after.steps_done = a.steps_done
    copied = copy.deepcopy(first)
    a.train(first, 3)
    third = make(two_groups(after.model))
    third.load_state_dict(copied.state_dict())
    after.train(third, 3)
    assert same(a.weights(), after.weights())


OTHERS = MAKERS | {
    "adamw": AdamW,
    "continuum_of_sgd": lambda groups: ContinuumMemory(groups, torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_optimizer_is_refused(problem, name, other):
    p, q = problem(), problem()
    saved, optimizer = OTHERS[other](two_groups(p.model)), MAKERS[name](two_groups(q.model))
    p.train(saved, 4)
    before = str(optimizer.state_dict())
    if kind(saved) == kind(optimizer):
        optimizer.load_state_dict(saved.state_dict())  # the same optimizer; its settings are loaded
        assert optimizer.param_groups[0]["lr"] == saved.param_groups[0]["lr"]
    else:
        with pytest.raises(ValueError, match=r"this is a state dict of .*, not of \w+\(?.*; load it with"):
            optimizer.load_state_dict(saved.state_dict())
        assert str(optimizer.state_dict()) == before


def test_the_state_of_another_model_is_refused(make, problem):
    p = problem()
    optimizer = make(two_groups(p.model))
    p.train(optimizer, 4)
    saved, before = optimizer.state_dict(), str(optimizer.state_dict())
    fewer = make([{"params": list(p.model[0].parameters())}])
    with pytest.raises(ValueError, match=re.escape("groups of [2] parameters, the state dict has [2, 2]")):
        fewer.load_state_dict(saved)
    wide = nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 1))
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(14, 6\), its \w+ in the state dict"):
        make(two_groups(wide)).load_state_dict(saved)
    assert str(optimizer.state_dict()) == before


def test_a_scheduler_sees_and_sets_the_learning_rates(make, problem):
    p = problem()
    optimizer = make(two_groups(p.model))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    p.train(optimizer, 3, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 8, 5e-3 / 8]
    clone = problem()
    other = make(two_groups(clone.model))
    again = LambdaLR(other, lambda step: 0.5**step)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    clone.train(other, 1, again)
    assert [group["lr"] for group in other.param_groups] == [1e-2 / 16, 5e-3 / 16]
