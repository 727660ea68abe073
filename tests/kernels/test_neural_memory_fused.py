"""What the compiled form of the neural memory takes by address: any layout, missing gradients, its own threads."""

from itertools import chain, pairwise

import pytest
import torch

from memzoo.kernels import threads
from memzoo.kernels.neural_memory import fused, neural_memory, reference, step_fused

pytestmark = pytest.mark.skipif(not fused.is_available(), reason="numba is not installed")

B, H, T, D, WIDE = 2, 2, 9, 5, 7


def inputs(T: int = T) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The six tensors of tokens, weights and momentum, float64, as leaves."""
    tokens = [torch.nn.functional.normalize(torch.randn(B, H, T, D), dim=-1) for _ in range(3)]
    gates = [torch.rand(B, H, T) * scale for scale in (0.3, 0.9, 0.5)]
    W, S = ([torch.randn(B, H, o, i) * i**-0.5 for i, o in pairwise((D, WIDE, D))] for _ in range(2))
    return tuple([x.double().requires_grad_() for x in xs] for xs in ([*tokens, *gates], W, S))


def strided(x: torch.Tensor) -> torch.Tensor:
    """Equal to x, with a layout that is neither contiguous nor dense."""
    return torch.stack([x.mT, x.mT + 1], -1)[..., 0].mT


@pytest.mark.parametrize("length", [1, T])
def test_any_layout_is_read(length):
    tokens, W, S = inputs(length)
    shared = [w[:1] for w in W]  # one memory for all rows, as at the start of a sequence
    with torch.set_grad_enabled(length > 1):
        dense = neural_memory(*tokens, [w.repeat(B, 1, 1, 1) for w in shared], S, 4)
        odd = neural_memory(*map(strided, tokens), [w.expand(B, -1, -1, -1) for w in shared], [*map(strided, S)], 4)
    torch.testing.assert_close(odd, dense, rtol=0, atol=0)
    if length > 1:
        leaves = [*tokens, *W, *S]
        grads = [torch.autograd.grad(y.square().sum() + s.weights[0].sum(), leaves) for y, s in (dense, odd)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [[0], [1], [2, 3], [4], [5, 6]])
def test_what_the_loss_does_not_use_has_no_gradient(used):
    """y, two matrices of W, of S and of start, of which the loss takes some; the last chunk is not full."""
    tokens, W, S = inputs()
    leaves, at = [*tokens, *W, *S], torch.zeros(B, dtype=torch.int64)
    y, state = neural_memory(*tokens, W, S, 4)
    read, *expected = reference(*tokens, W, S, W, at, 4)
    grads = []
    for outputs in ([y, *chain(*state[:3])], [read, *chain(*expected[:3])]):
        loss = sum(outputs[i].square().sum() for i in used)
        grads.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled_regions", [True, False])
def test_threads_change_nothing(compiled_regions, monkeypatch):
    """Also where compiled code cannot start torch's threads and Python's have to do."""

    def results(count):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        y, state = neural_memory(*tokens, W, S, 4)
        with torch.no_grad():
            step, after = neural_memory(*(x[:, :, :1] for x in tokens), W, S, 4)
        return y, *chain(*state[:3]), step, *chain(*after[:3]), *torch.autograd.grad(y.sum(), [*tokens, *W])

    tokens, W, S = inputs()
    monkeypatch.setattr(threads, "REGION_WORK", 0)
    monkeypatch.setattr(step_fused, "REGION_WORK", 0)
    alone = results(1)
    if not compiled_regions:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    for count in (2, 3, 7):  # 7: more than heads
        torch.testing.assert_close(results(count), alone, rtol=0, atol=0)


def test_numbers_too_small_to_be_normal_stay_what_they_are_for_others():
    """Inside the loops they are rounded to zero; the mode of the thread that called is as before."""
    tokens, W, S = inputs()
    y, _ = neural_memory(*tokens, W, S, 4)
    y.sum().backward()
    with torch.no_grad():
        neural_memory(*(x[:, :, :1] for x in tokens), W, S, 4)
    assert (torch.tensor([1e-30]) * 1e-10).item() > 0
