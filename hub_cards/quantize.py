"""Models in 8 or 4 bits (bitsandbytes), with what that saves and what it costs."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from memzoo.training.evaluate import evaluate_documents

BLOCK = 32  # bitsandbytes' 4-bit products on the CPU need outputs in multiples of this
Kind = Literal["int8", "nf4", "fp4"]


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
        kind: "int8" (LLM.int8, arXiv 2208.07339), "nf4" or "fp4" (QLoRA, arXiv 2305.14314, section 3).
        documents: texts to measure bits per byte on, before and after.

    Raises:
        ImportError: bitsandbytes is missing. ValueError: no such kind, or the model is quantized already.
    """
    if kind not in ("int8", "nf4", "fp4"):
        raise ValueError(f"there is no kind {kind!r}; the kinds are int8, nf4 and fp4")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError("bitsandbytes is not installed; pip install 'memzoo[bitsandbytes]'") from error
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized already; start from the model in full precision")
    before = model.get_memory_footprint(), _bits(model, tokenizer, documents)
    config: dict[str, Any] = {"llm_int8_skip_modules": _left_alone(model, kind)}
    config |= {"load_in_8bit": True} if kind == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_compute_dtype": torch.float32
    }  # fmt: skip
    small = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**config))
    after = small.get_memory_footprint(), _bits(small, tokenizer, documents)
    small.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return Quantized(before[0], after[0], before[1], after[1])


def _left_alone(model: nn.Module, kind: Kind) -> list[str]:
    """Layers that stay as they are: the head, and for 4 bits those whose width the CPU's products cannot take."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [
        name
        for name, module in layers.items()
        if name.endswith("lm_head") or (kind != "int8" and (module.out_features % BLOCK or module.in_features % BLOCK))
    ]


def _bits(model: Any, tokenizer: Any, documents: list[bytes] | None) -> float | None:
    if not documents:
        return None
    return evaluate_documents(model.eval(), tokenizer, documents, 512, carry=True).bits_per_byte
