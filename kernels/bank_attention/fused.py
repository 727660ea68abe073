"""Bank attention on the CPU through the compiled loops of loops.py and loops_backward.py. Numba is optional."""

import functools
import math

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels.selective_scan.fused import is_available
from memzoo.kernels.threads import run_tasks

__all__ = ["PAD", "backward", "forward", "is_available"]

PAD = 16  # heads are so wide, or a multiple of it: what tiles.py asks for
LEAST = 256  # rows of a part of the tokens
WORK = 32  # multiplications of a product that take as long as what `run_tasks` counts


@functools.cache
def _loops():
    from memzoo.kernels.bank_attention import loops, loops_backward

    return loops, loops_backward


def _arrays(*tensors: Tensor, dtype: torch.dtype) -> list[np.ndarray]:
    return [x.detach().to(dtype).contiguous().numpy() for x in tensors]


def _plan(q: Tensor, k: Tensor, chapters: Tensor, log_weights: Tensor, size: int, shared: int):
    """The pairs of a token and a chapter; the work of a key head in so many parts that threads get equally many."""
    n, H, _ = q.shape
    kv_heads, N, _ = k.shape
    threads = torch.get_num_threads()
    parts = min(threads // math.gcd(threads, kv_heads), max(n * H // kv_heads // LEAST, 1))
    pairs = chapters.contiguous().numpy(), log_weights.detach().contiguous().numpy()
    return _loops()[0].sort_pairs(*pairs, (N, size, shared), H, kv_heads, parts)


def _run(kernel, arguments, q: Tensor, k: Tensor, plan) -> None:
    routed = int(plan.begin[-1 - plan.parts])
    read = routed * plan.size + (len(plan.token) - routed) * plan.shared
    run_tasks(kernel, arguments, k.shape[0] * plan.parts, read * q.shape[1] * q.shape[2] // WORK)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q [n, H, d]; k, v [Hk, N, d]; chapters, log_weights [n, S]. Returns out [n, H, d], L [n, H]."""
    dtype, plan = log_weights.dtype, _plan(q, k, chapters, log_weights, size, shared)
    out = q.new_empty(q.shape, dtype=dtype)
    top, sums = q.new_full(q.shape[:2], -torch.inf, dtype=dtype), q.new_zeros(q.shape[:2], dtype=dtype)
    results = [x.view(-1).numpy() for x in (out, top, sums)]
    _run(_loops()[0].forward, (*_arrays(q, k, v, dtype=dtype), plan, joint, scale, *results), q, k, plan)
    nothing = sums == 0
    if nothing.any():
        out.masked_fill_(nothing[..., None], 0.0)
    return out.to(q.dtype), sums.log2_().add_(top).mul_(math.log(2))


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    out: Tensor,
    lse: Tensor,
    size: int,
    shared: int,
    joint: bool,
    scale: float,
    router: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_weights; logits are computed again."""
    dtype, plan, loops = log_weights.dtype, _plan(q, k, chapters, log_weights, size, shared), _loops()[1]
    rows, bank = [x.reshape(-1) for x in _arrays(q, grad, dtype=dtype)], _arrays(k, v, dtype=dtype)
    if joint:
        norm, delta = lse / math.log(2), (grad.to(dtype) * out.to(dtype)).sum(-1)
    else:
        norm, delta = lse.new_empty(2, len(plan.token), q.shape[1]).unbind()
    norms = [x.view(-1).numpy() for x in (norm, delta)]
    if not joint:
        _run(loops.separate, (*rows, *bank, plan, scale, *norms), q, k, plan)
    shapes = (plan.parts, q.numel()), k.shape, v.shape, (k.shape[0] * plan.parts, log_weights.numel())
    dq, dk, dv, dw = (q.new_zeros(shape, dtype=dtype) for shape in shapes)
    results = [x.numpy() for x in (dq, dk, dv, dw)]
    _run(loops.backward, (*rows, *bank, plan, joint, scale, *norms, *results), q, k, plan)
    dq, dw = (x[0] if len(x) == 1 else x.sum(0) for x in (dq, dw))
    if not joint:
        pair = torch.from_numpy(plan.pair)
        dw[pair[pair >= 0]] = delta.sum(1)[pair >= 0]
    return *(x.to(q.dtype) for x in (dq.view(q.shape), dk, dv)), dw.view_as(log_weights)
