"""The norm against torch's, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.rms_norm import rms_norm


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 33), (2, 2, 50, 64)])
def test_agrees_with_torch(shape, weighted):
    x = torch.randn(*shape, dtype=torch.float64).mT.contiguous().mT.requires_grad_()  # any strides
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True) if weighted else None
    leaves = [x, weight] if weighted else [x]
    results = [rms_norm(x, weight, 1e-3), F.rms_norm(x, shape[-1:], weight, 1e-3)]
    g = torch.randn_like(results[0])
    got, expected = ([y, *torch.autograd.grad(y, leaves, g)] for y in results)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_zeros(dtype):
    x = torch.randn(4, 30, dtype=dtype)
    x[1] = 0
    y = rms_norm(x, torch.ones(30, dtype=dtype), 1e-6)
    assert y.dtype == dtype and torch.equal(y[1], x[1])
    torch.testing.assert_close(y, F.rms_norm(x, (30,), torch.ones(30, dtype=dtype), 1e-6))


def test_two_threads_give_the_same_numbers():
    x, weight = torch.randn(601, 256, requires_grad=True), torch.randn(256, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y = rms_norm(x, weight, 1e-6)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, weight])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_compiles_as_one_graph():
    x, weight = torch.randn(3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")(x, weight, 1e-6)
    torch.testing.assert_close(compiled, rms_norm(x, weight, 1e-6))


def test_a_wrong_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight is \[4\], expected \[5\]"):
        rms_norm(torch.zeros(2, 5), torch.ones(4), 1e-6)
