"""What is measured was never trained on, and a run that was killed ends with the same numbers."""

import json
import signal
import subprocess
import sys
import time

import pytest

from memzoo.training.bench.cell import Protocol, eval_tasks, task_trainer
from memzoo.training.bench.models import build_config, build_model
from memzoo.training.bench.specs import Spec
from memzoo.training.tasks import build_task


def problems(dataset):
    """The questions of a dataset of sums; 3+4 and 4+3 are one."""
    task = dataset.task
    rows = (task.question(row["input_ids"], row["labels"]) for row in (dataset[i] for i in range(len(dataset))))
    return {tuple(sorted(text.removesuffix("=").split("+"))) for text in rows}


def test_no_sum_that_is_measured_was_trained_on(tmp_path):
    task = build_task("arithmetic", {"digits": 2, "test_fraction": 0.3})
    model = build_model(Spec("llama"), build_config(Spec("llama"), task, 0, 64), seed=0)
    trainer = task_trainer(model, task, 0, tmp_path, 200, max_steps=40, per_device_train_batch_size=32, use_cpu=True)
    trained, measured = problems(trainer.train_dataset), problems(trainer.eval_dataset)
    assert len(trained) > 1000 and len(measured) > 150 and not trained & measured
    variants = eval_tasks(task, Protocol(eval_lengths=["1x", "1.5x"], eval_size=200))
    assert [variant.split for _, variant in variants] == ["test", "test"]
    assert variants[1][1].digits > task.digits


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_numbers_of_one_that_was_not(tmp_path):
    words = "bench --task copy_memory delay=3 --model llama maru --seeds 3 --steps 15 --batch-size 4 --eval-size 8"
    command = [sys.executable, "-P", "-m", "memzoo", *words.split(), "--params", "20000", "--out"]

    def cells(name):
        keys = ("model", "seed", "losses", "evaluations")
        results = json.loads((tmp_path / name / "results.json").read_text())
        return sorted(json.dumps([cell[key] for key in keys]) for cell in results["cells"])

    subprocess.run([*command, tmp_path / "whole"], check=True, capture_output=True)
    killed = subprocess.Popen([*command, tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "results.json").exists():
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 1 <= len(cells("killed")) < 6
    subprocess.run([*command, tmp_path / "killed"], check=True, capture_output=True)
    assert cells("killed") == cells("whole") and len(cells("whole")) == 6
