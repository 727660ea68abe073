"""Two processes, as torchrun starts them."""

import sys

SCRIPT = """
import torch
import torch.distributed as dist
from memzoo import MaruConfig, MaruForCausalLM

dist.init_process_group("gloo")
assert dist.get_world_size() == 2
torch.manual_seed(dist.get_rank())
model = MaruForCausalLM(MaruConfig(hidden_size=16, num_hidden_layers=1))
weight = model.get_input_embeddings().weight.detach().clone()
dist.broadcast(weight, 0)
everyone = [None, None]
dist.all_gather_object(everyone, weight.sum().item())
assert everyone[0] == everyone[1]
if dist.get_rank() == 0:
    print("two agree")
dist.destroy_process_group()
"""


def test_two_processes(run, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert run(*torchrun, script, cwd=tmp_path).endswith("two agree")
