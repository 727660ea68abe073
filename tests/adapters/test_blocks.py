"""The norm in front of a memory, against its definition."""

import torch
from torch.autograd import gradcheck

from memzoo.adapters.blocks import EPS, Normalize


def test_normalize():
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(Normalize.apply, x)
    torch.testing.assert_close(Normalize.apply(x), torch.nn.functional.rms_norm(x, (7,), eps=EPS))
    assert torch.equal(Normalize.apply(torch.zeros(1, 3)), torch.zeros(1, 3))
    half = x.detach().bfloat16()
    torch.testing.assert_close(Normalize.apply(half), torch.nn.functional.rms_norm(half, (7,), eps=EPS))
    compiled = torch.compile(Normalize.apply, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), Normalize.apply(x))
