"""What the memory is for: with it, MARU recalls what the same model without it can't."""

import importlib.util
from pathlib import Path

import pytest

from memzoo.training.tasks.associative_recall import RecallTask

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "associative_recall.py"


@pytest.mark.slow
def test_memory_recalls_what_the_model_without_it_cannot():
    spec = importlib.util.spec_from_file_location("recall_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    task = RecallTask(num_pairs=8, num_queries=8, num_keys=16, num_values=16, gap=0)
    off, on = (benchmark.accuracy(banks, task, seed=0, steps=1000) for banks in (0, 4))
    assert on > off + 0.2, f"memory on {on:.2f}, off {off:.2f}"
