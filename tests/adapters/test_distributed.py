"""Two processes, and TRL: an adapter trains there as it does alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_take_the_step_of_one(kind, tmp_path):
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(SCRIPT), kind, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(tmp_path / "state.pt")

    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import two_processes
    finally:
        sys.path.pop(0)
    model = two_processes.build().train()
    before = {name: x.clone() for name, x in get_peft_model_state_dict(model).items()}
    optimizer = torch.optim.SGD(two_processes.memory_param_groups(model, 1.0, bank=2.0))
    for half in two_processes.ROWS.split(4):  # the routers' losses are of each process's tokens
        (model(input_ids=half, labels=half).loss / 2).backward()
    optimizer.step()
    changed = 0
    for name, expected in get_peft_model_state_dict(model).items():
        # the load balance knows the shares of both processes, so the router's own step differs a little
        tolerance = 1e-2 if ".router." in name else 1e-4
        torch.testing.assert_close(state[name], expected, rtol=tolerance, atol=tolerance)
        changed += not torch.equal(state[name], before[name])
    assert changed > 3


@pytest.mark.slow
def test_trl(tmp_path, make_base, make_adapted):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from memzoo import MemoryConfig

    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefghij"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    data = Dataset.from_dict({"text": [" ".join("abcdefghij"[i:] + "abcdefghij"[:i]) for i in range(8)] * 4})
    config = MemoryConfig(
        num_memory_tokens=8, num_heads=2, num_chapters=4, top_k_chapters=2, task_type="CAUSAL_LM",
        lora_config={"r": 2, "target_modules": ["q_proj"]},
    )  # fmt: skip
    args = trl.SFTConfig(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=3e-2, use_cpu=True, bf16=False,
        report_to=[], logging_steps=1, gradient_checkpointing=True, max_length=16, disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = trl.SFTTrainer(make_base(), args, train_dataset=data, processing_class=tokenizer, peft_config=config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert (tmp_path / "checkpoint-12" / "adapter_model.safetensors").exists()
