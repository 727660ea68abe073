"""The linear memory's Triton kernels without a GPU: run by the interpreter on tiny shapes, and compiled for sm_90."""

from itertools import pairwise

import pytest
import torch

from memzoo.kernels.neural_memory import neural_memory

pytest.importorskip("triton")

INTERPRETED = """
    import torch
    from memzoo.kernels.neural_memory import triton
    from memzoo.kernels.neural_memory.chunked import _backward_op, neural_memory_chunked, segments
    from memzoo.kernels.neural_memory.coefficients import coefficients

    torch.manual_seed(0)

    def check(N, G, C, dk, dv, dtype, tolerance, own_write=True, ends=None, clip=None, threshold=None, detach=None):
        q, k, v, d_y = (torch.randn(N * G, C, d, dtype=dtype) * d**-0.5 for d in (dk, dk, dv, dv))
        gates = torch.rand(2, N * G, C, dtype=dtype)
        theta, mask = torch.rand(N * G, C, dtype=dtype), (torch.rand(N * G, C) > 0.2).to(dtype)
        state, d_state = torch.randn(2, G, 2 * dv, dk, dtype=dtype)
        start, d_start = torch.randn(2, G, dv, dk, dtype=dtype)
        ends = torch.tensor(ends or [N * C] * G)
        rest = (ends, clip, threshold, "silu", False, own_write, detach)
        expected = neural_memory_chunked(q, k, v, gates, theta, mask, [state], [start], *rest, True)
        assert triton.fits(k, v, 1, clip, threshold)
        size, c = segments(N, C)[0][1], coefficients(gates, mask)
        options = (size, True, clip, threshold)
        y, last, final_start, kept, err = triton.forward(q, k, v, theta, c, own_write, state, start, ends, *options)
        got = [y, last, final_start, kept[:-1], err]
        want = [expected[0], *expected[1], *expected[2], expected[3][0][:-1], expected[3][1]]
        want += _backward_op(d_y, [d_state], [d_start], q, k, theta, mask, [start], ends, expected[3], *rest[1:])
        options = (size, clip, threshold, own_write, detach)
        inputs, saved = (q, k, theta, mask), [kept, err, c.D, c.P]
        grads, *first = triton.backward(d_y, d_state, d_start, inputs, start, ends, saved, *options)
        for x, y in zip((*got, *grads, *first), want, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)

    check(3, 2, 16, 16, 16, torch.float64, 1e-11)
    check(6, 2, 16, 24, 40, torch.float64, 1e-11, own_write=False, ends=[37, 96], detach=2)
    check(5, 2, 16, 16, 24, torch.float64, 1e-11, ends=[33, 80], clip=1.5, threshold=2.0)
    check(2, 1, 64, 20, 33, torch.float32, 1e-3, clip=2.0)
    print("agrees")
"""

COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from memzoo.kernels.neural_memory.triton import BLOCK_V, STAGES, backward_kernel, forward_kernel, warps

    kernel = {"forward": forward_kernel, "backward": backward_kernel}[sys.argv[1]]
    for C, width, clip in ((16, 64, False), (64, 64, True), (64, 128, False)):
        constants = dict(PRECISION="tf32x3", C=C, BLOCK_K=width, BLOCK_V=64 if clip else BLOCK_V, CLIP=clip)
        constants |= dict(THRESHOLD=clip, SAVE=True, DETACH=2)
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        integers, numbers = {"N", "G", "dk", "dv", "size", "pieces"}, {"clip", "threshold"}
        kinds = {
            name: "constexpr" if name in constants
            else "i32" if name in integers
            else "fp32" if name in numbers
            else "*i64" if name == "ends"
            else "*fp32"
            for name in kernel.arg_names
        }
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        options = {"num_warps": warps(constants["BLOCK_V"])}
        if kernel is backward_kernel:
            options["num_stages"] = STAGES
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\\x7fELF"
        assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    print("compiles")
"""


def test_interpreted_kernels_agree_with_the_chunked_form(run):
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "agrees"


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_compiles_for_sm_90_without_a_gpu(kernel, tmp_path, run):
    program = COMPILED.replace("sys.argv[1]", repr(kernel))
    assert run(program, TRITON_CACHE_DIR=str(tmp_path)) == "compiles"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("depth", [1, 2])
def test_on_a_gpu(depth, clip):
    dims = [32, *[48] * (depth - 1), 32]
    tokens = [torch.nn.functional.normalize(torch.randn(2, 3, 100, 32), dim=-1) for _ in range(3)]
    gates = [torch.rand(2, 3, 100) * scale for scale in (0.1, 0.9, 0.2)]
    W = [torch.randn(2, 3, o, i) * i**-0.5 for i, o in pairwise(dims)]
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (*tokens, *gates, *W)]
        y, state = neural_memory(*leaves[:6], leaves[6:], None, 16, clip=clip)
        loss = y.square().sum() + sum(x.square().sum() for x in state.weights)
        results.append([x.cpu() for x in (y, *state.weights, *torch.autograd.grad(loss, leaves))])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
