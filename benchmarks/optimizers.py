"""The nested optimizers against AdamW: a byte-level MARU on State of the Union addresses, one CPU thread.

    python benchmarks/optimizers.py --output optimizers      writes table.md, runs.json and optimizers.png there

Stopped, the same command goes on with the run that it was in.

Every optimizer gets the same learning rates, the same batches, the same schedule (linear warm-up, then constant, so
that a run cut short is a run with fewer steps) and the rest of its settings as they come. The learning rate with the
lowest held-out loss on seed 0 is run on the other seeds. "Equal time" is the CPU time that AdamW took for its steps.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from itertools import pairwise
from math import inf, isfinite, log
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch.optim import AdamW
from tqdm.auto import tqdm

from memzoo import MaruConfig, MaruForCausalLM, MaruTokenizer
from memzoo.training.config import DataConfig
from memzoo.training.data import load_documents
from memzoo.training.optim import ContinuumMemory, DeepMomentum, NestedController, groups_by_depth, levels_by_name

MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "dropout": 0.0,
    "memory_num_banks": 4,
    "memory_num_slots": 16,
    "memory_dim": 16,
}
BATCH, BLOCK, WARM_UP = 8, 128, 20  # sequences, bytes, steps
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1}
DEEP = {"momenta": (0.9, 0.99), "beta2": 0.95, "weight_decay": 0.1}
SLOW = {"embed_tokens": 4}  # the embedding moves every fourth step

OPTIMIZERS = {
    "AdamW": lambda model, lr: AdamW(model.parameters(), lr=lr, **ADAM),
    "DeepMomentum": lambda model, lr: DeepMomentum(model.parameters(), lr=lr, **DEEP),
    "ContinuumMemory": lambda model, lr: ContinuumMemory(levels_by_name(model, SLOW, default=1), lr=lr, **ADAM),
    "NestedController": lambda model, lr: NestedController(AdamW(groups_by_depth(model), lr=lr, **ADAM)),
}


def load_blocks(max_eval_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The training text as one row of bytes, and held-out blocks [n, BLOCK]."""
    train, held_out = load_documents(DataConfig(corpus="sotu", max_eval_bytes=max_eval_bytes))
    tokenizer = MaruTokenizer()
    rows = [torch.tensor([t for text in part for t in tokenizer.encode_bytes(text)]) for part in (train, held_out)]
    return rows[0], rows[1][: len(rows[1]) // BLOCK * BLOCK].view(-1, BLOCK)


@torch.no_grad()
def bits_per_byte(model, blocks: torch.Tensor) -> float:
    model.eval()
    losses = [model(b, labels=b).loss.item() for b in blocks.split(32)]
    model.train()
    return statistics.fmean(losses) / log(2)


def run(name: str, lr: float, seed: int, steps: int, data: tuple[torch.Tensor, torch.Tensor], bar: tqdm) -> dict:
    """One run: `curve` holds (step, CPU seconds of training so far, held-out bits per byte)."""
    text, held_out = data
    torch.manual_seed(seed)
    model = MaruForCausalLM(MaruConfig(vocab_size=len(MaruTokenizer()), **MODEL)).train()
    optimizer = OPTIMIZERS[name](model, lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP)
    random = torch.Generator().manual_seed(1000 + seed)
    curve, in_optimizer, seconds = [], 0.0, 0.0
    for step in range(1, steps + 1):
        starts = torch.randint(len(text) - BLOCK, (BATCH,), generator=random)
        batch = torch.stack([text[s : s + BLOCK] for s in starts.tolist()])
        start = time.process_time()
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.process_time()
        optimizer.step()
        end = time.process_time()
        optimizer.zero_grad()
        scheduler.step()
        seconds, in_optimizer = seconds + end - start, in_optimizer + end - before
        if step % (steps // 20) == 0:
            value = bits_per_byte(model, held_out)
            curve.append((step, seconds, value if isfinite(value) else inf))
            bar.set_postfix_str(f"{name} lr {lr:g} seed {seed} step {step}: {value:.3f} bits per byte")
        bar.update()
    rates = [group.get("lr_multiplier", 1.0) for group in optimizer.param_groups]
    return {
        "name": name,
        "lr": lr,
        "seed": seed,
        "curve": curve,
        "in_optimizer": in_optimizer,
        "lr_multipliers": rates,
        "parameters": model.num_parameters(),
    }


class Runs:
    """The runs done so far, kept in a file: a comparison that was stopped goes on with the next run."""

    def __init__(self, path: Path, settings: dict, data: tuple[torch.Tensor, torch.Tensor], bar: tqdm) -> None:
        self.path, self.settings, self.data, self.bar = path, settings, data, bar
        saved = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": []}
        if saved["settings"] != settings:
            raise SystemExit(f"{path} holds runs with {saved['settings']}, not {settings}; choose another --output")
        self.done: list[dict] = saved["runs"]

    def add(self, name: str, lr: float, seed: int) -> None:
        if any((r["name"], r["lr"], r["seed"]) == (name, lr, seed) for r in self.done):
            self.bar.update(self.settings["steps"])
            return
        self.done.append(run(name, lr, seed, self.settings["steps"], self.data, self.bar))
        self.path.write_text(json.dumps({"settings": self.settings, "runs": self.done}))


def at_time(curve: list[tuple[int, float, float]], seconds: float) -> float:
    """Held-out bits per byte at a CPU time, linear between evaluations; the last one for a run that ended before."""
    for (_, t0, v0), (_, t1, v1) in pairwise(curve):
        if t1 >= seconds:
            return v0 + (v1 - v0) * (seconds - t0) / (t1 - t0)
    return curve[-1][2]


def table(runs: list[dict], rates: list[float], steps: int) -> str:
    """Markdown; equal time is compared within a seed."""
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}"
    lines = [
        f"{steps} steps of {BATCH} x {BLOCK} bytes, MARU with {runs[0]['parameters']:,} parameters; {machine}. "
        "Held-out bits per byte (addresses from 1981 on), mean (lowest-highest) over the seeds.",
        "",
        "| optimizer | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | best lr, equal steps | best lr, equal time "
        "| time per step | of it in the optimizer |",
        "|---" * (len(rates) + 5) + "|",
    ]
    for name in OPTIMIZERS:
        tuning = {r["lr"]: r["curve"][-1][2] for r in runs if r["name"] == name and r["seed"] == 0}
        best = [r for r in runs if r["name"] == name and r["lr"] == best_rate(runs, name)]
        limits = {
            r["seed"]: r["curve"][-1][1] for r in runs if r["name"] == "AdamW" and r["lr"] == best_rate(runs, "AdamW")
        }
        equal_time = [at_time(r["curve"], limits[r["seed"]]) for r in best]
        step = statistics.fmean(r["curve"][-1][1] for r in best) / steps
        inside = statistics.fmean(r["in_optimizer"] for r in best) / steps
        cells = [f"{tuning[lr]:.3f}" for lr in rates]
        cells += [spread([r["curve"][-1][2] for r in best]), spread(equal_time)]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {1e3 * step:.1f} ms | {1e3 * inside:.1f} ms |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def best_rate(runs: list[dict], name: str) -> float:
    tuning = [r for r in runs if r["name"] == name and r["seed"] == 0]
    return min(tuning, key=lambda r: r["curve"][-1][2])["lr"]


def draw(runs: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    worst = 0.0
    for name, colour in zip(OPTIMIZERS, ("black", "tab:orange", "tab:blue", "tab:green")):
        best = [r["curve"] for r in runs if r["name"] == name and r["lr"] == best_rate(runs, name)]
        for axis, column in zip(axes, (0, 1)):
            x, y = ([statistics.fmean(c[i][k] for c in best) for i in range(len(best[0]))] for k in (column, 2))
            axis.plot(x, y, color=colour, lw=1.5, label=f"{name}, lr {best_rate(runs, name):g}")
            low, high = ([f(c[i][2] for c in best) for i in range(len(best[0]))] for f in (min, max))
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        worst = max(worst, y[1])
    lowest = min(value for r in runs for _, _, value in r["curve"])
    axes[0].set(xlabel="step", ylabel="held-out bits per byte", ylim=(lowest - 0.05, worst + 0.05))
    axes[1].set(xlabel="CPU seconds")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    seeds = len({r["seed"] for r in runs})
    figure.suptitle(f"each at its best learning rate; mean and range of {seeds} seeds")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 20")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=MODEL["hidden_size"])
    parser.add_argument("--layers", type=int, default=MODEL["num_hidden_layers"])
    parser.add_argument("--eval-bytes", type=int, default=16384)
    args = parser.parse_args()
    if args.steps < 20 or args.steps % 20:
        parser.error(f"--steps must be a multiple of 20, got {args.steps}")
    MODEL.update(hidden_size=args.hidden_size, num_hidden_layers=args.layers)
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.eval_bytes < BLOCK:
        parser.error(f"--eval-bytes {args.eval_bytes} is less than one block of {BLOCK} bytes")
    data = load_blocks(args.eval_bytes)
    for name in OPTIMIZERS:  # compiles the kernels, loads what is loaded on first use
        run(name, 1e-3, 0, 20, (data[0], data[1][:1]), tqdm(disable=True))
    settings = {"steps": args.steps, "eval_bytes": args.eval_bytes, "model": MODEL}
    total = len(OPTIMIZERS) * (len(args.rates) + args.seeds - 1) * args.steps
    with tqdm(total=total, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=1) as bar:
        runs = Runs(args.output / "runs.json", settings, data, bar)
        for lr in args.rates:
            for name in OPTIMIZERS:
                runs.add(name, lr, 0)
        for seed in range(1, args.seeds):
            for name in OPTIMIZERS:
                runs.add(name, best_rate(runs.done, name), seed)
    runs = runs.done
    (args.output / "table.md").write_text(table(runs, args.rates, args.steps) + "\n")
    draw(runs, args.output / "optimizers.png")
    print((args.output / "table.md").read_text())


if __name__ == "__main__":
    main()
