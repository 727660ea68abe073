"""Refusals of the public op, each naming the argument, its shape and the expected one."""

from torch import Tensor


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    eta: Tensor,
    theta: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor] | None,
    chunk_size: int,
    mask: Tensor | None,
    clip: float | None,
    threshold: float | None,
    start: list[Tensor] | None,
    position: Tensor | None,
) -> None:
    if q.ndim != 4 or v.ndim != 4 or q.shape[2] == 0:
        raise ValueError(f"neural_memory: q and v must be [B, H, T > 0, d], not {list(q.shape)} and {list(v.shape)}")
    B, H, T, dk = q.shape
    expected = {
        "k": (k, (B, H, T, dk)),
        "v": (v, (B, H, T, v.shape[-1])),
        "alpha": (alpha, (B, H, T)),
        "eta": (eta, (B, H, T)),
        "theta": (theta, (B, H, T)),
        **({} if mask is None else {"mask": (mask, (B, T))}),
        **({} if position is None else {"position": (position, (B,))}),
    }
    if not weights:
        raise ValueError("neural_memory: weights needs at least one matrix")
    width = dk
    for i, weight in enumerate(weights):
        out = v.shape[-1] if i == len(weights) - 1 else weight.shape[-2]
        expected[f"weights[{i}]"] = (weight, (B, H, out, width))
        width = out
    for name, given in (("momentum", momentum), ("start", start)):
        if given is None:
            continue
        if len(given) != len(weights):
            raise ValueError(f"neural_memory: {name} has {len(given)} matrices, weights has {len(weights)}")
        expected |= {f"{name}[{i}]": (x, tuple(w.shape)) for i, (x, w) in enumerate(zip(given, weights))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"neural_memory: {name} is {list(tensor.shape)}, expected {list(shape)}")
    if (start is None) != (position is None):
        raise ValueError("neural_memory: start and position belong together, give both or neither")
    if chunk_size < 1:
        raise ValueError(f"neural_memory: chunk_size must be at least 1, not {chunk_size}")
    if clip is not None and clip <= 0:
        raise ValueError(f"neural_memory: clip must be positive, not {clip}")
    if threshold is not None and threshold < 0:
        raise ValueError(f"neural_memory: threshold must not be negative, not {threshold}")
