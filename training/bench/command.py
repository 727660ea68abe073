"""`memzoo bench` on the command line."""

import argparse
from dataclasses import replace
from pathlib import Path

HELP = """\
examples:
  memzoo bench --sanity
  memzoo bench --task copy_memory delay=50 --model llama mamba maru maru memory_num_banks=0 --out runs/copy
  memzoo bench --task needle length=512 --eval-lengths 1x 4x --eval-depths 0 0.5 1 --model maru --out runs/needle
  memzoo bench --task needle length=2048 tokenizer=FOLDER --model FOLDER --steps 0 --out runs/pretrained
  memzoo bench --full --out runs/full

A run that was stopped goes on where it was when the same command is given again, and more tasks, models and seeds can
be added to a folder. Writes results.json, results.md and pictures.
"""
DEFAULT_MODELS = ["llama", "mamba", "maru"]
SEEDS = 3


def add_bench_command(commands) -> None:
    """Adds `bench` to the subparsers of the `memzoo` command."""
    bench = commands.add_parser(
        "bench",
        help="train models of equal size on synthetic memory tasks and compare them",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = bench.add_mutually_exclusive_group(required=True)
    spec = {"nargs": "+", "action": "extend", "metavar": "NAME [KEY=VALUE]"}
    what.add_argument("--task", **spec, help="tasks and their sizes")
    what.add_argument("--full", action="store_true", help="all tasks, all families and their baselines")
    what.add_argument("--sanity", action="store_true", help="does everything run, and are answers determined?")
    defaults = " ".join(DEFAULT_MODELS)
    bench.add_argument(
        "--model", **spec, help=f"model types, or folders of models, and fields of their configs (default: {defaults})"
    )
    bench.add_argument("--out", metavar="DIR", help="folder for the results; needed unless --sanity")
    numbers = {
        "--seeds": "runs of every model (default: 3, with --full 1)",
        "--steps": "training steps; 0 only measures (default: 1000)",
        "--batch-size": "sequences a step (default: 32)",
        "--params": "scale models to so many parameters, 0 for not at all (default: 100000)",
        "--eval-size": "held-out sequences (default: 256)",
    }
    for option, text in numbers.items():
        bench.add_argument(option, type=int, metavar="N", help=text)
    bench.add_argument(
        "--lr", type=float, nargs="+", help="several: the best on the first seed is taken (default: 3e-3)"
    )
    bench.add_argument("--eval-lengths", nargs="+", metavar="L", help="tokens, or 4x those of training (default: 1x)")
    bench.add_argument("--eval-depths", type=float, nargs="+", metavar="D", help="depths of the needle, 0 to 1")
    bench.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    from memzoo.training.bench.cell import Protocol
    from memzoo.training.bench.runner import run_bench
    from memzoo.training.bench.specs import parse_specs
    from memzoo.training.bench.suites import FULL_PROTOCOL, FULL_SEEDS, full_models, full_tasks, sanity

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.sanity:
        sanity()
        return
    if not args.out:
        raise ValueError("--out: missing; say which folder the results go to")
    if args.seeds is None:
        args.seeds = FULL_SEEDS if args.full else SEEDS
    if args.seeds < 1:
        raise ValueError(f"--seeds: {args.seeds} must be at least 1")
    tasks = full_tasks() if args.full else parse_specs(args.task, "task")
    if args.model or not args.full:
        models = parse_specs(args.model or DEFAULT_MODELS, "model")
    else:
        models = full_models()
    given = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rates": args.lr,
        "parameters": args.params,
        "eval_lengths": args.eval_lengths,
        "eval_depths": args.eval_depths,
        "eval_size": args.eval_size,
    }
    given = {name: value for name, value in given.items() if value is not None}
    protocol = replace(FULL_PROTOCOL if args.full else Protocol(), **given)
    run_bench(tasks, models, list(range(args.seeds)), protocol, Path(args.out))
    print((Path(args.out) / "results.md").read_text())
