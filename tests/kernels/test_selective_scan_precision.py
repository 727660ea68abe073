"""selective_scan: float32 accuracy, low precision, long sequences; seen by torch.compile, export and autocast."""

import pytest
import torch

from memzoo.kernels.selective_scan import causal_conv1d, fused, selective_scan, selective_scan_update
from memzoo.kernels.selective_scan.operators import scan_op

IMPLEMENTATIONS = [
    "chunked",
    pytest.param("fused", marks=pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")),
]


def make_inputs(batch=2, channels=70, time=50, states=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def sequence(size):
        return torch.randn(batch, time, size, generator=generator).to(dtype).transpose(1, 2)

    return {
        "u": sequence(channels),
        "delta": sequence(channels),
        "A": -torch.rand(channels, states, generator=generator) * 8,
        "B": sequence(states),
        "C": sequence(states),
        "D": torch.randn(channels, generator=generator),
        "z": sequence(channels),
        "delta_bias": torch.randn(channels, generator=generator) - 3,
        "delta_softplus": True,
    }


def cast(inputs, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def gradients(inputs, **options):
    tensors = {k: v.detach().requires_grad_() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    y, state = selective_scan(**{**inputs, **tensors}, **options)
    return y, state, torch.autograd.grad(y.float().square().sum() + state.sum(), list(tensors.values()))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_against_float64(implementation):
    inputs = make_inputs()
    y, state, grads = gradients(inputs, implementation=implementation)
    y64, state64, grads64 = gradients(cast(inputs, torch.float64), implementation="reference")
    for got, expected in zip((y, state, *grads), (y64, state64, *grads64)):
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() < 1e-6 * expected.abs().max()


@pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")
def test_elementary_functions_to_a_few_ulp():
    """Scans whose result is exp(x), softplus(x) or silu(x): the polynomials of the kernels, far into the tails."""
    x = torch.linspace(-60, 80, 100_003).reshape(1, 1, -1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    scan = {"A": torch.zeros(1, 1), "B": one, "C": one, "implementation": "fused"}
    decayed = [
        selective_scan(zero[..., :1], v.reshape(1, 1, 1), torch.ones(1, 1), one[..., :1], one[..., :1],
                       initial_state=torch.ones(1, 1, 1), implementation="fused")[0].item()
        for v in torch.linspace(-87, 88, 200)
    ]  # fmt: skip
    exact = torch.linspace(-87, 88, 200).double().exp()
    assert ((torch.tensor(decayed).double() - exact) / exact).abs().max() < 3e-7
    softplus = torch.stack(
        [selective_scan(one[..., k : k + 1], x[..., k : k + 1], **{**scan, "B": one[..., :1], "C": one[..., :1]},
                        delta_softplus=True)[0].squeeze() for k in range(0, x.shape[-1], 500)]
    )  # fmt: skip
    exact = torch.nn.functional.softplus(x[0, 0, ::500].double(), threshold=100)
    assert ((softplus.double() - exact) / exact).abs().max() < 5e-7
    silu = selective_scan(one, zero, D=torch.ones(1), z=x, **scan)[0].squeeze()
    exact = torch.nn.functional.silu(x[0, 0].double())
    assert ((silu.double() - exact).abs() / exact.abs().clamp(min=1e-30)).max() < 1e-6


@pytest.mark.parametrize("implementation", ["auto", "reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(implementation, dtype):
    inputs = make_inputs(dtype=dtype)
    y, state, grads = gradients(inputs, implementation=implementation)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert [g.dtype for g in grads] == [v.dtype for v in inputs.values() if isinstance(v, torch.Tensor)]
    y64, state64, grads64 = gradients(cast(inputs, torch.float64), implementation="reference")
    assert (y - y64).abs().max() < 1e-2 * y64.abs().max()
    assert (state - state64).abs().max() < 1e-5 * state64.abs().max()
    for got, expected in zip(grads, grads64):
        assert (got - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hundred_thousand_bf16_tokens_stay_finite(implementation):
    inputs = make_inputs(batch=1, channels=4, time=100_000, states=2, dtype=torch.bfloat16)
    inputs |= {"A": inputs["A"] - 1, "delta_bias": torch.zeros(4)}
    y, state, grads = gradients(inputs, implementation=implementation)
    assert all(x.isfinite().all() for x in (y, state, *grads))
    tail = {k: v[..., -2000:] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    # 2000 tokens forget everything before them, so a scan of those alone must end in the same state
    torch.testing.assert_close(state, selective_scan(**tail, implementation="reference")[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_infinity_and_nan_propagate(implementation):
    for value in (torch.nan, torch.inf):
        inputs = make_inputs(time=20)
        inputs["u"] = inputs["u"].clone()
        inputs["u"][0, 3, 5] = value
        y, state = selective_scan(**inputs, implementation=implementation)
        assert not y[0, 3, 5].isfinite()
        assert not state[0, 3].isfinite().all()
        assert y[1].isfinite().all()
        assert y[0, :3].isfinite().all()


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_autocast_does_not_touch_the_inside(implementation):
    inputs = make_inputs(time=20)
    expected = gradients(inputs, implementation=implementation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(inputs, implementation=implementation)
        torch.testing.assert_close(causal_conv1d(inputs["u"], inputs["A"]), causal_conv1d(inputs["u"], inputs["A"]))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_operator_registration(implementation):
    inputs = make_inputs(channels=3, time=9, dtype=torch.float64)
    tensors = [v.detach().requires_grad_() for v in inputs.values() if isinstance(v, torch.Tensor)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    for arguments in ((*tensors, None, None), (*tensors[:5], None, None, None, None, mask)):
        torch.library.opcheck(scan_op, (*arguments, True, implementation, True))


@pytest.mark.parametrize("time", [1, 20])
def test_compiles_without_graph_breaks(time):
    inputs = make_inputs(channels=6, time=time)

    def block(u, **others):
        x, tail = causal_conv1d(u, others["A"], others["D"])
        y, state = selective_scan(x * 2, **others)
        return y + 1, tail, state

    def loss_and_gradients(function):
        tensors = {k: v.detach().requires_grad_() if k != "delta_softplus" else v for k, v in inputs.items()}
        outputs = function(**tensors)
        tensors.pop("delta_softplus")
        return outputs, torch.autograd.grad(sum(x.sum() for x in outputs), list(tensors.values()))

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(loss_and_gradients(compiled), loss_and_gradients(block))
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), block(**inputs))


def test_inductor():
    inputs = make_inputs(channels=6, time=20)
    compiled = torch.compile(selective_scan, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs), selective_scan(**inputs))


def test_exports_with_dynamic_length():
    class Block(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            x, tail = causal_conv1d(u, A)
            return (*selective_scan(x, delta, A, B, C, delta_softplus=True), tail)

    names = ("u", "delta", "A", "B", "C")
    short, long = (tuple(make_inputs(channels=6, time=t)[k] for k in names) for t in (20, 45))
    time = {2: torch.export.Dim("time", min=4, max=4096)}
    program = torch.export.export(Block(), short, dynamic_shapes=(time, time, None, time, time))
    assert "memzoo.selective_scan" in str(program.graph)
    torch.testing.assert_close(program.module()(*long), Block()(*long))


def test_exports_a_single_step():
    class Step(torch.nn.Module):
        def forward(self, state, u, A, B):
            return selective_scan_update(state, u, u, A, B, B, delta_softplus=True)

    arguments = (torch.randn(2, 6, 4), torch.randn(2, 6), -torch.rand(6, 4), torch.randn(2, 4))
    program = torch.export.export(Step(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Step()(*arguments))
