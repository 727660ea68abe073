"""causal_conv1d against F.conv1d, and its carried tail."""

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.selective_scan import causal_conv1d, fused


@pytest.fixture(params=["numba", "torch"])
def both_paths(request, monkeypatch):
    """With Numba where it is installed, and as if it were not."""
    if request.param == "torch":
        monkeypatch.setattr(fused, "is_available", lambda: False)
    elif not fused.is_available():
        pytest.skip("numba is not installed")


def make_inputs(batch=2, channels=70, time=11, width=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    x = normal(batch, time, 2 * channels)[..., :channels].transpose(1, 2)
    return x, normal(channels, width), normal(channels), normal(batch, channels, width - 1)


def expected(x, weight, bias, tail, activation):
    y = F.conv1d(torch.cat((tail, x), -1), weight.unsqueeze(1), bias, groups=weight.shape[0])
    return F.silu(y) if activation else y


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 16, 50])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_matches_conv1d(both_paths, activation, time, width):
    tensors = [v.requires_grad_() for v in make_inputs(time=time, width=width)]
    y, tail = causal_conv1d(*tensors, activation=activation)
    reference = expected(*tensors, activation)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    assert torch.equal(tail, torch.cat((tensors[3], tensors[0]), -1)[..., time : time + width])
    weight = torch.randn(y.shape, dtype=y.dtype)
    got = torch.autograd.grad((y * weight).sum() + tail.square().sum(), tensors)
    tail = torch.cat((tensors[3], tensors[0]), -1)[..., time:]
    for g, e in zip(got, torch.autograd.grad((reference * weight).sum() + tail.square().sum(), tensors)):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", ["contiguous", "expanded"])
def test_strides_and_absent_arguments(both_paths, layout):
    x, weight, _, tail = make_inputs()
    x = x.contiguous() if layout == "contiguous" else x[:, :1].expand(-1, 70, -1)
    y, state = causal_conv1d(x, weight)
    torch.testing.assert_close(y, expected(x, weight, None, torch.zeros_like(tail), "silu"))
    assert torch.equal(state, x[..., -3:])


@pytest.mark.parametrize("cut", [1, 2, 3, 10])
def test_split_invariance(both_paths, cut):
    x, weight, bias, tail = make_inputs()
    whole, final = causal_conv1d(x, weight, bias, tail)
    first, carried = causal_conv1d(x[..., :cut], weight, bias, tail)
    second, carried = causal_conv1d(x[..., cut:], weight, bias, carried)
    torch.testing.assert_close(torch.cat((first, second), -1), whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(carried, final)


@pytest.mark.parametrize("time", [1, 2, 5])
def test_right_pads_leave_the_tail_of_real_inputs(both_paths, time):
    """Rows of every length from none to all: the tail equals that of the row alone, and so do real outputs."""
    x, weight, bias, tail = make_inputs(batch=time + 1, time=time)
    lengths = torch.arange(time + 1)
    mask = torch.arange(time) < lengths[:, None]
    x = x.masked_fill(~mask[:, None], torch.nan)
    y, final = causal_conv1d(x, weight, bias, tail, mask)
    assert torch.equal(final[0], tail[0])
    for row in range(1, time + 1):
        y_row, final_row = causal_conv1d(x[row : row + 1, :, :row], weight, bias, tail[row : row + 1])
        torch.testing.assert_close(y[row : row + 1, :, :row], y_row, rtol=1e-12, atol=1e-12)
        assert torch.equal(final[row : row + 1], final_row)


def test_tail_does_not_keep_the_sequence_alive(both_paths):
    x, weight, bias, _ = make_inputs(time=64)
    for _, tail in (causal_conv1d(x, weight, bias), causal_conv1d(x, weight, bias, mask=torch.ones(2, 64))):
        assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_threads_give_the_same_numbers(dtype):
    tensors = [v.requires_grad_() for v in make_inputs(time=150, dtype=dtype)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y, _ = causal_conv1d(*tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("time", [1, 7])
def test_gradcheck(both_paths, time):
    tensors = [v.requires_grad_() for v in make_inputs(channels=2, time=time)]
    mask = torch.arange(time) < torch.tensor([[time], [time // 2]])
    assert torch.autograd.gradcheck(lambda *v: causal_conv1d(*v, mask=mask), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(both_paths, dtype):
    tensors = make_inputs(dtype=dtype)
    y, tail = causal_conv1d(*tensors)
    assert (y.dtype, tail.dtype) == (dtype, dtype)
    torch.testing.assert_close(y.double(), expected(*(v.double() for v in tensors), "silu"), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \[batch, channels, time\]"),
        ({"x": torch.zeros(2, 70, 0)}, "no time step"),
        ({"weight": torch.zeros(3, 4)}, r"weight must have shape \[70, 4\], got \[3, 4\]"),
        ({"initial_state": torch.zeros(2, 70, 4)}, r"initial_state must have shape \[2, 70, 3\]"),
        ({"mask": torch.ones(2, 3)}, r"mask must have shape \[2, 11\]"),
        ({"activation": "gelu"}, "activation must be 'silu' or None, got 'gelu'"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, weight, *_ = make_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{"x": x, "weight": weight, **change})


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_token_without_gradients_is_the_same_function(activation, W, with_bias):
    """It takes a compiled step where Numba is installed."""
    x, weight, tail = torch.randn(3, 1, 5).mT, torch.randn(5, W), torch.randn(3, 5, W - 1)
    bias = torch.randn(5) if with_bias else None
    kept = tail.clone()
    with torch.no_grad():
        y, new_tail = causal_conv1d(x, weight, bias, tail, activation=activation)
    expected, expected_tail = causal_conv1d(x, weight.requires_grad_(), bias, tail, activation=activation)
    torch.testing.assert_close(y, expected.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(new_tail, expected_tail) and torch.equal(tail, kept)
