"""What test_distributed.py runs: python -m torch.distributed.run --nproc_per_node 2 two_processes.py DIR"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import memzoo  # noqa: F401 (registers the families)
from memzoo.kernels.selective_scan import fused
from memzoo.training.config import load_config
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.trainer import train

FAMILIES = {
    "maru": {"state_size": 4, "memory_num_banks": 4, "memory_num_slots": 4, "memory_dim": 8},
    "dual_memory": {"layer_types": ["linear_attention", "sliding_attention"], "memory_num_slots": 8},
    "memory_bank_transformer": {"num_attention_heads": 2, "intermediate_size": 32, "memory_num_tokens": 16},
}


class CutOff(Exception):
    pass


def main(root: Path) -> None:
    def run(name, **training):
        overrides = [f"training.{key}={value}" for key, value in {"output_dir": root / name, **training}.items()]
        return train(load_config(str(root / "run.yaml"), overrides))

    trainer = run("two")
    if dist.get_rank() == 0:
        (root / "two" / "world.json").write_text(str(trainer.args.world_size))
    run("onward", resume_from_checkpoint="auto")

    save_state = MemzooTrainer._save_optimizer_and_scheduler

    def cut_off(self, output_dir):
        if output_dir.endswith("checkpoint-6"):
            raise CutOff
        save_state(self, output_dir)

    MemzooTrainer._save_optimizer_and_scheduler = cut_off
    with contextlib.suppress(CutOff):
        run("cut_off")
    MemzooTrainer._save_optimizer_and_scheduler = save_state
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(root / "cut_off", root / "resumed")
    dist.barrier()
    run("resumed", resume_from_checkpoint="auto")

    # numba sees weights as numpy arrays, whose storage torch then never frees, as sharding on the CPU must
    with patch.object(fused, "_numba_imports", return_value=False):
        found = {family: sharded_losses(family, fields) for family, fields in FAMILIES.items()}
    if dist.get_rank() == 0:
        (root / "sharded.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def sharded_losses(family: str, fields: dict) -> dict:
    """Losses of three steps on the same batch, of a whole model and of one under FSDP2, layer by layer."""
    config = AutoConfig.for_model(family, vocab_size=64, hidden_size=16, num_hidden_layers=2, dropout=0.0, **fields)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    result = {}
    for how in ("whole", "sharded"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
        total = sum(p.numel() for p in model.parameters())
        if how == "sharded":
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            result["local_share"] = sum(p.to_local().numel() for p in model.parameters()) / total
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        losses = []
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        result[how] = losses
        result[f"{how}_balance"] = [b.tolist() for name, b in model.named_buffers() if name.endswith("balance.bias")]
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
