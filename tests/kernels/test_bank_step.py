"""One compiled token of a memory bank against the definition of its read, with one thread and with several."""

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.bank_attention import reference
from memzoo.kernels.bank_step import BankStep, BankWeights
from memzoo.kernels.selective_scan.fused import is_available

pytestmark = pytest.mark.skipif(not is_available(), reason="numba is not installed")
D, EPS = 40, 1e-3


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def build(heads, kv_heads, d, N, C, top_k, shared=0):
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64) / 4  # noqa: E731
    gate = (random(C - shared, D), random(C - shared)) if top_k else (None, None)
    return BankWeights(random(heads * d, D), *gate, *random(2, kv_heads, N, d) * 4, random(D, heads * d))


@pytest.mark.parametrize("normalize, eps", [(True, EPS), (False, None)])
@pytest.mark.parametrize(
    "heads, kv_heads, d, N, C, top_k, shared",
    [(4, 2, 16, 96, 6, 2, 1), (2, 1, 32, 30, 3, 3, 0), (4, 4, 16, 50, 1, 0, 0), (2, 1, 16, 640, 1, 0, 0)],
)
def test_against_the_definition(heads, kv_heads, d, N, C, top_k, shared, normalize, eps, threads):
    weights = build(heads, kv_heads, d, N, C, top_k, shared)
    for batch in (1, 2):
        x = torch.randn(batch, 1, D, dtype=torch.float64)
        with torch.no_grad():
            y, logits = BankStep(weights, C, shared, top_k, normalize, eps)(x)
        h = x if eps is None else F.rms_norm(x, (D,), None, eps)
        q, choice = (h @ weights.query.mT).unflatten(-1, (heads, d)), (None, None)
        if top_k:
            expected = h @ weights.gate.mT + weights.bias
            torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)
            log_p, chosen = expected.log_softmax(-1).topk(top_k)
            choice = chosen + shared, log_p.log_softmax(-1) if normalize else log_p
        read = reference(q, weights.k, weights.v, *choice, C, shared, "joint", d**-0.5, None)
        torch.testing.assert_close(y, read.flatten(2) @ weights.output.mT, rtol=1e-11, atol=1e-12)
        assert (logits is None) is (top_k == 0)


def test_weights_are_read_where_they_are():
    weights = build(2, 1, 16, 32, 1, 0)
    step, x = BankStep(weights), torch.randn(1, 1, D, dtype=torch.float64)
    with torch.no_grad():
        before = step(x)[0]
        weights.output.mul_(2)
        torch.testing.assert_close(step(x)[0], 2 * before)


def test_what_does_not_fit_is_left_to_others():
    weights = build(2, 1, 16, 32, 1, 0)
    step, x = BankStep(weights), torch.randn(2, 1, D, dtype=torch.float64)
    assert step(x) is None  # it would have a gradient
    with torch.no_grad():
        assert step(x) is not None and step(x.float()) is None
        assert step(x.expand(2, 3, D)) is None and step(torch.randn(3, 1, D).double()) is None
    assert BankStep.fits(weights) and not BankStep.fits(weights._replace(k=weights.k.float()))
    assert not BankStep.fits(build(4, 2, 8, 32, 1, 0))  # heads of half a vector
    assert not BankStep.fits(weights._replace(output=weights.output.mT.contiguous().mT))
