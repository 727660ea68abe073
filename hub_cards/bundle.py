"""A family's code as one flat folder, so that its models load where memzoo is not installed.

transformers downloads such code with the model (`trust_remote_code=True`) when `config.json` has an `auto_map`. Its
rule is that files lie side by side and import each other as `from .x import y`, so the family's module and everything
of memzoo that it imports are copied under flat names, and their imports rewritten. numba and triton stay optional.
"""

import ast
import importlib
import importlib.util
import json
from functools import cache
from pathlib import Path

from transformers import CONFIG_MAPPING

import memzoo

OPTIONAL = ("numba", "triton")  # fast forms that are imported only where these are installed
TOKENIZERS = {"MaruTokenizer": "memzoo.modeling.maru.tokenization_maru"}  # memzoo's own, whatever model they serve
SELF = "this_module"  # how a flat file offers itself to `from package import module`

_AUTO_CLASSES = {
    "AutoConfig": ("configuration", "Config"),
    "AutoModel": ("modeling", "Model"),
    "AutoModelForCausalLM": ("modeling", "ForCausalLM"),
    "AutoModelForSequenceClassification": ("modeling", "ForSequenceClassification"),
}


def bundle(folder: str | Path) -> list[Path]:
    """Put the code of the model saved in `folder` beside it and name it in its config.

    Args:
        folder: what `save_pretrained` wrote: `config.json`, and `tokenizer_config.json` if there is a tokenizer.

    Returns:
        The files of code that were written.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ValueError: the model is not of a memzoo family.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; save the model there first (model.save_pretrained)")
    config = json.loads(path.read_text())
    family, prefix = _family(config.get("model_type"))
    package = importlib.import_module(f"memzoo.modeling.{family}")
    roots = [f"memzoo.modeling.{family}.{kind}_{family}" for kind in ("configuration", "modeling")]
    auto_map = {
        auto: f"{kind}_{family}.{prefix}{suffix}"
        for auto, (kind, suffix) in _AUTO_CLASSES.items()
        if hasattr(package, prefix + suffix)
    }
    _update(path, {"auto_map": auto_map})
    tokenizer_config = folder / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_config.read_text())["tokenizer_class"] if tokenizer_config.is_file() else None
    if tokenizer in TOKENIZERS:
        roots.append(TOKENIZERS[tokenizer])
        name = f"{flat_name(TOKENIZERS[tokenizer])}.{tokenizer}"
        _update(tokenizer_config, {"auto_map": {"AutoTokenizer": [name, None]}})
    written = []
    for name, source in flatten(roots).items():
        written.append(folder / f"{name}.py")
        written[-1].write_text(source)
    return written


def _family(model_type: str | None) -> tuple[str, str]:
    """The family's package and the prefix of its classes."""
    if model_type in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[model_type]
        if config_class.__module__.startswith("memzoo.modeling."):
            return config_class.__module__.split(".")[2], config_class.__name__.removesuffix("Config")
    raise ValueError(f"model_type {model_type!r} is not a memzoo family; other models load without memzoo's code")


def _update(path: Path, fields: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2, sort_keys=True) + "\n")


def flatten(roots: list[str]) -> dict[str, str]:
    """Flat name -> source of the modules in `roots` and of every memzoo module that they import."""
    sources: dict[str, str] = {}
    as_modules: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if flat_name(module) in sources:
            continue
        sources[flat_name(module)], modules, imported = _rewrite(module)
        as_modules |= modules
        waiting += sorted(imported)
    header = f"# From memzoo {memzoo.__version__} (Apache-2.0), written by memzoo.hub_cards.bundle: do not edit.\n"
    for name, source in sources.items():
        sources[name] = header + (_offer_itself(source) if name in as_modules else source)
    return sources


def flat_name(module: str) -> str:
    """memzoo.modeling.cache -> cache, memzoo.modeling.maru.x -> x, memzoo.kernels.a.b -> kernel_a_b."""
    _, area, *parts = module.split(".")
    return parts[-1] if area == "modeling" else "_".join(["kernel", *parts])


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _rewrite(module: str) -> tuple[str, set[str], set[str]]:
    """The flat source, the flat names of modules that it imports as such, and all memzoo modules that it imports."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text()
    lines = source.splitlines()
    as_modules: set[str] = set()
    imported: set[str] = set()
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    tried = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in sorted(nodes, key=lambda node: -node.lineno):  # from the end, so that line numbers stay right
        new = None
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "memzoo":
            new = []
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if _is_module(submodule):
                    as_modules.add(flat_name(submodule))
                    imported.add(submodule)
                    new.append(f"from .{flat_name(submodule)} import {SELF} as {alias.asname or alias.name}")
                else:
                    imported.add(node.module)
                    name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                    new.append(f"from .{flat_name(node.module)} import {name}")
        elif _package(node) in OPTIONAL and node not in tried:
            new = ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    pass"]
        if new is not None:
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in new]
    return "\n".join(lines) + "\n", as_modules, imported


def _package(node: ast.Import | ast.ImportFrom) -> str:
    return (node.names[0].name if isinstance(node, ast.Import) else node.module or "").split(".")[0]


def _offer_itself(source: str) -> str:
    """The source with `this_module`, right after its docstring: modules may import each other in a circle."""
    first = ast.parse(source).body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    end = first.end_lineno if is_docstring else 0
    lines = source.splitlines()
    return "\n".join([*lines[:end], "", "import sys", f"{SELF} = sys.modules[__name__]", *lines[end:]]) + "\n"
