"""The long-term store: exact lookup per sequence, the graph index beside it, files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from memzoo.modeling.long_term_memory import LongTermMemoryCache


def filled(N: int = 50, **options) -> tuple[LongTermMemoryCache, torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, N, 8), torch.randn(2, N, 3)
    cache = LongTermMemoryCache(2, 8, 3, **options)
    cache.write(keys, values)
    return cache, keys, values


def test_finds_the_closest_of_its_own_row():
    cache, keys, values = filled()
    queries = torch.randn(2, 5, 8)
    found = cache.retrieve(queries, top_k=4)
    cosines = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).mT
    best = cosines.argsort(-1, descending=True)[..., :4]
    assert torch.equal(found.indices, best)
    torch.testing.assert_close(found.scores, cosines.gather(2, best))
    torch.testing.assert_close(found.values[1, 3], values[1, best[1, 3]])


def test_the_oldest_give_way_and_pads_take_no_place():
    cache = LongTermMemoryCache(2, 8, 3, capacity=10)
    keys, values, mask = torch.randn(2, 26, 8), torch.randn(2, 26, 3), torch.rand(2, 26) > 0.3
    mask[1, 4:] = False
    for piece in (slice(0, 7), slice(7, 8), slice(8, 26)):  # the last is longer than the capacity
        cache.write(keys[:, piece], values[:, piece], mask[:, piece])
    for b in range(2):
        last = keys[b, mask[b]][-10:]
        found = cache.retrieve(keys, top_k=1)
        right = torch.isin(torch.arange(26), mask[b].nonzero()[-10:])
        torch.testing.assert_close(found.values[b, right, 0], values[b, right])
        assert (found.scores[b, ~right, 0] < 1 - 1e-4).all()
        assert min(int(cache.count[b]), 10) == len(last)
    assert cache.count.tolist() == mask.sum(1).tolist() and len(cache) == 10


def test_less_than_top_k_is_marked():
    cache = LongTermMemoryCache(1, 8)
    nothing = cache.retrieve(torch.randn(1, 2, 8), top_k=3)
    assert (nothing.indices == -1).all() and not nothing.values.any() and nothing.scores.isneginf().all()
    cache.write(torch.randn(1, 2, 8), torch.ones(1, 2, 8))
    found = cache.retrieve(torch.randn(1, 1, 8), top_k=3)
    assert sorted(found.indices[0, 0].tolist()) == [-1, 0, 1] and found.values[0, 0].sum(-1).tolist() == [8, 8, 0]


def test_gradients_reach_what_was_written():
    keys, values = torch.randn(1, 6, 4, requires_grad=True), torch.randn(1, 6, 4, requires_grad=True)
    cache = LongTermMemoryCache(1, 4)
    cache.write(keys[:, :3], values[:, :3])
    cache.write(keys[:, 3:], values[:, 3:])
    found = cache.retrieve(torch.randn(1, 2, 4), top_k=6)
    (found.scores.softmax(-1)[..., None] * found.values).sum().backward()
    assert keys.grad.abs().amin() > 0 and values.grad.abs().amin() > 0


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_files_batches_and_reset(index, tmp_path):
    if index == "faiss":
        pytest.importorskip("faiss")
    cache, _, _ = filled(index=index, capacity=64)
    cache.save(tmp_path / "store" / "memory.safetensors")
    loaded = LongTermMemoryCache.load(tmp_path / "store" / "memory.safetensors")
    assert (loaded.capacity, loaded.index, len(loaded)) == (64, index, 50)
    queries = torch.randn(2, 5, 8)
    for x, y in zip(cache.retrieve(queries), loaded.retrieve(queries)):
        assert torch.equal(x, y)
    more = torch.randn(2, 20, 8)
    for store in (cache, loaded):
        store.write(more, more[..., :3])
    assert torch.equal(cache.retrieve(queries).indices, loaded.retrieve(queries).indices)
    loaded.reorder(torch.tensor([1, 1, 0]))
    assert torch.equal(loaded.retrieve(queries[[1, 1, 0]]).indices, cache.retrieve(queries).indices[[1, 1, 0]])
    loaded.reset()
    assert len(loaded) == 0 and not loaded.keys.any()


def test_the_graph_index_agrees_with_the_exact_one():
    pytest.importorskip("faiss")
    keys, values = torch.randn(1, 3000, 16), torch.randn(1, 3000, 4)
    stores = [LongTermMemoryCache(1, 16, 4, index=index) for index in ("exact", "faiss")]
    for store in stores:
        store.write(keys, values)
    exact, near = (store.retrieve(torch.randn(1, 40, 16, generator=torch.manual_seed(3)), 8) for store in stores)
    hits = sum(len(set(a) & set(b)) for a, b in zip(exact.indices[0].tolist(), near.indices[0].tolist()))
    assert hits >= 0.97 * 40 * 8
    same = exact.indices == near.indices
    torch.testing.assert_close(near.scores[same], exact.scores[same])
    torch.testing.assert_close(near.values[same], exact.values[same])


def test_bad_input_is_refused(tmp_path, monkeypatch):
    cache, _, _ = filled(capacity=60)
    for call, message in (
        (lambda: LongTermMemoryCache(1, 0), "key_dim is 0"),
        (lambda: LongTermMemoryCache(1, 4, index="annoy"), "must be 'exact' or 'faiss', not 'annoy'"),
        (lambda: cache.retrieve(torch.randn(2, 3, 8), 61), "top_k=61 must be between 1 and the capacity 60"),
        (lambda: cache.retrieve(torch.randn(2, 3, 7)), r"queries are \[2, 3, 7\], expected \[2, N, 8\]"),
        (lambda: cache.write(torch.randn(2, 3, 8), torch.randn(1, 3, 3)), r"values are \[1, 3, 3\]"),
        (lambda: cache.write(torch.randn(2, 3, 8), torch.randn(2, 3, 3), torch.ones(2, 4)), "mask is"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no long-term memory"):
        LongTermMemoryCache.load(tmp_path / "other.safetensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        LongTermMemoryCache(1, 4, index="faiss")
