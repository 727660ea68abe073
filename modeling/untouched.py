"""Whether a compiled step may stand in for a module: only where nothing but its weights decides what it does."""

from torch import nn


def untouched(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` itself, not an adapter or a quantized form, and has no hook on its forward."""
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    return all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)  # torchao, sharded
