"""What holds for all of them: groups, closures, gradients that are missing or of the wrong kind."""

import builtins
import runpy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from memzoo.training import optim
from memzoo.training.optim import ContinuumMemory, DeepMomentum, NestedController

from .conftest import same, two_groups


def test_a_group_has_its_own_learning_rate_and_decay(make, problem):
    p = problem()
    groups = two_groups(p.model)
    groups[1]["lr"] = 0.0
    optimizer = make(groups)
    before = p.weights()
    p.train(optimizer, 6)
    moved = [not torch.equal(x, y) for x, y in zip(before, p.weights())]
    assert moved == [True, True, False, False]


def test_weight_decay_shrinks_weights_whose_gradient_is_zero(make, problem):
    p = problem()
    optimizer = make(two_groups(p.model))
    before = p.weights()
    for _ in range(6):
        for q in p.model.parameters():
            q.grad = torch.zeros_like(q)
        optimizer.step()
    for q, old, decays in zip(p.weights(), before, (True, True, False, False)):
        assert (q.abs() < old.abs()).all() if decays else torch.equal(q, old)


def test_a_group_added_later_is_trained_and_saved(make, problem):
    p, q = problem(), problem()
    optimizer = make([{"params": list(p.model[0].parameters())}])
    p.train(optimizer, 2)
    optimizer.add_param_group({"params": list(p.model[2].parameters()), "lr": 1e-2})
    before = p.weights()
    p.train(optimizer, 6)
    assert not any(torch.equal(x, y) for x, y in zip(before, p.weights()))
    other = make(two_groups(q.model))
    other.load_state_dict(optimizer.state_dict())
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_a_parameter_in_two_groups_is_refused_and_nothing_is_added(make, problem):
    p = problem()
    optimizer = make(two_groups(p.model))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p.model[0].weight]})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p.model[0].weight]}, {"params": [p.model[0].weight]}])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")  # of the base optimizer
def test_a_parameter_twice_in_a_group_is_refused_and_nothing_is_added(make, problem):
    p = problem()
    optimizer = make([{"params": [p.model[0].weight]}])
    with pytest.raises(ValueError, match=r"parameter 1 of a group, of shape \(12,\), is in the group twice"):
        optimizer.add_param_group({"params": (q for q in [p.model[0].bias, p.model[0].bias])})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"parameter 2 of a group, of shape \(12, 6\), is in the group twice"):
        make([*p.model[0].parameters(), p.model[0].weight])
    with pytest.raises(ValueError, match="parameter 2"):
        make([*p.model[0].named_parameters(), ("again", p.model[0].weight)])


def test_a_closure_is_called_once_with_gradients(make, problem):
    p, plain = problem(), problem()
    optimizer, losses = make(two_groups(p.model)), []

    def closure():
        assert torch.is_grad_enabled()
        p.backward()
        losses.append(p.steps_done)
        return torch.tensor(float(p.steps_done))

    assert [optimizer.step(closure).item() for _ in range(5)] == [1, 2, 3, 4, 5]
    assert losses == [1, 2, 3, 4, 5]
    plain.train(make(two_groups(plain.model)), 5)
    assert same(p.weights(), plain.weights())


def test_parameters_without_gradient_are_left_alone(make, problem):
    p = problem()
    for q in p.model[0].parameters():
        q.requires_grad_(False)
    optimizer = make(two_groups(p.model))
    before = p.weights()
    p.train(optimizer, 6)
    moved = [not torch.equal(x, y) for x, y in zip(before, p.weights())]
    assert moved == [False, False, True, True]
    assert not any(q in optimizer.state for q in p.model[0].parameters())


def test_a_parameter_without_elements_is_left_alone(make):
    weight, nothing = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(0, 3))
    optimizer = make([weight, nothing])
    for _ in range(6):
        (weight.sum() + nothing.sum()).backward()
        optimizer.step()
    assert (weight < 1).all() and nothing.shape == (0, 3)


def test_sparse_gradients_and_complex_parameters_are_refused_before_anything_moves(make):
    dense, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 2, sparse=True)
    optimizer = make([dense, table.weight])
    (dense.sum() + table(torch.tensor([1])).sum()).backward()
    with pytest.raises(RuntimeError, match=r"takes no sparse gradients; build the embedding with sparse=False"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(3))
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="complex"):
        make([number]).step()


def test_every_optimizer_learns(make, problem):
    p = problem(torch.float32)
    optimizer = make([{"params": list(p.model.parameters()), "lr": 1e-2}])
    held_out = 10**6
    losses = []
    for steps in (0, 200):
        p.train(optimizer, steps)
        p.steps_done, done = held_out, p.steps_done
        losses.append(p.loss().item())
        p.steps_done = done
    assert losses[1] < 0.5 * losses[0]


def test_exports_are_lazy(monkeypatch):
    """The package's own file imports nothing but the standard library until a name is asked for."""
    imported, real = [], builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *args: imported.append(name) or real(name, *args))
    names = runpy.run_path(optim.__file__)
    monkeypatch.undo()
    assert not {name.partition(".")[0] for name in imported} & {"memzoo", "torch", "transformers"}
    for name in names["__all__"]:
        assert getattr(optim, name).__module__.startswith("memzoo.training.optim.")
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = optim.Adam


def test_what_cannot_be_wrapped_is_refused(problem):
    model = problem().model
    with pytest.raises(TypeError, match="base is an instance of AdamW; give the class"):
        ContinuumMemory(model.parameters(), AdamW(model.parameters()))
    for base in (AdamW, model.parameters()):
        with pytest.raises(TypeError, match="NestedController goes around an optimizer, such as AdamW"):
            NestedController(base)
    inside = NestedController(AdamW(model.parameters()))
    with pytest.raises(TypeError, match=r"cannot go around NestedController\(AdamW\): one of a kind"):
        NestedController(inside)
    with pytest.raises(TypeError, match="one of a kind"):
        ContinuumMemory(model.parameters(), ContinuumMemory)


def test_bad_settings_are_refused():
    p = [nn.Parameter(torch.ones(2))]
    for bad in ({"hidden_size": -1}, {"inner_lr": 3.0}, {"momenta": ()}, {"momenta": (1.0,)}, {"objective": "max"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            DeepMomentum(p, **bad)
        with pytest.raises(ValueError, match=next(iter(bad))):
            DeepMomentum([{"params": p, **bad}])
    for period in (0, -1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="period must be a positive number of steps"):
            ContinuumMemory(p, period=period)
        with pytest.raises(ValueError, match="period must be a positive number of steps"):
            ContinuumMemory([{"params": p, "period": period}])
    for bad in ({"min_multiplier": 0.0}, {"max_multiplier": 0.5}, {"meta_lr": -1.0}, {"hidden_size": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            NestedController(AdamW(p), **bad)
    with pytest.raises(TypeError, match="LBFGS"):
        ContinuumMemory(p, torch.optim.LBFGS)
