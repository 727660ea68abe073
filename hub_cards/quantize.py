"""Models in 8 or 4 bits (bitsandbytes, torchao), with what that saves and what it costs."""

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from memzoo.training.evaluate import evaluate_documents

INPUTS, OUTPUTS = 64, 32  # bitsandbytes' 4-bit products on the CPU need multiples of these
Kind = Literal["int8", "nf4", "fp4", "torchao-int8"]


class Quantized(NamedTuple):
    """Bytes of the weights and bits per byte of the text, before and after; None without a text."""

    bytes_before: int
    bytes_after: int
    bits_per_byte_before: float | None
    bits_per_byte_after: float | None

    def table(self, kind: str) -> str:
        rows = [("full precision", self.bytes_before, self.bits_per_byte_before)]
        rows += [(kind, self.bytes_after, self.bits_per_byte_after)]
        lines = ["| weights | MB | bits per byte |", "|---|---|---|"]
        lines += [f"| {name} | {size / 1e6:.2f} | {'-' if b is None else f'{b:.4f}'} |" for name, size, b in rows]
        return "\n".join(lines)


def quantize(
    folder: str | Path, out: str | Path, kind: Kind = "int8", documents: list[bytes] | None = None
) -> Quantized:
    """Write the model in `folder` with its linear layers in 8 or 4 bits to `out`; from_pretrained loads it as usual.

    Embeddings, norms, the head and what the memory's kernels read as matrices stay as they are.

    Args:
        kind: "int8" (LLM.int8, arXiv 2208.07339), "nf4" or "fp4" (QLoRA, arXiv 2305.14314, section 3), all three of
            bitsandbytes; "torchao-int8": only the weights in 8 bits, a scale for each output.
        documents: texts to measure bits per byte on, before and after.

    Raises:
        ImportError: the library is missing. ValueError: no such kind, or the model is quantized already.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"there is no kind {kind!r}; the kinds are {', '.join(get_args(Kind))}")
    library = "torchao" if kind == "torchao-int8" else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{library} is not installed; pip install 'memzoo[{library}]'")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized already; start from the model in full precision")
    before = model.get_memory_footprint(), _bits(model, tokenizer, documents)
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=_config(kind, _left_alone(model, kind)))
    bits = _bits(small, tokenizer, documents)
    small.save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))  # its tensors do not tell their size
    return Quantized(before[0], size, before[1], bits)


def _config(kind: Kind, left_alone: list[str]) -> Any:
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left_alone)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_alone)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=left_alone,
    )


def _left_alone(model: PreTrainedModel, kind: Kind) -> list[str]:
    """Layers that stay as they are: the head, what the model says that its kernels read (torchao does not ask the
    model), and for 4 bits those whose width the CPU's products cannot take.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = re.compile(rf"(.*\.)?({'|'.join(['lm_head', *(model._keep_in_fp32_modules or [])])})")
    return [
        name
        for name, module in layers.items()
        if kept.fullmatch(name)
        or (kind in ("nf4", "fp4") and (module.in_features % INPUTS or module.out_features % OUTPUTS))
    ]


def _bits(model: Any, tokenizer: Any, documents: list[bytes] | None) -> float | None:
    if not documents:
        return None
    return evaluate_documents(model.eval(), tokenizer, documents, 512, carry=True).bits_per_byte
