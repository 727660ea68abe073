"""A small network that sets a multiplier of each group's learning rate while the model trains.

Its objective is the loss after the step. Baydin et al.: Online Learning Rate Adaptation with Hypergradient Descent
(1703.04782), eq. 4-5: if the last step was d_{t-1} = mu_{t-1} lr u, then by the chain rule

    d loss_t / d log mu_{t-1} = <g_t, d_{t-1}>

which needs the next gradient, not a second backward pass. It is positive where the last step went too far. Scaled to
[-1, 1] by the two norms (their multiplicative rule), it goes back into the network, an MLP of four features per group:
log gradient norm, log parameter norm, depth, loss trend.
"""

from collections.abc import Callable
from itertools import chain
from math import exp, log, log10
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memzoo.training.optim.checks import check_gradients, check_range, check_state_dict
from memzoo.training.optim.wrapped import WrappedOptimizer

NUM_FEATURES = 4
TREND_DECAY = 0.9


class NestedController(WrappedOptimizer):
    """Steps `base` with each group's learning rate times mu in [min_multiplier, max_multiplier].

        NestedController(AdamW(groups_by_depth(model), lr=1e-3))

    log mu = <out, tanh(hidden f + bias)> + shift, clamped to the bounds. It starts at 0, so mu = 1, and nothing is
    learned that would push mu further out of its bounds, so that it never sticks there. `lr` in the groups is what the
    user or a scheduler put there, before and after every step; the multiplier is in the group as `lr_multiplier`.

    The loss trend is the moving average of the scaled hypergradient: the slope of the loss along the last steps. It
    needs no loss value, and is the same in every process that has the same gradients.

    Args:
        base: any torch optimizer; a group may have a `depth` in [0, 1] (else: its place among the groups).
        meta_lr: learning rate of the network, 0 turns it off.
        hidden_size: its width.

    State: a copy of each parameter from before the step, and the network under `controller` in the state dict.
    """

    own_state = ("previous",)

    def __init__(
        self,
        base: Optimizer,
        *,
        meta_lr: float = 0.05,
        hidden_size: int = 8,
        min_multiplier: float = 0.1,
        max_multiplier: float = 2.0,
    ):
        check_range("meta_lr", meta_lr, 0)
        check_range("hidden_size", hidden_size, 1)
        if not 0 < min_multiplier <= 1 <= max_multiplier:
            raise ValueError(
                "the multiplier starts at 1, so 0 < min_multiplier <= 1 <= max_multiplier; "
                f"got {min_multiplier} and {max_multiplier}"
            )
        self.meta_lr, self.bounds = meta_lr, (log(min_multiplier), log(max_multiplier))
        random = torch.Generator().manual_seed(0)
        self.controller = {
            "hidden": torch.randn(hidden_size, NUM_FEATURES, generator=random),
            "bias": torch.zeros(hidden_size),
            "out": torch.zeros(hidden_size),
            "shift": torch.zeros(1),
        }
        own = {"depth": None, "lr_multiplier": 1.0, "loss_trend": 0.0, "features": None}
        super().__init__(base, own)

    def check_group(self, group: dict[str, Any]) -> None:
        if group["depth"] is not None:
            check_range("depth", group["depth"], 0, 1)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "controller": dict(self.controller)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state_dict(self, state_dict, self.own_state)
        saved = state_dict.get("controller", {})
        if (shapes := _shapes(saved)) != _shapes(self.controller):
            raise ValueError(
                f"NestedController has a network of {_shapes(self.controller)}, the state dict of {shapes}"
            )
        super().load_state_dict(state_dict)
        self.controller = {name: value.to("cpu", copy=True) for name, value in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "controller": self.controller,
            "meta_lr": self.meta_lr,
            "bounds": self.bounds,
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.evaluate(closure)
        check_gradients(self)
        measured = self._measure()
        self._learn([(group, m["slope"]) for group, m in measured if m["slope"] is not None])
        for group, m in measured:
            group["features"] = self._features(group, m)
            group["lr_multiplier"] = exp(min(max(self._answer(group["features"])[0], self.bounds[0]), self.bounds[1]))
        for p in chain.from_iterable(group["params"] for group, _ in measured):
            if p.grad is not None:
                self.own[p]["previous"] = p.clone()
        rates = [group["lr"] for group in self.param_groups]
        try:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate * group["lr_multiplier"]
            self.base.step()
        finally:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate
        return loss

    def _measure(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Groups that have a gradient: root mean squares of gradient and parameters, and the scaled hypergradient."""
        groups, sums = [], []
        for group in self.param_groups:
            parts = [_sums(p, p.grad, self.own[p].get("previous")) for p in group["params"] if p.grad is not None]
            if parts:
                groups.append(group)
                sums.append(torch.stack([part.cpu() for part in parts]).sum(0))
        measured = []
        for group, (gg, pp, n, gd, dd, gg_d) in zip(groups, torch.stack(sums).tolist() if sums else []):
            slope = gd / (gg_d * dd) ** 0.5 if gg_d * dd > 0 else None
            measured.append((group, {"gradient": (gg / n) ** 0.5, "parameter": (pp / n) ** 0.5, "slope": slope}))
        return measured

    def _features(self, group: dict[str, Any], m: dict[str, Any]) -> list[float]:
        if m["slope"] is not None:
            group["loss_trend"] = TREND_DECAY * group["loss_trend"] + (1 - TREND_DECAY) * m["slope"]
        depth = group["depth"]
        if depth is None:
            place = next(i for i, other in enumerate(self.param_groups) if other is group)
            depth = place / max(len(self.param_groups) - 1, 1)
        scales = [log10(max(m[name], 1e-12)) / 4 for name in ("gradient", "parameter")]  # about -3 to 1
        return [*scales, depth, group["loss_trend"]]

    def _answer(self, features: list[float]) -> tuple[float, Tensor]:
        """log mu before the bounds, and the hidden units [H]."""
        net = self.controller
        h = torch.tanh(net["hidden"] @ torch.tensor(features) + net["bias"])
        return (net["out"] @ h + net["shift"]).item(), h

    def _learn(self, slopes: list[tuple[dict[str, Any], float]]) -> None:
        """One gradient step of the network on the mean over the groups of d loss / d log mu."""
        net = self.controller
        grads = {name: torch.zeros_like(value) for name, value in net.items()}
        for group, slope in slopes:
            answer, h = self._answer(group["features"])
            outwards = (answer <= self.bounds[0] and slope > 0) or (answer >= self.bounds[1] and slope < 0)
            d = 0.0 if outwards else slope / len(slopes)
            dh = d * net["out"] * (1 - h.square())  # [H]
            grads["shift"] += d
            grads["out"] += d * h
            grads["bias"] += dh
            grads["hidden"] += dh[:, None] * torch.tensor(group["features"])
        for name, value in net.items():
            value -= self.meta_lr * grads[name]


def _sums(p: Tensor, gradient: Tensor, previous: Tensor | None) -> Tensor:
    """Six sums over a parameter: g g, p p, 1, and with the last step d: g d, d d, g g where d is known."""
    at_least_fp32 = torch.promote_types(p.dtype, torch.float32)
    g, w = gradient.flatten().to(at_least_fp32), p.flatten().to(at_least_fp32)
    d = torch.zeros_like(w) if previous is None else w - previous.flatten().to(at_least_fp32)
    gg, count = g @ g, torch.full((), float(p.numel()), dtype=at_least_fp32, device=p.device)
    return torch.stack([gg, w @ w, count, g @ d, d @ d, torch.zeros_like(gg) if previous is None else gg])


def _shapes(net: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in net.items()}
