"""The `memzoo` command: train, tokenizer, generate, eval, chat. A user's mistake is one line and exit code 2."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memzoo.training.config import RunConfig

TRAIN_HELP = """\
examples:
  memzoo train training/configs/maru_demo.yaml
  memzoo train run.yaml training.max_steps=2000 model.hidden_size=512
  memzoo train run.yaml --resume
  memzoo train run.yaml training.resume_from_checkpoint=runs/mine/checkpoint-500

sections of CONFIG.yaml:
  model:      model_type (with an optional preset) or pretrained, and any field of the model's config
  tokenizer:  type bytes, type bpe with a vocab_size, or pretrained; without it, model.pretrained's own, or bytes
  data:       corpus | path | dataset | task; eval_path, eval_fraction, block_size, streaming, ...
  sample:     prompts, max_new_tokens, temperature of the text written at every evaluation
  training:   any field of transformers.TrainingArguments
  and learning_rates (by part of the model), early_stopping, optimizer; `memzoo config --explain KEY` explains each
"""


def build_parser() -> argparse.ArgumentParser:
    from memzoo import __version__
    from memzoo.hub_cards.command import add_commands as add_hub_commands
    from memzoo.training.adapt.command import add_commands as add_adapt_commands
    from memzoo.training.bench.command import add_bench_command
    from memzoo.training.command import add_commands as add_training_commands
    from memzoo.training.distill.command import add_commands as add_distill_commands
    from memzoo.training.harness import add_arguments as add_task_arguments

    parser = argparse.ArgumentParser("memzoo", description="Language models with a memory: train, generate, talk.")
    parser.add_argument("--version", action="version", version=f"memzoo {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a model from a YAML file",
        epilog=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. training.max_steps=10")
    train.add_argument("--resume", action="store_true", help="continue the last checkpoint in training.output_dir")
    train.set_defaults(run=run_train)

    tokenizer = commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer on text files")
    tokenizer.add_argument("--data", required=True, metavar="PATH", help="a .txt file or a folder of them, or 'sotu'")
    tokenizer.add_argument("--vocab-size", type=_positive, default=8192, metavar="N", help="(default: %(default)s)")
    tokenizer.add_argument("--min-frequency", type=_positive, default=2, metavar="N", help="(default: %(default)s)")
    tokenizer.add_argument("--out", required=True, metavar="DIR", help="folder that AutoTokenizer then loads")
    tokenizer.set_defaults(run=run_tokenizer)

    generate = commands.add_parser("generate", help="continue a prompt")
    _add_model(generate)
    generate.add_argument("--prompt", default="", help="text to continue (default: begin a new text)")
    _add_sampling(generate)
    generate.add_argument("--stream", action="store_true", help="print the text as it is written")
    generate.add_argument("--memory", metavar="DIR", help="go on from this memory snapshot")
    generate.add_argument("--save-memory", metavar="DIR", help="keep the memory afterwards")
    generate.set_defaults(run=run_generate)

    evaluate = commands.add_parser("eval", help="bits per byte of a text, with the memory carried along or in windows")
    _add_model(evaluate)
    evaluate.add_argument(
        "--data",
        metavar="PATH",
        help="a .txt file or a folder of them, or 'sotu' (default: what the model's own training run held out)",
    )
    evaluate.add_argument("--window", type=_positive, default=1024, help="tokens read at once (default: %(default)s)")
    evaluate.add_argument("--mode", choices=["carry", "window", "both"], default="both")
    evaluate.add_argument("--stride", type=_positive, metavar="N", help="windows overlap: score the last N of each")
    evaluate.add_argument("--max-bytes", type=_positive, metavar="N", help="read at most N bytes in all")
    add_task_arguments(evaluate)
    evaluate.set_defaults(run=run_eval)

    add_bench_command(commands)

    chat = commands.add_parser("chat", help="talk with a model; its memory is kept between turns")
    _add_model(chat)
    _add_sampling(chat)
    chat.add_argument("--memory", metavar="DIR", help="go on from this memory snapshot")
    chat.add_argument("--plain", action="store_true", help="no chat template: the model goes on with your text")
    chat.set_defaults(run=run_chat)
    add_hub_commands(commands)
    add_distill_commands(commands)
    add_training_commands(commands)
    add_adapt_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if hasattr(args, "overrides") and all("=" in word and word[0] != "-" for word in rest):
        args.overrides += rest  # argparse gives up on positionals after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.stdout.reconfigure(errors="replace")  # a byte-level model may write bytes that are not text
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            raise
        print(f"memzoo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def run_train(args: argparse.Namespace) -> None:
    from memzoo.training.config import load_config

    config = load_config(args.config, args.overrides)
    if args.resume:
        config.training["resume_from_checkpoint"] = "auto"
    _quiet()
    from memzoo.training.trainer import train

    trainer = train(config)
    if trainer.is_world_process_zero():
        print(f"model, tokenizer and loss.png are in {trainer.args.output_dir}")


def run_tokenizer(args: argparse.Namespace) -> None:
    _quiet()
    from memzoo.training.config import DataConfig, check_bpe_size
    from memzoo.training.data.bpe import bytes_per_token, train_bpe
    from memzoo.training.data.documents import load_documents, open_folder, pieces

    check_bpe_size("--vocab-size", args.vocab_size)
    if (Path(args.out) / "tokenizer.json").exists():
        raise FileExistsError(f"--out: {args.out} already holds a tokenizer; delete it or choose another folder")
    sotu = DataConfig(corpus="sotu")
    documents = load_documents(sotu)[0] if args.data == "sotu" else open_folder(args.data, "--data")
    tokenizer = train_bpe(pieces(documents), args.vocab_size, args.min_frequency)
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer):,} tokens, {bytes_per_token(tokenizer, pieces(documents)):.2f} bytes each; in {args.out}")


def run_generate(args: argparse.Namespace) -> None:
    session = _session(args)
    from transformers import TextStreamer

    streamer = TextStreamer(session.tokenizer, skip_prompt=True, skip_special_tokens=True) if args.stream else None
    print(args.prompt, end="", flush=True)
    text = session.reply(args.prompt, streamer, **_sampling(args))
    if not args.stream:
        print(text)
    if args.save_memory:
        session.save(args.save_memory)


def run_eval(args: argparse.Namespace) -> None:
    _quiet()
    if args.tasks is not None or args.task_dir is not None:
        from memzoo.training.harness import run_tasks

        run_tasks(args)
        return
    from memzoo.session import load_model
    from memzoo.training.config import DataConfig
    from memzoo.training.data.documents import equal_shares, load_documents, read_folder
    from memzoo.training.evaluate import evaluate_documents

    if args.stride is not None and (args.mode == "carry" or args.stride > args.window):
        raise ValueError(f"--stride {args.stride}: goes with --mode window, and with a --window of as many tokens")
    if args.data is None and (run := _run_of(args.model)).data.task is not None:
        _eval_task(args.model, run)
        return
    if args.data is None:
        documents = _held_out(run)
    elif args.data == "sotu":
        documents = load_documents(DataConfig(corpus="sotu"))[1]
    else:
        documents = read_folder(args.data, "--data")
    if args.max_bytes is not None:
        documents = equal_shares(documents, args.max_bytes)
    model, tokenizer = load_model(args.model)
    print(f"{len(documents)} document(s), {sum(map(len, documents)):,} bytes, {args.window} tokens at once")
    for mode in ("carry", "window") if args.mode == "both" else (args.mode,):
        stride = args.stride if mode == "window" else None
        score = evaluate_documents(model, tokenizer, documents, args.window, mode == "carry", stride)
        print(
            f"{mode:>6}: {score.bits_per_byte:.4f} bits per byte, perplexity {score.perplexity:.3f} per token, "
            f"{score.num_tokens / score.seconds:,.0f} tokens/s"
        )


def _eval_task(folder: str, run: "RunConfig") -> None:
    from memzoo.session import load_model
    from memzoo.training.evaluate import greedy_answers
    from memzoo.training.sources import load_task
    from memzoo.training.tasks.common import TextTask

    task = load_task(run)[1]
    if not isinstance(task, TextTask):
        raise ValueError(f"{run.data.task} is not text; use memzoo bench --task {run.data.task} --model {folder}")
    answers = greedy_answers(load_model(folder)[0], task, run.data.task_eval_size, seed=run.training.get("seed", 0))
    right = sum(answer.right for answer in answers)
    print(f"{run.data.task}: {right} of {len(answers)} held-out problems answered right ({right / len(answers):.1%})")
    for answer in answers[:8]:
        print(f"  {answer.question}{answer.written}{'' if answer.right else '   wrong'}")


def _run_of(folder: str) -> "RunConfig":
    """The settings of the training run that wrote a model."""
    from memzoo.training.checkpoints import RUN_FILE
    from memzoo.training.config import load_config

    file = Path(folder) / RUN_FILE
    if not file.is_file():
        raise FileNotFoundError(f"--data: missing, and {folder} has no {RUN_FILE} that says what it was trained on")
    return load_config(str(file))


def _held_out(run: "RunConfig") -> list[bytes]:
    from memzoo.training.data import load_documents, load_parts

    documents = (load_parts if run.data.path is not None else load_documents)(run.data)[1]
    if not documents:
        raise ValueError("--data: missing, and the model's training run held no text out")
    return documents


def run_chat(args: argparse.Namespace) -> None:
    session = _session(args)
    from memzoo.chat import chat

    chat(session, args.plain, _sampling(args))


def _session(args: argparse.Namespace):
    _quiet()
    from transformers import set_seed

    from memzoo.session import Session, load_model

    if args.seed is not None:
        set_seed(args.seed)
    return Session(*load_model(args.model), memory=args.memory)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a model, or its hub id")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=_positive, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of total mass P")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")


def _sampling(args: argparse.Namespace) -> dict:
    """Arguments of `generate`."""
    if args.temperature <= 0:
        return {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    return {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": args.top_k or 0,
        "top_p": args.top_p or 1.0,
    }


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _quiet() -> None:
    """transformers' own bars and notes stay out of the way of ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch.utils.data")


if __name__ == "__main__":
    sys.exit(main())
