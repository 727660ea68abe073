"""Windowed attention, compiled and in blocks, against its definition, with gradients."""

import pytest
import torch
from torch import Tensor

from memzoo.kernels.window_attention import fused, reference, window_attention
from memzoo.kernels.window_attention.blocks import window_attention_blocks

FORMS = {
    "compiled": window_attention,
    "blocks": lambda q, k, v, window, prefix, first, per: window_attention_blocks(
        q, k, v, window, prefix, first, per, 0.0
    ),
}


def inputs(T: int, past: int, heads: tuple[int, int], d: int, prefix: int, per: int) -> list[Tensor]:
    torch.manual_seed(0)
    H, kv = heads
    shapes = [(2, T, H, d), *[(2, (past + T) * per, kv, d)] * 2, *[(2, prefix, kv, d)] * 2]
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    tensors[0] = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)  # any strides but the last
    return [x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("T", "past", "heads", "d", "window", "prefix", "per", "ragged"),
    [
        (75, 0, (4, 4), 16, 20, 3, 1, False),
        (33, 9, (4, 2), 8, 20, 0, 1, True),
        (300, 30, (2, 1), 20, 50, 17, 1, True),  # more than a span of queries, a width that is no multiple of vectors
        (40, 30, (2, 2), 24, 128, 5, 2, True),  # two keys a token, all of them in the window
        (290, 0, (1, 1), 16, 1, 1, 1, False),  # itself only
    ],
)
def test_agrees_with_the_definition(form, T, past, heads, d, window, prefix, per, ragged):
    q, k, v, prefix_k, prefix_v = leaves = inputs(T, past, heads, d, prefix, per)
    first = torch.tensor([0, past]) if ragged else None
    pair = (prefix_k, prefix_v) if prefix else None
    leaves = leaves if prefix else leaves[:3]
    results = [f(q, k, v, window, pair, first, per) for f in (FORMS[form], reference)]
    g = torch.randn_like(results[0])
    got, expected = ([y, *torch.autograd.grad(y, leaves, g)] for y in results)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    q, k, v = (x.detach().to(dtype) for x in inputs(70, 5, (4, 2), 16, 0, 1)[:3])
    y = window_attention(q, k, v, 30)
    assert y.dtype == dtype
    expected = reference(q.double(), k.double(), v.double(), 30)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 8e-3)


def test_large_scores_and_what_is_not_seen_do_no_harm():
    q, k, v = (x.detach() for x in inputs(64, 0, (2, 2), 16, 0, 1)[:3])
    q = 1e3 * q
    expected = reference(q, k, v, 10)
    torch.testing.assert_close(window_attention(q, k, v, 10), expected, rtol=1e-10, atol=1e-10)
    v[:, :20] = 1e30  # outside the windows of the tokens from 29 on
    torch.testing.assert_close(window_attention(q, k, v, 10)[:, 29:], expected[:, 29:], rtol=1e-10, atol=1e-10)


def test_scores_that_are_not_numbers_stay_so():
    q, k, v = (x.detach().float() for x in inputs(40, 0, (2, 2), 16, 0, 1)[:3])
    q[0, 7] = torch.nan
    y, expected = window_attention(q, k, v, 10), reference(q, k, v, 10)
    assert y[0, 7].isnan().all()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_two_threads_give_the_same_numbers():
    leaves = inputs(600, 0, (4, 2), 16, 3, 1)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y = window_attention(*leaves[:3], 100, tuple(leaves[3:]))
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_compiles_as_one_graph():
    q, k, v = (x.detach().float().requires_grad_() for x in inputs(40, 0, (2, 2), 16, 0, 1)[:3])
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")(q, k, v, 20)
    torch.testing.assert_close(compiled, window_attention(q, k, v, 20))
    assert fused.fits(q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 8, 3, 4)}, "k and v"),
        ({"q": torch.zeros(1, 8, 3, 4)}, "does not belong"),
        ({"window": 0}, "at least 1, not 0"),
        ({"per": 3}, "8 keys for 8 queries with 3"),
        ({"prefix": (torch.zeros(1, 2, 1, 4),) * 2}, "must be"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    given = {"q": torch.zeros(1, 8, 2, 4), "k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4), "window": 4}
    with pytest.raises(ValueError, match=message):
        window_attention(**(given | change))
