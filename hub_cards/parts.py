"""Parts of a model for deployment: a LoRA folded into its base, memory banks on their own."""

from pathlib import Path
from typing import Any

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from memzoo.modeling.memory_bank_files import save_bank
from memzoo.training.distill.distill import banks_of


def merge_lora(adapter: str | Path, out: str | Path) -> list[Path]:
    """Write the base with the adapter's LoRA in its weights to `out/base`, and the memory that stays to `out/adapter`.

    Together they compute what the adapter computed; `out/adapter` names `out/base` as its base. Of an adapter that is
    only a LoRA, nothing stays.

    Returns:
        The folders that were written.

    Raises:
        FileNotFoundError: there is no adapter. FileExistsError: `out` holds something. ValueError: it has no LoRA.
    """
    adapter, out = Path(adapter), _empty(out)
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json; give the folder of an adapter")
    model: Any = AutoPeftModelForCausalLM.from_pretrained(adapter)
    config = model.active_peft_config
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(adapter) if has_tokenizer else None
    written = [out / "base"]
    if config.peft_type == "LORA":
        base = model.merge_and_unload()
    elif getattr(config, "lora_config", None) is None:
        raise ValueError(f"{adapter} has no LoRA (lora_config is null); a memory itself cannot be merged")
    else:
        model.base_model.merge_lora()
        config.base_model_name_or_path = str(out / "base")
        written.append(out / "adapter")
        model.save_pretrained(out / "adapter")
        base = model.unload()
    base.save_pretrained(out / "base")
    if tokenizer is not None:
        for folder in written:
            tokenizer.save_pretrained(folder)
    return written


def extract_banks(model: str | Path, out: str | Path) -> list[Path]:
    """Write each memory bank of a model or an adapter to a folder for `load_bank`: `out/bank_0` and so on.

    Raises:
        FileExistsError: `out` holds something. ValueError: the model reads no banks.
    """
    out = _empty(out)
    kind = AutoPeftModelForCausalLM if (Path(model) / "adapter_config.json").is_file() else AutoModelForCausalLM
    banks = banks_of(kind.from_pretrained(model))
    if not banks:
        raise ValueError(f"{model} reads no memory banks; there is nothing to take out")
    folders = [out / f"bank_{i}" for i in range(len(banks))]
    for bank, folder in zip(banks, folders):
        save_bank(bank, folder)
    return folders


def _empty(out: str | Path) -> Path:
    if Path(out).exists() and any(Path(out).iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder")
    return Path(out)
