"""RMSNorm with a sigmoid gate: the compiled form against torch's operators, in float64, with gradients."""

import pytest
import torch

from memzoo.kernels.neural_memory import gated_norm as package
from memzoo.kernels.neural_memory.gated_norm import gated_norm


@pytest.mark.skipif(not package.is_available(), reason="numba is not installed")
@pytest.mark.parametrize("strided", [False, True])
def test_compiled_form_is_torchs(monkeypatch, strided):
    x = torch.randn(2, 3, 5, 7).double()
    x = (x.transpose(1, 2) if strided else x).requires_grad_()
    weight, gate = torch.randn(7).double().requires_grad_(), torch.randn(*x.shape[:2], x.shape[2] * 7).double()
    leaves, sums = [x, weight, gate.requires_grad_()], torch.randn_like(gate)

    def run():
        y = gated_norm(*leaves, 1e-6)
        with torch.no_grad():
            assert torch.equal(gated_norm(*leaves, 1e-6), y)
        return y, *torch.autograd.grad((y * sums).sum(), leaves)

    compiled = run()
    monkeypatch.setattr(package, "is_available", lambda: False)
    torch.testing.assert_close(compiled, run(), rtol=1e-12, atol=1e-12)


def test_half_precision_is_torchs():
    x, gate = torch.randn(2, 3, 2, 8).bfloat16(), torch.randn(2, 3, 16).bfloat16()
    y = gated_norm(x, torch.ones(8).bfloat16(), gate, 1e-6)
    expected = torch.nn.functional.rms_norm(x.double(), (8,), eps=1e-6).reshape(2, 3, 16) * gate.double().sigmoid()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.02)
