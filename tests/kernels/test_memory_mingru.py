"""The parallel cell: its compiled step against the composition, its composition against a loop written out here."""

import math

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.memory_mingru import MemoryMinGRUWeights, memory_mingru, mingru, split_sizes

B, K, S, M, R, H = 2, 3, 5, 4, 6, 7


def problem(T: int, shared: bool = False, dtype: torch.dtype = torch.float64) -> tuple:
    Kr = K - shared
    x = torch.randn(B, T, sum(split_sizes(R, M, H)), dtype=dtype)
    h, banks = torch.randn(B, H, dtype=dtype), torch.randn(B, K, S, M, dtype=dtype)
    shapes = [(Kr, R), (Kr,), (K, S, M), (2 * H, M)]
    weights = MemoryMinGRUWeights(*(torch.randn(*shape, dtype=dtype) for shape in shapes))
    return x, h, banks, weights, torch.randn(Kr, dtype=dtype)


def loop(x, h, banks, weights, bias, top_k=None, shared_bank=False, decay=1.0, slot_norm_cap=None):
    """The equations of the docstring for one sequence, slot by slot."""
    h, banks = h.clone(), banks.clone()
    if slot_norm_cap is not None:
        for slot in banks.flatten(0, 1):
            slot *= min(1.0, slot_norm_cap / slot.norm().item())
    out = []
    for row in x:
        router, query, key, strengths, value, gate, erase, gates = row.split([R, M, M, 2, M, 1, 1, 2 * H])
        rho = (weights.router_out @ router.relu() + weights.router_out_bias + bias).softmax(-1)
        if top_k is not None:
            rho[rho < rho.topk(top_k).values[-1]] = 0
        if shared_bank:
            rho = torch.cat([torch.ones(1, dtype=x.dtype), rho])
        e, v = erase.sigmoid(), value.tanh()
        if slot_norm_cap is not None:
            v = v * min(1.0, (0.99 * e * slot_norm_cap / v.norm()).item())
        c, new = torch.zeros(M, dtype=x.dtype), banks.clone()
        for k in range(K):
            keys = F.normalize(weights.slot_keys[k], dim=-1)
            read, write = (
                ((1 + F.softplus(strengths[i])) * (keys @ F.normalize(q, dim=-1))).softmax(-1)
                for i, q in enumerate((query, key))
            )
            c += rho[k] * read @ banks[k]
            w = rho[k] * gate.sigmoid() * write
            new[k] = decay * (1 - 0.99 * w * e)[:, None] * banks[k] + w[:, None] * v
        banks = new
        z, n = (gates + weights.gates_c @ c / (c.square().mean() + 1e-4).sqrt()).chunk(2)
        h = (1 - z.sigmoid()) * h + z.sigmoid() * n.tanh()
        out.append(h)
    return torch.stack(out), h, banks


OPTIONS = [
    {},
    {"top_k": 1},
    {"top_k": 2, "decay": 0.7},
    {"top_k": 1, "shared_bank": True},
    {"slot_norm_cap": 0.3, "decay": 0.9},
]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("T", [1, 2, 35])
def test_agrees_with_the_equations(T, options):
    x, h0, M0, weights, bias = problem(T, options.get("shared_bank", False))
    h, logits, (h_last, banks) = memory_mingru(x, h0, M0, weights, bias, **options)
    assert logits.shape == (B, T, len(bias))
    for b in range(B):
        expected = loop(x[b], h0[b], M0[b], weights, bias, **options)
        for got, want in zip((h[b], h_last[b], banks[b]), expected):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_compiled_step_is_the_composition(options, dtype, tolerance):
    pytest.importorskip("numba")
    arguments = problem(1, options.get("shared_bank", False), dtype)
    before = arguments[2].clone()
    step = memory_mingru(*arguments, **options)
    composed = memory_mingru(*arguments, **options, mask=torch.ones(B, 1))  # a mask takes the other way
    for got, want in zip((*step[:2], *step[2]), (*composed[:2], *composed[2])):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert torch.equal(arguments[2], before)


@torch.no_grad()
def test_large_strengths_and_zero_queries_stay_finite():
    for dtype in (torch.float32, torch.float64):
        x, h0, M0, weights, bias = problem(1, dtype=dtype)
        x[..., R : R + 2 * M], x[..., R + 2 * M : R + 2 * M + 2] = 0.0, 1e4
        for mask in (None, torch.ones(B, 1)):
            h, _, (_, banks) = memory_mingru(x, h0, M0, weights, bias, mask=mask)
            assert h.isfinite().all() and banks.isfinite().all()
        x[..., R : R + M] = 1.0
        results = [memory_mingru(x, h0, M0, weights, bias, mask=mask)[0] for mask in (None, torch.ones(B, 1))]
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_gradcheck():
    x, h0, M0, weights, bias = problem(4)
    tensors = [t.requires_grad_() for t in (x, h0, M0, *weights, bias)]

    def run(x, h0, M0, *rest):
        h, logits, state, _ = memory_mingru(
            x, h0, M0, MemoryMinGRUWeights(*rest[:4]), rest[4], slot_norm_cap=0.5, return_writes=True
        )
        return h, logits, *state

    assert torch.autograd.gradcheck(run, tensors)


def test_wrong_width_is_refused():
    x, *rest = problem(3)
    width = sum(split_sizes(R, M, H))
    with pytest.raises(ValueError, match=rf"x is \[2, 3, {width - 1}\], expected \[B, T, {width}\]"):
        memory_mingru(x[..., 1:], *rest)
    assert math.isclose(width, R + 3 * M + 4 + 2 * H)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [1, 2, 37])
def test_mingru_agrees_with_its_loop(T, masked):
    gates, h0 = torch.randn(B, T, 140, dtype=torch.float64), torch.randn(B, 70, dtype=torch.float64)
    tensors = [gates.requires_grad_(), h0.requires_grad_()]
    mask = torch.rand(B, T) > 0.4 if masked else None
    h, steps = h0, []
    for t in range(T):
        z, n = gates[:, t].chunk(2, dim=-1)
        new = (1 - z.sigmoid()) * h + z.sigmoid() * n.tanh()
        h = new if mask is None else torch.where(mask[:, t, None], new, h)
        steps.append(h)
    expected = (torch.stack(steps, dim=1), h)
    got = mingru(gates, h0, mask)
    weights = [torch.randn_like(x) for x in got]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(out, weights)), tensors) for out in (got, expected)
    ]
    for x, y in zip((*got, *gradients[0]), (*expected, *gradients[1])):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
