"""Parameters on different clocks: each level accumulates its gradient over C steps and is then updated once.

Behrouz et al.: Nested Learning (2512.24695, NeurIPS 2025), eq. 71: level l with period C_l moves at step i only if
i = 0 mod C_l, by what its gradients of the last C_l steps sum up to. Here the base optimizer gets their mean, so that
a learning rate means the same at every period.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from memzoo.training.optim.checks import check_gradients
from memzoo.training.optim.wrapped import WrappedOptimizer


class ContinuumMemory(WrappedOptimizer):
    """Continuum memory system (CMS) as an optimizer around any other; `levels_by_name` makes the groups of a model.

        ContinuumMemory([{"params": slow, "period": 8}, {"params": fast}], AdamW, lr=1e-3)

    Between its updates nothing of a level changes: no weight, no momentum, no weight decay, no count of steps. A level
    of period 1 is the base optimizer, bit for bit. A parameter without a gradient at some step counts as zero in the
    mean; one that had none over a whole period is skipped. Gradients that wait are saved with the state, in at least
    float32.

    Args:
        params: parameters or groups; a group may have its own `period`.
        base: the class of optimizer that updates the levels; `base_options` are its arguments.
        period: of the groups that name none.

    Raises ValueError for a period that is no positive integer, RuntimeError for sparse, complex or sharded parameters.
    """

    own_state = ("gradient_sum",)

    def __init__(self, params: Any, base: type[Optimizer] = AdamW, *, period: int = 1, **base_options: Any):
        if isinstance(base, Optimizer):
            raise TypeError(f"base is an instance of {type(base).__name__}; give the class, and its arguments by name")
        params = list(params)
        for group in params:
            if isinstance(group, dict):
                self.check_group({"period": period, **group})
        super().__init__(base(params, **base_options), {"period": period, "steps_waited": 0})

    def check_group(self, group: dict[str, Any]) -> None:
        period = group["period"]
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise ValueError(f"period must be a positive number of steps, got {period!r}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = self.evaluate(closure)
        check_gradients(self)
        given = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        try:
            for group in self.param_groups:
                if group["period"] > 1:
                    self._accumulate(group)
            self.base.step()  # skips every parameter whose gradient is None
        finally:
            for p, gradient in given:
                p.grad = gradient
        return loss

    def _accumulate(self, group: dict[str, Any]) -> None:
        """Adds this step's gradients; leaves the mean in `.grad` if the level is due, else None."""
        group["steps_waited"] += 1
        due = group["steps_waited"] >= group["period"]
        for p in group["params"]:
            if p.grad is not None:
                gradient = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32))
                if "gradient_sum" in self.own[p]:
                    self.own[p]["gradient_sum"].add_(gradient)
                else:
                    self.own[p]["gradient_sum"] = gradient.clone()
            waiting = self.own[p].pop("gradient_sum", None) if due else None
            p.grad = None if waiting is None else waiting.div_(group["steps_waited"]).to(p.dtype)
        if due:
            group["steps_waited"] = 0
