"""The command `memzoo adapt`."""

import argparse
from typing import Any

HELP = """\
examples:
  memzoo adapt training/configs/adapter_smollm2.yaml data.path=chats.jsonl
  memzoo adapt run.yaml base.quantization=nf4 memory.num_memory_tokens=512
  memzoo adapt run.yaml --resume

sections of CONFIG.yaml:
  base:            name of a folder or on the Hub, dtype, quantization, chat_template
  memory:          fields of memzoo.MemoryConfig
  lora:            fields of peft.LoraConfig; instead of a memory, or beside it
  data:            path (.jsonl of conversations, or text) | dataset; eval_path, eval_fraction, max_length
  learning_rates:  bank, router, projections, lora, base; training.learning_rate where none is given
  training:        any field of transformers.TrainingArguments
"""


def add_commands(commands: Any) -> None:
    """Add it to argparse's subparsers."""
    adapt = commands.add_parser(
        "adapt",
        help="train a memory, a LoRA or both on a pretrained model, from a YAML file",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    adapt.add_argument("config", metavar="CONFIG.yaml")
    adapt.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. memory.num_memory_tokens=64")
    adapt.add_argument("--resume", action="store_true", help="continue the last checkpoint in training.output_dir")
    adapt.set_defaults(run=run_adapt)


def run_adapt(args: argparse.Namespace) -> None:
    from memzoo.cli import _quiet
    from memzoo.training.adapt.settings import load_adapt_config

    config = load_adapt_config(args.config, args.overrides)
    if args.resume:
        config.training["resume_from_checkpoint"] = "auto"
    _quiet()
    from memzoo.training.adapt.run import adapt

    trainer = adapt(config)
    if not trainer.is_world_process_zero():
        return
    found = [log["eval_perplexity"] for log in trainer.state.log_history if "eval_perplexity" in log]
    if found:
        print(f"perplexity on what was held out: {found[-1]:.3f}")
    print(f"the adapter and its tokenizer are in {trainer.args.output_dir}")
