"""What test_sharding.py runs under torchrun or accelerate launch: sharded_runs.py DIR JOBS.json

A job is a name and overrides of DIR/run.yaml; `die_in` names a method of the trainer whose third call is the first
process's last deed.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from memzoo.training.config import load_config
from memzoo.training.memzoo_trainer import MemzooTrainer
from memzoo.training.trainer import train

torch.set_num_threads(1)


def main(root: Path, jobs: list[dict]) -> None:
    for job in jobs:
        if "die_in" in job:
            kill_first_process(job["die_in"])
        overrides = [f"training.output_dir={root / job['name']}", *job["overrides"]]
        trainer = train(load_config(str(root / "run.yaml"), overrides))
        parameters = list(trainer.model.parameters())
        local = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in parameters)
        found = {
            "world": trainer.args.world_size,
            "kind": trainer.accelerator.distributed_type.value,
            "local_share": local / sum(p.numel() for p in parameters),
            "dtypes": sorted({str(p.dtype) for p in parameters}),
        }
        if trainer.is_world_process_zero():
            (root / job["name"] / "found.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def kill_first_process(method: str) -> None:
    original, calls = getattr(MemzooTrainer, method), []

    def doomed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    setattr(MemzooTrainer, method, doomed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
