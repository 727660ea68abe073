"""Two processes, as torchrun starts them, train as one does, and either resumes what the other began."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from memzoo.training.config import parse_config
from memzoo.training.trainer import train

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "two_processes.py"
STEPS = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "logging_steps": 1, "include_num_input_tokens_seen": "all"}
MODEL = {"memory_num_banks": 4, "memory_balance_rate": 0.5, "memory_top_k": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def one(settings, runs):
    """A run of six steps of four blocks in this process; kept for the other tests."""
    folder = runs / "one"
    if not folder.exists():
        train(parse_config(settings(model=MODEL, training={**STEPS, "output_dir": str(folder)})))
    return folder


@pytest.fixture
def two(settings, one, runs):
    """The same in two processes of two blocks each; and from step 3 of the run in one process."""
    if not (runs / "two").exists():
        shutil.copytree(one / "checkpoint-3", runs / "onward" / "checkpoint-3")
        sections = settings(model=MODEL, training={**STEPS, "per_device_train_batch_size": 2})
        sections["training"].pop("output_dir")
        (runs / "run.yaml").write_text(yaml.safe_dump(sections))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run([*torchrun, WORKER, runs], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return runs / "two"


def weights(folder):
    return load_file(folder / "model.safetensors")


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def test_losses_and_weights_are_those_of_one_process(one, two):
    assert json.loads((two / "world.json").read_text()) == 2
    assert logged(two, "num_input_tokens_seen") == logged(one, "num_input_tokens_seen")  # ragged batches among them
    assert logged(two, "loss") == pytest.approx(logged(one, "loss"), rel=1e-5)
    assert logged(two, "eval_bits_per_byte") == pytest.approx(logged(one, "eval_bits_per_byte"), rel=1e-5)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-5)


def test_the_balance_of_the_banks_counts_the_tokens_of_both_processes(one, two):
    a, b = weights(one), weights(two)
    name = "model.layers.0.cell.router.balance."
    assert a[name + "steps"] == b[name + "steps"] == STEPS["max_steps"] - 1
    assert a[name + "count"] == b[name + "count"] > 64  # more than one process has seen
    assert a[name + "bias"].abs().max() > 0.01
    torch.testing.assert_close(b[name + "bias"], a[name + "bias"], rtol=1e-4, atol=1e-6)


def test_two_processes_go_on_from_a_checkpoint_of_one(one, two, runs):
    torch.testing.assert_close(weights(runs / "onward"), weights(one), rtol=1e-3, atol=1e-5)


def test_one_process_goes_on_from_a_checkpoint_of_two(settings, two, runs):
    shutil.copytree(two / "checkpoint-3", runs / "back" / "checkpoint-3")
    training = {**STEPS, "output_dir": str(runs / "back"), "resume_from_checkpoint": "auto"}
    train(parse_config(settings(model=MODEL, training=training)))
    torch.testing.assert_close(weights(runs / "back"), weights(two), rtol=1e-3, atol=1e-5)


def test_two_processes_cut_off_while_they_write_a_checkpoint_resume_bit_for_bit(two, runs):
    left = sorted(path.name for path in (runs / "cut_off").glob("checkpoint-*"))
    assert left == ["checkpoint-3", "checkpoint-6"]
    a, b = weights(two), weights(runs / "resumed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_fully_sharded_models_have_the_losses_of_whole_ones(two, runs):
    found = json.loads((runs / "sharded.json").read_text())
    assert set(found) == {"maru", "dual_memory", "memory_bank_transformer"}
    for family, result in found.items():
        assert result["sharded"] == pytest.approx(result["whole"], rel=1e-5), family
        assert len(result["whole_balance"]) == (2 if family == "maru" else 0)
        for a, b in zip(result["sharded_balance"], result["whole_balance"], strict=True):
            assert any(b) and a == pytest.approx(b, rel=1e-3, abs=1e-7)
        assert result["local_share"] < 0.6, family  # of the parameters' bytes; uneven and small ones are rounded up
