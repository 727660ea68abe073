"""The norm in front of a memory, against its definition."""

import torch
from torch.autograd import gradcheck

from memzoo.adapters.blocks import EPS
from memzoo.kernels.rms_norm import rms_norm


def normalize(x):
    return rms_norm(x, None, EPS)


def test_normalize():
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(normalize, x)
    torch.testing.assert_close(normalize(x), torch.nn.functional.rms_norm(x, (7,), eps=EPS))
    assert torch.equal(normalize(torch.zeros(1, 3)), torch.zeros(1, 3))
    half = x.detach().bfloat16()
    torch.testing.assert_close(normalize(half), torch.nn.functional.rms_norm(half, (7,), eps=EPS))
    compiled = torch.compile(normalize, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), normalize(x))
