"""The linear recurrence against its loop, in float64, with gradients."""

import pytest
import torch

from memzoo.kernels.linear_scan import linear_scan, reference
from memzoo.kernels.linear_scan.chunked import two_levels


def inputs(T: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    a, b, h = torch.rand(2, T, 3, dtype=dtype), torch.randn(2, T, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
    return [x.requires_grad_() for x in (a, b, h)]


@pytest.mark.parametrize("T", [1, 2, 3, 15, 16, 17, 101])
def test_agrees_with_the_loop(T):
    tensors = inputs(T)
    got, expected = linear_scan(*tensors), reference(*tensors)
    weights = [torch.randn_like(x) for x in got]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), tensors) for out in (got, expected)
    ]
    for x, y in zip((*got, *gradients[0]), (*expected, *gradients[1])):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 3, 16, 17, 101])
def test_two_levels_agree_with_the_loop(T):
    """What runs on a GPU, and on a CPU without numba."""
    tensors = inputs(T)
    torch.testing.assert_close(two_levels(*tensors), reference(*tensors)[0], rtol=1e-12, atol=1e-12)


def test_gradcheck_and_double_backward():
    assert torch.autograd.gradcheck(linear_scan, inputs(7))
    assert torch.autograd.gradgradcheck(linear_scan, inputs(5))


@torch.no_grad()
def test_splits_pads_and_zero_gates():
    a, b, h = inputs(33)
    whole, last = linear_scan(a, b, h)
    first, middle = linear_scan(a[:, :10], b[:, :10], h)
    second, end = linear_scan(a[:, 10:], b[:, 10:], middle)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(end, last, rtol=1e-12, atol=1e-12)
    a, b = a.clone(), b.clone()
    a[:, 20:], b[:, 20:] = 1.0, 0.0
    assert torch.equal(linear_scan(a, b, h)[1], linear_scan(a, b, h)[0][:, 19])  # a pad is exact
    a[:, 5] = 0.0  # forgets exactly: a log-space form could not
    torch.testing.assert_close(linear_scan(a, b, h)[0], reference(a, b, h)[0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(dtype):
    a, b, _ = inputs(300, dtype)
    h, state = linear_scan(a, b)
    assert h.dtype == dtype and state.dtype == torch.float32
    torch.testing.assert_close(state, reference(a.float(), b.float(), torch.zeros(2, 3))[1], rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph():
    a, b, h = (x.detach() for x in inputs(20))
    compiled = torch.compile(linear_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, h), linear_scan(a, b, h))


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 5)), ((2, 0, 4), (2, 0, 4)), ((2, 4), (2, 4))])
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="linear_scan needs"):
        linear_scan(*(torch.zeros(shape) for shape in shapes))
    with pytest.raises(ValueError, match=r"initial_state is \[2, 9\]"):
        linear_scan(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 9))
