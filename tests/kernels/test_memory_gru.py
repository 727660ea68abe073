"""memory_gru: the compiled loops against the plain one, and the laws of a memory on the op itself."""

import pytest
import torch

import memzoo.kernels.memory_gru as package
from memzoo.kernels.memory_gru import MemoryGRUWeights, memory_gru

needs_numba = pytest.mark.skipif(not package.has_numba(), reason="numba is not installed")
fused = pytest.param("fused", marks=needs_numba)
each_implementation = pytest.mark.parametrize("implementation", ["reference", fused])

CASES = {
    "plain": {},
    "top_k": {"top_k": 2},
    "shared_bank": {"shared_bank": True, "temperature": 0.6},
    "decay": {"decay": 0.9},
    "cap": {"slot_norm_cap": 0.8},
    "bias": {"bias": "static", "temperature": 2.0},
    "bias_per_step": {"bias": "per step", "mask": "holes", "top_k": 3},
    "left_pad": {"mask": "left", "decay": 0.95},
    "right_pad": {"mask": "right", "slot_norm_cap": 0.7},
    "all": {"mask": "holes", "bias": "per step", "shared_bank": True, "top_k": 2, "decay": 0.97, "slot_norm_cap": 0.7},
    "one_step": {"T": 1},
    "whole_chunks": {"T": 32, "shared_bank": True, "top_k": 1},
    "last_chunk_of_one": {"T": 33, "mask": "left"},
}


def make(B=3, T=37, H=9, K=4, S=7, m=6, R=5, dtype=torch.float64, grad=True, bias=None, mask=None, **options):
    """Inputs [x_router, x_query, x_gates, h0, M0], weights, keywords; odd sizes: no vector loop divides evenly."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).requires_grad_(grad)

    Kr = K - options.get("shared_bank", False)
    shapes = (R, H), (Kr, R), (Kr,), (m + 1, H), (3 * H, m), (3 * H, H), (3 * m + 2, H), (3 * m + 2,)
    weights = MemoryGRUWeights(*(random(*shape, scale=0.5) for shape in shapes))
    inputs = [random(B, T, R), random(B, T, m + 1), random(B, T, 3 * H), random(B, H), random(B, K, S, m, scale=0.4)]
    masks = {"left": range(5), "right": range(T - 9, T), "holes": (0, 3, 4, T // 2, T - 1)}
    if mask is not None:
        options["mask"] = torch.ones(B, T)
        options["mask"][0, list(masks[mask])] = 0
    if bias is not None:
        options["router_bias"] = random(Kr) if bias == "static" else random(B, T, Kr)
    return inputs, weights, options


def flat(result):
    h_seq, logits, state, *writes = result
    return [h_seq, logits, *state, *writes]


def gradients(outputs, leaves, **keywords):
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs[:4])
    return torch.autograd.grad(loss, leaves, **keywords)


@needs_numba
@pytest.mark.parametrize("case", CASES)
def test_fused_matches_reference(case):
    inputs, weights, options = make(**CASES[case])
    leaves = [*inputs, *weights, *([options["router_bias"]] if "router_bias" in options else [])]
    results = {}
    for name in ("reference", "fused"):
        outputs = flat(memory_gru(*inputs, weights, **options, return_writes=True, implementation=name))
        results[name] = [*outputs, *gradients(outputs, leaves)]
    torch.testing.assert_close(results["fused"], results["reference"], rtol=1e-10, atol=1e-10)


@each_implementation
@pytest.mark.parametrize("case", ["plain", "all"])
def test_gradcheck(implementation, case):
    case = CASES[case] | {"mask": "left", "bias": "static"}
    inputs, weights, options = make(B=2, T=7, H=3, K=3, S=2, m=2, R=3, **case)
    bias = options.pop("router_bias")

    def run(*tensors):
        weights = MemoryGRUWeights(*tensors[5:13])
        call = dict(options, router_bias=tensors[13], implementation=implementation)
        return tuple(flat(memory_gru(*tensors[:5], weights, **call)))

    assert torch.autograd.gradcheck(run, (*inputs, *weights, bias))


@each_implementation
@pytest.mark.parametrize("sizes", [(16, 21), (1, 36), (30, 7), (1,) * 37])
def test_split_invariance(implementation, sizes):
    inputs, weights, options = make(**CASES["all"], grad=False)
    options["implementation"] = implementation
    whole = flat(memory_gru(*inputs, weights, **options))
    state, pieces = inputs[3:], []
    by_piece = {"mask": options.pop("mask").split(sizes, 1), "router_bias": options.pop("router_bias").split(sizes, 1)}
    for i, xs in enumerate(zip(*(x.split(sizes, 1) for x in inputs[:3]))):
        extra = {name: pieces[i] for name, pieces in by_piece.items()}
        h_seq, logits, state = memory_gru(*xs, *state, weights, **options, **extra)
        pieces.append((h_seq, logits))
    joined = [torch.cat(column, dim=1) for column in zip(*pieces)]
    torch.testing.assert_close([*joined, *state], whole, rtol=1e-12, atol=1e-12)


@each_implementation
def test_rows_do_not_meet_and_nan_stays_in_its_row(implementation):
    inputs, weights, _ = make(grad=False)
    expected = flat(memory_gru(*[x[1:] for x in inputs], weights, implementation=implementation))
    inputs[2][0, 20] = float("nan")
    given = flat(memory_gru(*inputs, weights, implementation=implementation))
    torch.testing.assert_close([x[1:] for x in given], expected, rtol=1e-12, atol=1e-12)
    assert given[0][0, 20:].isnan().all() and not given[0][0, :20].isnan().any()


@each_implementation
def test_pads_are_an_exact_no_op(implementation):
    inputs, weights, options = make(dtype=torch.float32, mask="right", decay=0.9, slot_norm_cap=0.5, bias="per step")
    with torch.no_grad():
        for x in (*inputs[:3], options["router_bias"]):
            x[0, -9:] = float("nan")
    outputs = flat(memory_gru(*inputs, weights, **options, return_writes=True, implementation=implementation))
    short = {name: x[:, :-9] if torch.is_tensor(x) else x for name, x in options.items()}
    cut = [x[:, :-9] for x in inputs[:3]] + inputs[3:]
    expected = flat(memory_gru(*cut, weights, **short, implementation=implementation))
    assert torch.equal(outputs[2][0], expected[2][0]) and torch.equal(outputs[3][0], expected[3][0])
    assert torch.equal(outputs[0][0, -9:], outputs[2][0].expand(9, -1))
    assert not outputs[1][0, -9:].any() and not outputs[4][0, -9:].any()
    leaves = [*inputs, *weights, options["router_bias"]]
    for x, grad in zip(leaves, gradients(outputs, leaves)):
        assert grad.isfinite().all()
        assert x.dim() != 3 or not grad[0, -9:].any()


@each_implementation
def test_zero_memory_has_finite_gradients(implementation):
    inputs, weights, _ = make(dtype=torch.float32)
    inputs[3:] = [torch.zeros_like(x).requires_grad_() for x in inputs[3:]]
    outputs = flat(memory_gru(*inputs, weights, implementation=implementation))
    assert all(grad.isfinite().all() and grad.any() for grad in gradients(outputs, [*inputs, *weights]))


def test_half_precision_stays_finite_over_a_long_run():
    inputs, weights, options = make(B=1, T=20_000, dtype=torch.bfloat16, grad=False, slot_norm_cap=1.5)
    inputs[2] *= 3
    h_seq, logits, (h, M) = memory_gru(*inputs, weights, **options)
    assert h_seq.dtype == torch.bfloat16 and logits.dtype == h.dtype == M.dtype == torch.float32
    assert h_seq.isfinite().all() and logits.isfinite().all() and M.norm(dim=-1).max() <= 1.5 * (1 + 1e-5)


@needs_numba
def test_backward_does_not_keep_every_bank():
    inputs, weights, _ = make(B=1, T=256, H=8, K=4, S=32, m=32, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        memory_gru(*inputs, weights, implementation="fused")
    assert sum(saved) < 256 * 4 * 32 * 32 / 5


@needs_numba
def test_strides_compile_and_double_backward():
    inputs, weights, _ = make(mask=None)
    inputs[0], inputs[3] = inputs[0].mT.contiguous().mT, inputs[3][:1].expand(3, -1)
    expected = gradients(flat(memory_gru(*inputs, weights, implementation="reference")), inputs)
    compiled = torch.compile(memory_gru, fullgraph=True, backend="aot_eager")
    outputs = flat(compiled(*inputs, weights, implementation="fused"))
    torch.testing.assert_close(gradients(outputs, inputs), expected)
    (grad,) = gradients(flat(memory_gru(*inputs, weights, implementation="fused")), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@needs_numba
def test_without_numba(monkeypatch):
    inputs, weights, _ = make(T=2)
    monkeypatch.setattr(package, "has_numba", lambda: False)
    torch.testing.assert_close(flat(memory_gru(*inputs, weights)), flat(memory_gru(*inputs, weights)))
    with pytest.raises(RuntimeError, match="numba"):
        memory_gru(*inputs, weights, implementation="fused")


ERRORS = {
    r"x_query has shape \(3, 37, 6\), expected \(3, 37, 7\)": lambda x, w: (x[0], x[1][..., :-1], *x[2:], w),
    r"h0 has shape \(2, 9\), expected \(3, 9\)": lambda x, w: (*x[:3], x[3][:2], x[4], w),
    r"x_gates has shape \(3, 0, 27\).* T >= 1": lambda x, w: (*(y[:, :0] for y in x[:3]), *x[3:], w),
    r"weights.gates_c has shape \(26, 6\), expected \(27, 6\)": lambda x, w: (*x, w._replace(gates_c=w.gates_c[1:])),
    r"mask has shape \(3, 36\), expected \(3, 37\)": {"mask": torch.ones(3, 36)},
    r"router_bias has shape \(3,\), expected \(4,\)": {"router_bias": torch.ones(3)},
    r"top_k is 5, expected 1 to 4": {"top_k": 5},
    r"temperature is 0.0, expected": {"temperature": 0.0},
    r"decay is 1.5, expected": {"decay": 1.5},
    r"slot_norm_cap is -1.0, expected": {"slot_norm_cap": -1.0},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_argument_given_and_expected(message):
    inputs, weights, _ = make()
    change = ERRORS[message]
    args, options = (change(inputs, weights), {}) if callable(change) else ((*inputs, weights), change)
    with pytest.raises(ValueError, match=message):
        memory_gru(*args, **options)
