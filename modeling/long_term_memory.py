"""A long-term store of keys and values per sequence, looked up by cosine: what no longer fits into the memory."""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Retrieved(NamedTuple):
    """What `LongTermMemoryCache.retrieve` found, the best first; -inf and index -1 where there was nothing."""

    values: Tensor  # [B, Q, k, dv], zero where there was nothing
    scores: Tensor  # [B, Q, k], cosines
    indices: Tensor  # [B, Q, k], places in the store


class LongTermMemoryCache:
    """Up to `capacity` pairs of key and value per sequence; the oldest give way. Not trained, and never detaches.

    Like a model's cache it belongs to a batch: row b is written and read by sequence b alone. Lookup is exact. With
    `index="faiss"` (pip install faiss-cpu) a graph index answers instead, which pays off from about a hundred thousand
    pairs on and may miss some of the best.

    Args:
        batch_size: sequences B. key_dim, value_dim: widths of keys and values.
        capacity: pairs per sequence.
        index: "exact" or "faiss".
        dtype, device: of the store.

    Raises:
        ValueError: a size is below 1, or the index is unknown.
        ImportError: the index is "faiss" and faiss is not installed.
    """

    def __init__(
        self,
        batch_size: int,
        key_dim: int,
        value_dim: int | None = None,
        capacity: int = 4096,
        index: str = "exact",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = key_dim if value_dim is None else value_dim
        for name, size in {
            "batch_size": batch_size,
            "key_dim": key_dim,
            "value_dim": value_dim,
            "capacity": capacity,
        }.items():
            if size < 1:
                raise ValueError(f"LongTermMemoryCache: {name} is {size}; it must be at least 1")
        if index not in ("exact", "faiss"):
            raise ValueError(f"LongTermMemoryCache: index must be 'exact' or 'faiss', not {index!r}")
        if index == "faiss" and importlib.util.find_spec("faiss") is None:
            raise ImportError("LongTermMemoryCache(index='faiss') needs faiss: pip install 'memzoo[faiss]'")
        self.capacity, self.index = capacity, index
        self.keys = torch.zeros(batch_size, capacity, key_dim, dtype=dtype, device=device)  # of unit length
        self.values = torch.zeros(batch_size, capacity, value_dim, dtype=dtype, device=device)
        self.count = torch.zeros(batch_size, dtype=torch.int64, device=device)  # written so far
        self._graphs: list | None = None

    def __len__(self) -> int:
        """Pairs held by the fullest row."""
        return min(int(self.count.max()), self.capacity)

    def write(self, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> None:
        """Store keys [B, N, dk] and values [B, N, dv] where mask [B, N] is not 0.

        The stored tensors are replaced, so that gradients reach the keys and values of earlier writes.
        """
        B, N, _ = keys.shape
        self._check(keys, "keys", self.keys)
        self._check(values, "values", self.values)
        mask = torch.ones(B, N, dtype=torch.bool, device=keys.device) if mask is None else mask.bool()
        if mask.shape != (B, N):
            raise ValueError(f"LongTermMemoryCache: mask is {list(mask.shape)}, expected {[B, N]}")
        place = self.count[:, None] + mask.cumsum(1) - 1
        kept = mask & (place >= (self.count + mask.sum(1))[:, None] - self.capacity)  # the rest would be overwritten
        rows, columns = kept.nonzero(as_tuple=True)
        at = (rows, place[rows, columns] % self.capacity)
        unit = F.normalize(keys.to(self.keys.dtype), dim=-1)
        self.keys = self.keys.index_put(at, unit[rows, columns])
        self.values = self.values.index_put(at, values[rows, columns].to(self.values.dtype))
        self.count = self.count + mask.sum(1)
        self._graphs = None

    def retrieve(self, queries: Tensor, top_k: int = 8) -> Retrieved:
        """The `top_k` stored pairs whose keys are closest in cosine to queries [B, Q, dk].

        Raises:
            ValueError: shapes do not fit, or top_k is above the capacity.
        """
        self._check(queries, "queries", self.keys)
        if not 1 <= top_k <= self.capacity:
            raise ValueError(f"LongTermMemoryCache: top_k={top_k} must be between 1 and the capacity {self.capacity}")
        q = F.normalize(queries.to(self.keys.dtype), dim=-1)
        if self.index == "faiss":
            scores, indices = self._search(q, top_k)
        else:
            scores = q @ self.keys.mT  # [B, Q, capacity]
            held = torch.arange(self.capacity, device=q.device) < self.count[:, None]
            scores, indices = scores.masked_fill(~held[:, None], -torch.inf).topk(top_k, dim=-1)
        found = scores > -torch.inf
        place = indices.clamp(min=0)
        values = self.values.gather(1, place.flatten(1)[..., None].expand(-1, -1, self.values.shape[-1]))
        values = values.view(*indices.shape, -1) * found[..., None]
        return Retrieved(values, scores, torch.where(found, indices, -1))

    def reset(self) -> None:
        """Forget everything."""
        self.keys, self.values = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        self.count, self._graphs = torch.zeros_like(self.count), None

    def reorder(self, rows: Tensor) -> None:
        """Take the rows [B'] of the batch, as `MemoryCache.reorder_cache` does."""
        self.keys, self.values, self.count = (x[rows] for x in (self.keys, self.values, self.count))
        self._graphs = None

    def save(self, path: str | os.PathLike) -> None:
        """Write what is held to one safetensors file."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        held = len(self)
        tensors = {"keys": self.keys[:, :held], "values": self.values[:, :held], "count": self.count}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt", "capacity": str(self.capacity), "index": self.index})

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> "LongTermMemoryCache":
        """Read a file that `save` wrote.

        Raises:
            ValueError: the file is not one.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if names != {"keys", "values", "count"} or "capacity" not in metadata:
                raise ValueError(f"{path} is no long-term memory: it holds {sorted(names)}")
            keys, values, count = (file.get_tensor(name).to(device) for name in ("keys", "values", "count"))
        capacity = int(metadata["capacity"])
        (B, held, dk), dv = keys.shape, values.shape[-1]
        cache = cls(B, dk, dv, capacity, metadata["index"], keys.dtype, device)
        cache.keys[:, :held], cache.values[:, :held], cache.count = keys, values, count
        return cache

    def _check(self, x: Tensor, name: str, like: Tensor) -> None:
        expected = [like.shape[0], like.shape[2]]
        if x.ndim != 3 or [x.shape[0], x.shape[2]] != expected:
            raise ValueError(
                f"LongTermMemoryCache: {name} are {list(x.shape)}, expected [{expected[0]}, N, {expected[1]}]"
            )

    def _search(self, q: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """By HNSW graphs (arXiv 1603.09320), one a row, built at the first lookup after a write."""
        import faiss

        if self._graphs is None:
            self._graphs = []
            for keys, count in zip(self.keys.detach().float().cpu().numpy(), self.count.tolist()):
                graph = faiss.IndexHNSWFlat(keys.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
                graph.hnsw.efSearch = 128
                graph.add(keys[: min(count, self.capacity)])
                self._graphs.append(graph)
        rows = [g.search(x, top_k)[1] for g, x in zip(self._graphs, q.detach().float().cpu().numpy())]
        indices = torch.stack([torch.from_numpy(row) for row in rows]).to(q.device)
        keys = self.keys.gather(1, indices.clamp(min=0).flatten(1)[..., None].expand(-1, -1, q.shape[-1]))
        scores = (q[:, :, None] * keys.view(*indices.shape, -1)).sum(-1)  # carries the gradient
        return torch.where(indices >= 0, scores, -torch.inf), indices
