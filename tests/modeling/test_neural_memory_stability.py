"""A deep memory in bfloat16: long texts and the first steps of training stay finite."""

import pytest
import torch

from memzoo import TitanMacConfig, TitanMacForCausalLM
from memzoo.modeling.neural_memory import NeuralMemory


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("theta_max", [1.0, 0.1])
def test_100_thousand_bfloat16_tokens_at_depth_4(theta_max):
    """Few distinct tokens and gates that write with almost all they have: the memory is never left alone."""
    torch.manual_seed(0)
    layer = NeuralMemory(32, 2, depth=4, chunk_size=64, theta=0.4 * theta_max, theta_max=theta_max)
    layer.init_weights(0.2)
    layer.bfloat16()
    words, state, norms = torch.randn(50, 32).bfloat16(), {}, []
    for _ in range(10):
        y, state = layer(words[torch.randint(50, (1, 10_000))], state)
        norms.append(y.float().norm(dim=-1).mean().item())
        assert y.dtype == torch.bfloat16 and y.isfinite().all()
    memory = {name: x for name, x in state.items() if name != "conv" and x.is_floating_point()}
    assert len(memory) == 12 and all(x.dtype == torch.float32 and x.isfinite().all() for x in memory.values())
    assert 0.1 < norms[-1] / norms[0] < 10  # neither forgotten to zero nor running away
    _, later = layer(words[None], state)
    assert not torch.equal(later["weights_0"], state["weights_0"])


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_the_first_steps_of_training_at_depth_4(variant):
    torch.manual_seed(0)
    config = TitanMacConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        titans_variant=variant,
        sliding_window=16,
        memory_depth=4,
        memory_chunk_size=16,
        num_persistent_tokens=2,
    )
    model = TitanMacForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 20, (2, 12)).repeat(1, 4)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
