"""Gated slots against their loop, in float64, with gradients; extreme gates; long runs."""

from functools import partial

import pytest
import torch

from memzoo.kernels.gated_slots import MIN_DECAY, gated_slots, reference

B, K, S, M = 2, 3, 5, 4


def inputs(T: int, dtype: torch.dtype = torch.float64, sharp: float = 3.0) -> list[torch.Tensor]:
    shapes = [(B, T, 2, K, S), (B, T, K), (B, T), (B, T), (B, T, M), (B, K, S, M)]
    tensors = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    tensors[0] = tensors[0] * sharp
    tensors[1:4] = [tensors[1].softmax(-1), tensors[2].sigmoid(), tensors[3].sigmoid()]
    return [x.detach().requires_grad_() for x in tensors]


@pytest.fixture(params=["chunked", "fused"])
def implementation(request):
    if request.param == "fused":
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("decay", [1.0, MIN_DECAY])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 33, 131, 257])
def test_agrees_with_the_loop(T, masked, decay, implementation):
    tensors = inputs(T)
    mask = (torch.rand(B, T) > 0.3) if masked else None
    got = gated_slots(*tensors, decay=decay, mask=mask, implementation=implementation)
    expected = reference(*tensors, decay=decay, mask=None if mask is None else mask.double())
    weights = [torch.randn_like(x) for x in got]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), tensors) for out in (got, expected)
    ]
    for x, y in zip((*got, *gradients[0]), (*expected, *gradients[1])):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_gradcheck(implementation):
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]])
    run = partial(gated_slots, decay=0.9, mask=mask, implementation=implementation)
    assert torch.autograd.gradcheck(run, inputs(5))


@pytest.mark.parametrize("sharp", [0.0, 1000.0])
def test_extreme_gates_stay_exact_in_float32(sharp, implementation):
    """Every token erases one slot wholly, at the lowest decay: the worst case for factors within a chunk."""
    tensors = [x.detach().float() for x in inputs(70, sharp=sharp)]
    tensors[2], tensors[3] = torch.ones(B, 70), torch.ones(B, 70)
    tensors = [x.requires_grad_() for x in tensors]
    y, state = gated_slots(*tensors, decay=MIN_DECAY, implementation=implementation)
    double = [x.detach().double().requires_grad_() for x in tensors]
    y64, state64 = reference(*double, decay=MIN_DECAY)
    torch.testing.assert_close(y.double(), y64, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.double(), state64, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(y.sum() + state.sum(), tensors)
    for grad, exact in zip(grads, torch.autograd.grad(y64.sum() + state64.sum(), double)):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_causality_is_exact_and_pads_leave_the_state_alone(implementation):
    tensors = inputs(40)
    before = gated_slots(*tensors, implementation=implementation)[0]
    changed = [x.clone() for x in tensors]
    for x in (changed[0][:, :, 1], *changed[2:5]):  # what is written
        x[:, 21] = x[:, 21].flip(0) * 0.7
    after = gated_slots(*changed, implementation=implementation)[0]
    assert torch.equal(after[:, :22], before[:, :22])  # token 21 reads before it writes
    assert not torch.equal(after[:, 22], before[:, 22])
    mask = torch.zeros(B, 40)
    assert torch.equal(gated_slots(*tensors, decay=0.7, mask=mask, implementation=implementation)[1], tensors[-1])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_long_runs_stay_finite(dtype, implementation):
    y, state = gated_slots(*inputs(20_000, dtype), implementation=implementation)
    assert y.dtype == dtype and y.isfinite().all()
    assert state.dtype == torch.float32 and state.isfinite().all()


def test_compiles_as_one_graph(implementation):
    tensors = [x.detach().float().requires_grad_() for x in inputs(40)]
    run = partial(gated_slots, implementation=implementation)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(compiled, run(*tensors))
    torch.autograd.grad(compiled[0].sum(), tensors)


@pytest.mark.parametrize("argument", ["router", "write_gate", "erase", "value", "initial_state"])
def test_wrong_shapes_are_refused(argument):
    tensors = inputs(6)
    i = ["logits", "router", "write_gate", "erase", "value", "initial_state"].index(argument)
    tensors[i] = torch.zeros(B + 1, *tensors[i].shape[1:])
    with pytest.raises(ValueError, match=rf"gated_slots: {argument} is \[3"):
        gated_slots(*tensors)


def test_wrong_decay_is_refused():
    with pytest.raises(ValueError, match=r"decay=0.1"):
        gated_slots(*inputs(6), decay=0.1)
