"""The Triton kernels without a GPU: run by the interpreter on tiny shapes, and compiled for sm_90."""

import pytest
import torch

from memzoo.kernels import available
from memzoo.kernels import selective_scan as package
from memzoo.kernels.selective_scan import selective_scan

pytest.importorskip("triton")

INTERPRETED = """
    import torch
    from memzoo.kernels.selective_scan import selective_scan

    torch.manual_seed(0)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")

    def check(batch, channels, time, states, dtype, tolerance, absent=(), masked=False, softplus=True):
        shapes = [(batch, channels, time), (batch, channels, time), (channels, states), (batch, states, time),
                  (batch, states, time), (channels,), (batch, channels, time), (channels,), (batch, channels, states)]
        inputs = {k: torch.randn(s, dtype=dtype) for k, s in zip(names, shapes) if k not in absent}
        inputs["A"] = -inputs["A"].exp()
        inputs["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
        if not softplus:
            inputs["delta"] = inputs["delta"].abs()
        mask = torch.rand(batch, time) > 0.3 if masked else None
        results = []
        for implementation in ("reference", "triton"):
            tensors = {k: v.clone().requires_grad_() for k, v in inputs.items()}
            y, state = selective_scan(
                **tensors, delta_softplus=softplus, mask=mask, implementation=implementation)
            torch.manual_seed(1)
            loss = (y * torch.randn(y.shape)).sum() + (state * torch.randn(state.shape)).sum()
            results.append((y, state, *torch.autograd.grad(loss, list(tensors.values()))))
        for name, expected, got in zip(("y", "state", *tensors), *results):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")

    check(2, 3, 1, 1, torch.float64, 1e-11)
    check(1, 3, 16, 3, torch.float64, 1e-11, masked=True)
    check(2, 9, 35, 3, torch.float64, 1e-11, masked=True)
    check(1, 2, 17, 2, torch.float64, 1e-11, absent=names[5:], softplus=False)
    check(1, 2, 18, 2, torch.float32, 1e-5)
    check(1, 2, 5, 2, torch.float64, 1e-11, absent=("z",), masked=True)
    print("agrees")
"""

COMPILED = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from memzoo.kernels.selective_scan.triton import BLOCK_I, CHUNK, backward_kernel, forward_kernel

    flags = ("SOFTPLUS", "HAS_D", "HAS_Z", "HAS_BIAS", "HAS_INITIAL", "HAS_MASK", "HAS_FINAL", "SAVE")
    options = dict.fromkeys(flags, True)
    options |= {"CHUNK": CHUNK, "BLOCK_I": BLOCK_I, "BLOCK_N": 16}
    integers = {"T", "I", "N", "chunks"}
    for kernel in (forward_kernel, backward_kernel):
        kinds = {
            name: "constexpr" if name in options
            else "*u8" if name == "mask"
            else "i32" if name in integers or name.endswith(("_b", "_t"))
            else "*fp32"
            for name in kernel.arg_names
        }
        constants = {name: value for name, value in options.items() if name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.asm["cubin"][:4] == b"\\x7fELF"
    print("compiles")
"""


def test_interpreted_forward_and_backward_agree_with_the_reference(run):
    assert run(INTERPRETED, TRITON_INTERPRET="1") == "agrees"


def test_compiles_for_sm_90_without_a_gpu(tmp_path, run):
    assert run(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiles"


def test_refuses_cpu_tensors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, A = torch.ones(1, 2, 3), -torch.ones(2, 1)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        selective_scan(x, x, A, x[:, :1], x[:, :1], implementation="triton")


def test_cuda_without_triton_takes_torch_operators_and_warns_once(monkeypatch):
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    available.find_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Triton is not installed") as caught:
            assert [package._choose("auto", "cuda") for _ in range(3)] == ["chunked"] * 3
        assert len(caught) == 1
    finally:
        available.find_triton.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    u, delta, z = (torch.randn(2, 300, 70, generator=generator, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    B, C = (torch.randn(2, 16, 300, generator=generator, dtype=torch.float64) for _ in range(2))
    A = -torch.rand(70, 16, generator=generator, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        tensors = [x.detach().to(device).requires_grad_() for x in (u, delta, A, B, C)]
        y, state = selective_scan(*tensors, z=z.to(device), delta_softplus=True)
        results.append([x.cpu() for x in (y, state, *torch.autograd.grad(y.sum() + state.sum(), tensors))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
