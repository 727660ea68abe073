"""Run by test_distributed.py under torchrun: `ddp` through Trainer, `fsdp` with fully_shard, on two CPU processes."""

import sys

import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from memzoo import MemoryConfig
from memzoo.adapters.optim import MemoryTrainerMixin, memory_param_groups

ROWS = torch.randint(3, 61, (8, 12), generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=61, pad_token_id=0
    )
    options = {"num_memory_tokens": 8, "num_heads": 2, "num_chapters": 4, "top_k_chapters": 2, "sharing": "shared"}
    return get_peft_model(LlamaForCausalLM(llama), MemoryConfig(**options, task_type="CAUSAL_LM"))


class MemoryTrainer(MemoryTrainerMixin, Trainer):
    pass


def ddp(folder):
    """Each process has half of the batch: together one step on the whole of it."""
    data = [{"input_ids": row, "labels": row} for row in ROWS]
    args = TrainingArguments(
        folder, per_device_train_batch_size=4, max_steps=1, learning_rate=1.0, use_cpu=True, report_to=[],
        optim="sgd", max_grad_norm=0.0, save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = MemoryTrainer(build(), args, train_dataset=data, memory_lrs={"bank": 2.0})
    trainer.train()
    assert dist.get_world_size() == 2
    return get_peft_model_state_dict(trainer.model)


def fsdp(folder):
    """Sharded layers and a root that holds the shared bank; each process has half of the batch."""
    dist.init_process_group("gloo")
    mesh, model = init_device_mesh("cpu", (2,)), build()
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(memory_param_groups(model, 1.0, bank=2.0))
    own = ROWS[4 * dist.get_rank() : 4 * dist.get_rank() + 4]
    model.train()(input_ids=own, labels=own).loss.backward()
    optimizer.step()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return get_peft_model_state_dict(model, state_dict=full) if dist.get_rank() == 0 else {}


if __name__ == "__main__":
    state = {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](sys.argv[2])
    if dist.get_rank() == 0:
        torch.save(state, f"{sys.argv[2]}/state.pt")
    dist.destroy_process_group()
