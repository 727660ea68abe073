"""The tuner: PEFT's interface to memories on a base model."""

import re
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from memzoo.adapters.config import ARROW, MemoryConfig
from memzoo.adapters.layer import CHILD, MemoryHost, MemoryLayer
from memzoo.adapters.sites import (
    ARCHITECTURES,
    check_modules_to_save,
    default_sites,
    find_exit,
    find_sites,
    matches,
    place,
    split,
)
from memzoo.adapters.snapshots import Remembers

# names of our own modules: an adapter of such a name could not be told from them in a state dict
_OURS = {"memzoo", "memory", "bank", "basis", "router", "gate", "qkv_proj", "gate_proj", "z_proj", "conv1d", "norm"}


class MemoryModel(Remembers, BaseTuner):
    """A base model with memories, as `get_peft_model(model, MemoryConfig(...))` makes it.

    They cannot be merged into the base, since what they add depends on the text; LoRA of `lora_config` can be
    (`merge_lora`).
    """

    prefix = "memzoo_"
    tuner_layer_cls = BaseTunerLayer  # memories and the layers of a nested LoRA
    target_module_mapping = {name: [f"{a}{ARROW}{b}"] for name, (a, b) in ARCHITECTURES.items()}

    def _prepare_adapter_config(self, peft_config: MemoryConfig, model_config: dict[str, Any]) -> MemoryConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = [ARROW.join(default_sites(self.model))]
        sites = find_sites(peft_config, self.model)
        check_modules_to_save(peft_config, sites, self._exits(peft_config))
        if peft_config.layers_pattern is None and sites and not isinstance(peft_config.target_modules, str):
            peft_config.layers_pattern = sorted({site.layers for site in sites if site.layers}) or None
        if peft_config.layers_to_transform is None:
            peft_config.layers_to_transform = place(peft_config, sites)
        return peft_config

    def _exits(self, config: MemoryConfig) -> list[str]:
        named = list(split(config.target_modules)[1].values())
        model_type = self.get_model_config(self.model).get("model_type", "")
        return named or [ARCHITECTURES.get(model_type or "", ("", "mlp"))[1]]

    @staticmethod
    def _check_target_module_exists(peft_config: MemoryConfig, key: str) -> Any:
        return matches(peft_config, key)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As PEFT's; a state dict does not name the entries, so the places come from the configuration always."""
        config = self.peft_config[adapter_name]
        parts = {part for name, _ in model.named_parameters() for part in name.split(".")}
        check_adapter_name(adapter_name, parts - (set(self.peft_config) - {adapter_name}))
        options: dict[str, Any] = {
            "autocast_adapter_dtype": autocast_adapter_dtype,
            "low_cpu_mem_usage": low_cpu_mem_usage,
        }
        super().inject_adapter(model, adapter_name, **options)
        if config.lora_config is not None:
            self._inject_lora(model, adapter_name, config, options)

    def _create_and_replace(
        self,
        peft_config: MemoryConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(parent, CHILD, None)
        if not isinstance(layer, MemoryLayer):
            layer = self._new_layer(peft_config, target, parent, current_key)
        host = self._host(layer)
        host.configs[adapter_name] = peft_config
        group = None
        if peft_config.sharing != "per_layer":
            before = sum(adapter_name in other.configs for other in self._layers())
            group = 0 if peft_config.sharing == "shared" else before // peft_config.group_size
            host.shared_bank(adapter_name, group, layer.in_features)
            host._move_adapter_to_device_of_base_layer(adapter_name)
        layer.add_memory(adapter_name, peft_config, group)
        for module in (host, layer):
            module.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _new_layer(self, config: MemoryConfig, entry: nn.Module, parent: nn.Module, key: str) -> MemoryLayer:
        exit = find_exit(config, self.model, parent, key)
        size = self._hidden_size(entry)
        config.width(size)  # refuses before anything is attached
        host = getattr(self.model, CHILD, None)
        if not isinstance(host, MemoryHost):
            beside = entry if next(entry.parameters(), None) is not None else parent
            host = MemoryHost(self.model, beside, size)
            self.model.add_module(CHILD, host)
        layer = MemoryLayer(parent, entry, exit, host, size)
        layer.set_adapter(self.active_adapters)
        parent.add_module(CHILD, layer)
        return layer

    def _hidden_size(self, entry: nn.Module) -> int:
        weight = getattr(entry, "weight", None)
        if weight is not None and weight.ndim == 1:
            return weight.shape[0]
        if (features := getattr(entry, "in_features", None)) is not None:
            return features
        config = getattr(self.model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        if (size := getattr(config, "hidden_size", None)) is None:
            raise ValueError(
                f"the width of the residual stream is not known: the entry, {type(entry).__name__}, has neither "
                "in_features nor a weight of one dimension, and the model has no config.hidden_size"
            )
        return size

    def _host(self, layer: MemoryLayer) -> MemoryHost:
        return layer._host[0]

    def _layers(self) -> list[MemoryLayer]:
        return [module for module in self.model.modules() if isinstance(module, MemoryLayer)]

    # LoRA beside the memory: PEFT's own tuner on the same base, kept out of the tree of modules

    def _inject_lora(self, model: nn.Module, adapter_name: str, config: MemoryConfig, options: dict[str, Any]) -> None:
        lora_config: Any = config.lora_config
        lora_config.inference_mode = config.inference_mode
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        before = model.__dict__.pop("peft_config", None)
        try:
            if self._lora is None:
                low_cpu = options["low_cpu_mem_usage"]
                lora = LoraModel(model, {adapter_name: lora_config}, adapter_name, low_cpu_mem_usage=low_cpu)
                self.__dict__["_lora_tuner"] = lora
            else:
                self._lora.peft_config[adapter_name] = lora_config
                self._lora.inject_adapter(model, adapter_name, **options)
        finally:
            model.__dict__.pop("peft_config", None)
            if before is not None:
                model.peft_config = before
        self._lora.active_adapter = self.active_adapter
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for parameter, requires_grad in trainable:
            parameter.requires_grad = requires_grad

    @property
    def _lora(self) -> LoraModel | None:
        return self.__dict__.get("_lora_tuner")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        if self._lora is not None:
            self._lora.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if self._lora is not None:
            self._lora.peft_config.pop(adapter_name, None)
            self._lora.active_adapter = self.active_adapter

    def merge_lora(self, safe_merge: bool = False) -> None:
        """Fold the LoRA of the active adapter into the base's weights; the memory stays an adapter.

        A memory saved after that belongs to the changed base: save it too (`get_base_model()` after `unload`).

        Raises:
            ValueError: there is no LoRA, or other adapters have one, which would be lost.
        """
        with_lora = [name for name, config in self.peft_config.items() if config.lora_config is not None]
        if self._lora is None or not set(with_lora) & set(self.active_adapters):
            raise ValueError(f"no active adapter has a lora_config (active: {', '.join(self.active_adapters)})")
        if others := sorted(set(with_lora) - set(self.active_adapters)):
            raise ValueError(f"the LoRA of {', '.join(others)} would be lost; delete these adapters first")
        lora, configs = self.__dict__.pop("_lora_tuner"), self.model.__dict__.get("peft_config")
        lora._unload_and_optionally_merge(merge=True, safe_merge=safe_merge)
        if configs is not None:
            self.model.peft_config = configs
        for config in self.peft_config.values():
            config.lora_config = None

    # merging and unloading

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(
            "a memory cannot be merged into the base's weights, since what it adds depends on the text. "
            "`merge_lora()` merges the LoRA of lora_config, `unload()` returns the base without adapters."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        model: Any = super()._unload_and_optionally_merge(False, *args, **kwargs)
        for module in list(model.modules()):
            child = module._modules.get(CHILD)
            if isinstance(child, (MemoryLayer, MemoryHost)):
                child.detach_from_base()
                del module._modules[CHILD]
        self.__dict__.pop("_lora_tuner", None)
        return model

    # state dicts

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # the name comes right after our containers, PEFT looks for it at the end
        new = re.sub(rf"(\.memzoo_(?:banks|blocks))\.{re.escape(adapter_name)}\.", r"\1.", key, count=1)
        return new if new != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MemoryConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As PEFT's, refusing weights of another method or base.

        Raises:
            ValueError: naming the first parameter that differs, and both shapes.
        """
        own = model.state_dict()
        known = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if state_dict and not any("memzoo_" in key for key in known):
            raise ValueError(
                f"this is no checkpoint of a memory: none of its {len(known)} tensors is one (the first is "
                f"{next(iter(known))!r})"
            )
        foreign = [key for key in known if "memzoo_" in key and key not in own]
        if foreign:
            raise ValueError(
                f"the checkpoint has {len(foreign)} tensors for which this model has no place, {foreign[0]!r} the "
                "first: the base has other layers than the one it was trained on, or the configuration differs"
            )
        for key, value in known.items():
            if "memzoo_" in key and own[key].shape != value.shape:
                raise ValueError(
                    f"{key!r} is {list(value.shape)} in the checkpoint and {list(own[key].shape)} here: the base has "
                    "another hidden size than the one the memory was trained on, or the configuration differs"
                )
        return known


def check_adapter_name(name: str, taken: set[str]) -> None:
    """Refuse a name that state dicts could not tell from a module's; `taken` are names of modules in the model.

    Raises:
        ValueError: saying which names can be used.
    """
    if not name or "." in name or name in taken | _OURS or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot be an adapter's name: it must not be empty, contain a dot, or be the name of a part of "
            "the model or of a module's attribute; try 'default' or 'my_memory'"
        )
