"""How a memory hangs on a base model: an extra child of a decoder layer and hooks, never a wrapper.

So names of the base's modules and parameters stay as they are, and LoRA reaches all of them. The hooks are bound
methods, and modules that they refer to are kept in tuples: `deepcopy` makes a model that is whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from memzoo.adapters.blocks import BankBlock, build_bank, build_block
from memzoo.adapters.config import MemoryConfig
from memzoo.adapters.states import Call
from memzoo.modeling.chapter_router import router_losses
from memzoo.modeling.memory_bank import MemoryBank

CHILD = "memzoo"  # name of our modules in their parents


class _OnBase(BaseTunerLayer):
    """What PEFT asks of a layer, of one that wraps nothing: its base layer is a module that it stands beside."""

    _beside: tuple[nn.Module, ...]
    _handles: list[Any]
    merged_adapters: list[str]

    def get_base_layer(self) -> nn.Module:
        return self._beside[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype | None]:
        weights = [p for module in self._beside for p in module.parameters()]
        floating = [p for p in weights if p.is_floating_point() and p.element_size() > 1]
        weight = (floating or weights)[0]
        hook = getattr(base_layer, "_hf_hook", None)
        if weight.device.type == "meta" and hook is not None:  # offloaded: where it will be computed
            return torch.device(hook.execution_device), weight.dtype
        return weight.device, weight.dtype if floating else None

    def detach_from_base(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class MemoryHost(nn.Module, _OnBase):
    """On the top-level model: the banks that several layers read, and the routers' losses.

    Layers hand over their router's logits while training; when the model returns a loss, theirs are added to it.
    """

    adapter_layer_names = ("memzoo_banks",)
    other_param_names = ("configs",)

    def __init__(self, model: nn.Module, beside: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.memzoo_banks = nn.ModuleDict()
        self.configs: dict[str, MemoryConfig] = {}
        self.merged_adapters = []
        self.in_features = self.out_features = hidden_size
        self.count = 0  # memories in the model
        text_config = getattr(model, "config", None)
        text_config = text_config.get_text_config() if hasattr(text_config, "get_text_config") else text_config
        self.num_layers = getattr(text_config, "num_hidden_layers", 0)
        self.last_router_losses: dict[str, Tensor] = {}
        self._beside = (beside,)
        self._logits: dict[str, list[tuple[Tensor, tuple[int, ...]]]] | None = None  # None: nobody collects
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True),
        ]

    def shared_bank(self, adapter: str, group: int, hidden_size: int) -> None:
        """Make the bank of a group of layers, if it is not there."""
        banks = self.memzoo_banks
        if adapter not in banks:
            banks[adapter] = nn.ModuleDict()
        if str(group) not in banks[adapter]:
            banks[adapter][str(group)] = build_bank(self.configs[adapter], hidden_size)

    def bank(self, adapter: str, group: int) -> MemoryBank:
        return self.memzoo_banks[adapter][str(group)]

    def collect(self, adapter: str, logits: Tensor, halves: Any) -> None:
        if self._logits is not None:
            self._logits.setdefault(adapter, []).append((logits, halves))

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._logits = {} if model.training and kwargs.get("labels") is not None else None

    def _end(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        collected, self._logits = self._logits, None
        if not collected:
            return output
        losses = {adapter: self._router_loss(adapter, layers) for adapter, layers in collected.items()}
        self.last_router_losses = {adapter: loss.detach() for adapter, loss in losses.items()}
        # the loss is normalised by the tokens of the whole accumulated batch; so is this call's part of the routers'
        items = kwargs.get("num_items_in_batch")
        share = 1.0 if items is None else kwargs["labels"][..., 1:].ne(-100).sum() / items
        if isinstance(output, tuple):
            return (_add(output[0], losses.values(), share), *output[1:])
        if getattr(output, "loss", None) is not None:
            output.loss = _add(output.loss, losses.values(), share)
        return output

    def _router_loss(self, adapter: str, layers: list[tuple[Tensor, tuple[int, ...]]]) -> Tensor:
        config = self.configs[adapter]
        logits, halves = tuple(x.to(layers[0][0].device) for x, _ in layers), layers[0][1]
        if torch.is_grad_enabled() and not config.inference_mode and not logits[0].requires_grad:
            raise RuntimeError(
                "the router's logits have no gradient, so its losses would not train it; "
                'use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        balance, _, z = router_losses(logits, halves, config.top_k_chapters)
        return config.router_aux_loss_coef * balance + config.router_z_loss_coef * z


def _add(loss: Tensor, losses: Iterable[Tensor], share: Tensor | float) -> Tensor:
    for other in losses:
        loss = loss + (other * share).to(loss.device)
    return loss


@dataclass
class _Now:
    """What the hooks of a layer tell one another within a call. In an object of its own, since setting an attribute of
    a module takes longer than all else they do.
    """

    call: Call = field(default_factory=Call)
    later: list[str] = field(default_factory=list)  # adapters of variant B
    x: Tensor | None = None
    m: Tensor | None = None
    alone: "_Alone | None" = None  # kept from call to call, found again when the adapters change


class _Alone(NamedTuple):
    """The only memory to read before a layer's feed-forward, a bank's; and the active adapters when it was found."""

    active: Any
    disabled: bool
    name: str = ""
    block: nn.Module | None = None  # None: more than one bank is read, or something else
    bank: tuple[dict[str, Any], str] | None = None  # which dict holds it, by what name

    def holds(self, layer: "MemoryLayer") -> bool:
        if layer._active_adapter is not self.active or layer._disable_adapters is not self.disabled:
            return False
        return self.block is None or layer._modules["memzoo_blocks"]._modules.get(self.name) is self.block


class MemoryLayer(nn.Module, _OnBase):
    """The memories of all adapters in one decoder layer.

    A: the entry reads x + m, m = memory(x), and the exit's output gets + m. B: it gets + memory(x + output).
    """

    adapter_layer_names = ("memzoo_blocks",)
    other_param_names = ("configs", "groups")

    def __init__(
        self, layer: nn.Module, entry: nn.Module, exit: nn.Module, host: MemoryHost, hidden_size: int
    ) -> None:
        super().__init__()
        self.memzoo_blocks = nn.ModuleDict()
        self.configs: dict[str, MemoryConfig] = {}
        self.groups: dict[str, int | None] = {}  # whose bank of the host each adapter reads; None: its own
        self.merged_adapters = []
        self.in_features = self.out_features = hidden_size
        self.index, host.count = host.count, host.count + 1
        beside = [module for module in (entry, exit, layer) if next(module.parameters(), None) is not None]
        self._beside, self._host = tuple(beside), (host,)
        self._now = _Now()
        # A checkpointed layer computes its `forward` again, not its hooks: those of its parts run then too.
        attention = [part for part in layer.children() if "attention_mask" in signature(part.forward).parameters]
        self._handles = [
            *(part.register_forward_pre_hook(self._attend, with_kwargs=True) for part in attention),
            entry.register_forward_pre_hook(self._enter),
            exit.register_forward_hook(self._leave),
        ]

    def add_memory(self, adapter: str, config: MemoryConfig, group: int | None) -> None:
        self.configs[adapter], self.groups[adapter] = config, group
        self.memzoo_blocks[adapter] = build_block(config, self.in_features, own_bank=group is None)
        self._now.alone = None
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _attend(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._now.call = call = Call.of(kwargs)
        if call.prompt_lengths is not None:  # ours; attention functions do not know it
            return args, {name: value for name, value in kwargs.items() if name != "prompt_lengths"}
        return None

    def _enter(self, entry: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, *rest = args
        if not self.training and not torch.compiler.is_compiling() and (m := self._step(x)) is not None:
            self._now.m = m
            return x + m, *rest
        now, names = self._now, self._reading()
        now.later = [name for name in names if self.configs[name].block_variant == "B"]
        now.x = x if now.later else None
        now.m = self._read([name for name in names if name not in now.later], x)
        return None if now.m is None else (x + now.m, *rest)

    def _leave(self, exit: nn.Module, args: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        now = self._now
        if now.m is not None:
            y = y + now.m
        if now.x is not None:
            y = y + self._read(now.later, now.x + y)
        now.call, now.x, now.m = Call(), None, None
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _step(self, x: Tensor) -> Tensor | None:
        """A whole read of a token in few calls, which are most of its time; None where it is no bank's alone."""
        if x.ndim != 3 or x.shape[1] != 1 or torch.is_grad_enabled():
            return None
        alone = self._now.alone
        if alone is None or not alone.holds(self):
            alone = self._now.alone = self._find_alone()
        if (block := alone.block) is None or alone.bank is None:
            return None
        (banks, name), read = alone.bank, block._modules["memory"]
        if block._forward_hooks or block._forward_pre_hooks or read._forward_hooks or read._forward_pre_hooks:
            return None
        step = read.step(x, banks[name])
        return None if step is None else step[0]

    def _find_alone(self) -> _Alone:
        names, state = self._reading(), (self._active_adapter, self._disable_adapters)
        block = self.memzoo_blocks[names[0]] if len(names) == 1 else None
        if not isinstance(block, BankBlock) or block.stateful or self.configs[names[0]].block_variant != "A":
            return _Alone(*state)
        if (group := self.groups[names[0]]) is None:
            return _Alone(*state, names[0], block, (block._modules, "bank"))
        return _Alone(*state, names[0], block, (self._host[0].memzoo_banks[names[0]]._modules, str(group)))

    def _reading(self) -> list[str]:
        """The active adapters that have a memory here."""
        blocks = self.memzoo_blocks
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in blocks]

    def _read(self, names: list[str], x: Tensor) -> Tensor | None:
        """What the memories of these adapters add to x; None if there is none."""
        total = None
        for name in names:
            m = self._read_one(name, x)
            total = m if total is None else total + m
        return total

    def _read_one(self, adapter: str, x: Tensor) -> Tensor:
        host, block, group, call = self._host[0], self.memzoo_blocks[adapter], self.groups[adapter], self._now.call
        bank = None if group is None else host.bank(adapter, group)
        own, state, real = {}, None, None
        # pads count for nothing in what is pooled over tokens and in the routers' losses
        if x.ndim == 3 and (block.stateful or (self.training and self.configs[adapter].num_chapters > 1)):
            real = call.real(*x.shape[:2])
        if block.stateful and (state := call.state(self.index, host.count, host.num_layers)) is not None:
            own = state.of(adapter, x.shape[0])
        m, new, logits = block(x, bank, own, real, call.prompt_lengths)
        if state is not None:
            state.put(adapter, new, 0 if call.counted else x.shape[1])
            call.counted = True
        if logits is not None:
            host.collect(adapter, logits, block.memory.router.halves)
        return m
