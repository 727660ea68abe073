"""The `optimizer:` section of a run, as the factory that Trainer takes in `optimizer_cls_and_kwargs`.

`name` is one of OPTIMIZERS, the other keys are arguments of that class. Learning rate, weight decay and Adam's betas
and epsilon stay where they are, in `training`.
"""

import inspect
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainingArguments

from memzoo.training.config import ConfigError
from memzoo.training.optim.continuum_memory import ContinuumMemory
from memzoo.training.optim.deep_momentum import DeepMomentum
from memzoo.training.optim.groups import groups_by_depth, levels_by_name, split_by_decay, trained_parameters
from memzoo.training.optim.nested_controller import NestedController

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "deep_momentum": DeepMomentum,
    "continuum_memory": ContinuumMemory,
    "nested_controller": NestedController,
}
FROM_TRAINING = {"params", "base", "lr", "weight_decay", "eps"}  # arguments that the run gives, not the section


def optimizer_options(name: str) -> dict[str, Any]:
    """The keys that the section may have beside `name`, with their types."""
    signature, hints = inspect.signature(OPTIMIZERS[name]), get_type_hints(OPTIMIZERS[name].__init__)
    keyword_only = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = {key: hints[key] for key in keyword_only if key not in FROM_TRAINING}
    return options | ({"levels": dict[str, int]} if name == "continuum_memory" else {})


def check_options(name: str, **options: Any) -> None:
    """Raises ValueError for values that the optimizer refuses, before there is a model."""
    parameter = nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [{"params": [parameter]}]
    for pattern, period in options.pop("levels", {}).items():
        try:
            ContinuumMemory(groups, period=period)
        except ValueError as error:
            raise ValueError(f"level {pattern!r}: {error}") from error
    _construct(name, groups, {}, options)


def trainer_optimizer(section: dict[str, Any], args: TrainingArguments, model: nn.Module) -> Any:
    """Trainer's `optimizer_cls_and_kwargs` for the run's section; None, which leaves it to Trainer, for an empty one.

    Raises ConfigError where the levels do not fit the model.
    """
    if not section:
        return None

    def factory(model: nn.Module) -> Optimizer:
        return build_optimizer(model, args=args, **section)

    try:
        factory(model)
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error
    return (lambda: factory), {}


def build_optimizer(model: nn.Module, name: str, args: TrainingArguments, **options: Any) -> Optimizer:
    """The optimizer over the model's trained parameters, in groups by level or depth and by weight decay."""
    if name == "continuum_memory":
        groups = levels_by_name(model, options.pop("levels", {}), default=options.pop("period", 1))
    elif name == "nested_controller":
        groups = groups_by_depth(model)
    else:
        groups = [{"params": trained_parameters(model)}]
    trainer_class: Any = Trainer  # its rule for weight decay is a method that reads nothing of the trainer
    decay_names = set(trainer_class.get_decay_parameter_names(None, model))
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    return _construct(name, split_by_decay(groups, decay_names, args.weight_decay), adam, options)


def _construct(name: str, groups: list[dict[str, Any]], adam: dict[str, Any], options: dict[str, Any]) -> Optimizer:
    if name == "nested_controller":
        return NestedController(AdamW(groups, **adam), **options)
    if name == "continuum_memory":
        return ContinuumMemory(groups, AdamW, **adam, **options)
    if "betas" in adam:
        beta1, beta2 = adam.pop("betas")
        options = {"momenta": (beta1, 0.99), "beta2": beta2} | options
    return DeepMomentum(groups, **adam, **options)
