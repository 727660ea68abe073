"""The Mamba baseline at a speed that can be waited for.

Where mamba_ssm is not installed, transformers' Mamba is a Python loop over time. Within `fast_mamba` it calls memzoo's
`selective_scan` instead, which computes the same function (tests/training/test_bench_models.py).
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.models.mamba import modeling_mamba

from memzoo.kernels.selective_scan import selective_scan


@contextmanager
def fast_mamba() -> Iterator[None]:
    """transformers' Mamba runs on memzoo's scan until the context is left; mamba_ssm's own kernel is left in place."""
    if importlib.util.find_spec("mamba_ssm") is not None:
        yield
        return
    before = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = _scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = before


def _scan(*args: Any, return_last_state: bool = False, use_mambapy=None, use_associative_scan=None, **kwargs: Any):
    """In the place of `mamba_selective_scan`; the two ways to compute it that it offers are not looked at."""
    y, state = selective_scan(*args, **kwargs)
    return (y, state) if return_last_state else y
