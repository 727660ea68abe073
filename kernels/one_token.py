"""What the compiled one-token steps share. While decoding, calls cost more than the arithmetic does."""

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from memzoo.kernels.selective_scan.fused import is_available

MAX_BATCH = 2  # from then on a matrix product beats reading the weights once a sequence

_views: WeakKeyDictionary[Any, tuple[list[int], list[np.ndarray]]] = WeakKeyDictionary()


def fits(x: Tensor, *states: Tensor) -> bool:
    """Whether a step may be compiled: few sequences on the CPU, one precision, no gradient, autocast or tracing."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if x.device.type != "cpu" or x.shape[0] > MAX_BATCH or x.dtype not in (torch.float32, torch.float64):
        return False
    return all(state.dtype == x.dtype for state in states) and is_available()


def views(owner: Any, weights: list[Tensor | None], dtype: torch.dtype) -> list[np.ndarray] | None:
    """numpy views of the weights of `owner`, a module; None where one has another type or is not contiguous.

    They are kept, with the memory that they show, for the next token, which then only asks whether the weights still
    lie where they did; what changes them in place is seen. None among the weights becomes an empty array.
    """
    places = [0 if weight is None else weight.data_ptr() for weight in weights]
    kept = _views.get(owner)
    if kept is not None and kept[0] == places and kept[1][0].dtype == _DTYPES[dtype]:
        return kept[1]
    if any(w is not None and not (w.is_contiguous() and w.dtype == dtype and w.device.type == "cpu") for w in weights):
        return None
    arrays = [np.empty(0, _DTYPES[dtype]) if weight is None else weight.detach().numpy() for weight in weights]
    _views[owner] = (places, arrays)
    return arrays


_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}
