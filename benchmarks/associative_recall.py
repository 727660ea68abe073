"""Associative recall: MARU with its memory on against the same model with it off, over several seeds.

    python benchmarks/associative_recall.py            prints the Markdown table of docs/results.md

The state-space mixer is kept small (state_size 2, expand 1), so that what is recalled has to come from the banks.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile

from transformers import set_seed

from memzoo import MaruConfig, MaruForCausalLM
from memzoo.training.bench.cell import task_trainer
from memzoo.training.tasks.associative_recall import RecallTask

MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "state_size": 2,
    "expand": 1,
    "dropout": 0.0,
    "memory_num_slots": 32,
    "memory_dim": 32,
}
TRAINING = {
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "disable_tqdm": True,
    "logging_strategy": "no",
}


def accuracy(recurrence: str, memory_num_banks: int, task: RecallTask, seed: int, steps: int) -> float:
    """Held-out accuracy after training; the answer by chance is 1 / num_values."""
    with tempfile.TemporaryDirectory() as folder:
        set_seed(seed)
        memory = {"recurrence": recurrence, "memory_num_banks": memory_num_banks}
        config = MaruConfig(**MODEL, **memory, vocab_size=task.vocab_size)
        trainer = task_trainer(
            MaruForCausalLM(config), task, seed, folder, eval_size=512, max_steps=steps, eval_strategy="no", **TRAINING
        )
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--recurrence", choices=["parallel", "sequential"], default="parallel")
    args = parser.parse_args()
    print(f"accuracy on the answers after {args.steps} steps, mean (lowest-highest) of {args.seeds} seeds\n")
    print("| pairs | chance | memory off | memory on (4 banks) |\n|---|---|---|---|", flush=True)
    for pairs in args.pairs:
        task = RecallTask(num_pairs=pairs, num_queries=pairs, num_keys=2 * pairs, num_values=16, gap=0)
        cells = []
        for banks in (0, 4):
            with contextlib.redirect_stdout(sys.stderr):  # Trainer's log
                scores = [accuracy(args.recurrence, banks, task, seed, args.steps) for seed in range(args.seeds)]
            cells.append(f"{statistics.mean(scores):.2f} ({min(scores):.2f}-{max(scores):.2f})")
        print(f"| {pairs} | {1 / task.num_values:.2f} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main()
