"""Whether Triton, which is optional, is there; said once an operation where CUDA has to do without."""

import importlib.util
import warnings
from functools import cache

import torch


@torch.compiler.assume_constant_result
def has_triton(operation: str) -> bool:
    return find_triton(operation)


@cache
def find_triton(operation: str) -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(f"Triton is not installed: {operation} runs on CUDA through torch operators", stacklevel=5)
    return found
