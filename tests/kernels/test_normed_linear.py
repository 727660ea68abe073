"""A norm and linear maps in one against the two, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.normed_linear import normed_linear

EPS = 1e-3


def plainly(x, weights):
    h = F.rms_norm(x, x.shape[-1:], None, EPS)
    return [F.linear(h, weight) for weight in weights]


@pytest.mark.parametrize("outputs", [(5,), (4, 3)])
@pytest.mark.parametrize("frozen", ["nothing", "x", "weights"])
def test_agrees_with_norm_and_linear(outputs, frozen):
    x = torch.randn(2, 7, 6, dtype=torch.float64).mT.contiguous().mT.requires_grad_(frozen != "x")  # any strides
    weights = [torch.randn(n, 6, dtype=torch.float64, requires_grad=frozen != "weights") for n in outputs]
    leaves = [y for y in (x, *weights) if y.requires_grad]
    results = [normed_linear(x, weights, EPS), plainly(x, weights)]
    grads = [torch.randn_like(y) for y in results[0]]
    got, expected = ([*ys, *torch.autograd.grad(ys, leaves, grads)] for ys in results)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_an_output_that_is_not_used():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    got, expected = (
        torch.autograd.grad(f(x, weights)[1].square().sum(), [x, *weights], allow_unused=True)
        for f in (lambda *a: normed_linear(*a, EPS), plainly)
    )
    for a, b in zip(got, expected):
        assert (a is None or not a.any()) if b is None or not b.any() else torch.allclose(a, b)


def test_half_precision_zeros_and_compiling():
    x, weight = torch.randn(4, 16), torch.randn(3, 16, requires_grad=True)
    half = normed_linear(300 * x.half(), [weight.half()], EPS)[0]  # whose product before the norm has no room
    assert half.dtype == torch.float16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), plainly(300 * x, [weight])[0], rtol=1e-2, atol=1e-2)
    assert not normed_linear(torch.zeros(2, 16), [weight], EPS)[0].any()
    compiled = torch.compile(lambda x: normed_linear(x, [weight], EPS)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), plainly(x, [weight])[0])
