"""What the neural memory is for: pairs that lie before the attention window."""

import pytest
import torch
import torch.nn.functional as F
from transformers import set_seed

from memzoo import NeuralMemoryTransformerConfig, NeuralMemoryTransformerForCausalLM
from memzoo.training.tasks.associative_recall import RecallTask
from memzoo.training.tasks.common import IGNORED

TASK = RecallTask(num_pairs=6, num_queries=6, num_keys=16, num_values=8, gap=16)


def accuracy(memory_enabled: bool, steps: int) -> float:
    """On the last sequences of training, none of which was seen before."""
    set_seed(0)
    config = NeuralMemoryTransformerConfig(
        vocab_size=TASK.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        sliding_window=4,
        memory_enabled=memory_enabled,
        pad_token_id=None,
    )
    model = NeuralMemoryTransformerForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, 1.0, 50)
    scores = []
    for step in range(steps):
        ids, labels = TASK.sample(32, seed=step)
        logits, asked = model(ids).logits[:, :-1], labels[:, 1:] != IGNORED
        F.cross_entropy(logits[asked], labels[:, 1:][asked]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        scores.append((logits.argmax(-1) == labels[:, 1:])[asked].float().mean().item())
    return sum(scores[-20:]) / 20


@pytest.mark.slow
def test_the_memory_recalls_what_the_window_does_not_reach():
    on, off = accuracy(True, 600), accuracy(False, 600)
    assert off < 0.2  # chance is 1/8
    assert on > off + 0.25
