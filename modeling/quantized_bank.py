"""Memory banks in 8 or 4 bits: absmax codes of each row, with its scale, and what they lose.

int8: x = s c with c in [-127, 127]. int4: c in [-7, 7], two codes a byte, the even column in the low half.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Format = Literal["int8", "int4"]
LARGEST = {"int8": 127, "int4": 7}


def check_format(name: str | None) -> None:
    """Refuse a format that this file cannot read."""
    if name is not None and name not in LARGEST:
        raise ValueError(
            f"unknown quantization format {name!r} of a memory bank; this memzoo reads {get_args(Format)}"
        )


def code_columns(width: int, name: str) -> int:
    """Bytes that hold the codes of a row of `width` numbers."""
    return width if name == "int8" else (width + 1) // 2


@torch.no_grad()
def quantize(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """rows [n, w] -> codes ([n, w] int8, or [n, ceil(w / 2)] uint8) and scales [n, 1] in float32.

    Raises:
        ValueError: the format is unknown.
    """
    check_format(name)
    rows = rows.float()
    scale = rows.abs().amax(1, keepdim=True) / LARGEST[name]
    codes = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    if name == "int8":
        return codes, scale
    if codes.shape[1] % 2:
        codes = torch.cat([codes, codes.new_zeros(len(codes), 1)], 1)
    nibbles = (codes + 8).view(torch.uint8)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale


def dequantize(codes: Tensor, scale: Tensor, name: str, width: int) -> Tensor:
    """The inverse of `quantize`, in the scales' data type."""
    check_format(name)
    if name == "int4":
        codes = torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :width].view(torch.int8) - 8
    return codes.to(scale.dtype) * scale


def fake_quantize(rows: Tensor, name: str) -> Tensor:
    """rows as the format would return them; the gradient passes straight through (arXiv 1308.3432)."""
    seen = dequantize(*quantize(rows.detach(), name), name, rows.shape[1]).to(rows.dtype)
    return rows + (seen - rows).detach()


def quantization_error(rows: Tensor, name: str) -> float:
    """||rows - quantized rows|| / ||rows||."""
    rows = rows.detach().float()
    return ((fake_quantize(rows, name) - rows).norm() / rows.norm()).item()
