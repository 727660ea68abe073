"""The neural memory's chunked form and its single step against the loop over tokens, in float64, with gradients."""

from itertools import chain, pairwise

import pytest
import torch

from memzoo.kernels.neural_memory import fused, neural_memory, neural_memory_read, reference

B, H, DK, DV, HIDDEN = 2, 2, 5, 5, 7


@pytest.fixture(autouse=True, params=["fused", "torch"])
def form(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(fused, "is_available", lambda: False)
    elif not fused.is_available():
        pytest.skip("numba is not installed")


def inputs(T: int, depth: int, grad: bool = True, dk: int = DK) -> list[list[torch.Tensor]]:
    """q, k, v; alpha, eta, theta; weights; momentum; start."""
    dims = [dk, *[HIDDEN] * (depth - 1), DV]
    tokens = [torch.nn.functional.normalize(torch.randn(B, H, T, d), dim=-1) for d in (dk, dk, DV)]
    gates = [torch.rand(B, H, T) * scale for scale in (0.3, 0.9, 0.5)]
    W, S, start = ([torch.randn(B, H, o, i) * i**-0.5 for i, o in pairwise(dims)] for _ in range(3))
    start = [w + 0.3 * s for w, s in zip(W, start)]
    groups = tokens, gates, W, [0.1 * s for s in S], start
    return [[x.double().requires_grad_(grad) for x in group] for group in groups]


def both(tokens, gates, W, S, start, chunk_size, mask, position, **options):
    """[y, weights, momentum, start] of the op and of the reference; the positions are compared here."""
    y, state = neural_memory(
        *tokens, *gates, W, S, chunk_size, mask, start=start or None, position=position, **options
    )
    at = torch.zeros(B, dtype=torch.int64) if position is None else position
    expected = reference(*tokens, *gates, W, S, start or W, at, chunk_size, mask, **options)
    assert torch.equal(state.position, expected[4])
    return [y, *state.weights, *state.momentum, *state.start], [expected[0], *chain(*expected[1:4])]


def assert_agree(got, expected, leaves):
    weights = [torch.randn_like(x) for x in got]
    gradients = [
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(out, weights)), leaves, allow_unused=True, materialize_grads=True
        )
        for out in (got, expected)
    ]
    for x, y in zip((*got, *gradients[0]), (*expected, *gradients[1])):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize(
    ("depth", "chunk_size", "T"),
    [(1, 4, 11), (2, 1, 6), (2, 16, 40), (1, 64, 70), (2, 64, 130), (4, 5, 15), (2, 4, 1)],
)
def test_agrees_with_the_loop(depth, chunk_size, T, continued, masked):
    tokens, gates, W, S, start = inputs(T, depth)
    mask = (torch.rand(B, T) > 0.3) if masked else None
    position = torch.tensor([min(3, chunk_size - 1), min(1, chunk_size - 1)]) if continued else None
    start = start if continued else []
    got, expected = both(tokens, gates, W, S, start, chunk_size, mask, position)
    assert_agree(got, expected, [*tokens, *gates, *W, *S, *start])


@pytest.mark.parametrize("T", [1, 11])
@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.7},
        {"clip": 0.7, "threshold": 2.0, "activation": "gelu"},
        {"residual": True},
        {"read_own_write": False, "residual": True},
        {"read_own_write": False, "threshold": 1.5},
    ],
)
def test_options_agree_with_the_loop(options, T):
    tokens, gates, W, S, start = inputs(T, 3)
    mask = torch.rand(B, T) > 0.2
    got, expected = both(tokens, gates, W, S, start, 4, mask, torch.tensor([2, 0]), **options)
    assert_agree(got, expected, [*tokens, *gates, *W, *S, *start])


@pytest.mark.parametrize("T", [1, 11])
@pytest.mark.parametrize("residual", [True, False])
def test_normalize_is_unit_length_of_q_and_k(T, residual):
    tokens, gates, W, S, start = inputs(T, 2)
    tokens[0].data *= 2
    tokens[1].data[:, :, 0] = 0
    at = torch.tensor([2, 0])
    y, state = neural_memory(*tokens, *gates, W, S, 4, normalize=True, start=start, position=at, residual=residual)
    units = [torch.nn.functional.normalize(x, dim=-1) for x in tokens[:2]]
    expected = reference(*units, tokens[2], *gates, W, S, start, at, 4, residual=residual)
    got = [y, *state.weights, *state.momentum]
    assert_agree(got, [expected[0], *chain(*expected[1:3])], [*tokens, *gates, *W, *S, *start])


@pytest.mark.parametrize("detach_every", [1, 2])
def test_truncation_agrees_with_the_loop(detach_every):
    tokens, gates, W, S, start = inputs(23, 2)
    mask = torch.arange(23) < torch.tensor([[23], [10]])
    got, expected = both(tokens, gates, W, S, start, 3, mask, torch.tensor([1, 2]), detach_every=detach_every)
    assert_agree(got, expected, [*tokens, *gates, *W, *S, *start])


def test_gates_at_their_limits_are_exact():
    tokens, gates, W, S, start = inputs(9, 2)
    for gate, columns in zip(gates, (([2, 7], 1.0), ([3, 4], 0.0), ([5], 0.0))):
        gate.data[:, :, columns[0]] = columns[1]
    got, expected = both(tokens, gates, W, S, start, 4, None, torch.tensor([0, 3]))
    assert_agree(got, expected, [*tokens, *gates, *W, *S, *start])


def test_gradcheck():
    tokens, gates, W, S, start = inputs(5, 2)
    leaves = [*tokens, *gates, *W, *S, *start]

    def op(*x):
        y, state = neural_memory(*x[:6], x[6:8], x[8:10], 2, clip=0.8, start=x[10:], position=torch.tensor([1, 0]))
        return y, *state.weights, *state.momentum, *state.start

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"clip": 0.7, "activation": "gelu", "normalize": True},
        {"threshold": 2.0, "residual": True, "read_own_write": False},
        {"residual": True, "normalize": True},
    ],
)
@pytest.mark.parametrize("depth", [1, 3])
def test_single_tokens_are_the_sequence(depth, options):
    tokens, gates, W, S, start = inputs(9, depth, grad=False)
    mask, at = torch.rand(B, 9) > 0.3, torch.tensor([2, 0])
    whole, final = neural_memory(*tokens, *gates, W, S, 4, mask, start=start, position=at, **options)
    reads, state = [], (W, S, start, at)
    for t in range(9):
        one = [x[:, :, t : t + 1] for x in (*tokens, *gates)]
        y, state = neural_memory(*one, *state[:2], 4, mask[:, t : t + 1], start=state[2], position=state[3], **options)
        reads.append(y)
    torch.testing.assert_close(torch.cat(reads, 2), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(list(chain(*state[:3])), list(chain(*final[:3])), rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("read_own_write", [True, False])
def test_any_split_is_one_function(chunk_size, read_own_write):
    tokens, gates, W, S, _ = inputs(70, 2, grad=False)
    options = {"chunk_size": chunk_size, "clip": 1.0, "read_own_write": read_own_write}
    whole, final = neural_memory(*tokens, *gates, W, S, **options)
    for sizes in ([1] * 70, [33, 1, 36], [64, 6], [5, 65]):
        reads, state = [], (W, S, None, None)
        for part in zip(*(x.split(sizes, 2) for x in (*tokens, *gates))):
            y, state = neural_memory(*part, *state[:2], start=state[2], position=state[3], **options)
            reads.append(y)
        torch.testing.assert_close(torch.cat(reads, 2), whole, rtol=1e-10, atol=1e-12)
        for got, expected in zip(state, final):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_causality_is_exact_and_pads_change_nothing():
    tokens, gates, W, S, _ = inputs(40, 2, grad=False)
    whole, final = neural_memory(*tokens, *gates, W, S, 8)
    changed = [x.clone() for x in (*tokens, *gates)]
    for x in changed:
        x[:, :, 21] = x[:, :, 21].flip(0) * 0.7
    after, _ = neural_memory(*changed, W, S, 8)
    assert torch.equal(after[:, :, :21], whole[:, :, :21]) and not torch.equal(after[:, :, 21], whole[:, :, 21])
    # the same tokens with pads of any content in between
    real = torch.rand(B, 70).argsort(1) < 40
    index = torch.where(real, real.cumsum(1) - 1, 39)[:, None].expand(B, H, 70)
    padded = [x.gather(2, index[..., None].expand(B, H, 70, x.shape[-1])) for x in tokens]
    y, state = neural_memory(*padded, *(x.gather(2, index) for x in gates), W, S, 8, real)
    assert not y.transpose(1, 2)[~real].any()
    torch.testing.assert_close(y.transpose(1, 2)[real].view(B, 40, H, DV).transpose(1, 2), whole)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    _, same = neural_memory(*tokens, *gates, W, S, 8, torch.zeros(B, 40), start=W, position=torch.zeros(B).long())
    assert all(torch.equal(x, y) for x, y in zip((*same.weights, *same.momentum), (*W, *S)))


@torch.no_grad()
def test_read_alone_is_the_network():
    tokens, gates, W, *_ = inputs(6, 3, grad=False)
    y, _ = neural_memory(*tokens, 0 * gates[0], gates[1], 0 * gates[2], W, None, 4, residual=True)
    torch.testing.assert_close(neural_memory_read(tokens[0], W, residual=True), y)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_keeps_a_float32_state(dtype):
    tokens, gates, W, S, _ = ([x.to(dtype) for x in group] for group in inputs(50, 2, grad=False))
    y, state = neural_memory(*tokens, *gates, W, S, 16)
    tokens, gates, W, S = ([x.double() for x in group] for group in (tokens, gates, W, S))
    exact, _ = neural_memory(*tokens, *gates, W, S, 16)
    assert y.dtype == dtype and all(x.dtype == torch.float32 for x in chain(*state[:3]))
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 2e-3)


@torch.no_grad()
def test_100_thousand_tokens_stay_finite_at_depth_4():
    """Steps as large as they get, and the same few keys again and again: what blows up without clip and decay."""
    W = [0.5 * torch.randn(1, 1, 4, 4) for _ in range(4)]
    k = torch.nn.functional.normalize(torch.randn(1, 1, 100_000, 4).sign(), dim=-1).bfloat16()
    gate = torch.ones(1, 1, 100_000)
    y, state = neural_memory(k, k, 5 * k, 0.01 * gate, 0.9 * gate, 0.5 * gate, W, None, 64, clip=1.0)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in chain(*state[:3]))


def test_compiles_as_one_graph():
    def op(W, S, *x):
        y, state = neural_memory(*x, W, S, 4, torch.tensor([[1] * 9, [1] * 5 + [0] * 4]), clip=0.5)
        return y.sum() + sum(x.sum() for x in chain(*state[:3]))

    tokens, gates, W, S, _ = inputs(9, 2)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(W, S, *tokens, *gates), [*tokens, *gates, *W, *S]) for f in (op, compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(B, H, 6, 4)}, r"k is \[2, 2, 6, 4\], expected \[2, 2, 6, 5\]"),
        ({"alpha": torch.zeros(B, H, 5)}, r"alpha is \[2, 2, 5\]"),
        ({"weights": []}, "at least one matrix"),
        ({"weights": [torch.zeros(B, H, 7, 4), torch.zeros(B, H, 5, 7)]}, r"weights\[0\] is"),
        ({"momentum": [torch.zeros(B, H, 7, 5)]}, "momentum has 1 matrices"),
        ({"mask": torch.ones(B, 5)}, "mask is"),
        ({"position": torch.zeros(B).long()}, "belong together"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"threshold": -1.0}, "threshold must not be negative"),
        ({"activation": "relu"}, "activation must be 'silu' or 'gelu'"),
        ({"detach_every": 0}, "detach_every must be at least 1"),
        ({"q": torch.zeros(B, H, 0, 5), "k": torch.zeros(B, H, 0, 5)}, "T > 0"),
    ],
)
def test_bad_input_is_refused(change, message):
    tokens, gates, W, S, _ = inputs(6, 2, grad=False)
    names = ("q", "k", "v", "alpha", "eta", "theta", "weights", "momentum", "chunk_size")
    arguments = dict(zip(names, (*tokens, *gates, W, S, 4)))
    with pytest.raises(ValueError, match=message):
        neural_memory(**arguments | change)


def test_residual_needs_equal_widths():
    tokens, gates, W, _, _ = inputs(3, 2, grad=False, dk=4)
    with pytest.raises(ValueError, match="residual needs dk = dv"):
        neural_memory(*tokens, *gates, W, None, 2, residual=True)
