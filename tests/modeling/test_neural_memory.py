"""The NeuralMemory layer: parts, pads, state, gradients, update modes, precision."""

import pytest
import torch

from memzoo.modeling.neural_memory import NeuralMemory

B, D, H = 2, 12, 3


def build(dtype=torch.float64, **options) -> NeuralMemory:
    module = NeuralMemory(D, H, **{"chunk_size": 4, **options})
    module.init_weights(0.3)
    return module.to(dtype)


VARIANTS = [
    {},
    {"depth": 1, "residual": True, "clip": None},
    {"depth": 3, "conv_kernel": None, "threshold": 0.3, "read_own_write": False},
    {"activation": "gelu", "expansion": 1.0, "chunk_size": 1},
    {"update": "never"},
]


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS)
def test_any_split_is_one_function(options):
    module, x = build(**options), torch.randn(B, 19, D, dtype=torch.float64)
    whole, state = module(x, {})
    for sizes in ([1] * 19, [6, 13], [8, 1, 7, 3]):
        parts, carried = [], {}
        for part in x.split(sizes, 1):
            y, carried = module(part, carried)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
        assert carried.keys() == state.keys()
        for name, value in carried.items():
            torch.testing.assert_close(value, state[name], rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS)
def test_pads_and_other_rows_change_nothing(options):
    module, x = build(**options), torch.randn(B, 11, D, dtype=torch.float64)
    mask = torch.arange(11) < torch.tensor([[11], [6]])
    y, state = module(torch.where(mask[..., None], x, 7.0), {}, mask)
    for row, length in enumerate((11, 6)):
        alone, alone_state = module(x[row : row + 1, :length], {})
        torch.testing.assert_close(y[row : row + 1, :length], alone, rtol=1e-10, atol=1e-12)
        for name, value in alone_state.items():
            torch.testing.assert_close(state[name][row : row + 1], value, rtol=1e-10, atol=1e-12)


def test_gradients_reach_every_parameter_and_the_carried_state():
    module, x = build(), torch.randn(B, 9, D, dtype=torch.float64, requires_grad=True)
    _, state = module(x, {})
    y, _ = module(torch.randn(B, 6, D, dtype=torch.float64), state)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_detach_every_cuts_the_past():
    x = torch.randn(B, 12, D, dtype=torch.float64, requires_grad=True)
    module = build(detach_every=2, conv_kernel=None)  # chunks of 4: the cut is at token 8
    (grad,) = torch.autograd.grad(module(x, {})[0][:, 8:].sum(), x)
    assert grad[:, :8].abs().sum() == 0 and grad[:, 8:].abs().sum() > 0
    (grad,) = torch.autograd.grad(build(conv_kernel=None)(x, {})[0][:, 8:].sum(), x)
    assert grad[:, :8].abs().sum() > 0


@torch.no_grad()
def test_update_modes():
    x = torch.randn(B, 7, D, dtype=torch.float64)
    module = build(update="train", conv_kernel=None)
    learned, state = module(x, {})
    module.eval()
    fixed, empty = module(x, {})
    assert "position" in state and empty == {} and not torch.equal(learned, fixed)
    module.update = "never"
    torch.testing.assert_close(module(x, {})[0], fixed, rtol=0, atol=0)
    kept, same = module(x, state)  # a given memory is read, not changed
    assert all(same[name] is value for name, value in state.items()) and not torch.equal(kept, fixed)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 4])
def test_bfloat16_keeps_a_float32_state_that_stays_finite(depth):
    module = build(torch.bfloat16, depth=depth, theta_max=0.5, chunk_size=16)
    state = {}
    for _ in range(4):
        y, state = module(3 * torch.randn(1, 1000, D, dtype=torch.bfloat16), state)
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
    for name, value in state.items():
        assert value.dtype == {"conv": torch.bfloat16, "position": torch.int64}.get(name, torch.float32)
        assert value.shape[0] == 1 and value.isfinite().all()


def test_autocast_and_float32_agree():
    module, x = build(torch.float32), torch.randn(B, 9, D)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = module(x, {})
    assert state["weights_0"].dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x, {})[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "not a multiple"),
        ({"depth": 0}, "at least 1"),
        ({"chunk_size": 0}, "at least 1"),
        ({"update": "sometimes"}, "'always', 'train' or 'never'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(**{"hidden_size": D, "num_heads": H, **options})
