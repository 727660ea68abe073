"""The slot attention's Triton kernels without a GPU: run by the interpreter on tiny shapes, and compiled for sm_90."""

import pytest
import torch

from memzoo.kernels import available
from memzoo.kernels.slot_memory import empty_slots, slot_memory

pytest.importorskip("triton")

INTERPRETED = """
    import torch
    from memzoo.kernels.slot_memory.attention import slot_attention
    from memzoo.kernels.slot_memory.triton import triton_attention

    torch.manual_seed(0)

    def check(B, H, n, C, M, dk, dv, dtype, tolerance):
        offset = (torch.rand(B, n * C) > 0.4).cumsum(1).view(B, n, C)  # as of a tier that is not always written
        E = int(offset.max()) + M + C
        leaves = [torch.randn(s, dtype=dtype) for s in ((B, H, n, C, dk), (B, H, E, dk), (B, H, E, dv))]
        leaves.append(torch.randn(B, E, dtype=torch.float64))
        leaves[3][:, : M + 2] = -torch.inf  # the first queries have nothing to read
        base = torch.randn(B, n, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in leaves]
        results = []
        for attention in (slot_attention, triton_attention):
            y, peak, _ = attention(*leaves, base, offset, M, 0, False)
            torch.manual_seed(1)
            loss = (y * torch.randn_like(y)).sum() + (peak * torch.randn_like(peak)).sum()
            results.append((y, peak, *torch.autograd.grad(loss, leaves)))
        assert not results[0][0][0, 0, 0, 0].any() and results[0][1].max() > 0
        for expected, got in zip(*results):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)

    check(2, 2, 2, 5, 4, 3, 5, torch.float64, 1e-11)
    check(1, 1, 1, 64, 40, 20, 68, torch.float64, 1e-11)  # in halves
    check(1, 1, 2, 7, 3, 4, 4, torch.float32, 1e-4)
    print("agrees")
"""

COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from memzoo.kernels.slot_memory.triton import BLOCK, LAUNCH, backward_kernel, forward_kernel

    kinds = {"bias": "*fp64", "base": "*fp64", "d_bias": "*fp64", "offset": "*i64", "best": "*i32"}
    kinds |= dict.fromkeys(("H", "n", "C", "E", "dk", "dv", "M"), "i32")
    for kernel in (forward_kernel, backward_kernel):
        constants = dict(PRECISION="tf32x3", BLOCK=BLOCK, BLOCK_C=32, BLOCK_K=128, BLOCK_V=128)
        signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=LAUNCH)
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\\x7fELF"
        assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
    print("compiles")
"""


def test_interpreted_forward_and_backward_agree_with_torch(run):
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "agrees"


def test_compiles_for_sm_90_without_a_gpu(tmp_path, run):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiles"


def test_without_triton_cuda_takes_torch_operators_and_warns_once(monkeypatch):
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    available.find_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed") as caught:
            assert [available.has_triton("slot_memory") for _ in range(3)] == [False] * 3
        assert len(caught) == 1
    finally:
        available.find_triton.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [48, 128])
def test_on_a_gpu(width):
    q, k, v = (torch.randn(2, 3, 300, width, dtype=torch.float64) for _ in range(3))
    write, strength = torch.rand(2, 300) > 0.5, torch.randn(2, 300, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [x.detach().to(device).requires_grad_() for x in (q, k, v, strength)]
        state = empty_slots(2, 3, 64, width, width, torch.float64, device)
        options = {"write": write.to(device), "strength": leaves[3], "rate": 0.5, "decay": 0.99}
        (y, peak, _), state = slot_memory(*leaves[:3], state, **options)
        loss = y.square().sum() + peak.sum() + state.value.sum()
        results.append([x.cpu() for x in (y, peak, *state, *torch.autograd.grad(loss, leaves))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
