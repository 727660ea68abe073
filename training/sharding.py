"""FSDP2 through Trainer: among CPU processes as among GPUs, and with checkpoints that say what they are.

Accelerate shards for GPUs and their like only: AcceleratorState.__init__ (accelerate 1.15, state.py) takes FSDP up
where the kind of devices is in a list that lacks MULTI_CPU, and a CPU run becomes DDP without a word. Nothing else in
it depends on that list, so it is told of GPUs while it looks. A plan for a cluster can then be tried, and is tested,
with a few CPU processes.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerState, TrainingArguments

from memzoo.training.config import ConfigError

BY_ACCELERATE = "ACCELERATE_USE_FSDP"  # set by `accelerate launch --use_fsdp`
WHOLE, SHARDS = "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0"  # Accelerate's names in a checkpoint


def is_asked_for(args: TrainingArguments) -> bool:
    """Whether the settings or the launcher ask for FSDP."""
    return bool(args.fsdp) or os.environ.get(BY_ACCELERATE, "false").lower() == "true"


def check_sharding(args: TrainingArguments) -> None:
    """Raises ConfigError where FSDP cannot be had."""
    if not is_asked_for(args):
        return
    if args.distributed_state.distributed_type == DistributedType.NO:
        raise ConfigError(
            "training.fsdp: needs processes to shard among; start the run with torchrun or accelerate launch"
        )
    if args.use_cpu and torch.accelerator.is_available():
        raise ConfigError(
            "training.use_cpu: FSDP takes the GPUs that it sees; hide them with CUDA_VISIBLE_DEVICES=, or leave it out"
        )


def shard_on_cpus(args: TrainingArguments) -> None:
    """To be called before Accelerate's Accelerator is made; does nothing without FSDP, or where there are GPUs.

    Numba looks into weights as NumPy arrays, and torch never frees a storage that NumPy has seen, as sharding must:
    torch's own operators take over.
    """
    state = PartialState()
    if is_asked_for(args) and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU  # AcceleratorState makes it FSDP; device and backend stand
        os.environ["NUMBA_DISABLE_JIT"] = "1"


def is_sharded(model: Any) -> bool:
    return isinstance(model, FSDPModule)


def takes_part(model: Any, state: TrainerState) -> bool:
    """Whether this process has to run a model that only the first one wants to run: all of them hold its weights."""
    return state.is_world_process_zero or is_sharded(model)


def check_kind(checkpoint: str, trainer: Any) -> None:
    """Raises ConfigError if a checkpoint cannot be resumed because it is sharded in another way than the run."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    now = "none" if plugin is None else plugin.state_dict_type.name
    found = {SHARDS: "SHARDED_STATE_DICT", WHOLE: "FULL_STATE_DICT"}
    then = next((kind for name, kind in found.items() if (Path(checkpoint) / name).exists()), "none")
    if now == then:
        return
    settings = {
        "none": "training.fsdp=null",
        "FULL_STATE_DICT": "training.fsdp=true",
        "SHARDED_STATE_DICT": "training.fsdp=true 'training.fsdp_config={state_dict_type: SHARDED_STATE_DICT}'",
    }
    raise ConfigError(
        f"training.fsdp: {checkpoint} was written with {settings[then]}; go on with that (any number of processes, "
        "one under torchrun among them), or start a new run from its weights with model.pretrained"
    )


def load_weights(checkpoint: str, model: Any) -> None:
    """The weights of a checkpoint of FSDP, in whatever number of parts, into a model or adapter that is whole."""
    folder, is_adapter = Path(checkpoint), isinstance(model, PeftModel)
    if (folder / SHARDS).is_dir():
        import torch.distributed.checkpoint as dcp

        weights = get_peft_model_state_dict(model) if is_adapter else model.state_dict()
        dcp.load({"model": weights}, checkpoint_id=folder / SHARDS)
    else:
        weights = load_file(folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors"))
    if is_adapter:
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights, strict=False)  # tied weights are there once
        model.tie_weights()
