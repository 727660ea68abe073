"""selective_scan_update, one token at a time, against the scan over the whole sequence."""

import pytest
import torch

from memzoo.kernels.selective_scan import (
    causal_conv1d,
    causal_conv1d_update,
    selective_scan,
    selective_scan_update,
)


def make_inputs(batch=3, channels=67, time=9, states=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    sequences = [normal(batch, size, time) for size in (channels, channels, states, states, channels)]  # u delta B C z
    return sequences, -normal(channels, states).exp(), normal(channels), normal(channels)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_steps_equal_the_scan(grad, full):
    """grad=False takes the compiled step where Numba is installed, grad=True the torch operators."""
    (u, delta, B, C, z), A, D, bias = make_inputs()
    extra = {"D": D, "z": z, "delta_bias": bias, "delta_softplus": True} if full else {}
    delta = delta if full else delta.abs()
    expected, final = selective_scan(u, delta, A, B, C, **extra, implementation="reference")
    state = torch.zeros(3, 67, 5, dtype=torch.float64)
    for t in range(9):
        before, kept = state, state.clone()
        now = {**extra, "z": z[:, :, t]} if full else {}
        with torch.set_grad_enabled(grad):
            y, state = selective_scan_update(
                state, u[:, :, t].requires_grad_(grad), delta[:, :, t], A, B[:, :, t], C[:, :, t], **now
            )
        assert torch.equal(before, kept)  # functional
        assert y.requires_grad == grad
        torch.testing.assert_close(y, expected[:, :, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    (u, delta, B, C, z), A, D, bias = make_inputs(time=1, dtype=torch.float32)
    u, delta, B, C, z = (x[:, :, 0].to(dtype) for x in (u, delta, B, C, z))
    arguments = (torch.randn(3, 67, 5), u, delta, A, B, C, D, z, bias)
    y, state = selective_scan_update(*arguments, delta_softplus=True)
    y64, state64 = selective_scan_update(*(x.double() for x in arguments), delta_softplus=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(state.double(), state64, rtol=1e-5, atol=1e-5)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(y.double(), y64, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("grad", [False, True])
def test_single_token_scan_honours_mask_and_state(grad):
    (u, delta, B, C, z), A, D, bias = make_inputs(time=1)
    state = torch.randn(3, 67, 5, dtype=torch.float64)
    mask = torch.tensor([[1], [0], [1]])
    arguments = (u.requires_grad_(grad), delta, A, B, C, D, z, bias, True, state, mask)
    for got, expected in zip(selective_scan(*arguments), selective_scan(*arguments, implementation="reference")):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(selective_scan(*arguments)[1][1], state[1])


def test_gradients_of_a_step():
    (u, delta, B, C, z), A, D, bias = make_inputs(batch=2, channels=2, time=1, states=2)
    u, delta, B, C, z = (x[:, :, 0] for x in (u, delta, B, C, z))
    state = torch.randn(2, 2, 2, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (state, u, delta, A, B, C, D, z, bias)]
    assert torch.autograd.gradcheck(lambda *x: selective_scan_update(*x, True), inputs)


def test_errors_name_the_argument():
    state, u, A, B = torch.zeros(2, 4, 3), torch.zeros(2, 4), torch.zeros(4, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"state must have shape \[2, 4, 3\], got \[2, 3, 4\]"):
        selective_scan_update(state.transpose(1, 2), u, u, A, B, B)
    with pytest.raises(ValueError, match=r"C must have shape \[2, 3\], got \[2, 4\]"):
        selective_scan_update(state, u, u, A, B, u)
    with pytest.raises(ValueError, match=r"u must be \[batch, channels\]"):
        selective_scan_update(state, u[:, :, None], u, A, B, B)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolution_steps_equal_the_convolution(grad, dtype):
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((2, 67, 9), (67, 4), (67,)))
    expected, tail = causal_conv1d(x, weight, bias)
    state = torch.zeros(2, 67, 3, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for t in range(9):
        y, state = causal_conv1d_update(state, x[:, :, t].requires_grad_(grad), weight, bias)
        assert y.requires_grad == grad and y.dtype == state.dtype == dtype
        torch.testing.assert_close(y, expected[:, :, t], rtol=tolerance, atol=tolerance)
    assert torch.equal(state, tail)
    with pytest.raises(ValueError, match="x must be"):
        causal_conv1d_update(state, x, weight)
