"""Segments of ragged rows, and the bank of key-value pairs against plain loops over rows, tokens and pairs."""

import pytest
import torch
import torch.nn.functional as F

from memzoo.modeling.key_value_memory import KeyValueMemory
from memzoo.modeling.segments import Segments


@pytest.mark.parametrize("place", [[0, 0, 0], [2, 2, 2], [0, 3, 4], [1, 0, 0]])
@pytest.mark.parametrize("tokens", [None, [11, 4, 0], [1, 10, 7]])
@pytest.mark.parametrize("T", [1, 3, 11])
def test_segments_are_those_of_each_row(place, tokens, T):
    """Size 5: a piece holds what each row has in its i-th segment; join undoes split; the rest is kept by place."""
    size, counts = 5, [T] * 3 if tokens is None else [min(n, T) for n in tokens]
    mask = None if tokens is None else torch.arange(T) < torch.tensor(counts)[:, None]
    x = torch.arange(1.0, 3 * T + 1).view(3, T, 1)
    cut = Segments(torch.tensor(place), T, mask, size)
    pieces, old = cut.split(x), -torch.ones(3, size - 1, 1)
    kept = cut.unfinished(old, pieces)
    for b, (p, n) in enumerate(zip(place, counts)):
        row = [None] * p + x[b, :n, 0].tolist()  # None: read before
        for i, (piece, own) in enumerate(zip(pieces, cut.masks)):
            real = torch.ones(piece.shape[1], dtype=torch.bool) if own is None else own[b]
            expected = [token for token in row[i * size : (i + 1) * size] if token is not None]
            assert piece[b, real, 0].tolist() == expected
            ends = len(row) >= (i + 1) * size
            assert (cut.full[i] is None and ends) or bool(cut.full[i][b]) == ends
            assert cut.completes[i] or not ends
        rest = row[len(row) // size * size :]
        assert cut.place[b] == len(rest)
        assert kept[b, :, 0].tolist() == [-1 if t is None else t for t in rest] + [0] * (size - 1 - len(rest))
        assert torch.equal(cut.join(list(pieces))[b, :n], x[b, :n])
    assert torch.equal(cut.places, (torch.tensor(place)[:, None] + torch.arange(T)) % size)


def bank(**options) -> KeyValueMemory:
    torch.manual_seed(0)
    layer = KeyValueMemory(8, **{"dim": 4, "capacity": 6, "top_k": 3, "decay": 0.7, "segment_size": 5, **options})
    layer.init_weights()
    return layer.double()


def search_and_keep(layer: KeyValueMemory, x: torch.Tensor) -> torch.Tensor:
    """x [T, D]: a loop over tokens and a list of pairs [key, value, usage]."""
    pairs, fresh, reads = [], [], []
    for token in x:
        q, k, v = layer.qkv_proj(token).chunk(3)
        strength = layer.strength_proj(token).sigmoid()
        scores = [layer.sharpness * F.normalize(q, dim=0) @ key for key, _, _ in pairs]
        best = sorted(range(len(pairs)), key=lambda m: -scores[m])[: layer.top_k]
        p = torch.stack([scores[m] for m in best] + [scores[0] * 0 if pairs else q[0] * 0]).softmax(0)
        read = sum((p[n] * pairs[m][1] for n, m in enumerate(best)), torch.zeros(layer.dim, dtype=x.dtype))
        for n, m in enumerate(best):
            pairs[m][2] += p[n].item()
        reads.append(layer.o_proj(read))
        fresh.append([F.normalize(k, dim=0), strength * v, strength.item()])
        if len(fresh) == layer.segment_size:
            old = [[key, value, layer.decay * usage] for key, value, usage in pairs]
            pairs, fresh = sorted(old + fresh, key=lambda pair: -pair[2])[: layer.capacity], []
    return torch.stack(reads)


@pytest.mark.parametrize("options", [{}, {"capacity": 3}, {"top_k": 6}, {"segment_size": 1}, {"decay": 1.0}])
def test_bank_is_a_loop_over_tokens_and_pairs(options):
    layer, x = bank(**options), torch.randn(2, 23, 8, dtype=torch.float64)
    y, _ = layer(x, {})
    expected = torch.stack([search_and_keep(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (y, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_bank_keeps_what_is_used():
    """Two tokens of the first segment are asked for again and again: they outlive those that nobody asks for."""
    layer = bank(capacity=5, top_k=1, decay=0.9)
    with torch.no_grad():  # queries look for equal tokens, and all pairs are as strong
        layer.qkv_proj.weight[:4] = layer.qkv_proj.weight[4:8]
        layer.strength_proj.weight.zero_()
    kept = torch.randn(2, 8, dtype=torch.float64)
    x = torch.cat([kept, torch.randn(3, 8, dtype=torch.float64)])
    for _ in range(6):
        x = torch.cat([x, kept, torch.randn(3, 8, dtype=torch.float64)])
    _, state = layer(x[None], {})
    keys = F.normalize(layer.qkv_proj(kept).chunk(3, dim=-1)[1], dim=-1)
    nearest = (keys @ state["bank.keys"][0].T).amax(-1)
    torch.testing.assert_close(nearest, torch.ones_like(nearest))
    assert state["bank.usage"][0, 0] > 1
