"""Routers: what each may see, splits and pads, product keys, losses."""

import math
import subprocess
import sys

import pytest
import torch

from memzoo.modeling.chapter_router import ChapterRouter, choose, router_losses


def build(routing="token", chapters=6, top_k=2, product_keys=False, normalize=True):
    torch.manual_seed(0)
    router = ChapterRouter(8, chapters, top_k, routing, 4, normalize, product_keys).double()
    router.init_weights(0.7)
    return router


def pooled(routing, x, t):
    """What the router sees at token t of a row [T, D], None when it routes nothing there."""
    if routing == "token":
        return x[t]
    if routing == "prefix":
        return x[: t + 1].mean(0)
    block = t // 4
    if block == 0:
        return None
    return x[:4].mean(0) if routing == "prompt" else x[4 * (block - 1) : 4 * block].mean(0)


@pytest.mark.parametrize("product_keys", [False, True])
@pytest.mark.parametrize("routing", ["token", "prefix", "block", "prompt"])
def test_against_a_loop_in_one_call_and_in_pieces(routing, product_keys):
    router = build(routing, product_keys=product_keys)
    x = torch.randn(3, 15, 8, dtype=torch.float64)
    for pieces in ([15], [1] * 15, [3, 1, 7, 4], [4, 4, 7]):
        state, choices = {}, []
        for piece in x.split(pieces, 1):
            choice, state = router(piece, state)
            choices.append(choice)
        chapters, log_weights, logits = (torch.cat(parts, 1) for parts in zip(*choices))
        for b in range(3):
            for t in range(15):
                r = pooled(routing, x[b], t)
                if r is None:
                    assert (chapters[b, t] == -1).all() and (logits[b, t] == -torch.inf).all()
                    continue
                scores = router.gate(r)
                torch.testing.assert_close(logits[b, t], scores, rtol=1e-12, atol=1e-12)
                if product_keys:
                    scores = (scores[:2, None] + scores[None, 2:]).flatten()
                best = scores.topk(2)
                assert torch.equal(chapters[b, t], best.indices)
                torch.testing.assert_close(log_weights[b, t], best.values.log_softmax(0), rtol=1e-12, atol=1e-12)
        for name, value in state.items():
            assert value.shape[0] == 3, name


@pytest.mark.parametrize("routing", ["token", "prefix", "block", "prompt"])
def test_pads_choose_nothing_and_change_nothing(routing):
    router = build(routing)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    plain, state = router(x[:1, :7], {})
    mask = torch.arange(11) < torch.tensor([[7], [11]])
    padded, padded_state = router(x, {}, mask)
    assert (padded.chapters[0, 7:] == -1).all() and (padded.logits[0, 7:] == -torch.inf).all()
    for a, b in zip(plain, padded):
        torch.testing.assert_close(a[0], b[0, :7], rtol=1e-12, atol=1e-12)
    for name in state:
        torch.testing.assert_close(state[name][0], padded_state[name][0], rtol=1e-12, atol=1e-12)


def test_prompts_of_different_lengths():
    router = build("prompt")
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    choice, state = router(x, {}, None, torch.tensor([2, 6]))
    for b, length in enumerate((2, 6)):
        assert (choice.chapters[b, :length] == -1).all() and (choice.chapters[b, length:] >= 0).all()
        torch.testing.assert_close(choice.logits[b, length], router.gate(x[b, :length].mean(0)))
    later, _ = router(x[:, :1], state)  # the lengths are remembered
    assert torch.equal(later.chapters[:, 0], choice.chapters[:, -1])


def test_weights_without_normalization_are_probabilities():
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    choice, _ = build(normalize=False)(x, {})
    p = choice.logits.softmax(-1).gather(-1, choice.chapters)
    torch.testing.assert_close(choice.log_weights.exp(), p)
    assert (p.sum(-1) < 1).all()


def test_product_keys_find_the_best_of_all():
    logits = torch.randn(50, 5 + 7, dtype=torch.float64)
    chapters, log_p = choose(logits, (5, 7), 6)
    scores = (logits[:, :5, None] + logits[:, None, 5:]).flatten(1).log_softmax(-1)
    expected = scores.topk(6, -1)
    assert torch.equal(chapters, expected.indices)
    torch.testing.assert_close(log_p, expected.values)


def test_losses_at_uniform_and_by_hand():
    uniform = torch.zeros(2, 500, 6, dtype=torch.float64)
    balance, variance, z = router_losses((uniform,), (6,), 2)
    assert balance.item() == pytest.approx(1) and variance.item() == pytest.approx(0, abs=1e-12)
    assert z.item() == pytest.approx(math.log(6) ** 2)
    torch.manual_seed(0)
    logits = torch.randn(2, 40, 6, dtype=torch.float64) * 2
    kept = torch.rand(2, 40) > 0.3
    masked = torch.where(kept[..., None], logits, -torch.inf).requires_grad_()
    other = torch.randn(2, 40, 6, dtype=torch.float64)
    balance, variance, z = router_losses((masked, other), (6,), 2)

    def by_hand(rows):
        p = rows.softmax(-1).mean(0)
        f = torch.stack([(rows.topk(2, -1).indices == c).double().sum() for c in range(6)]) / (2 * len(rows))
        return 6 * (f * p).sum(), 6 * p.var(correction=0) * 6, rows.logsumexp(-1).square().mean()

    expected = [(a + b) / 2 for a, b in zip(by_hand(logits[kept]), by_hand(other.flatten(0, 1)))]
    torch.testing.assert_close([balance, variance, z], expected)
    (gradient,) = torch.autograd.grad(balance + variance + z, masked)
    assert gradient.isfinite().all() and not gradient[~kept].any() and gradient[kept].abs().min() > 0
    nothing = torch.full((1, 4, 6), -torch.inf)
    assert all(loss == 0 for loss in router_losses((nothing,), (6,), 2))


def test_minimizing_the_losses_balances_the_router():
    torch.manual_seed(0)
    router = ChapterRouter(8, 6, 2)
    router.init_weights(0.5)
    with torch.no_grad():
        router.gate.bias[0] += 4  # nearly every token chooses chapter 0
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    x, most = torch.randn(1, 400, 8), []
    for _ in range(60):
        choice, _ = router(x, {})
        most.append(choice.chapters.flatten().bincount(minlength=6).max().item() / choice.chapters.numel())
        balance, variance, z = router_losses((choice.logits,), (6,), 2)
        optimizer.zero_grad()
        (balance + variance + 0.01 * z).backward()
        optimizer.step()
    assert most[0] > 0.45 and most[-1] < 0.3


WORKER = """
import sys, torch
from memzoo.modeling.chapter_router import router_losses
torch.set_num_threads(1)
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
logits = torch.full((10, 2), -4.0)
logits[:, rank] = 4.0  # each process has its own favourite: balanced together
balance, _, _ = router_losses((logits.requires_grad_(),), (2,), 1)
with torch.no_grad():
    alone, _, _ = router_losses((logits,), (2,), 1)
assert abs(balance.item() - 1) < 1e-3 and alone.item() > 1.9, (balance, alone)
"""


@pytest.mark.slow
def test_load_is_counted_over_all_processes(tmp_path):
    commands = [[sys.executable, "-P", "-c", WORKER, str(rank), str(tmp_path / "meet")] for rank in (0, 1)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors


def test_refusals():
    with pytest.raises(ValueError, match="top_k_chapters 7 must be between 1 and the 6"):
        ChapterRouter(8, 6, 7)
    with pytest.raises(ValueError, match="routing must be one of"):
        ChapterRouter(8, 6, 2, "sequence")
    with pytest.raises(ValueError, match="two factors, not 7"):
        ChapterRouter(8, 7, 2, product_keys=True)
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        ChapterRouter(8, 6, 2, "block", 0)
