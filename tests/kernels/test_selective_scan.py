"""selective_scan: every implementation against the plain loop, in values and in all gradients."""

import pytest
import torch

from memzoo.kernels.selective_scan import fused, selective_scan
from memzoo.kernels.selective_scan.common import CHUNK

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
needs_numba = pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")
IMPLEMENTATIONS = ["chunked", pytest.param("fused", marks=needs_numba)]


@pytest.fixture(autouse=True)
def empty_is_nan():
    """Deterministic mode fills torch.empty with NaN, so that an output nobody wrote can't pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def make_inputs(batch=2, channels=5, time=7, states=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "u": normal(batch, time, channels).transpose(1, 2),
        "delta": normal(batch, time, channels).transpose(1, 2),
        "A": -normal(channels, states).exp(),
        "B": normal(batch, time, 2 * states)[..., :states].transpose(1, 2),
        "C": normal(batch, time, 2 * states)[..., states:].transpose(1, 2),
        "D": normal(channels),
        "z": normal(batch, time, 2 * channels)[..., channels:].transpose(1, 2),
        "delta_bias": normal(channels),
        "initial_state": normal(batch, channels, states),
    }


def run(inputs, implementation, **options):
    """y, final state and the gradients of a fixed random projection of both."""
    inputs = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = selective_scan(**inputs, implementation=implementation, **options)
    weight_y, weight_state = (
        torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(9)) for x in (y, state)
    )
    gradients = torch.autograd.grad((y * weight_y).sum() + (state * weight_state).sum(), list(inputs.values()))
    return {"y": y.detach(), "state": state.detach(), **{f"grad_{k}": g for k, g in zip(inputs, gradients)}}


def assert_same(got, expected, rtol=1e-11, atol=1e-11):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("time", [1, 2, 3, 15, 16, 17, 31, 32, 33, 97])
def test_lengths(implementation, time):
    assert CHUNK == 16  # the lengths above sit around its multiples
    inputs = make_inputs(time=time)
    assert_same(run(inputs, implementation, delta_softplus=True), run(inputs, "reference", delta_softplus=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels, states", [(1, 1), (63, 2), (64, 16), (65, 5), (130, 4)])
def test_widths(implementation, channels, states):
    inputs = make_inputs(channels=channels, states=states, time=19)
    assert_same(run(inputs, implementation, delta_softplus=True), run(inputs, "reference", delta_softplus=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("absent", [("D",), ("z",), ("delta_bias",), ("initial_state",), NAMES[5:]])
@pytest.mark.parametrize("softplus", [False, True])
def test_optional_arguments(implementation, absent, softplus):
    inputs = {k: v for k, v in make_inputs(time=20).items() if k not in absent}
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
    assert_same(
        run(inputs, implementation, delta_softplus=softplus), run(inputs, "reference", delta_softplus=softplus)
    )


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("options", [{}, {"mask": torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])}])
def test_gradcheck(implementation, options):
    inputs = [v.clone().requires_grad_() for v in make_inputs(channels=2, time=5, states=2).values()]
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(
            **dict(zip(NAMES, x)), delta_softplus=True, implementation=implementation, **options
        ),
        inputs,
    )


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_pads_are_exact_no_ops(implementation):
    """Left, middle and right pads full of NaN: outputs and state are those of the sequence without them."""
    compact = make_inputs(time=20)
    positions = torch.tensor([3, 4, 5, *range(9, 25), 30])  # of 35 steps
    mask = torch.zeros(2, 35, dtype=torch.long)
    mask[:, positions] = 1
    padded = dict(compact)
    for name in ("u", "delta", "B", "C", "z"):
        padded[name] = torch.full((2, compact[name].shape[1], 35), torch.nan, dtype=torch.float64)
        padded[name][:, :, positions] = compact[name]
    tensors = {k: v.detach().clone().requires_grad_() for k, v in padded.items()}
    y, state = selective_scan(**tensors, delta_softplus=True, mask=mask, implementation=implementation)
    y_compact, state_compact = selective_scan(**compact, delta_softplus=True, implementation=implementation)
    torch.testing.assert_close(y[:, :, positions], y_compact, rtol=0, atol=1e-13)
    torch.testing.assert_close(state, state_compact, rtol=0, atol=1e-13)
    assert not y[:, :, mask[0] == 0].any()
    if implementation != "reference":  # the plain loop multiplies NaN by zero in its gradient
        y.sum().backward()
        assert all(v.grad.isfinite().all() for v in tensors.values())
        assert not tensors["delta"].grad[:, :, mask[0] == 0].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mask_per_row_and_no_real_token(implementation):
    inputs = make_inputs(batch=4, time=37)
    mask = torch.rand(4, 37, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[1], mask[2] = False, True
    expected = run(inputs, "reference", delta_softplus=True, mask=mask)
    assert_same(run(inputs, implementation, delta_softplus=True, mask=mask), expected)
    assert torch.equal(expected["state"][1], inputs["initial_state"][1])


@pytest.mark.parametrize("implementation", ["auto", "reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("cut", [1, 16, 23, 49])
def test_split_invariance(implementation, cut):
    inputs = make_inputs(time=50)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(1)) > 0.3
    whole, state = selective_scan(**inputs, mask=mask, delta_softplus=True, implementation=implementation)
    parts, carried = [], inputs["initial_state"]
    for now in (slice(0, cut), slice(cut, 50)):
        part = {k: v[..., now] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
        part["initial_state"] = carried
        y, carried = selective_scan(**part, mask=mask[:, now], delta_softplus=True, implementation=implementation)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(carried, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_strides(implementation):
    inputs = make_inputs(batch=3, channels=6, time=18, states=4)
    expected = run(inputs, "reference", delta_softplus=True)
    assert_same(run({k: v.contiguous() for k, v in inputs.items()}, implementation, delta_softplus=True), expected)
    strided = {k: torch.stack((v, v), -1)[..., 0] for k, v in inputs.items()}
    y, _ = selective_scan(**strided, delta_softplus=True, implementation=implementation)
    torch.testing.assert_close(y, expected["y"])
    expanded = {**inputs, "u": inputs["u"][:1, :1].expand(3, 6, 18), "B": inputs["B"][:1].expand(3, -1, -1)}
    assert_same(run(expanded, implementation, delta_softplus=True), run(expanded, "reference", delta_softplus=True))


def test_outputs_do_not_depend_on_other_rows():
    inputs = make_inputs(batch=3, channels=70, time=40, dtype=torch.float32)
    y, _ = selective_scan(**inputs, delta_softplus=True)
    inputs["u"] = inputs["u"].clone()
    inputs["u"][1:] = 1e4
    assert torch.equal(selective_scan(**inputs, delta_softplus=True)[0][0], y[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"delta": torch.zeros(2, 5, 6)}, r"delta must have shape \[2, 5, 7\], got \[2, 5, 6\]"),
        ({"A": torch.zeros(4, 3)}, r"A must have shape \[5, 3\], got \[4, 3\]"),
        ({"B": torch.zeros(2, 7, 3)}, r"B must have shape \[2, 3, 7\]"),
        ({"mask": torch.ones(2, 6)}, r"mask must have shape \[2, 7\]"),
        ({"initial_state": torch.zeros(1, 5, 3)}, r"initial_state must have shape \[2, 5, 3\]"),
        ({"u": torch.zeros(2, 5)}, r"u must be \[batch, channels, time\], got shape \[2, 5\]"),
        ({"u": torch.zeros(2, 5, 0)}, "no time step"),
        ({"implementation": "cuda"}, "implementation must be auto, reference"),
        ({"D": torch.zeros(5, device="meta")}, "D is on meta, u is on cpu"),
    ],
)
def test_errors_name_the_argument(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**make_inputs(dtype=torch.float32), **change})
