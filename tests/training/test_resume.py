"""A run that is killed, at any moment, goes on with --resume and ends with the very weights of one that was not."""

import logging
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from memzoo.training.checkpoints import DamagedCheckpoint
from memzoo.training.config import parse_config
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.trainer import train

STEPS = {"max_steps": 6, "save_steps": 2, "eval_strategy": "no", "logging_steps": 1}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_a_step(self, model, inputs, *args):
    if self.state.global_step == 5:
        die()
    return Trainer.training_step(self, model, inputs, *args)


def while_it_writes_the_model(self, output_dir=None, state_dict=None):
    Trainer._save(self, output_dir, state_dict)
    if output_dir.endswith("checkpoint-4"):
        cut_short(f"{output_dir}/model.safetensors")
        die()


def before_it_writes_the_optimizer(self, output_dir):
    if output_dir.endswith("checkpoint-4"):
        die()
    Trainer._save_optimizer_and_scheduler(self, output_dir)


def while_it_writes_its_first_checkpoint(self, output_dir):
    die()


def while_it_writes_the_finished_model(self, output_dir=None, state_dict=None):
    Trainer._save(self, output_dir, state_dict)
    if "checkpoint" not in output_dir:
        cut_short(f"{output_dir}/model.safetensors")
        die()


def cut_short(file):
    os.truncate(file, os.path.getsize(file) // 2)


KILLS = {
    in_the_middle_of_a_step: ("training_step", [2, 4]),
    while_it_writes_the_model: ("_save", [2, 4]),
    before_it_writes_the_optimizer: ("_save_optimizer_and_scheduler", [2, 4]),
    while_it_writes_its_first_checkpoint: ("_save_optimizer_and_scheduler", [2]),
    while_it_writes_the_finished_model: ("_save", [2, 4, 6]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"

    def get(settings):
        if not folder.exists():
            config = parse_config(settings(training={**STEPS, "output_dir": str(folder)}))
            train(config)
        return folder

    return get


def assert_same_weights(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_a_killed_run_resumes_bit_for_bit(settings, whole, tmp_path, kill):
    method, left = KILLS[kill]
    training = {**STEPS, "output_dir": str(tmp_path / "run")}

    def doomed():
        setattr(MemzooTrainer, method, kill)
        train(parse_config(settings(training=training)))

    child = multiprocessing.get_context("fork").Process(target=doomed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in left]
    train(parse_config(settings(training={**training, "resume_from_checkpoint": "auto"})))
    assert_same_weights(tmp_path / "run", whole(settings))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_checkpoint_cut_short_is_passed_over(settings, whole, tmp_path, caplog, name):
    run = tmp_path / "run"
    for step in (2, 4):
        shutil.copytree(whole(settings) / f"checkpoint-{step}", run / f"checkpoint-{step}")
    cut_short(run / "checkpoint-4" / name)
    with caplog.at_level(logging.WARNING):
        train(parse_config(settings(training={**STEPS, "output_dir": str(run), "resume_from_checkpoint": "auto"})))
    assert f"{name} is cut short or damaged" in caplog.text
    assert f"going on from {run / 'checkpoint-2'}" in caplog.text
    assert_same_weights(run, whole(settings))


def test_a_named_checkpoint_cut_short_is_refused(settings, whole, tmp_path):
    named = tmp_path / "run" / "checkpoint-4"
    shutil.copytree(whole(settings) / "checkpoint-4", named)
    cut_short(named / "optimizer.pt")
    training = {**STEPS, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": str(named)}
    with pytest.raises(DamagedCheckpoint, match=r"optimizer.pt is cut short or damaged .*delete .*checkpoint-4"):
        train(parse_config(settings(training=training)))
