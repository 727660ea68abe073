"""Bank attention's Triton kernels without a GPU: run by the interpreter on tiny shapes, and compiled for sm_90."""

import pytest
import torch

from memzoo.kernels.bank_attention import bank_attention

pytest.importorskip("triton")

INTERPRETED = """
    import torch
    from memzoo.kernels.bank_attention import bank_attention, reference

    def check(H, kv_heads, shared, mixing, d, size, dtype, tolerance, B=2, T=11, chapters=6, slots=2, offset=0.0):
        torch.manual_seed(0)
        q = torch.randn(B, T, H, d, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(kv_heads, chapters * size, d, dtype=dtype, requires_grad=True) for _ in range(2))
        with torch.no_grad():
            q[..., 0] += offset
            k[..., 0] += offset
        chosen = torch.rand(B, T, chapters - shared).topk(slots, -1).indices + shared
        chosen[0, 0, 1] = -1
        chosen[1, -1] = -1
        w = torch.randn(B, T, slots, dtype=dtype, requires_grad=True)
        results = []
        for op, options in ((bank_attention, {"implementation": "triton"}), (reference, {})):
            out = op(q, k, v, chosen, w, chapters, shared, mixing, **options)
            weight = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
            results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v, w))])
        for got, want in zip(*results):
            assert (got - want).abs().max() <= tolerance * want.abs().max(), (got - want).abs().max()

    check(4, 2, 0, "joint", 6, 7, torch.float64, 1e-12)
    check(2, 1, 1, "joint", 16, 70, torch.float64, 1e-12)
    check(2, 2, 2, "separate", 20, 5, torch.float64, 1e-12)
    check(2, 1, 1, "joint", 4, 5, torch.float64, 1e-10, offset=40.0)
    check(2, 1, 0, "separate", 16, 16, torch.float32, 1e-5)
    check(1, 1, 0, "joint", 4, 3, torch.float64, 1e-12, T=40, chapters=2)
    print("agrees")
"""

COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from memzoo.kernels.bank_attention import triton as kernels

    INTEGERS = {"N", "d", "H", "size"}
    PLACES = {"token", "tile_chapter", "tile_start", "begins", "ends", "first_key", "last_key"}
    for name in ("forward_kernel", "query_kernel", "bank_kernel"):
        kernel = getattr(kernels, name)
        for kind, precision in (("*fp32", "tf32x3"), ("*bf16", "ieee"))[name != "forward_kernel" :]:
            blocks = dict(BLOCK_R=kernels.BLOCK_R, BLOCK_K=kernels.BLOCK_K, BLOCK_D=64)
            constants = dict(GROUPS=2, PRECISION=precision, **blocks)
            wide = {"lse", "norm", "delta", "dq", "dk", "dv"}
            signature = {
                argument: "constexpr" if argument in constants
                else "i32" if argument in INTEGERS
                else "*i64" if argument in PLACES
                else "fp32" if argument == "scale"
                else "*fp32" if argument in wide
                else kind
                for argument in kernel.arg_names
            }
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
            assert ".target sm_90" in compiled.asm["ptx"]
            assert compiled.asm["cubin"][:4] == b"\\x7fELF"
            assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    print("compiles")
"""


def test_interpreted_kernels_agree_with_the_reference(run):
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "agrees"


def test_compiles_for_sm_90_without_a_gpu(tmp_path, run):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiles"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mixing", ["joint", "separate"])
def test_on_a_gpu(mixing):
    q = torch.randn(2, 300, 4, 64)
    k, v = torch.randn(2, 1024, 64), torch.randn(2, 1024, 64)
    chosen, w = torch.rand(2, 300, 15).topk(4, -1).indices + 1, torch.randn(2, 300, 4)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v, w)]
        out = bank_attention(*leaves[:3], chosen.to(device), leaves[3], 16, 1, mixing)
        results.append([x.cpu() for x in (out, *torch.autograd.grad(out.square().sum(), leaves))])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
