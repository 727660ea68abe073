"""What every implementation of the selective scan shares: the bundle of inputs and the argument checks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # steps between the states that a forward saves for its backward


class ScanInputs(NamedTuple):
    """The arguments of `selective_scan`. B batch, I channels, N states per channel, T time."""

    u: Tensor  # [B, I, T]
    delta: Tensor  # [B, I, T]
    A: Tensor  # [I, N]
    B: Tensor  # [B, N, T]
    C: Tensor  # [B, N, T]
    D: Tensor | None  # [I]
    z: Tensor | None  # [B, I, T]
    delta_bias: Tensor | None  # [I]
    initial_state: Tensor | None  # [B, I, N]
    mask: Tensor | None  # [B, T]
    delta_softplus: bool

    def in_compute_dtype(self) -> "ScanInputs":
        """float64 stays float64, everything else is computed in float32; the mask becomes bool."""
        dtype = compute_dtype(self.u)
        tensors = [None if x is None else x.to(dtype) for x in self[:9]]
        mask = None if self.mask is None else self.mask.bool()
        return ScanInputs(*tensors, mask, self.delta_softplus)


class ScanGradients(NamedTuple):
    """Gradients of the first nine fields of `ScanInputs`, in their shapes; None where the input is None."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None


def compute_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). Torch's default threshold of 20 would be off by 1e-10, which float64 can see."""
    return F.softplus(x, threshold=40.0)


def check_inputs(inputs: ScanInputs) -> None:
    """Raise a ValueError that names the argument, its shape and the expected shape."""
    u, A = inputs.u, inputs.A
    if u.dim() != 3:
        raise ValueError(f"u must be [batch, channels, time], got shape {list(u.shape)}")
    if A.dim() != 2:
        raise ValueError(f"A must be [channels, states], got shape {list(A.shape)}")
    if not u.is_floating_point():
        raise ValueError(f"u must be a floating point tensor, got {u.dtype}")
    batch, channels, time = u.shape
    if time == 0:
        raise ValueError("u has no time step (shape [batch, channels, 0]); selective_scan needs at least one")
    states = A.shape[1]
    expected = {
        "delta": (inputs.delta, (batch, channels, time)),
        "A": (A, (channels, states)),
        "B": (inputs.B, (batch, states, time)),
        "C": (inputs.C, (batch, states, time)),
        "D": (inputs.D, (channels,)),
        "z": (inputs.z, (batch, channels, time)),
        "delta_bias": (inputs.delta_bias, (channels,)),
        "initial_state": (inputs.initial_state, (batch, channels, states)),
        "mask": (inputs.mask, (batch, time)),
    }
    for name, (tensor, shape) in expected.items():
        check_tensor(name, tensor, shape, u.device)


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, u is on {device}")
