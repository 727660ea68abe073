"""The commands `memzoo distill` and `memzoo show-bank`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memzoo.training.distill.settings import Settings
from memzoo.training.smollm2 import SMOLLM2

if TYPE_CHECKING:
    from memzoo.training.distill.distill import Report

_OPTIONS = {
    "continuations": "texts that the teacher writes to learn from",
    "held_out": "texts that it writes to measure with",
    "opening": "tokens of the document that each text begins with",
    "length": "tokens that the teacher writes after them",
    "context": "tokens that the teacher sees at once (default: the model's limit); longer documents are cut",
    "steps": "training steps",
    "batch_size": "texts of a step",
    "seed": "of openings, continuations and order",
}
_NEW = {
    "memory_tokens": (64, "memory tokens of a new adapter"),
    "chapters": (1, "chapters of its bank; a token reads two of them"),
    "every": (5, "a new adapter reads in every N-th layer"),
}


def add_commands(commands: Any) -> None:
    """Add them to argparse's subparsers."""
    teach = commands.add_parser("distill", help="learn a document by heart: train a memory bank to stand in for it")
    teach.add_argument("--document", required=True, metavar="FILE", help="a text file")
    teach.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help=f"a memory_bank_transformer, a memory adapter, or a pretrained model to give one to ('{SMOLLM2}' for the "
        "small one from PyPI)",
    )
    teach.add_argument(
        "--out", required=True, metavar="DIR", help="a new folder for the model or adapter, and the bank"
    )
    teach.add_argument(
        "--train", choices=["bank", "read"], help="the bank alone, or its projections too (default: bank; read if new)"
    )
    for name, text in _OPTIONS.items():
        value = getattr(Settings(), name)
        shown = "" if value is None else f" (default: {value})"
        teach.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text + shown)
    teach.add_argument("--learning-rate", type=float, metavar="LR", help="of the bank (default: 0.01)")
    teach.add_argument(
        "--seed-chapters",
        action="store_true",
        help="start from the document's own passages, embedded by the model: one a chapter, with routers that find it",
    )
    teach.add_argument("--quantize", choices=["int8", "int4"], help="write the learned banks in 8 or 4 bits")
    for name, (value, text) in _NEW.items():
        teach.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"{text} (default: {value})")
    teach.set_defaults(run=run_distill)

    show = commands.add_parser("show-bank", help="draw which chapters and memory tokens each token reads")
    show.add_argument("model", metavar="MODEL", help="folder of a model with memory banks, or of an adapter")
    show.add_argument("--text", required=True, help="what the model reads")
    show.add_argument("--out", required=True, metavar="DIR", help="folder for the pictures and bank.html")
    show.set_defaults(run=run_show_bank)


def run_distill(args: argparse.Namespace) -> None:
    from memzoo.cli import _quiet
    from memzoo.training.distill.distill import distill, quantized_nats

    out, document = Path(args.out), Path(args.document)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"--out: {out} is not empty; delete it or choose another folder")
    if not document.is_file():
        raise FileNotFoundError(f"--document: {document} is not a file")
    try:
        text = document.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--document: {document} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ValueError(
            f"--document: {document} is empty ({document.stat().st_size} bytes); there is nothing to distil"
        )
    _quiet()
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if args.learning_rate is not None:
        given["bank_learning_rate"] = args.learning_rate
    Settings(**given)  # a wrong number is refused before a model is loaded
    chosen = {name: getattr(args, name) for name in _NEW if getattr(args, name) is not None}
    model, tokenizer, new = open_model(args.model, chosen)
    if chosen and not new:
        raise ValueError(
            f"--{next(iter(chosen)).replace('_', '-')} is of a new adapter, and {args.model} has a memory"
        )
    settings = Settings(**given, train=args.train or ("read" if new else "bank"), seed_chapters=args.seed_chapters)
    report = distill(model, tokenizer, text, settings)
    if args.quantize is not None:
        report.with_quantized_bank = quantized_nats(model, report.held_out, settings.batch_size, args.quantize)
    saved = save(model, tokenizer, out, args.quantize)
    report.save(out / "distillation.json", settings)
    print(describe(report), *saved, sep="\n")
    print(f"the model or adapter, its bank and distillation.json are in {out}")


def describe(report: "Report") -> str:
    if report.kept is None:
        gap = f"{report.without_memory - report.with_document:.4f} nats, standard error {report.gap_error:.4f}"
        kept = f"not measurable: the document in context brings {gap}"
    else:
        kept = f"{report.kept:.0%}"
    seeded = "" if report.when_seeded is None else f"{report.when_seeded:.3f} with its passages as chapters, "
    small = "" if report.with_quantized_bank is None else f" ({report.with_quantized_bank:.3f} when quantized)"
    return (
        f"{report.document_tokens:,} tokens, read in {report.windows} window(s)\n"
        f"nats per held-out token: {report.without_memory:.3f} without the document, {seeded}{report.with_bank:.3f} "
        f"with the bank{small}, {report.with_document:.3f} with the document in context\n"
        f"kept: {kept}"
    )


def open_model(name: str, chosen: dict[str, int] | None = None) -> tuple[Any, Any, bool]:
    """Model and tokenizer from a folder of a model or an adapter, and whether its memory is new.

    `chosen` are the command's options about a new memory.
    """
    from peft import AutoPeftModelForCausalLM, get_peft_model
    from transformers import AutoTokenizer

    from memzoo import MemoryConfig
    from memzoo.session import load_model
    from memzoo.training.distill.distill import banks_of

    if (Path(name) / "adapter_config.json").is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True).eval()
        base = (
            name
            if (Path(name) / "tokenizer_config.json").is_file()
            else model.active_peft_config.base_model_name_or_path
        )
        return model, AutoTokenizer.from_pretrained(base), False
    if name == SMOLLM2:
        from memzoo.training.smollm2 import smollm2_folder

        name = str(smollm2_folder())
    model, tokenizer = load_model(name)
    if banks_of(model):
        return model, tokenizer, False
    config = model.config
    if hasattr(config, "memory_placement"):
        raise ValueError(f"{name} was made without a memory (memory_placement is {config.memory_placement!r})")
    size = {name: value for name, (value, _) in _NEW.items()} | (chosen or {})
    bank = {"num_memory_tokens": size["memory_tokens"], "num_chapters": size["chapters"]}
    bank |= {"top_k_chapters": min(size["chapters"], 2), "num_heads": config.num_attention_heads}
    place = {"placement": "every_n", "placement_k": size["every"], "sharing": "shared"}
    return get_peft_model(model, MemoryConfig(task_type="CAUSAL_LM", **bank, **place)), tokenizer, True


def save(model: Any, tokenizer: Any, out: Path, quantization: Any) -> list[str]:
    """The whole model or the adapter, and each bank on its own: `bank`, or `bank_0` and so on; a line about each."""
    from memzoo.modeling.memory_bank_files import save_bank
    from memzoo.modeling.quantized_bank import quantization_error
    from memzoo.training.distill.distill import banks_of

    banks = banks_of(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    lines = []
    for i, bank in enumerate(banks):
        folder = out / ("bank" if len(banks) == 1 else f"bank_{i}")
        written = bank if quantization is None else bank.quantize(quantization)
        save_bank(written, folder)
        size = written.footprint()
        lines.append(f"{folder.name}: {size['bytes']:,} bytes, {size['bytes'] / size['float32_bytes']:.1%} of float32")
        if quantization is not None:
            lines[-1] += f"; {quantization} is off by {quantization_error(bank.rows(), quantization):.1%} of its norm"
    return lines


def run_show_bank(args: argparse.Namespace) -> None:
    from memzoo.cli import _quiet
    from memzoo.training.bank_pictures import show_bank

    _quiet()
    model, tokenizer, new = open_model(args.model)
    if new:
        raise ValueError(f"{args.model} has no memory bank to show")
    for file in show_bank(model, tokenizer, args.text, Path(args.out), Path(args.model)):
        print(file)
