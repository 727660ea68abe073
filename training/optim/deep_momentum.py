"""Momentum that is a network trained on the gradients.

Behrouz et al.: Nested Learning (2512.24695, NeurIPS 2025), section 4.4. With u_t the gradient of the loss and m a
network with weights theta that are trained on an inner objective L2 while the model trains,

    W_{t+1} = W_t - lr m_{t+1}(s_t),     theta_{t+1} = alpha theta_t - eta grad L2(m_t; s_{t-1}, u_t)     (eq. 50, 52)

`objective="dot"` is L2 = -<m(s), u> (eq. 34), `"regression"` is L2 = |m(s) - u|^2 / 2 (eq. 48). Two levels:

1. One weight m_k per element and momentum beta_k, with the constant key 1 (the linear memory of eq. 33). Its objective
   gives beta m + u, the heavy ball, for "dot", and beta m + (1 - beta) u, the moving average, for "regression".
2. One network per tensor, applied to each element with the same weights: m(s) = <skip, s> + <out, tanh(hidden s)>.
   Its keys s are the first level's memories *before* u_t arrived, so that it learns to predict the next gradient;
   with u_t among the keys it would learn to copy it. It is odd, so that no direction is preferred, and starts as
   momentum 0.

The paper leaves the network and the keys open. Here both are divided by the root of the second moment of the gradient
(Adam's preconditioner) and scaled to mean square 1 over the tensor; the inner step is divided by the mean square norm
of the features (the proximal step of eq. 56-57), which makes it stable for eta < 2. The network decides the direction
of the step, momentum 0 its length, so that learning rates of AdamW carry over, and eta = 0 is AdamW itself. Where the
network points against momentum 0, momentum 0 is used.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from memzoo.training.optim.checks import check_gradients, check_members, check_range, check_state_dict, kind, paired

BLOCK = 1 << 15  # elements that go through the network at once: bounds its memory, fits a cache


class DeepMomentum(Optimizer):
    """Deep momentum gradient descent (DMGD), elementwise: time and memory are linear in the parameters.

    Args:
        params: parameters or groups; every argument below may be given per group, `momenta` with equal lengths.
        lr: learning rate, on AdamW's scale.
        hidden_size: width of a tensor's network; 0 leaves the network out and steps along momentum 0 alone.
        objective: what the momentum is trained on, at both levels.
        momenta: retention of the first level's memories; the first is the plain momentum, the others are further keys.
        beta2: retention of the second moment; 0 turns the preconditioner off.
        inner_lr, inner_decay: eta and alpha of the network.
        weight_decay: decoupled, as in AdamW.

    State per parameter of n elements: `memories` [K, n], `second_moment` [n] and the network, in at least float32.
    Raises ValueError for a setting out of range, RuntimeError for sparse, complex or sharded parameters.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        hidden_size: int = 8,
        objective: Literal["regression", "dot"] = "regression",
        momenta: list[float] | tuple[float, ...] = (0.9, 0.99),
        beta2: float = 0.999,
        inner_lr: float = 0.1,
        inner_decay: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        options = {"hidden_size": hidden_size, "objective": objective, "momenta": tuple(momenta), "beta2": beta2}
        inner = {"inner_lr": inner_lr, "inner_decay": inner_decay}
        rest = {"eps": eps, "weight_decay": weight_decay, "optimizer": kind(self)}
        super().__init__(params, {"lr": lr, **options, **inner, **rest})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _check_group({**self.defaults, **param_group})
        check_members(param_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state_dict(self, state_dict, ("memories", "second_moment"))
        super().load_state_dict(state_dict)
        for p, index in paired(self, state_dict):  # torch casts state to the parameter's dtype, bfloat16 perhaps
            for key, value in state_dict["state"].get(index, {}).items():
                if key != "step":
                    self.state[p][key] = value.to(p.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            self._start(p, state, group)
        state["step"] += 1
        t, beta2 = state["step"].item(), group["beta2"]
        v = state["second_moment"].flatten()  # [n]
        memories = state["memories"].view(-1, v.numel())  # [K, n]
        u = gradient.flatten().to(v.dtype)
        v.mul_(beta2).addcmul_(u, u, value=1 - beta2)
        precondition = (v / (1 - beta2**t)).sqrt_().add_(group["eps"]).reciprocal_() if beta2 else torch.ones_like(v)
        if group["hidden_size"]:
            _learn(state, _keys(memories, precondition, group), u * precondition, group)
        for m, beta in zip(memories, group["momenta"]):
            m.mul_(beta).add_(u, alpha=1 if group["objective"] == "dot" else 1 - beta)
        step = memories[0] * precondition
        if beta2 and group["objective"] == "regression":  # Adam corrects its bias; the heavy ball does not
            step = step / (1 - group["momenta"][0] ** t)
        if group["hidden_size"]:
            step = _direction(state, _keys(memories, precondition, group), step)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(step.view_as(p).to(p.dtype), alpha=-group["lr"])

    def _start(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        like: dict[str, Any] = {"dtype": torch.promote_types(p.dtype, torch.float32), "device": p.device}
        H = group["hidden_size"]
        K = len(group["momenta"]) if H else 1
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["memories"] = torch.zeros((K, *p.shape), **like)
        state["second_moment"] = torch.zeros(p.shape, **like)
        if H:
            hidden = torch.randn(H, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / K**0.5
            state["hidden"], state["out"] = hidden.to(**like), torch.zeros(H, **like)
            state["skip"] = torch.zeros(K, **like)
            state["skip"][0] = 1


def _keys(memories: Tensor, precondition: Tensor, group: dict[str, Any]) -> Tensor:
    """memories [K, n] -> keys [K, n], before they are scaled over the tensor.

    A memory longer than the second moment's outlives it: where an element gets no gradients, their ratio would grow
    without bound. At equal retention an average is at most the root of the average square, so 1 is the limit.
    """
    keys = memories * precondition
    if group["beta2"]:
        for key, beta in zip(keys[1:], group["momenta"][1:]):
            limit = 1 / (1 - beta) if group["objective"] == "dot" else 1.0
            key.clamp_(-limit, limit)
    return keys


def _inverse_size(x: Tensor) -> Tensor:
    """x [..., n] -> [...], what scales it to mean square 1; 0 for zeros."""
    size = torch.linalg.vector_norm(x, dim=-1) / x.shape[-1] ** 0.5
    return size.reciprocal().nan_to_num(nan=0.0, posinf=0.0)


def _respond(state: dict[str, Any], scale: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [K, n] before they are scaled [K] -> the network's answer [n] and its hidden units [H, n]."""
    hidden = ((state["hidden"] * scale) @ keys).tanh_()
    return (state["skip"] * scale) @ keys + state["out"] @ hidden, hidden


def _learn(state: dict[str, Any], keys: Tensor, u: Tensor, group: dict[str, Any]) -> None:
    """One step of the network on keys [K, n] and the gradient u [n] that followed them, in closed form.

    With e = d L2 / d answer, averaged over the elements, and h the hidden units, the gradients of `skip`, `out` and
    `hidden` are s e, h e and out (1 - h^2) e s.
    """
    n, scale = u.numel(), _inverse_size(keys)
    u = u * _inverse_size(u)
    skip, out, hidden = (torch.zeros_like(state[name]) for name in ("skip", "out", "hidden"))
    size = n * scale.count_nonzero()  # of the features: sum of s^2 and h^2
    for k, target in zip(keys.split(BLOCK, dim=1), u.split(BLOCK)):
        answer, h = _respond(state, scale, k)
        e = answer - target if group["objective"] == "regression" else -target
        he = h * e
        skip += k @ e
        out += he.sum(1)
        hidden += torch.addcmul(e, h, he, value=-1) @ k.T
        size = size + h.flatten() @ h.flatten()
    rate = group["inner_lr"] / size.clamp(min=n)
    steps = {"skip": skip * scale, "out": out, "hidden": state["out"][:, None] * hidden * scale}
    for name, step in steps.items():
        state[name].mul_(group["inner_decay"]).sub_(rate * step)


def _direction(state: dict[str, Any], keys: Tensor, step: Tensor) -> Tensor:
    """The network's answer to keys [K, n] with the length of `step` [n], or `step` where the two point apart."""
    scale = _inverse_size(keys)
    answer = torch.cat([_respond(state, scale, k)[0] for k in keys.split(BLOCK, dim=1)])
    agrees = answer @ step > 0
    length = torch.linalg.vector_norm(step) / torch.linalg.vector_norm(answer)
    return torch.where(agrees, answer.mul_(length), step)


def _check_group(group: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps", "hidden_size"):
        check_range(name, group[name], 0)
    if not isinstance(group["hidden_size"], int):
        raise ValueError(f"hidden_size must be a whole number of units, got {group['hidden_size']}")
    check_range("inner_lr", group["inner_lr"], 0, 2)
    check_range("inner_decay", group["inner_decay"], 0, 1)
    for name, values in (("momenta", group["momenta"]), ("beta2", [group["beta2"]])):
        for value in values:
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
    if not group["momenta"]:
        raise ValueError("momenta is empty; give at least one, such as (0.9,)")
    if group["objective"] not in ("regression", "dot"):
        raise ValueError(f"objective must be 'regression' or 'dot', got {group['objective']!r}")
