"""Where a decoder layer takes a memory: two modules of each layer.

The entry reads the residual stream x before the feed-forward, F(entry(x)); the output of the exit is added to it. With
m added to the entry's input and to the exit's output, the layer computes (x + m) + F(entry(x + m)).
"""

import re
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from memzoo.adapters.config import ARROW, MemoryConfig

_LLAMA = ("post_attention_layernorm", "mlp")
_GEMMA = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
ARCHITECTURES = {
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": ("ln_2", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": ("mlp", "post_feedforward_layernorm"),
    "phi3": ("post_attention_layernorm", "resid_mlp_dropout"),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}
# A decoder layer that has exactly these parts computes as the architecture that they are named after.
_STRUCTURES = {
    frozenset({"input_layernorm", "self_attn", *_LLAMA}): _LLAMA,
    frozenset({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp", *_GEMMA}): _GEMMA,
}
_SCALES = ("residual_multiplier", "scale_depth")  # of configs whose layers scale what they add


class Site(NamedTuple):
    """The entry of a layer, and how the layer is reached."""

    key: str  # of the entry
    layers: str | None  # name of the list of layers
    number: int | None  # in it


def default_sites(model: nn.Module) -> tuple[str, str]:
    """The names of entry and exit in the layers of a model.

    Raises:
        ValueError: the architecture is neither known nor built like one that is; how to name the sites.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None) or (config or {}).get("model_type")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if not any(getattr(config, name, None) is not None for name in _SCALES):
        for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)):
            parts = frozenset(name for name, _ in layers[0].named_children() if not name.startswith("memzoo"))
            if parts in _STRUCTURES:
                return _STRUCTURES[parts]
    raise ValueError(
        f"where to add a memory to a {model_type or type(model).__name__!r} is not known (known: "
        f"{', '.join(sorted(ARCHITECTURES))}). Name two modules of each layer, the one that reads the residual stream "
        "before the feed-forward and the one whose output is added to it: "
        f"MemoryConfig(target_modules=['ENTRY{ARROW}EXIT']), for GPT-2 ['ln_2{ARROW}mlp']"
    )


def split(target_modules: Any) -> tuple[set[str] | str, dict[str, str]]:
    """`target_modules` without exits, as PEFT understands them, and the exit of each entry that names one."""
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    pairs = [target.split(ARROW) for target in targets]
    exits = {entry.strip(): rest[0].strip() for entry, *rest in pairs if rest}
    entries = {entry.strip() for entry, *_ in pairs}
    return (next(iter(entries)) if isinstance(target_modules, str) else entries), exits


def matches(config: Any, key: str) -> Any:
    """PEFT's answer to whether `key` is targeted."""
    names = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    options = {name: getattr(config, name) for name in names}
    targets, _ = split(config.target_modules)
    return check_target_module_exists(SimpleNamespace(target_modules=targets, target_parameters=None, **options), key)


def find_exit(config: MemoryConfig, model: nn.Module, parent: nn.Module, key: str) -> nn.Module:
    """The exit that belongs to the entry at `key`, a child of `parent`.

    Raises:
        ValueError: none is named or known, or the layer does not have it.
    """
    targets, exits = split(config.target_modules)
    if isinstance(targets, str):
        name = next(iter(exits.values()), None)
    else:
        name = next((exits[t] for t in exits if key == t or key.endswith(f".{t}")), None)
    entry = key.rsplit(".", 1)[-1]
    if name is None:
        known_entry, known_exit = default_sites(model)
        if entry != known_entry:
            raise ValueError(
                f"{key!r} is targeted without an exit; the memory of this architecture enters at {known_entry!r}. "
                f"For another place name both modules: target_modules=['{entry}{ARROW}EXIT']"
            )
        name = known_exit
    try:
        return parent.get_submodule(name)
    except AttributeError as error:
        children = ", ".join(child for child, _ in parent.named_children())
        raise ValueError(f"the layer of {key!r} has no module {name!r} to be the exit; it has {children}") from error


def find_sites(config: MemoryConfig, model: nn.Module) -> list[Site]:
    """All entries in the model that `target_modules` names, in order, whatever the placement."""
    found = []
    everywhere = SimpleNamespace(**{**vars(config), "layers_to_transform": None, "modules_to_save": None})
    for key, _ in model.named_modules():
        if key and matches(everywhere, key):
            place = re.match(r"(?:.*\.)?([^.]+)\.(\d+)\.[^.]", key)
            found.append(Site(key, place and place[1], place and int(place[2])))
    return found


def place(config: MemoryConfig, sites: list[Site]) -> list[int] | None:
    """The layers of the configured placement, None for all."""
    k, numbers = config.placement_k, sorted({site.number for site in sites if site.number is not None})
    if config.placement in ("all", "custom"):
        return None
    return {"first_k": numbers[:k], "last_k": numbers[-k:], "every_n": numbers[::k]}[config.placement]


def check_modules_to_save(config: MemoryConfig, sites: list[Site], exits: list[str]) -> None:
    """Refuse to copy a module that the memory hangs on.

    Raises:
        ValueError: naming the module and the site inside it.
    """
    keys = [site.key for site in sites] + [f"{site.key.rpartition('.')[0]}.{exit}" for site in sites for exit in exits]
    for name in config.modules_to_save or []:
        for key in keys:
            if re.match(rf"(.*\.)?{re.escape(name)}(\.|$)", key):
                raise ValueError(
                    f"modules_to_save={name!r} would copy {key!r}, which the memory is attached to; "
                    "save other modules, or train the base's own with memory_param_groups(base=...)"
                )
