"""What the optimizers refuse before they change anything: gradients, settings and state dicts that do not fit."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless low <= value <= high."""
    if not low <= value <= high:
        limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limit}, got {value}")


def check_members(group: dict[str, Any]) -> None:
    """Raises ValueError if a parameter is in the group twice, which would be stepped twice; torch only warns."""
    if not isinstance(group["params"], (Tensor, set)):  # torch refuses sets
        group["params"] = list(group["params"])
        seen: set[int] = set()
        for i, p in enumerate(p[1] if isinstance(p, tuple) else p for p in group["params"]):
            if id(p) in seen:
                raise ValueError(f"parameter {i} of a group, of shape {tuple(p.shape)}, is in the group twice")
            seen.add(id(p))


def check_gradients(optimizer: Optimizer) -> None:
    """Raises before a step if a gradient is sparse, or its parameter complex or sharded."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            name = type(optimizer).__name__
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(f"{name} takes no sparse gradients; build the embedding with sparse=False")
            if p.is_complex():
                raise RuntimeError(f"{name} takes no complex parameters; optimize torch.view_as_real of them")
            if hasattr(p, "device_mesh"):  # a DTensor, without importing torch.distributed.tensor
                raise RuntimeError(f"{name} takes no sharded parameters; train with DDP instead of FSDP")


def check_state_dict(optimizer: Optimizer, state_dict: dict[str, Any], elementwise: tuple[str, ...]) -> None:
    """Raises ValueError if the state is another optimizer's or another model's; nothing is loaded then.

    `elementwise` are the names of the per-parameter tensors whose trailing dimensions are the parameter's.
    """
    name, groups, saved = kind(optimizer), optimizer.param_groups, state_dict["param_groups"]
    for group in saved:
        if group.get("optimizer") != name:
            other = group.get("optimizer", "another optimizer")
            raise ValueError(f"this is a state dict of {other}, not of {name}; load it with the one that saved it")
    sizes, saved_sizes = ([len(group["params"]) for group in which] for which in (groups, saved))
    if sizes != saved_sizes:
        raise ValueError(f"{name} has groups of {sizes} parameters, the state dict has {saved_sizes}")
    for p, index in paired(optimizer, state_dict):
        for key, value in state_dict["state"].get(index, {}).items():
            if key in elementwise and value.shape[value.dim() - p.dim() :] != p.shape:
                raise ValueError(
                    f"parameter {index} has shape {tuple(p.shape)}, its {key} in the state dict {tuple(value.shape)}"
                )


def kind(optimizer: Optimizer) -> str:
    """Names an optimizer and what it wraps, such as ContinuumMemory(AdamW); every group saves it as `optimizer`."""
    name = type(optimizer).__name__
    return f"{name}({kind(optimizer.base)})" if hasattr(optimizer, "base") else name


def paired(optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[Tensor, int]]:
    """Every parameter with its key in `state_dict["state"]`."""
    return [
        (p, index)
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"])
        for p, index in zip(group["params"], saved["params"])
    ]
