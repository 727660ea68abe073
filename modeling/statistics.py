"""What a memory does, in numbers: routing, use of slots, learning of a neural memory, parameters by part."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memzoo.kernels.neural_memory.reference import ACTIVATION
from memzoo.modeling.neural_memory import NeuralMemory


def router_statistics(probabilities: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Of bank probabilities [B, T, K]: the mean entropy (nats), and the mean load's variance, maximum and minimum."""
    weight = torch.ones_like(probabilities[..., 0]) if mask is None else mask.to(probabilities.dtype)
    count = weight.sum().clamp(min=1)
    entropy = -(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1)
    load = (probabilities * weight[..., None]).sum((0, 1)) / count
    return {
        "router_entropy": ((entropy * weight).sum() / count).item(),
        "load_variance": load.var(correction=0).item(),
        "max_load": load.max().item(),
        "min_load": load.min().item(),
    }


def slot_statistics(writes: Tensor, mask: Tensor | None = None) -> dict[str, float]:
    """Of write weights [B, T, K, S]: the mean total write of a token, and the share of slots that are in use.

    A slot is in use when it receives more than a tenth of its even share of all writes. `address_peak` is the mean
    share of a token's write that its strongest slot gets: 1 / (K S) when flat, 1 when one slot is chosen.
    """
    if mask is not None:
        writes = writes * mask[..., None, None].to(writes.dtype)
    per_token = writes.flatten(2)  # [B, T, K S]
    total = per_token.sum(-1)
    real = total > 0
    per_slot = per_token.sum((0, 1))
    return {
        "write_mass": total[real].mean().item() if real.any() else 0.0,
        "slots_in_use": (per_slot > 0.1 * per_slot.mean()).float().mean().item(),
        "address_peak": (per_token.amax(-1)[real] / total[real]).mean().item() if real.any() else 0.0,
    }


@contextmanager
def record_calls(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[tuple, Any]]]]:
    """The positional arguments and the output of every call of the modules while the context is open."""
    calls: dict[nn.Module, list[tuple[tuple, Any]]] = {module: [] for module in modules}
    hooks = [m.register_forward_hook(lambda m, args, output: calls[m].append((args, output))) for m in calls]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def masked_mean(values: Tensor, mask: Tensor | None) -> float:
    """The mean of [B, T] over the tokens that are not pads."""
    return (values if mask is None else values[mask.bool()]).double().mean().item()


@torch.no_grad()
def neural_memory_statistics(
    memory: NeuralMemory, hidden_states: Tensor, state: dict[str, Tensor], mask: Tensor | None = None
) -> dict[str, float]:
    """How a neural memory learns from its input [B, T, D], read from `state` on; pads do not count.

    - `theta`, `eta`, `alpha`: mean step, momentum and decay. `update_rate`: share of tokens and heads that change the
      memory (their squared error is at the threshold or above).
    - `surprise`, `surprise_max`: the squared error ||f_W(k) - v||^2, mean and largest.
    - `gradient_norm`, `clipped`: mean norm of a token's gradient before the clip; share that the clip shortens.
    - `weight_change`: ||W - W_0|| / (||W|| + ||W_0||) after the last token, of all matrices of a head, from 0 to 1.
    - `effective_rank` of W - W_0, exp of the entropy of its singular values (Roy & Vetterli 2007), and `capacity`, its
      share of the full rank.

    Rows of pads alone do not count either. Raises ValueError where there is nothing else.
    """
    if mask is not None and not mask.any():
        raise ValueError("every token is a pad (the attention mask is 0 everywhere); there is nothing to tell of")
    per_token: dict[str, list[Tensor]] = {}
    per_head: dict[str, list[Tensor]] = {}
    for row in range(len(hidden_states)):
        real = slice(None) if mask is None else mask[row].bool()
        x, own = hidden_states[row, real][None], {name: value[row : row + 1] for name, value in state.items()}
        if not x.shape[1]:
            continue
        position = int(own["position"]) if "position" in own else 0
        sizes = [min(memory.chunk_size - position, x.shape[1])]
        sizes += [memory.chunk_size] * ((x.shape[1] - sizes[0]) // memory.chunk_size)
        for piece in x.split([*sizes, *([rest] if (rest := x.shape[1] - sum(sizes)) else [])], dim=1):
            for name, value in _learning(memory, piece, own).items():
                per_token.setdefault(name, []).append(value.flatten())
            own = memory(piece, own)[1]
        for name, value in _change(memory, own).items():
            per_head.setdefault(name, []).append(value.flatten())
    result = {name: torch.cat(values).double().mean().item() for name, values in {**per_token, **per_head}.items()}
    result["surprise_max"] = torch.cat(per_token["surprise"]).max().item()
    return result


def _learning(memory: NeuralMemory, x: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of x [1, c, D] within one chunk, per head and token."""
    _, k, v, _ = memory.project(x, state)
    alpha, eta, theta = memory.gates(x)
    given = memory.memory(state, k)
    activation, residual = ACTIVATION[memory.network["activation"]], memory.network["residual"]
    hidden, outputs = [], []
    with torch.enable_grad():  # the gradient of a matrix is an outer product: its norm needs no matrix
        h = k
        for i, weight in enumerate(given.weights if given.start is None else given.start):
            hidden.append(activation(h) if i else h)
            h = hidden[-1] @ weight.mT
            outputs.append(h if h.requires_grad else h.requires_grad_())
        error = (h + k if residual else h) - v
        deltas = torch.autograd.grad(0.5 * error.square().sum(), outputs)
    surprise = error.detach().square().sum(-1)
    norm = sum(d.square().sum(-1) * h.square().sum(-1) for d, h in zip(deltas, hidden)).sqrt()
    clip, threshold = memory.rule["clip"], memory.rule["threshold"]
    writes = torch.full_like(theta, memory.updates) * (surprise >= (threshold or 0.0))
    return {
        "theta": theta,
        "eta": eta,
        "alpha": alpha,
        "update_rate": writes,
        "surprise": surprise,
        "gradient_norm": norm,
        "clipped": (norm > (clip or torch.inf)).double(),
    }


def _change(memory: NeuralMemory, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of a state [1, H, out, in] against the learned first ones."""
    firsts = list(memory.initial_weights)
    lasts = [state.get(f"weights_{i}", first[None])[0] for i, first in enumerate(firsts)]
    changes = [last - first for last, first in zip(lasts, firsts)]
    moved, *norms = (sum(m.square().sum((-2, -1)) for m in ms).sqrt() for ms in (changes, firsts, lasts))  # [H]
    singular = [torch.linalg.svdvals(change.double()) for change in changes]  # [H, r]
    shares = [s / s.sum(-1, keepdim=True).clamp(min=1e-300) for s in singular]
    ranks = [torch.where(s.sum(-1) > 0, torch.special.entr(s).sum(-1).exp(), 0.0) for s in shares]
    return {
        "weight_change": moved / sum(norms).clamp(min=1e-30),
        "effective_rank": torch.stack(ranks),
        "capacity": torch.stack([rank / s.shape[-1] for rank, s in zip(ranks, singular)]),
    }


def parameter_breakdown(model: nn.Module, depth: int = 2) -> dict[str, int]:
    """Parameters by part, largest first: names are cut to `depth` levels and layer numbers are merged.

    Tied parameters count once, under their first name.
    """
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".")[:-1] if not part.isdigit() and part not in ("model", "layers")]
        counts[".".join(parts[:depth]) or name] += parameter.numel()
    return dict(counts.most_common())
