"""The linear memory's Triton kernel without a GPU: run by the interpreter on tiny shapes, and compiled for sm_90."""

from itertools import pairwise

import pytest
import torch

from memzoo.kernels.neural_memory import neural_memory

pytest.importorskip("triton")

INTERPRETED = """
    import torch
    from memzoo.kernels.neural_memory.chunked import neural_memory_chunked, segments
    from memzoo.kernels.neural_memory.coefficients import coefficients
    from memzoo.kernels.neural_memory.triton import fits, forward

    torch.manual_seed(0)

    def check(N, G, C, dk, dv, dtype, tolerance, own_write=True, ends=None):
        q, k, v = (torch.randn(N * G, C, d, dtype=dtype) * d**-0.5 for d in (dk, dk, dv))
        gates = torch.rand(2, N * G, C, dtype=dtype)
        theta, mask = torch.rand(N * G, C, dtype=dtype), (torch.rand(N * G, C) > 0.2).to(dtype)
        state, start = torch.randn(G, 2 * dv, dk, dtype=dtype), torch.randn(G, dv, dk, dtype=dtype)
        ends = torch.tensor(ends or [N * C] * G)
        rest = (ends, None, None, "silu", False, own_write, None, True)
        expected = neural_memory_chunked(q, k, v, gates, theta, mask, [state], [start], *rest)
        c = coefficients(gates, mask)
        read, inside = c.read(own_write)
        factors = (read, inside * theta[:, None], c.end() * theta[..., None], c.mix())
        assert fits(k, v, 1, None, None)
        size = segments(N, C)[0][1]
        y, last, final_start, kept, err = forward(q, k, v, *factors, state, start, ends, size, True)
        for got, want in zip((y, last, final_start, kept[:-1], err),
                             (expected[0], *expected[1], *expected[2], expected[3][0][:-1], expected[3][1])):
            torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)

    check(3, 2, 16, 16, 16, torch.float64, 1e-11)
    check(6, 2, 16, 24, 40, torch.float64, 1e-11, own_write=False, ends=[37, 96])
    check(2, 1, 64, 20, 33, torch.float32, 1e-4)
    print("agrees")
"""

COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from memzoo.kernels.neural_memory.triton import BLOCK_V, forward_kernel

    for C, width in ((16, 64), (64, 64), (64, 128)):
        constants = dict(SAVE=True, PRECISION="tf32x3", C=C, BLOCK_K=width, BLOCK_V=BLOCK_V)
        integers = {"N", "G", "dk", "dv", "size"}
        kinds = {
            name: "constexpr" if name in constants
            else "i32" if name in integers
            else "*i64" if name == "ends"
            else "*fp32"
            for name in forward_kernel.arg_names
        }
        source = ASTSource(fn=forward_kernel, signature=kinds, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\\x7fELF"
        assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    print("compiles")
"""


def test_interpreted_forward_agrees_with_the_chunked_form(run):
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "agrees"


def test_compiles_for_sm_90_without_a_gpu(tmp_path, run):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiles"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("depth", [1, 2])
def test_on_a_gpu(depth):
    dims = [32, *[48] * (depth - 1), 32]
    tokens = [torch.nn.functional.normalize(torch.randn(2, 3, 100, 32), dim=-1) for _ in range(3)]
    gates = [torch.rand(2, 3, 100) * scale for scale in (0.1, 0.9, 0.2)]
    W = [torch.randn(2, 3, o, i) * i**-0.5 for i, o in pairwise(dims)]
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (*tokens, *gates, *W)]
        y, state = neural_memory(*leaves[:6], leaves[6:], None, 16)
        loss = y.square().sum() + sum(x.square().sum() for x in state.weights)
        results.append([x.cpu() for x in (y, *state.weights, *torch.autograd.grad(loss, leaves))])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
