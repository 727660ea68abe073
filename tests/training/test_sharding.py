"""FSDP2 through Trainer in CPU processes trains as one process does; its checkpoints go on in any number of them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memzoo.training.checkpoints import DamagedCheckpoint, check_files
from memzoo.training.config import ConfigError, parse_config
from memzoo.training.trainer import train

WORKER = Path(__file__).parent / "sharded_runs.py"
STEPS = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "logging_steps": 1}
MODEL = {"num_hidden_layers": 2, "memory_num_banks": 4, "memory_balance_rate": 0.5, "memory_top_k": 2}
FSDP = "training.fsdp=true"
SHARDED = "training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}"
CHECKPOINTING = "training.fsdp_config={activation_checkpointing: true}"
KINDS = {"full": [FSDP], "sharded": [FSDP, SHARDED]}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def job(name, *overrides, **more):
    return {"name": name, "overrides": overrides, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def one(settings, runs):
    """Six steps of four blocks in this process; kept for the other tests."""
    folder = runs / "one"
    if not folder.exists():
        train(parse_config(settings(model=MODEL, training={**STEPS, "output_dir": str(folder)})))
    return folder


@pytest.fixture
def launch(settings, runs):
    """Runs jobs of run.yaml (two blocks a process and step) and returns the exit code and what was said."""

    def run(launcher, *jobs, sections=None):
        sections = sections or settings(model=MODEL, training=STEPS)
        sections["training"] |= {"output_dir": None, "per_device_train_batch_size": 2}
        (runs / "run.yaml").write_text(yaml.safe_dump(sections))
        (runs / "jobs.json").write_text(json.dumps(jobs))
        done = subprocess.run(
            [*launcher, str(WORKER), str(runs), str(runs / "jobs.json")], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def two(launch, one, runs):
    """The same run in two processes that share the weights, with either kind of checkpoint."""
    if not (runs / "full").exists():
        code, said = launch([*TORCHRUN, "2"], *(job(kind, *overrides) for kind, overrides in KINDS.items()))
        assert code == 0, said[-4000:]
    return runs


def weights(folder):
    return load_file(folder / "model.safetensors")


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_and_weights_are_those_of_one_process(two, one, kind):
    found = json.loads((two / kind / "found.json").read_text())
    assert (found["world"], found["kind"]) == (2, "FSDP")
    assert found["local_share"] == pytest.approx(0.5, abs=0.05)
    for name in ("loss", "eval_bits_per_byte", "grad_norm"):
        assert logged(two / kind, name) == pytest.approx(logged(one, name), rel=1e-4)
    torch.testing.assert_close(weights(two / kind), weights(one), rtol=1e-3, atol=1e-5)


def test_a_checkpoint_is_whole_or_in_as_many_parts_as_processes(two):
    full, parts = two / "full" / "checkpoint-2", two / "sharded" / "checkpoint-2"
    assert (full / "model.safetensors").exists() and (full / "pytorch_model_fsdp.bin").exists()
    assert not (parts / "model.safetensors").exists()
    for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
        assert sorted(file.name for file in (parts / folder).glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
    assert AutoTokenizer.from_pretrained(parts).eos_token_id is not None
    assert json.loads((parts / "config.json").read_text())["use_cache"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_the_finished_model_loads_in_one_line(two, one, kind):
    ids = torch.tensor([[65, 66, 67]])
    whole, gathered = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (one, two / kind))
    torch.testing.assert_close(gathered(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-4)
    assert gathered.config.use_cache is True


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_either_kind_goes_on_in_any_number_of_processes(two, launch, processes):
    size = f"training.per_device_train_batch_size={4 // processes}"
    jobs = []
    for kind, overrides in KINDS.items():
        name = f"{kind}_on_{processes}"
        shutil.copytree(two / kind / "checkpoint-2", two / name / "checkpoint-2")
        jobs.append(job(name, *overrides, size, "training.resume_from_checkpoint=auto"))
        jobs.append(job(kind, *overrides, size, "training.resume_from_checkpoint=auto"))  # which is at its end
    before = {kind: weights(two / kind) for kind in KINDS}
    code, said = launch([*TORCHRUN, str(processes)], *jobs)
    assert code == 0, said[-4000:]
    for kind in KINDS:
        assert_equal(weights(two / kind), before[kind])
        resumed = weights(two / f"{kind}_on_{processes}")
        assert len(logged(two / f"{kind}_on_{processes}", "loss")) == len(logged(two / kind, "loss")) == 6
        if processes == 2:
            assert_equal(resumed, before[kind])
        torch.testing.assert_close(resumed, before[kind], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint_of_one(two, launch):
    jobs = [job(f"{kind}_alone", *overrides, "training.per_device_train_batch_size=4", "training.max_steps=2",
                "training.lr_scheduler_type=constant") for kind, overrides in KINDS.items()]  # fmt: skip
    assert launch([*TORCHRUN, "1"], *jobs)[0] == 0
    more = ["training.lr_scheduler_type=constant", "training.resume_from_checkpoint=auto"]
    jobs = [job(f"{kind}_alone", *overrides, *more) for kind, overrides in KINDS.items()]
    jobs.append(job("never_stopped", FSDP, "training.lr_scheduler_type=constant"))
    code, said = launch([*TORCHRUN, "2"], *jobs)
    assert code == 0, said[-4000:]
    for kind in KINDS:
        torch.testing.assert_close(
            weights(two / f"{kind}_alone"), weights(two / "never_stopped"), rtol=1e-3, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "ddp"])
@pytest.mark.parametrize("method", ["training_step", "_save_optimizer_and_scheduler"])
def test_killed_processes_go_on_bit_for_bit(two, launch, kind, method):
    """kill -9 in the third step, and while the third checkpoint is written (the other process goes down with it)."""
    name, overrides = f"{kind}_{method}", KINDS.get(kind, [])
    code, _ = launch([*TORCHRUN, "2"], job(name, *overrides, "training.save_steps=1", die_in=method))
    assert code != 0
    left = {path.name: (path / "trainer_state.json").exists() for path in (two / name).glob("checkpoint-*")}
    cut_off = {} if method == "training_step" else {"checkpoint-3": False}
    assert left == {"checkpoint-1": True, "checkpoint-2": True} | cut_off
    jobs = [job(name, *overrides, "training.save_steps=1", "training.resume_from_checkpoint=auto")]
    if kind == "ddp" and not (two / "ddp").exists():
        jobs.append(job("ddp"))
    code, said = launch([*TORCHRUN, "2"], *jobs)
    assert code == 0, said[-4000:]
    assert_equal(weights(two / name), weights(two / kind))


@pytest.mark.slow
def test_accelerate_launch_starts_both_kinds_of_run(two, launch):
    """By the settings or by the launcher's own words; without FSDP it is DDP."""
    words = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    words += ["--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "false"]
    for launcher, jobs in (
        (["--multi_gpu"], [job("launched_ddp"), job("launched_fsdp", FSDP), job("again", FSDP, CHECKPOINTING)]),
        (words, [job("launched_by_words")]),
    ):
        code, said = launch([*ACCELERATE, *launcher], *jobs)
        assert code == 0, said[-4000:]
    for name, kind in (("ddp", "MULTI_CPU"), ("fsdp", "FSDP"), ("by_words", "FSDP")):
        folder = two / f"launched_{name}"
        found = json.loads((folder / "found.json").read_text())
        assert (found["world"], found["kind"]) == (2, kind)
        torch.testing.assert_close(weights(folder), weights(two / "full"), rtol=1e-3, atol=1e-5)
    again, once = weights(two / "again"), weights(two / "full")
    for name in [name for name in once if name.endswith(("balance.total", "balance.count"))]:
        assert torch.equal(
            again.pop(name), 2 * once.pop(name)
        )  # counted again with each layer; only their ratio is used
    torch.testing.assert_close(again, once, rtol=1e-3, atol=1e-5)
    assert (two / "launched_by_words" / "checkpoint-2" / "optimizer_0" / "__1_0.distcp").exists()


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "num_attention_heads": 2}
FAMILIES = {
    "dual_memory": {"layer_types": ["linear_attention", "sliding_attention"], "memory_num_slots": 8, "dropout": 0.0},
    "memory_bank_transformer": {"memory_num_tokens": 16},
    "titan_mac": {"sliding_window": 8},
    "neural_memory_transformer": {"sliding_window": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_sharded(settings, launch, runs, family):
    """Tied and untied heads, banks shared by layers; with the best model loaded at the end, in bf16 too."""
    model = SMALL | FAMILIES[family] | {"model_type": family}
    if family == "dual_memory":
        del model["intermediate_size"]
    training = {**STEPS, "load_best_model_at_end": True, "save_steps": 3, "output_dir": str(runs / f"{family}_one")}
    sections = settings("llama", training=training) | {"model": model}
    train(parse_config(sections))
    best = ["training.load_best_model_at_end=true", "training.save_steps=3"]
    jobs = [job(f"{family}_two", FSDP, SHARDED, *best), job(f"{family}_bf16", FSDP, "training.bf16=true")]
    code, said = launch([*TORCHRUN, "2"], *jobs, sections=sections)
    assert code == 0, said[-4000:]
    one = weights(runs / f"{family}_one")
    torch.testing.assert_close(weights(runs / f"{family}_two"), one, rtol=1e-3, atol=1e-5)
    bf16 = weights(runs / f"{family}_bf16")
    assert {w.dtype for w in bf16.values()} == {torch.float32} and any(not torch.equal(bf16[k], one[k]) for k in one)
    losses = [logged(runs / f"{family}_{which}", "loss") for which in ("bf16", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_the_other_kind_is_refused(settings, two, tmp_path, kind):
    shutil.copytree(two / kind / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    training = {**STEPS, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"}
    with pytest.raises(ConfigError, match=r"training\.fsdp: .*checkpoint-2 was written with training\.fsdp=true"):
        train(parse_config(settings(model=MODEL, training=training)))


def test_fsdp_in_one_lonely_process_is_refused(settings):
    with pytest.raises(ConfigError, match=r"training\.fsdp: needs processes .* with torchrun or accelerate launch"):
        train(parse_config(settings(model=MODEL, training={**STEPS, "fsdp": True})))


@pytest.mark.parametrize("file", [".metadata", "__1_0.distcp"])
def test_a_sharded_checkpoint_cut_short_is_found(two, tmp_path, file):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(two / "sharded" / "checkpoint-2", folder)
    check_files(folder, "delete it")
    part = folder / "optimizer_0" / file
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(DamagedCheckpoint, match=rf"{file} .*delete it"):
        check_files(folder, "delete it")
    part.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"delete it"):
        check_files(folder, "delete it")


@pytest.mark.slow
def test_an_adapter_is_trained_on_a_sharded_base(make_base, corpus, tmp_path):
    """In one process, in two, and in one from the shards of two; a finished run is taken as it is."""
    settings = {
        "base": {"name": make_base(tmp_path / "base"), "dtype": "float32"},
        "memory": {"num_memory_tokens": 16, "num_heads": 2, "sharing": "shared"},
        "data": {"path": str(corpus), "max_length": 32},
        "learning_rates": {"bank": 1e-2},
        "training": {"use_cpu": True, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2},
    }
    settings["training"] |= {"output_dir": "given", "learning_rate": 1e-2, "disable_tqdm": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))

    def adapt(name, processes, *words):
        launcher = [*TORCHRUN, str(processes)] if FSDP in words else [sys.executable]
        size = f"training.per_device_train_batch_size={4 // processes}"
        command = [*launcher, "-m", "memzoo", "adapt", str(tmp_path / "run.yaml"), size, *words]
        command.append(f"training.output_dir={tmp_path / name}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return load_file(tmp_path / name / "adapter_model.safetensors")

    one = adapt("one", 1)
    two = adapt("two", 2, FSDP, SHARDED)
    shutil.copytree(tmp_path / "two" / "checkpoint-2", tmp_path / "on" / "checkpoint-2")
    for found in (two, adapt("two", 2, FSDP, SHARDED, "--resume"), adapt("on", 1, FSDP, SHARDED, "--resume")):
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-5)
