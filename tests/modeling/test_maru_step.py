"""The compiled step of a MARU block against its modules, and when it must not stand in for them."""

import copy

import pytest
import torch
from torch import nn

from memzoo import MaruConfig, MaruForCausalLM, MemoryCache
from memzoo.modeling.maru import modeling_maru

pytest.importorskip("numba")
SIZES = {"vocab_size": 40, "hidden_size": 24, "cell_size": 20, "num_hidden_layers": 2, "state_size": 5}
MEMORY = {"memory_num_banks": 3, "memory_num_slots": 7, "memory_dim": 6, "memory_router_hidden_size": 5}
OPTIONS = [
    {},
    {"use_bias": True, "conv_kernel": 2},
    {"memory_top_k": 1, "memory_shared_bank": True},
    {"memory_slot_norm_cap": 0.3, "memory_decay": 0.9},
]


def build(dtype: torch.dtype = torch.float64, batch: int = 2, **options) -> tuple[MaruForCausalLM, MemoryCache]:
    model = MaruForCausalLM(MaruConfig(**SIZES, **MEMORY, **options)).to(dtype).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    cache = MemoryCache(model.config)
    with torch.no_grad():
        model(torch.randint(3, 40, (batch, 11)), past_key_values=cache)
    return model, cache


@pytest.fixture
def steps(monkeypatch):
    """What each call of the compiled step returned."""
    returned = []

    def record(*args, **kwargs):
        returned.append(step(*args, **kwargs))
        return returned[-1]

    step = modeling_maru.maru_step
    monkeypatch.setattr(modeling_maru, "maru_step", record)
    return returned


@torch.no_grad()
def run(model: MaruForCausalLM, cache: MemoryCache) -> tuple:
    tokens = torch.full((cache.batch_size, 1), 7)
    cache = cache.clone()
    out = model(tokens, past_key_values=cache)
    return out.logits, cache.states


def composed(model: MaruForCausalLM, cache: MemoryCache) -> tuple:
    """The same through the modules: gradients turn every compiled step off."""
    tokens, cache = torch.full((cache.batch_size, 1), 7), cache.clone()
    return model(tokens, past_key_values=cache).logits, cache.states


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_equals_the_modules(options, dtype, tolerance, steps):
    model, cache = build(dtype, **options)
    before = {name: state.clone() for name, state in cache.states.items()}
    logits, states = run(model, cache)
    assert len(steps) == 2 and None not in steps
    expected, expected_states = composed(model, cache)
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    assert list(states) == list(expected_states)
    for name, state in states.items():
        torch.testing.assert_close(state, expected_states[name], rtol=tolerance, atol=tolerance)
        assert torch.equal(cache.states[name], before[name])  # functional


def test_sees_weights_that_changed_or_moved(steps):
    model, cache = build()
    first = run(model, cache)[0]
    with torch.no_grad():
        model.model.layers[0].mixer.in_proj.weight.mul_(1.5)
    changed = run(model, cache)[0]
    model.model.layers[0].out_proj.weight = nn.Parameter(model.model.layers[0].out_proj.weight.detach() * 2)
    moved = run(model, cache)[0]
    assert None not in steps and not torch.equal(first, changed) and not torch.equal(changed, moved)
    torch.testing.assert_close(moved, composed(model, cache)[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(run(copy.deepcopy(model), cache)[0], moved, rtol=0, atol=0)


class Doubled(nn.Module):
    """As an adapter: a layer in the place of a linear one."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight = inner, inner.weight

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("name", ["mixer.in_proj", "mixer.out_proj", "cell.x_proj", "out_proj"])
def test_an_adapter_is_heard(name, steps):
    model, cache = build()
    plain = run(model, cache)[0]
    layer = model.model.layers[1]
    parent = layer.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], Doubled(layer.get_submodule(name)))
    logits = run(model, cache)[0]
    assert not torch.allclose(logits, plain)
    torch.testing.assert_close(logits, composed(model, cache)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["mixer", "mixer.x_proj", "cell", "cell_norm", "out_proj"])
def test_a_hook_is_heard(name):
    model, cache = build()
    calls = []
    hook = model.model.layers[0].get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    run(model, cache)
    assert calls
    hook.remove()


def test_router_logits_are_recorded_while_decoding():
    model, cache = build()
    with torch.no_grad():
        out = model(torch.full((2, 1), 7), past_key_values=cache.clone(), output_router_logits=True)
    assert len(out.router_logits) == 2 and out.router_logits[0].shape == (2, 1, 3)


def test_a_large_batch_and_half_precision_take_the_modules(steps):
    model, cache = build(batch=3)
    torch.testing.assert_close(run(model, cache)[0], composed(model, cache)[0], rtol=1e-11, atol=1e-11)
    run(*build(torch.bfloat16))
    assert steps and all(step is None for step in steps)
