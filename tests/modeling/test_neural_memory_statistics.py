"""What is said about a neural memory's learning, against gradients from autograd."""

import pytest
import torch

from memzoo import NeuralMemoryTransformerConfig, NeuralMemoryTransformerForCausalLM
from memzoo.kernels.neural_memory.reference import network
from memzoo.modeling.neural_memory import NeuralMemory
from memzoo.modeling.statistics import neural_memory_statistics

D, T = 12, 11


def build(**options) -> NeuralMemory:
    torch.manual_seed(0)
    module = NeuralMemory(D, 3, **{"chunk_size": 4, "theta": 0.1, **options})
    module.init_weights(0.3)
    return module.double().eval()


@pytest.mark.parametrize("options", [{}, {"depth": 1, "residual": True}, {"depth": 3, "chunk_size": 1}])
def test_surprise_and_gradients_are_those_of_the_inner_loss(options):
    module, x = build(**options), torch.randn(1, T, D, dtype=torch.float64)

    def loss(weights, k, v):
        return 0.5 * (network(weights, k, **module.network) - v).square().sum()

    with torch.no_grad():
        _, k, v, _ = module.project(x, {})
        surprise, norms, state = [], [], {}
        for t in range(T):  # the step's own record of where gradients are taken is the definition's
            memory = module.memory(state, k)
            start = memory.weights if memory.start is None else memory.start
            for h in range(3):
                matrices, key, value = [w[0, h] for w in start], k[0, h, t], v[0, h, t]
                gradients = torch.func.grad(loss)(matrices, key, value)
                norms.append(sum(g.square().sum() for g in gradients).sqrt())
                surprise.append(2 * loss(matrices, key, value))
            state = module(x[:, t : t + 1], state)[1]
        stats = neural_memory_statistics(module, x, {})
    surprise, norms = torch.stack(surprise), torch.stack(norms)
    assert stats["surprise"] == pytest.approx(surprise.mean().item())
    assert stats["surprise_max"] == pytest.approx(surprise.max().item())
    assert stats["gradient_norm"] == pytest.approx(norms.mean().item())
    module.rule.update(clip=norms.median().item() * 1.001, threshold=surprise.median().item() * 1.001)
    # with other rules the states differ; of the first chunk they do not
    first = 3 * module.chunk_size
    limited = neural_memory_statistics(module, x[:, : module.chunk_size], {})
    assert limited["clipped"] == pytest.approx((norms[:first] > module.rule["clip"]).double().mean().item())
    assert limited["update_rate"] == pytest.approx(
        (surprise[:first] >= module.rule["threshold"]).double().mean().item()
    )


@torch.no_grad()
def test_pads_do_not_count_and_a_memory_can_be_under_way():
    module, x = build(), torch.randn(2, T, D, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([[T], [6]])
    both = neural_memory_statistics(module, torch.where(mask[..., None], x, 9.0), {}, mask)
    alone = [neural_memory_statistics(module, x[b : b + 1, :n], {}) for b, n in enumerate((T, 6))]
    weighted = (alone[0]["surprise"] * T + alone[1]["surprise"] * 6) / (T + 6)
    assert both["surprise"] == pytest.approx(weighted)
    assert both["surprise_max"] == pytest.approx(max(a["surprise_max"] for a in alone))
    assert both["weight_change"] == pytest.approx(sum(a["weight_change"] for a in alone) / 2)
    _, state = module(x[:, :5], {})
    parts = [neural_memory_statistics(module, x[:, :5], {}), neural_memory_statistics(module, x[:, 5:], state)]
    whole = neural_memory_statistics(module, x, {})
    assert whole["surprise"] == pytest.approx((5 * parts[0]["surprise"] + 6 * parts[1]["surprise"]) / T)
    for name in ("weight_change", "effective_rank", "capacity"):
        assert parts[1][name] == pytest.approx(whole[name])


@torch.no_grad()
def test_a_fixed_memory_changes_nothing():
    stats = neural_memory_statistics(build(update="never"), torch.randn(1, T, D, dtype=torch.float64), {})
    assert stats["update_rate"] == stats["weight_change"] == stats["effective_rank"] == stats["capacity"] == 0
    assert stats["surprise"] > 0
    one = neural_memory_statistics(build(depth=1, alpha=(1e-9, 1e-9)), torch.randn(1, 1, D, dtype=torch.float64), {})
    assert one["effective_rank"] == pytest.approx(1) and one["capacity"] == pytest.approx(1 / 4)


@torch.no_grad()
def test_rows_of_pads_alone_do_not_count():
    memory, x = build(), torch.randn(2, T, D, dtype=torch.float64)
    mask = torch.tensor([[True], [False]]).expand(2, T)
    assert neural_memory_statistics(memory, x, {}, mask) == neural_memory_statistics(memory, x[:1], {})
    with pytest.raises(ValueError, match="every token is a pad"):
        neural_memory_statistics(memory, x, {}, mask & False)


@torch.no_grad()
def test_statistics_of_a_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NeuralMemoryTransformerConfig(**sizes, intermediate_size=24, sliding_window=6, initializer_range=0.2)
    model = NeuralMemoryTransformerForCausalLM(config).train()
    ids, mask = torch.randint(3, 61, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    ids[0, :7], mask[0, :7] = 0, 0
    stats = model.get_memory_stats(ids, mask)
    assert model.training and len(stats) == 2
    for layer in stats:
        assert 0 < layer["gate"] < 1 and layer["activation"] > 0 and 0 < layer["theta"] < 1
        assert layer["update_rate"] == 1 and 0 < layer["capacity"] <= 1 and layer["weight_change"] > 0
    other = ids.clone()
    other[0, :7] = 9
    assert model.get_memory_stats(other, mask) == stats
    assert (
        NeuralMemoryTransformerForCausalLM(
            NeuralMemoryTransformerConfig(**sizes, intermediate_size=24, memory_enabled=False)
        ).get_memory_stats(ids)
        == []
    )
