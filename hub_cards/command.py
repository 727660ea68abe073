"""The commands `memzoo push`, `pull`, `export`, `quantize`, `merge-lora` and `extract-bank`."""

import argparse
from typing import Any


def add_commands(commands: Any) -> None:
    """Add them to argparse's subparsers."""
    push = commands.add_parser("push", help="publish a model, an adapter or a memory on the Hub")
    push.add_argument("folder", metavar="DIR", help="what `memzoo train` or save_pretrained wrote")
    push.add_argument("repo", metavar="USER/NAME")
    push.add_argument("--private", action="store_true", default=None, help="a new repository that only you see")
    push.add_argument("--revision", metavar="BRANCH")
    push.add_argument("--license", metavar="ID", help="for the card, e.g. apache-2.0")
    push.add_argument("--no-code", action="store_true", help="without the code for people who have no memzoo")
    push.set_defaults(run=run_push)

    pull = commands.add_parser("pull", help="download a model, an adapter or a memory from the Hub, checked")
    pull.add_argument("repo", metavar="USER/NAME")
    pull.add_argument("folder", metavar="DIR", help="a new folder")
    pull.add_argument("--revision", metavar="BRANCH")
    pull.set_defaults(run=run_pull)

    export = commands.add_parser("export", help="write ONNX graphs with explicit state: one token, and a prefill")
    export.add_argument("model", metavar="MODEL", help="folder of a model, or its hub id")
    export.add_argument("--onnx", required=True, metavar="DIR", help="where the graphs go")
    export.set_defaults(run=run_export)

    quantize = commands.add_parser("quantize", help="write a model with 8- or 4-bit weights, and what that costs")
    quantize.add_argument("model", metavar="MODEL", help="folder of a model, or its hub id")
    quantize.add_argument("--out", required=True, metavar="DIR")
    kinds = ["int8", "nf4", "fp4", "torchao-int8"]
    quantize.add_argument("--kind", choices=kinds, default="int8", help="(default: %(default)s)")
    quantize.add_argument("--data", metavar="PATH", help="measure bits per byte on this .txt file or folder of them")
    quantize.set_defaults(run=run_quantize)

    merge = commands.add_parser("merge-lora", help="fold the LoRA of an adapter into its base; the memory stays")
    merge.add_argument("adapter", metavar="DIR", help="folder of an adapter with a LoRA")
    merge.add_argument("--out", required=True, metavar="DIR", help="gets base/ and adapter/")
    merge.set_defaults(run=run_merge_lora)

    extract = commands.add_parser("extract-bank", help="write the memory banks of a model or an adapter on their own")
    extract.add_argument("model", metavar="MODEL", help="folder of a model or an adapter, or its hub id")
    extract.add_argument("--out", required=True, metavar="DIR", help="gets bank_0/ and so on, for load_bank")
    extract.set_defaults(run=run_extract_bank)


def run_push(args: argparse.Namespace) -> None:
    from memzoo.hub_cards.push import push

    options = {"private": args.private, "revision": args.revision, "license": args.license}
    print(push(args.folder, args.repo, code=not args.no_code, **options))


def run_pull(args: argparse.Namespace) -> None:
    from memzoo.hub_cards.push import pull

    print(f"{args.repo} is in {pull(args.repo, args.folder, revision=args.revision)}")


def run_export(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM

    from memzoo.hub_cards.export import export_onnx

    differences = export_onnx(AutoModelForCausalLM.from_pretrained(args.model), args.onnx)
    for name, difference in differences.items():
        print(f"{args.onnx}/{name}.onnx: logits within {difference:.1g} of torch")


def run_quantize(args: argparse.Namespace) -> None:
    from memzoo.hub_cards.quantize import quantize
    from memzoo.training.data import read_folder

    documents = read_folder(args.data, "--data") if args.data else None
    print(quantize(args.model, args.out, args.kind, documents).table(args.kind))


def run_merge_lora(args: argparse.Namespace) -> None:
    from memzoo.hub_cards.parts import merge_lora

    print(f"written: {', '.join(map(str, merge_lora(args.adapter, args.out)))}")


def run_extract_bank(args: argparse.Namespace) -> None:
    from memzoo.hub_cards.parts import extract_banks

    for folder in extract_banks(args.model, args.out):
        print(f"a bank is in {folder}")
