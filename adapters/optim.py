"""Learning rates by part of an adapted model: bank, router, projections, LoRA and base."""

from collections.abc import Iterator
from typing import Any

from torch import nn

PARTS = ("bank", "router", "projections", "lora", "base")


def part_of(name: str) -> str:
    """The part that a parameter of this name belongs to; modules_to_save are of the base."""
    if ".lora_" in name:
        return "lora"
    if "memzoo_" not in name:
        return "base"
    if ".router." in name:
        return "router"
    # what a memory holds: learned tokens, or the first weights of a neural memory
    return "bank" if "memzoo_banks." in name or ".bank." in name or ".initial_weights." in name else "projections"


def memory_param_groups(
    model: nn.Module,
    lr: float,
    *,
    bank: float | None = None,
    router: float | None = None,
    projections: float | None = None,
    lora: float | None = None,
    base: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer, `AdamW(memory_param_groups(model, 1e-3, bank=1e-2))`.

    A part's learning rate is `lr` where None is given; 0 freezes the part, and `base` above 0 unfreezes the base's
    own weights. Only weights of at least two dimensions decay, and a bank's tokens never do.

    Args:
        model: what `get_peft_model` returned, wrapped in DDP or FSDP2 or not.
        base: of the base model's weights; None leaves them as they are: frozen, but for modules_to_save.

    Returns:
        A group for each part and decay that has parameters; `name` says which.

    Raises:
        ValueError: the model has no memory, a rate is negative, or a quantized base cannot be trained.
    """
    given = dict(zip(PARTS, (bank, router, projections, lora, base)))
    rates = {part: lr if rate is None else rate for part, rate in given.items()}
    if negative := [f"{part}={rate}" for part, rate in rates.items() if rate < 0]:
        raise ValueError(f"a learning rate must not be negative: {', '.join(negative)}")
    found: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        found[part_of(name)].append((name, parameter))
    if not found["projections"]:
        raise ValueError(f"{type(model).__name__} has no memory; see get_peft_model(model, MemoryConfig())")
    if given["base"]:
        _unfreeze(found["base"])
    for part, parameters in found.items():
        if rates[part] == 0:
            for _, parameter in parameters:
                parameter.requires_grad_(False)
    return list(_groups(found, rates, weight_decay))


def _groups(
    found: dict[str, list[tuple[str, nn.Parameter]]], rates: dict[str, float], weight_decay: float
) -> Iterator[dict[str, Any]]:
    for part, named in found.items():
        parameters = [parameter for _, parameter in named if parameter.requires_grad]
        decayed = [p.ndim >= 2 and part != "bank" for p in parameters]
        for decay in (True, False):
            chosen = [p for p, yes in zip(parameters, decayed) if yes is decay]
            if chosen:
                name = part if decay else f"{part}, no decay"
                yield {"params": chosen, "lr": rates[part], "weight_decay": weight_decay * decay, "name": name}


def _unfreeze(named: list[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in named:
        if not parameter.is_floating_point():
            raise ValueError(
                f"base is above 0, but {name!r} is {parameter.dtype}: a quantized base cannot be trained; "
                "use lora_config instead"
            )
        if ".original_module." not in name:  # the untouched copy of a module of modules_to_save
            parameter.requires_grad_(True)


class MemoryTrainerMixin:
    """For transformers' Trainer and its subclasses: learning rates by part.

    ```python
    class MemoryTrainer(MemoryTrainerMixin, Trainer): ...
    trainer = MemoryTrainer(model, args, train_dataset=data, memory_lrs={"bank": 1e-2, "lora": 1e-4, "base": 0})
    ```

    `memory_lrs` are the keywords of `memory_param_groups`; a part that is not named has `args.learning_rate`.
    """

    def __init__(self, *args: Any, memory_lrs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if unknown := sorted(set(memory_lrs or {}) - set(PARTS)):
            raise ValueError(f"memory_lrs names {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
        self.memory_lrs = memory_lrs or {}
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Built from the model that is passed (FSDP2 passes the sharded one), as Trainer's own."""
        trainer: Any = self
        if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
            built = trainer.model if model is None else model
            groups = memory_param_groups(
                built, trainer.args.learning_rate, weight_decay=trainer.args.weight_decay, **self.memory_lrs
            )
            kind, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, built)
            trainer.optimizer_cls_and_kwargs = (kind, {**kwargs, "params": groups})
            try:
                return super().create_optimizer(model)  # type: ignore[misc]
            finally:
                trainer.optimizer_cls_and_kwargs = None
        return super().create_optimizer(model)  # type: ignore[misc]
