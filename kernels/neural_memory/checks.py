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
    gates, tokens = (B, H, T), [("k", k, (B, H, T, dk)), ("v", v, (B, H, T, v.shape[-1]))]
    tokens += [("alpha", alpha, gates), ("eta", eta, gates), ("theta", theta, gates)]
    if mask is not None:
        tokens.append(("mask", mask, (B, T)))
    if position is not None:
        tokens.append(("position", position, (B,)))
    for name, tensor, shape in tokens:
        _check(tensor, shape, name)
    if not weights:
        raise ValueError("neural_memory: weights needs at least one matrix")
    for name, given in (("momentum", momentum), ("start", start)):
        if given is not None and len(given) != len(weights):
            raise ValueError(f"neural_memory: {name} has {len(given)} matrices, weights has {len(weights)}")
    width = dk
    for i, weight in enumerate(weights):
        shape = B, H, v.shape[-1] if i == len(weights) - 1 else weight.shape[-2], width
        _check(weight, shape, "weights", i)
        if momentum is not None:
            _check(momentum[i], shape, "momentum", i)
        if start is not None:
            _check(start[i], shape, "start", i)
        width = shape[2]
    if (start is None) != (position is None):
        raise ValueError("neural_memory: start and position belong together, give both or neither")
    if chunk_size < 1:
        raise ValueError(f"neural_memory: chunk_size must be at least 1, not {chunk_size}")
    if clip is not None and clip <= 0:
        raise ValueError(f"neural_memory: clip must be positive, not {clip}")
    if threshold is not None and threshold < 0:
        raise ValueError(f"neural_memory: threshold must not be negative, not {threshold}")


def _check(tensor: Tensor, shape: tuple[int, ...], name: str, layer: int | None = None) -> None:
    if tensor.shape != shape:  # what it is called matters to those only who got it wrong
        called = name if layer is None else f"{name}[{layer}]"
        raise ValueError(f"neural_memory: {called} is {list(tensor.shape)}, expected {list(shape)}")
