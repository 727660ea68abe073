"""An optimizer around another one: the same groups and the same state, with tensors of its own per parameter."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from memzoo.training.optim.checks import check_members, check_state_dict, kind, paired


class WrappedOptimizer(Optimizer):
    """Groups and state are those of `base`: learning rate schedulers and Accelerate see nothing else.

    A subclass gives `group_defaults`, the keys that it adds to every group (group settings win), and `own_state`, the
    names of its tensors of the parameter's shape, held in `self.own[p]` and saved with the parameter's state.
    """

    own_state: tuple[str, ...] = ()

    def __init__(self, base: Optimizer, group_defaults: dict[str, Any]):
        name = type(self).__name__
        if not isinstance(base, Optimizer):
            raise TypeError(f"{name} goes around an optimizer, such as AdamW(model.parameters()), not {base!r}")
        if isinstance(base, LBFGS):
            raise TypeError(f"{name} cannot wrap LBFGS, which takes several steps inside of one")
        if f"{name}(" in kind(base):  # both would keep what is theirs under the same names
            raise TypeError(f"{name} cannot go around {kind(base)}: one of a kind is enough")
        self.base = base
        self.own: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        super().__init__(base.param_groups, {**base.defaults, **group_defaults})
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = {key: value for key, value in self.defaults.items() if key not in self.base.defaults}
        self.check_group({**own, **param_group})
        check_members(param_group)
        if not any(group is param_group for group in self.base.param_groups):
            self.base.add_param_group(param_group)
        for key, value in own.items():
            param_group.setdefault(key, value)
        param_group["optimizer"] = kind(self)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a setting of the group that cannot be used."""

    def state_dict(self) -> dict[str, Any]:
        packed = self.base.state_dict()
        packed["state"] = {index: dict(state) for index, state in packed["state"].items()}
        for p, index in paired(self, packed):
            if p in self.own:
                packed["state"].setdefault(index, {}).update(self.own[p])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state_dict(self, state_dict, self.own_state)
        own: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        of_base = {}
        for p, index in paired(self, state_dict):
            state = state_dict["state"].get(index, {})
            for key in self.own_state:
                if key in state:
                    own[p][key] = state[key].to(p.device, copy=True)
            if rest := {key: value for key, value in state.items() if key not in self.own_state}:
                of_base[index] = rest
        groups = [{**group, "optimizer": kind(self.base)} for group in state_dict["param_groups"]]
        self.base.load_state_dict({**state_dict, "state": of_base, "param_groups": groups})
        self.own = own
        self._share()
        for group in self.param_groups:
            group["optimizer"] = kind(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base": self.base, "own": self.own}

    @staticmethod
    def evaluate(closure: Any) -> Any:
        """The closure's loss, with gradients on; None without a closure."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()
