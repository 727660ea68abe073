"""A language model with banks, without, and with as much more feed-forward as a read costs, over seeds.

    python benchmarks/bank_language.py --steps 800 --seeds 2

As `memory_bank.py language`, but with initial weights of 0.1, which is about 1 / sqrt(width), and memory tokens of 1:
with the 0.02 of wide models all three learn slowly, and the attention within a chapter stays even.
"""

import argparse
import time
from pathlib import Path

from memory_bank import BLOCK, FEED_FORWARD, WIDTH, layer_cost, read_cost, settings

MEMORY = {"memory_num_tokens": 512, "memory_num_chapters": 16, "memory_top_k_chapters": 2}
MEMORY |= {"memory_num_shared_chapters": 1, "memory_init_std": 1.0}


def run(fields: dict, folder: Path, args: argparse.Namespace, seed: int) -> tuple[float, float, int]:
    """Held-out bits per byte at the end, CPU seconds, parameters."""
    from memzoo.training.config import parse_config
    from memzoo.training.trainer import train

    config = settings({"initializer_range": 0.1, **fields}, str(folder), args.steps, args.batch_size)
    config["training"] |= {"seed": seed, "learning_rate": args.learning_rate}
    config["data"]["max_eval_bytes"] = args.eval_bytes
    start = time.process_time()
    trainer = train(parse_config(config))
    seconds = time.process_time() - start
    last = [log for log in trainer.state.log_history if "eval_bits_per_byte" in log][-1]
    trainer.save_model()
    trainer.save_state()
    return last["eval_bits_per_byte"], seconds, trainer.model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--eval-bytes", type=int, default=60_000)
    parser.add_argument("--out", type=Path, default=Path("/tmp/bank_language"), help="folder for the runs")
    args = parser.parse_args()
    cost = read_cost(MEMORY, args.batch_size * BLOCK)
    wider = FEED_FORWARD + round(cost / (3 * WIDTH))
    off = {"memory_placement": "none"}
    variants = {
        "on: 512 tokens, 2 + 1 of 16 chapters": (MEMORY, layer_cost(FEED_FORWARD) + cost),
        "off": (off, layer_cost(FEED_FORWARD)),
        f"off, feed-forward {wider} wide": ({**off, "intermediate_size": wider}, layer_cost(wider)),
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in variants}
    for seed in range(args.seeds):
        for i, (name, (fields, _)) in enumerate(variants.items()):
            found[name].append(run(fields, args.out / f"{i}_{seed}", args, seed))
            print(f"{name}, seed {seed}: {found[name][-1]}", flush=True)
    print("| memory | parameters | multiply-adds of a layer per token | held-out bits per byte | CPU seconds |")
    print("|---|---|---|---|---|")
    for name, results in found.items():
        bits, seconds, parameters = zip(*results)
        shown = ", ".join(f"{x:.3f}" for x in bits)
        mean = sum(seconds) / len(seconds)
        print(f"| {name} | {parameters[0]:,} | {variants[name][1]:,.0f} | {shown} | {mean:.0f} |")


if __name__ == "__main__":
    main()
