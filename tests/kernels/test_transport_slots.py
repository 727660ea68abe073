"""Slots that tokens are transported to: against the loop, and the transport against an exact assignment."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from memzoo.kernels.transport_slots import TransportState, empty_transport, sinkhorn, transport_slots

B, H, DK, DV = 2, 2, 3, 4
OPTIONS = {"epsilon": 0.1, "iterations": 8}


def tokens(T: int, M: int) -> list[torch.Tensor]:
    """q, k, v, prototypes, mass."""
    q, k, v = (torch.randn(B, H, T, d, dtype=torch.float64) for d in (DK, DK, DV))
    mass = torch.rand(B, T, dtype=torch.float64) * (torch.rand(B, T) > 0.4)
    return [3 * F.normalize(q, dim=-1), k, v, torch.randn(H, M, DK, dtype=torch.float64), mass]


def middle(M: int, S: int) -> TransportState:
    """A state with one empty slot and a block that is partly filled."""
    empty = empty_transport(B, H, M, S, DK, DV, torch.float64, torch.device("cpu"))
    position = torch.tensor([min(1, S - 1), S - 1])
    there = (torch.arange(S) < position[:, None]).double()
    strength = torch.rand(B, H, M, dtype=torch.float64)
    strength[:, :, 0] = 0
    some = (strength > 0)[..., None]
    return TransportState(
        torch.randn_like(empty.key) * some,
        torch.randn_like(empty.value) * some,
        strength,
        torch.randn_like(empty.pending_key) * there[:, None, :, None],
        torch.randn_like(empty.pending_value) * there[:, None, :, None],
        torch.rand(B, S, dtype=torch.float64) * there,
        position,
    )


def results(leaves, state, **options):
    q, k, v, prototypes, mass = leaves
    read, after = transport_slots(q, k, v, prototypes, state, mass, return_entropy=True, **OPTIONS, **options)
    torch.manual_seed(1)
    outputs = [read.value, read.peak, *after[:-1]]
    loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
    grads = list(torch.autograd.grad(loss, [*leaves, *state[:-1]], allow_unused=True, materialize_grads=True))
    # the loop leaves out tokens of mass 0 and places that are not filled: no gradient is defined there
    there = torch.arange(state.pending_mass.shape[1]) < state.position[:, None]
    grads[4] = grads[4] * (mass > 0)
    grads[8:10] = [g * there[:, None, :, None] for g in grads[8:10]]
    grads[10] = grads[10] * (state.pending_mass > 0)
    return [read.entropy, *outputs, after.position, *grads]


@pytest.mark.parametrize(("decay", "top_k"), [(1.0, None), (0.9, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("T", "M", "S"), [(1, 4, 2), (5, 5, 5), (33, 8, 4), (3, 2, 1)])
def test_agrees_with_the_loop(T, M, S, masked, decay, top_k):
    leaves, state = tokens(T, M), middle(M, S)
    mask = torch.rand(B, T) > 0.3 if masked else None
    for x in (*leaves, *state[:-1]):
        x.requires_grad_()
    options = {"mask": mask, "decay": decay, "top_k": top_k}
    expected = results(leaves, state, implementation="reference", **options)
    for x, y in zip(results(leaves, state, **options), expected):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 40, [13, 1, 26], [8, 32], [5] * 8])
def test_any_split_is_one_function(sizes):
    (q, k, v, prototypes, mass), first = tokens(40, 8), middle(8, 4)
    whole, final = transport_slots(q, k, v, prototypes, first, mass, decay=0.9, **OPTIONS)
    reads, state = [], first
    for a, b, c, m in zip(*(x.split(sizes, 2) for x in (q, k, v)), mass.split(sizes, 1)):
        read, state = transport_slots(a, b, c, prototypes, state, m, decay=0.9, **OPTIONS)
        reads.append(read.value)
    torch.testing.assert_close(torch.cat(reads, 2), whole.value, rtol=1e-11, atol=1e-11)
    for x, y in zip(state, final):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_writes_are_seen_from_the_next_block_on_and_causality_is_exact():
    (q, k, v, prototypes, mass), state = (
        tokens(24, 6),
        middle(6, 4)._replace(position=torch.zeros(B, dtype=torch.int64)),
    )
    state = TransportState(*state[:3], *(torch.zeros_like(x) for x in state[3:6]), state.position)
    whole = transport_slots(q, k, v, prototypes, state, mass + 0.1, **OPTIONS)[0].value
    changed = v.clone()
    changed[:, :, 9] += 1
    after = transport_slots(q, k, changed, prototypes, state, mass + 0.1, **OPTIONS)[0].value
    assert torch.equal(after[:, :, :12], whole[:, :, :12]) and not torch.equal(after[:, :, 12], whole[:, :, 12])


@pytest.mark.parametrize(("S", "M"), [(3, 3), (4, 6), (1, 5), (6, 6)])
def test_small_epsilon_is_the_exact_assignment(S, M):
    """Against every assignment there is: it costs no more than entropy allows, and its peaks are the best one."""
    for _ in range(6):
        cost = torch.rand(S, M, dtype=torch.float64)
        plan = sinkhorn(cost, torch.ones(S, dtype=torch.float64), epsilon=0.005, iterations=2000)
        choices = list(itertools.permutations(range(M), S))
        costs = cost[torch.arange(S), torch.tensor(choices)].sum(1)
        best = costs.min()
        torch.testing.assert_close(plan.sum(1), torch.ones(S, dtype=torch.float64), rtol=0, atol=1e-3)
        assert (plan.sum(0) <= 1 + 1e-12).all()
        assert best - 1e-3 <= (plan * cost).sum() <= best + 0.005 * S * torch.tensor(float(M)).log() + 1e-3
        second = costs.sort().values[1] if len(choices) > 1 else best + 1
        if second - best > 0.05:
            assert tuple(plan.argmax(1).tolist()) == choices[int(costs.argmin())]


@pytest.mark.parametrize(("S", "M"), [(16, 16), (24, 64), (64, 64)])
def test_larger_plans_cost_no_more_than_an_exact_solver_finds(S, M):
    """The cost of the exact assignment bounds the plan's from below, entropy from above."""
    solver = pytest.importorskip("scipy.optimize")
    keys, prototypes = (F.normalize(torch.randn(n, 16, dtype=torch.float64), dim=-1) for n in (S, M))
    cost = 1 - keys @ prototypes.T
    rows, columns = solver.linear_sum_assignment(cost.numpy())
    best = cost[rows, columns].sum()
    costs = []
    for epsilon in (0.1, 0.03):
        plan = sinkhorn(cost, torch.ones(S, dtype=torch.float64), epsilon, iterations=3000)
        torch.testing.assert_close(plan.sum(1), torch.ones(S, dtype=torch.float64), rtol=0, atol=2e-3)
        assert (plan.sum(0) <= 1 + 1e-12).all()
        costs.append((plan * cost).sum())
        assert best - 5e-3 <= costs[-1] <= best + epsilon * S * torch.tensor(float(M)).log()
    assert costs[1] - best < 0.6 * (costs[0] - best)  # it closes as the entropy's share falls
    plan = sinkhorn(cost, torch.ones(S, dtype=torch.float64), 0.004, iterations=6000)
    assert (plan.argmax(1).numpy() == columns).mean() > 0.9


def test_masses_are_met():
    cost, mass = 2 * torch.rand(5, 4, 9, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    mass[:, 1] = 0
    plan = sinkhorn(cost, mass, epsilon=0.05, iterations=200)
    torch.testing.assert_close(plan.sum(-1), mass, rtol=1e-6, atol=1e-9)
    assert not plan[:, 1].any() and (plan.sum(-2) <= 1 + 1e-12).all()


@torch.no_grad()
def test_tokens_alike_share_a_slot_over_blocks_and_not_within_one():
    prototypes = torch.eye(6, dtype=torch.float64)[None]  # [1, 6, 6]
    k = prototypes[:, [0, 1, 0, 2]].repeat(1, 3, 1)[None]  # slot 0 is asked for twice in every block of 4
    v = torch.randn(1, 1, 12, 2, dtype=torch.float64)
    state = empty_transport(1, 1, 6, 4, 6, 2, torch.float64, torch.device("cpu"))
    _, after = transport_slots(k, k, v, prototypes, state, torch.ones(1, 12), rate=1.0, iterations=100)
    used = after.strength[0, 0]
    assert (used[:3] > 0.9).all()
    # the second spreads over the three that nobody asked for, a third of it in every block
    torch.testing.assert_close(used[3:], torch.full((3,), 1 - (2 / 3) ** 3, dtype=torch.float64), rtol=0.05, atol=0)
    torch.testing.assert_close(after.value[0, 0, 1], v[0, 0, 9], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prototypes": torch.zeros(H, 5, DK)}, r"prototypes is \[2, 5, 3\], expected \[2, 6, 3\]"),
        ({"mass": torch.zeros(B, 3)}, "mass is"),
        ({"top_k": 7}, "top_k=7 must be between 1 and the 6 slots"),
        ({"epsilon": 0.001}, "epsilon >= 0.03"),
        ({"state": middle(6, 7)}, "a block of 7 tokens does not fit into 6 slots"),
    ],
)
def test_bad_input_is_refused(change, message):
    q, k, v, prototypes, mass = tokens(4, 6)
    arguments = {"q": q, "k": k, "v": v, "prototypes": prototypes, "mass": mass, "state": middle(6, 3)}
    with pytest.raises(ValueError, match=message):
        transport_slots(**{**arguments, **change})
