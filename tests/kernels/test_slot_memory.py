"""The slot memory: the parallel form and the step against the loop, in outputs, state and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.slot_memory import SlotState, empty_slots, slot_memory, slot_weights

B, H, DK, DV = 2, 2, 3, 5
NEW = -1  # no slot of any row is filled


def tokens(T: int) -> list[torch.Tensor]:
    q, k, v = (torch.randn(B, H, T, d, dtype=torch.float64) for d in (DK, DK, DV))
    return [3 * F.normalize(q, dim=-1), k, v, torch.randn(B, T, dtype=torch.float64)]


def filled(M: int, slots: int) -> SlotState:
    """A state with `slots` filled slots in the first row, one more in the second; none with NEW."""
    key, value, strength = empty_slots(B, H, M, DK, DV, torch.float64, "cpu")
    for b in range(B):
        new = slice(M - min(max(slots + b, 0), M), M)
        key[b, :, new] = F.normalize(torch.randn_like(key[b, :, new]), dim=-1)
        value[b, :, new] = torch.randn_like(value[b, :, new])
        strength[b, new] = 0.3 * torch.randn_like(strength[b, new])
    return SlotState(key, value, strength)


def results(leaves, state, rate, **options):
    """Reads, state and gradients of one implementation."""
    read, after = slot_memory(*leaves[:3], state, strength=leaves[3], rate=rate, return_entropy=True, **options)
    outputs = [read.value, read.peak, *(torch.where(x.isinf(), 0.0, x) for x in after)]
    torch.manual_seed(1)
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
    grads = list(torch.autograd.grad(loss, [*leaves, *state], allow_unused=True, materialize_grads=True))
    if rate == 1.0:  # the state's keys have unit length: what remains is tangential
        grads[4] = grads[4] - (grads[4] * state.key).sum(-1, keepdim=True) * state.key
    return [read.entropy, *outputs, *after, *grads]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize(("rate", "decay"), [(1.0, 1.0), (0.4, 0.9)])
@pytest.mark.parametrize(("gated", "masked"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("T", "M", "slots"),
    [(1, 4, 0), (1, 3, 3), (2, 2, 1), (40, 3, 0), (70, 16, 20), (67, 70, 9), (66, 5, NEW), (20, 30, NEW)],
)
def test_agrees_with_the_loop(T, M, slots, gated, masked, rate, decay, top_k):
    leaves, state = tokens(T), filled(M, slots)
    write = torch.rand(B, T) > 0.6 if gated else None
    mask = torch.rand(B, T) > 0.3 if masked else None
    for x in (*leaves, *state):
        x.requires_grad_()
    options = {"rate": rate, "decay": decay, "top_k": top_k, "write": write, "mask": mask}
    expected = results(leaves, state, implementation="reference", **options)
    for got in (results(leaves, state, implementation=name, **options) for name in ("auto", "chunked")):
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    leaves, state = tokens(6), filled(3, 1)
    write = torch.rand(B, 6) > 0.4

    def op(*x):
        read, after = slot_memory(*x[:3], state, write, strength=x[3], rate=0.5, decay=0.9)
        return read.value, read.peak, after.key, after.value

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in leaves], fast_mode=True)


@torch.no_grad()
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_any_split_is_one_function(rate):
    leaves = tokens(90)
    write = torch.rand(B, 90) > 0.5
    options = {"rate": rate, "decay": 0.95, "top_k": 3}
    first = filled(7, 0)
    whole, final = slot_memory(*leaves[:3], first, write, strength=leaves[3], **options)
    for sizes in ([1] * 90, [33, 1, 56], [64, 26], [5, 85]):
        reads, state = [], first
        pieces = [x.split(sizes, 2 if x.ndim == 4 else 1) for x in (*leaves, write)]
        for q, k, v, strength, w in zip(*pieces):
            read, state = slot_memory(q, k, v, state, w, strength=strength, **options)
            reads.append(read.value)
        torch.testing.assert_close(torch.cat(reads, 2), whole.value, rtol=1e-11, atol=1e-11)
        for x, y in zip(state, final):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_causality_is_exact_and_slots_forget_the_oldest():
    (q, k, v, _), state = tokens(80), filled(4, 0)
    whole = slot_memory(q, k, v, state)[0].value
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 50] *= -1
    after = slot_memory(*changed, state)[0].value
    assert torch.equal(after[:, :, :50], whole[:, :, :50])
    assert not torch.equal(after[:, :, 51], whole[:, :, 51]) and not torch.equal(after[:, :, 54], whole[:, :, 54])
    torch.testing.assert_close(after[:, :, 55:], whole[:, :, 55:])  # four tokens later the slot is overwritten


@torch.no_grad()
def test_a_tier_that_is_not_written_is_not_read():
    q, k, v, _ = tokens(20)
    (y, peak, _), state = slot_memory(
        q, k, v, filled(4, 0)._replace(strength=torch.full((B, 4), -math.inf).double()), write=torch.zeros(B, 20)
    )
    assert not y.any() and not peak.any() and state.strength.isneginf().all()


@torch.no_grad()
def test_weights_of_fixed_slots_are_those_of_the_read():
    q, k, v, _ = tokens(1)
    state = filled(5, 3)
    read, _ = slot_memory(q, k, v, state, top_k=2)
    w = slot_weights(q, state.key, state.strength, 2)
    assert ((w > 0).sum(-1) == 2).all()
    torch.testing.assert_close(w @ state.value, read.value)
    torch.testing.assert_close(w.amax(-1), read.peak)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_keeps_a_float32_state(dtype):
    q, k, v, _ = (x.to(dtype) for x in tokens(100))
    state = empty_slots(B, H, 8, DK, DV, dtype, "cpu")
    read, after = slot_memory(q, k, v, state, rate=0.5, decay=0.99)
    exact, _ = slot_memory(
        *(x.double() for x in (q, k, v)), SlotState(*(x.double() for x in state)), rate=0.5, decay=0.99
    )
    assert read.value.dtype == dtype and all(x.dtype == torch.float32 for x in after)
    torch.testing.assert_close(
        read.value.double(), exact.value, rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 3e-3
    )


@torch.no_grad()
def test_strong_decay_stays_exact_over_50_thousand_tokens():
    """The logits of decay are differences of large numbers; in float32 they must not lose the small ones."""
    q, k, v = (torch.randn(1, 1, 50_000, 4) for _ in range(3))
    read, _ = slot_memory(F.normalize(q, dim=-1), k, v, empty_slots(1, 1, 8, 4, 4, torch.float32, "cpu"), decay=0.7)
    last = [x[:, :, -40:].double() for x in (F.normalize(q, dim=-1), k, v)]
    exact, _ = slot_memory(*last, empty_slots(1, 1, 8, 4, 4, torch.float64, "cpu"), decay=0.7)
    torch.testing.assert_close(read.value[:, :, -20:].double(), exact.value[:, :, -20:], rtol=1e-5, atol=1e-5)


def test_compiles_as_one_graph():
    leaves, state, write = tokens(12), filled(3, 1), torch.rand(B, 12) > 0.5

    def op(*x):
        read, after = slot_memory(*x[:3], state, write, strength=x[3], rate=0.5)
        return read.value.sum() + read.peak.sum() + after.value.sum()

    for x in leaves:
        x.requires_grad_()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(*leaves), leaves) for f in (op, compiled)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(B, H, 5, DK)}, r"k is \[2, 2, 5, 3\], expected \[2, 2, 6, 3\]"),
        ({"q": torch.zeros(B, H, 0, DK)}, "T > 0"),
        ({"state": empty_slots(B, H, 4, 2, DV, torch.float64, "cpu")}, "state.key is"),
        ({"mask": torch.ones(B, 5)}, "mask is"),
        ({"top_k": 5}, "top_k=5 must be between 1 and the 4 slots"),
        ({"rate": 0.0}, "rate must be in"),
        ({"decay": 1.1}, "decay must be in"),
    ],
)
def test_bad_input_is_refused(change, message):
    q, k, v, _ = tokens(6)
    arguments = {"q": q, "k": k, "v": v, "state": filled(4, 0)}
    with pytest.raises(ValueError, match=message):
        slot_memory(**{**arguments, **change})
