"""The parts of the chunked forward: surprise of a chunk, its update, the reads of a segment of chunks.

Every product is a batched one over groups, or over chunks and groups; x [batch, C, d], weights [batch, out, in].
"""

import torch
from torch import Tensor

from memzoo.kernels.neural_memory.activation import Activation


def surprise(
    weights: list[Tensor],
    act: Activation,
    target: Tensor,
    h: list[Tensor],
    z: list[Tensor],
    g: list[Tensor],
    delta: list[Tensor],
) -> None:
    """Gradients of 1/2 ||f_W(k) - target||^2 at one chunk, written into the buffers z, g, h[1:] and delta.

    delta_l is the gradient at layer l's output, g_l the one before the activation's slope, h_0 = k is given.
    """
    last = len(weights) - 1
    for l, weight in enumerate(weights):
        torch.bmm(h[l], weight.mT, out=delta[l] if l == last else z[l])
        if l < last:
            act.value(z[l], out=h[l + 1])
    delta[last].sub_(target)
    for l in reversed(range(last)):
        torch.bmm(delta[l + 1], weights[l + 1], out=g[l])
        act.backward(g[l], z[l], grad_input=delta[l])


def squared_norm(h: list[Tensor], delta: list[Tensor]) -> Tensor:
    """||g||^2 of each token's gradient over all matrices, each an outer product delta h'; [batch, C]."""
    return sum((d * d).sum(-1) * (x * x).sum(-1) for x, d in zip(h, delta))


def clip_scale(square: Tensor, clip: float) -> Tensor:
    return torch.where(square > clip**2, clip * square.clamp(min=clip**2).rsqrt(), 1.0)


def steps(theta: Tensor, h: list[Tensor], delta: list[Tensor], clip: float | None, threshold: float | None) -> Tensor:
    """theta [batch, C] after the clip of the gradient's norm and the threshold on the squared error."""
    if clip is not None:
        theta = theta * clip_scale(squared_norm(h, delta), clip)
    if threshold is not None:
        theta = theta * (delta[-1].square().sum(-1) >= threshold)
    return theta


def scaled_rows(x: Tensor, factors: Tensor) -> Tensor:
    """x [batch, C, d] times factors [batch, C, 2] -> [batch, C, 2 d]."""
    return (x.unsqueeze(-2) * factors.unsqueeze(-1)).flatten(-2)


def rows(state: Tensor) -> Tensor:
    """(W, S) [batch, 2 out, in] as two rows, [batch, 2, out in]."""
    return state.view(state.shape[0], 2, -1)


def advance(state: Tensor, mix: Tensor, updates: Tensor, h: Tensor, out: Tensor) -> None:
    """(W, S) at the chunk's end: mix (W, S) - updates' h."""
    torch.bmm(mix, rows(state), out=rows(out))
    out.baddbmm_(updates.mT, h, alpha=-1)


def read(
    q: Tensor,
    h: list[Tensor],
    delta: list[Tensor],
    states: list[Tensor],
    start: Tensor,
    inside: Tensor,
    act: Activation,
) -> list[Tensor]:
    """Every layer's output at the queries. start [batch, C, 2]: factors of W and S, inside [batch, C, C]: of steps."""
    outputs, x = [], q
    for l, (h_l, delta_l, state) in enumerate(zip(h, delta, states)):
        if l:
            x = act.value(outputs[-1])
        W, S = torch.bmm(x, state.mT).chunk(2, -1)
        out = (W * start[..., :1]).addcmul_(S, start[..., 1:])
        outputs.append(out.baddbmm_(torch.bmm(x, h_l.mT).mul_(inside), delta_l, alpha=-1))
    return outputs
