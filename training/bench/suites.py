"""What `memzoo bench --full` and `--sanity` run."""

import tempfile
import time
from pathlib import Path

from memzoo import _FAMILIES
from memzoo.training.bench.cell import Protocol
from memzoo.training.bench.runner import run_bench
from memzoo.training.bench.specs import Spec, parse_specs
from memzoo.training.tasks import TASKS, build_task
from memzoo.training.tasks.common import IGNORED, Task

BASELINES = ["llama", "mamba"]
# the same family without its memory, for those where that is one field
WITHOUT_MEMORY = {
    "maru": "memory_num_banks=0",
    "dual_memory": "memory_layers=[]",
    "memory_bank_transformer": "memory_placement=none",
    "neural_memory_transformer": "memory_enabled=false",
    "titan_mac": "memory_enabled=false",
}

FULL_TASKS = """
    copy_memory delay=50
    selective_copy
    induction_head
    associative_recall num_pairs=8 gap=8
    multi_query_recall num_pairs=8 num_queries=8 gap=8
    needle length=128 key_letters=1 value_digits=1
"""
# about an hour of one core: what is learned in that time, not what can be learned
FULL_PROTOCOL = Protocol(steps=400, batch_size=16, eval_lengths=["1x", "4x"], eval_size=64)
FULL_SEEDS = 1


def full_tasks() -> list[Spec]:
    return parse_specs(FULL_TASKS.split(), "task")


def full_models() -> list[Spec]:
    """The baselines, every family, and the family without its memory."""
    words = [*BASELINES]
    for family in _FAMILIES:
        words += [family, *([family, WITHOUT_MEMORY[family]] if family in WITHOUT_MEMORY else [])]
    return parse_specs(words, "model")


def check_answers(task: Task, size: int = 32, seed: int = 0) -> int:
    """Finds every answer by search in what stands before it; returns how many. Raises ValueError if one differs."""
    found = 0
    for row, labels in zip(*(part.tolist() for part in task.sample(size, seed)), strict=True):
        for place, answer in enumerate(labels):
            if answer != IGNORED:
                found += 1
                if task.solve(row[:place]) != answer:
                    raise ValueError(f"{task}: the answer at {place} does not follow from the tokens before: {row}")
    return found


def sanity(write=print) -> None:
    """Every answer is determined, every task and every model runs, and a model learns. Raises ValueError if not."""
    start = time.perf_counter()
    for name in TASKS:
        write(f"{name}: all {check_answers(build_task(name, {}))} answers follow from what stands before them")
    models = [Spec(name) for name in (*BASELINES, *_FAMILIES)]
    small = parse_specs(["copy_memory", "vocab_size=4", "num_items=2", "delay=2"], "task")
    protocol = Protocol(steps=2, batch_size=4, eval_size=8, eval_lengths=["1x", "2x"], parameters=0)
    with tempfile.TemporaryDirectory() as folder:
        run_bench([Spec(name) for name in TASKS], models[:1], [0], protocol, Path(folder, "tasks"))
        run_bench(small, models, [0], protocol, Path(folder, "models"))
        learning = Protocol(steps=200, batch_size=32, eval_size=64, parameters=0)
        cells = run_bench(small, models[:1], [0], learning, Path(folder, "learning"))["cells"]
    accuracy = cells[0]["evaluations"][0]["accuracy"]
    if accuracy < 0.95:
        raise ValueError(f"{models[0]} learned {small[0]} to {accuracy:.2f} in {learning.steps} steps; expected 0.95")
    write(f"{models[0]} learned {small[0]} to {accuracy:.2f}")
    write(f"{len(TASKS)} tasks and {len(models)} models run, {time.perf_counter() - start:.0f} s")
