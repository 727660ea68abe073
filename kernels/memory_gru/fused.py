"""memory_gru as compiled CPU loops (loops.py) behind torch.library ops: forward, and backpropagation through time.

The forward keeps the small per-step activations, and the banks at every CHUNK steps. The backward replays the writes
of one chunk at a time, so the banks take (T / CHUNK + CHUNK) K S m numbers, not T K S m. Its loop returns only the
gradients of the pre-activations; those of the weights are matmuls over all steps.

A thread takes whole sequences.
"""

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels.memory_gru.loops import CHUNK, backward, forward
from memzoo.kernels.memory_gru.reference import MemoryGRUWeights
from memzoo.kernels.threads import run_tasks


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _bias_array(bias: Tensor | None, Kr: int, like: Tensor) -> np.ndarray:
    """[1 or B, 1 or T, Kr]"""
    if bias is None:
        bias = like.new_zeros(Kr)
    return _array(bias if bias.dim() == 3 else bias[None, None])


def _mask_array(mask: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.bool_) if mask is None else _array(mask.bool())


def _outputs(x_router: Tensor, h0: Tensor, M0: Tensor, Kr: int, save: bool) -> list[Tensor]:
    """h_seq, logits, M_T, and for the backward acts, addresses (one step unless save), checkpoints (none)."""
    (B, T, R), H, (_, K, S, m) = x_router.shape, h0.shape[1], M0.shape
    steps, chunks = (T, (T + CHUNK - 1) // CHUNK) if save else (1, 0)
    width = R + K + 5 * m + 3 + 3 * H  # see `parts`
    shapes = (B, T, H), (B, T, Kr), (B, K, S, m), (B, steps, width), (B, steps, 2, K, S), (B, chunks * K, S, m)
    return [h0.new_empty(shape) for shape in shapes]


def _run_forward(
    x_router: Tensor,
    x_query: Tensor,
    x_gates: Tensor,
    h0: Tensor,
    M0: Tensor,
    weights: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    top_k: int,
    decay: float,
    cap: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    Kr = weights[1].shape[0]
    outputs = _outputs(x_router, h0, M0, Kr, save)
    outputs[2].copy_(M0)
    arrays = [_array(x) for x in (x_router, x_query, x_gates)], [_array(x) for x in (h0, *weights)]
    options = temperature, top_k, M0.shape[1] - Kr, decay, cap
    side = _bias_array(bias, Kr, h0), _mask_array(mask)
    arguments = (*arrays[0], *side, *arrays[1], *options, *(x.numpy() for x in outputs))
    run_tasks(forward, arguments, len(h0), x_router.shape[1] * M0.numel())
    return tuple(outputs)


forward_op = torch.library.custom_op("memzoo::memory_gru", _run_forward, mutates_args=())


@forward_op.register_fake
def _(x_router, x_query, x_gates, h0, M0, weights, bias, mask, temperature, top_k, decay, cap, save):
    return tuple(_outputs(x_router, h0, M0, weights[1].shape[0], save))


@torch.library.custom_op("memzoo::memory_gru_backward", mutates_args=())
def backward_op(
    dh_seq: Tensor,
    dlogits: Tensor,
    dM_T: Tensor,
    h0: Tensor,
    h_seq: Tensor,
    acts: Tensor,
    addresses: Tensor,
    checkpoints: Tensor,
    weights: list[Tensor],
    mask: Tensor | None,
    temperature: float,
    decay: float,
    cap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h0, M0 and of the pre-activations (`backward`)."""
    w = MemoryGRUWeights(*weights)
    saved = [_array(x) for x in (h0, h_seq, acts, addresses, checkpoints)]
    loop_weights = [_array(x) for x in (w.router_h, w.router_out, w.query_h, w.gates_c, w.gates_h, w.write)]
    dM, dh0 = dM_T.clone(memory_format=torch.contiguous_format), h0.new_empty(h0.shape)
    deltas = h0.new_empty(*h_seq.shape[:2], _delta_width(w))
    gradients = [_array(x) for x in (dh_seq, dlogits, dM, dh0, deltas)]
    arguments = (_mask_array(mask), *saved, *loop_weights, temperature, decay, cap, *gradients)
    run_tasks(backward, arguments, len(h0), h_seq.shape[1] * dM_T.numel())
    return dh0, dM, deltas


def _delta_width(w: MemoryGRUWeights) -> int:
    return sum(len(x) for x in (w.router_h, w.query_h, w.gates_c, w.write, w.router_out, w.router_out))


@backward_op.register_fake
def _(dh_seq, dlogits, dM_T, h0, h_seq, acts, addresses, checkpoints, weights, mask, temperature, decay, cap):
    deltas = h0.new_empty(*h_seq.shape[:2], _delta_width(MemoryGRUWeights(*weights)))
    return h0.new_empty(h0.shape), dM_T.new_empty(dM_T.shape), deltas


def _save(ctx, inputs, output):
    _, _, _, h0, _, weights, bias, mask, temperature, _, decay, cap, save = inputs
    h_seq, _, _, acts, addresses, checkpoints = output
    if not save:
        raise RuntimeError("memzoo::memory_gru was called with save=False on tensors that require a gradient")
    ctx.save_for_backward(h0, h_seq, acts, addresses, checkpoints, mask, *weights)
    ctx.options, ctx.bias_dim = (temperature, decay, cap), None if bias is None else bias.dim()
    ctx.mark_non_differentiable(acts, addresses, checkpoints)
    ctx.set_materialize_grads(False)


@torch.autocast("cpu", enabled=False)  # weight gradients are float32 wherever backward is called from
def _backward(ctx, dh_seq, dlogits, dM_T, *_):
    h0, h_seq, acts, addresses, checkpoints, mask, *weights = ctx.saved_tensors
    w = MemoryGRUWeights(*weights)
    R, H, m, K, Kr = len(w.router_h), h0.shape[1], w.gates_c.shape[1], addresses.shape[3], len(w.router_out)
    dh_seq = torch.zeros_like(h_seq) if dh_seq is None else dh_seq
    dlogits = h_seq.new_zeros(*h_seq.shape[:2], Kr) if dlogits is None else dlogits
    dM_T = torch.zeros_like(checkpoints[:, :K]) if dM_T is None else dM_T
    dh0, dM0, deltas = backward_op(
        dh_seq, dlogits, dM_T, h0, h_seq, acts, addresses, checkpoints, weights, mask, *ctx.options
    )
    drouter, dquery, dgates, dwrite, dscores, dl = deltas.split([R, m + 1, 3 * H, 3 * m + 2, Kr, Kr], dim=-1)
    h_prev = torch.cat([h0[:, None], h_seq[:, :-1]], dim=1)
    pre, _, _, c, reset, _ = acts.split([R, K, m + 1, m, H, 2 * H + 3 * m + 2], dim=-1)  # see `parts`
    dgates_h = [_outer(dgates[..., : 2 * H], h_prev), _outer(dgates[..., 2 * H :], reset * h_prev)]
    dweights = [
        _outer(drouter, h_prev),
        _outer(dl, pre.relu()),
        dl.sum((0, 1)),
        _outer(dquery, h_prev),
        _outer(dgates, c),
        torch.cat(dgates_h),
        _outer(dwrite, h_seq),
        dwrite.sum((0, 1)),
    ]
    dbias = {None: None, 1: dscores.sum((0, 1)), 3: dscores}[ctx.bias_dim]
    return drouter, dquery, dgates, dh0, dM0, dweights, dbias, None, None, None, None, None, None


def _outer(d: Tensor, x: Tensor) -> Tensor:
    """Sum over batch and time of d x': [B, T, O], [B, T, I] -> [O, I]."""
    return d.flatten(0, 1).T @ x.flatten(0, 1)


def _double_backward(ctx, *_):
    raise NotImplementedError(
        "memory_gru has no double backward in its fused form; call it with implementation='reference'"
    )


forward_op.register_autograd(_backward, setup_context=_save)
backward_op.register_autograd(_double_backward)


def memory_gru_fused(
    x_router: Tensor,
    x_query: Tensor,
    x_gates: Tensor,
    h0: Tensor,
    M0: Tensor,
    weights: MemoryGRUWeights,
    router_bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    shared_bank: bool = False,
    decay: float = 1.0,
    slot_norm_cap: float | None = None,
    return_writes: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """As memory_gru_reference; writes are None unless asked for, and have no gradient."""
    (K, _, m), H, R, Kr = M0.shape[1:], h0.shape[1], x_router.shape[2], len(weights.router_out)
    tensors = (x_router, x_query, x_gates, h0, M0, *weights, *([] if router_bias is None else [router_bias]))
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    run = forward_op if with_grad or torch.compiler.is_compiling() else _run_forward  # the op's dispatch costs 50 us
    options = temperature, Kr if top_k is None else top_k, decay, slot_norm_cap or 0.0
    h_seq, logits, M, acts, addresses, _ = run(
        *tensors[:5], list(weights), router_bias, mask, *options, with_grad or return_writes
    )
    writes = None
    if return_writes:
        rho, gate = acts[..., R : R + K], acts[..., R + K + 3 * m + 3 * H + 2]
        writes = addresses[:, :, 1] * (rho * gate[..., None])[..., None]
    return h_seq, logits, h_seq[:, -1].clone(), M, writes
