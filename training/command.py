"""The commands `memzoo config` and `memzoo lr-find`."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add them to argparse's subparsers."""
    config = commands.add_parser("config", help="explain a key of a run's YAML, or print a run's settings in full")
    what = config.add_mutually_exclusive_group(required=True)
    what.add_argument("--explain", metavar="KEY", help="e.g. training.learning_rate, model.memory_top_k, lora.r")
    what.add_argument(
        "--print",
        dest="file",
        metavar="CONFIG.yaml",
        help="every setting of a run of memzoo train or memzoo adapt, as YAML",
    )
    config.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    config.set_defaults(run=run_config)

    finder = commands.add_parser("lr-find", help="try growing learning rates, suggest one, draw the curve")
    finder.add_argument("config", metavar="CONFIG.yaml")
    finder.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    finder.add_argument("--start", type=float, default=1e-7, help="first rate (default: %(default)s)")
    finder.add_argument("--end", type=float, default=1.0, help="last rate (default: %(default)s)")
    finder.add_argument("--steps", type=int, default=100, help="(default: %(default)s)")
    finder.add_argument("--out", default="lr_find.png", metavar="PNG", help="the curve (default: %(default)s)")
    finder.set_defaults(run=run_lr_find)


def run_config(args: argparse.Namespace) -> None:
    import yaml

    from memzoo.training.explain import explain, resolve_file

    if args.explain is not None:
        print("\n".join(map(str, explain(args.explain))))
    else:

        class Plain(yaml.SafeDumper):
            def ignore_aliases(self, data):
                return True  # a value that two keys share is written twice, not as &anchor

        print(yaml.dump(resolve_file(args.file, args.overrides), Dumper=Plain, sort_keys=False), end="")


def run_lr_find(args: argparse.Namespace) -> None:
    from memzoo.training.config import load_config
    from memzoo.training.lr_find import find_learning_rate, plot_finding

    config = load_config(args.config, args.overrides)
    finding = find_learning_rate(config, args.start, args.end, args.steps)
    plot_finding(finding, Path(args.out), f"{Path(args.config).name}, {len(finding.rates)} steps")
    print(
        f"learning rate: {finding.steepest:.1e} where the loss falls most steeply, {finding.a_tenth:.1e} a tenth of "
        f"where it is lowest; the curve is in {args.out}"
    )
