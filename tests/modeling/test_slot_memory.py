"""The dual-tier memory as a module: read and write one token at a time, surprise, options, statistics."""

import pytest
import torch

from memzoo.modeling.slot_memory import DualTierMemory

D = 12
VARIANTS = {
    "plain": {},
    "heads": {"num_heads": 3, "memory_dim": 6, "decay": 0.9, "top_k": 2, "fast_rate": 0.6},
    "shared": {"query_proj": False, "conv_kernel": None, "confidence": False, "deep_rate": 1.0},
    "sinkhorn": {"assignment": "sinkhorn", "block_size": 2, "decay": 0.9},
}


def build(**options) -> DualTierMemory:
    torch.manual_seed(0)
    memory = DualTierMemory(D, **{"num_slots": 4, "surprise_threshold": 0.45, **options}).double()
    memory.init_weights(0.3)
    return memory


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_read_and_write_are_what_forward_does(options):
    memory, x = build(**options), torch.randn(2, 15, D, dtype=torch.float64)
    whole, final = memory(x, {})
    state = memory.start(2, torch.float64)
    writes = 0
    for t in range(15):
        read = memory.read(x[:, t], state)
        torch.testing.assert_close(read.value, whole[:, t], rtol=1e-11, atol=1e-11)
        state, report = memory.write(x[:, t], x[:, t], state)
        writes += report.deep_write.sum()
        assert ((report.surprise > 0.45) <= report.deep_write).all()
    assert 8 < writes < 30  # the first four of each row at least, and not all
    for name, value in final.items():
        torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_what_was_written_is_found():
    memory = build(query_proj=False, conv_kernel=None, num_slots=8, temperature=0.02)
    keys, values = torch.randn(8, 3, D, dtype=torch.float64), torch.randn(8, 3, D, dtype=torch.float64)
    state = memory.start(3, torch.float64)
    for key, value in zip(keys, values):
        state, _ = memory.write(key, value, state)
    read = memory.read(keys[2], state)
    # the newest is in the last slot, so the third of eight is in the third
    assert (read.fast_weights.argmax(-1) == 2).all() and (read.deep_weights.argmax(-1) == 2).all()
    assert (read.strength > 0.9).all() and (read.entropy < 0.3).all() and (read.confidence < read.strength).all()
    torch.testing.assert_close(read.fast[:, 0], memory.value_proj(values[2]), rtol=0.1, atol=0.1)
    weak, _ = memory.write(keys[2], values[2], memory.start(3, torch.float64), weight=torch.tensor([1.0, 0.5, 0.1]))
    torch.testing.assert_close(weak["fast_strength"][:, -1].exp(), torch.tensor([1.0, 0.5, 0.1]).double())


@torch.no_grad()
def test_context_decides_the_gates_and_the_surprise_and_not_what_is_found():
    memory, x = build(num_heads=3), torch.randn(2, 8, D, dtype=torch.float64)
    _, state = memory(x[:, :6], {})
    before = {name: value.clone() for name, value in state.items()}
    key, context = x[:, 6], x[:, 7]
    alone, beside = memory.read(key, state), memory.read(key, state, context)
    assert torch.equal(alone.fast, beside.fast) and torch.equal(alone.deep_weights, beside.deep_weights)
    assert not torch.allclose(alone.confidence, beside.confidence) and not torch.allclose(alone.value, beside.value)
    (plain, surprised), (other, report) = memory.write(key, key, state), memory.write(key, key, state, context=context)
    assert torch.equal(plain["fast_key"], other["fast_key"]) and not torch.equal(surprised.surprise, report.surprise)
    torch.testing.assert_close(other["surprise_mean"], memory.write(context, key, state)[0]["surprise_mean"])
    torch.testing.assert_close(report.value_norm, memory.value_proj(key).norm(dim=-1))
    assert all(torch.equal(state[name], value) for name, value in before.items()), "a state is a value"


@torch.no_grad()
@pytest.mark.parametrize("assignment", ["ring", "sinkhorn"])
def test_apply_decay_is_the_decay_of_tokens(assignment):
    memory, x = build(decay=0.8, assignment=assignment), torch.randn(1, 6, D, dtype=torch.float64)
    _, state = memory(x, {})
    later = memory.apply_decay(state, 3)
    assert later["fast_strength"].sub(state["fast_strength"]).exp()[0, -1].item() == pytest.approx(0.8**3)
    forgotten, kept = (memory.write(x[:, 0], x[:, 0], s)[0] for s in (later, state))
    old = memory.read(x[:, 4], kept).fast_weights[0, 0, :-1] - memory.read(x[:, 4], forgotten).fast_weights[0, 0, :-1]
    assert (old > 0).all()  # weaker beside what is written afterwards


@torch.no_grad()
def test_surprise_is_measured_against_what_came_before():
    memory = build(surprise_threshold=0.6, surprise_momentum=0.2)
    base = torch.randn(1, 1, D, dtype=torch.float64)
    x = base + 0.3 * torch.randn(1, 60, D, dtype=torch.float64)
    x[:, 45] = -5 * base
    mean, var = torch.zeros(D).double(), torch.ones(D).double()
    surprise = []
    for h in memory.surprise_proj(x)[0]:
        surprise.append(torch.sigmoid(((h - mean).abs() / (var + 1e-6).sqrt()).mean() - 1))
        mean, var = mean + 0.2 * (h - mean), var + 0.2 * ((h - mean) ** 2 - var)
    *_, (_, got, write) = memory._run(
        x, x, memory._heads(memory.value_proj(x), memory._start(x)), memory._start(x), None
    )
    torch.testing.assert_close(got[0], torch.stack(surprise))
    assert write[0, :4].all() and write[0, 45] and got[0].argmax() == 45 and write[0, 10:45].sum() < 4


def test_the_gate_is_hard_and_its_soft_form_has_the_gradient():
    memory, x = build(num_slots=3), torch.randn(2, 20, D, dtype=torch.float64)
    y, _ = memory(x, {})
    y.square().sum().backward()
    assert memory.surprise_proj.weight.grad.abs().max() > 1e-6
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in memory.parameters())
    with torch.no_grad():  # no token of the second row can change the first
        changed = torch.cat([x[:1], x[1:].flip(1)])
        assert torch.equal(memory(changed, {})[0][0], y[0])


@torch.no_grad()
def test_every_option_changes_what_is_read():
    x = torch.randn(1, 30, D, dtype=torch.float64)
    plain = build()(x, {})[0]
    for change in (
        {"temperature": 0.2},
        {"fast_rate": 0.5},
        {"deep_rate": 0.9},
        {"decay": 0.9},
        {"top_k": 2},
        {"surprise_threshold": 0.3},
        {"surprise_momentum": 0.3},
        {"surprise_temperature": 0.5},
    ):
        assert not torch.allclose(build(**change)(x, {})[0], plain), change


@torch.no_grad()
def test_statistics_leave_out_pads():
    memory, x = build(), torch.randn(2, 9, D)
    memory = memory.float()
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    stats = memory.statistics(x, {}, mask)
    rows = [memory.statistics(x[b : b + 1, mask[b]], {}) for b in range(2)]
    for name in ("surprise", "deep_writes", "mix", "confidence", "peak_fast", "entropy_deep", "gain"):
        assert stats[name] == pytest.approx((9 * rows[0][name] + 5 * rows[1][name]) / 14, rel=1e-4), name
    assert stats["surprise_max"] == pytest.approx(max(row["surprise_max"] for row in rows))
    assert stats["filled_fast"] == stats["filled_deep"] == 1.0
    assert memory.statistics(x[:, :2], {})["filled_fast"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "width 12 is not a multiple of num_heads 5"),
        ({"top_k": 9}, "top_k 9 must be between 1 and num_slots 4"),
        ({"assignment": "sinkhorn", "block_size": 5}, "block_size 5 must be between 1 and num_slots 4"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
