"""Laws 1 to 6: what a memory may and may not change in the outputs."""

import copy

import pytest
import torch

from memzoo import MemoryCache


def states_close(a: MemoryCache, b: MemoryCache, rows: slice | int = slice(None), tolerance: float = 1e-10) -> None:
    assert a.states.keys() == b.states.keys() and a.states
    for name, state in a.states.items():
        state, expected = state[rows], b.states[name]
        if name.endswith((".keys", ".values")):  # right-aligned, as many as the longest row of a batch has
            spare = state.shape[2] - expected.shape[2]
            assert spare >= 0 and not state[:, :, :spare].any()
            state = state[:, :, spare:]
        torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_1_causality(row, ids):
    model = row.build()
    before = model(ids).logits
    for t in (1, 16, 20, 36):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] - 3 + 7) % 58 + 3
        after = model(changed).logits
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} changed an earlier output"
        assert not torch.equal(after[:, t:], before[:, t:])


@torch.no_grad()
def test_2_isolation(row, ids):
    model = row.build()
    together = model(ids).logits
    others = ids.clone()
    others[1:] = ids[1:].flip(1)
    assert torch.equal(model(others).logits[0], together[0])
    for b in range(len(ids)):
        torch.testing.assert_close(model(ids[b : b + 1]).logits[0], together[b], rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_3_split_invariance(row, ids, dtype, tolerance):
    model = row.build(dtype)
    whole = model(ids, use_cache=True)
    scale = whole.logits.abs().max()
    splits = range(1, ids.shape[1]) if dtype == torch.float64 else (1, 16, 20)
    for pieces in [*([k, ids.shape[1] - k] for k in splits), [1] * ids.shape[1], [5] * 7 + [2]]:
        cache = MemoryCache(model.config)
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, 1)], 1)
        assert (logits - whole.logits).abs().max() <= tolerance * scale, f"split at {pieces}"
        assert cache.get_seq_length() == ids.shape[1]
        states_close(cache, whole.past_key_values, tolerance=10 * tolerance)


@torch.no_grad()
@pytest.mark.parametrize("pads", [(4, 0), (0, 5), (33, 0), (3, 2)], ids=["left", "right", "long", "both"])
def test_4_padding(row, ids, pads):
    model = row.build()
    plain = model(ids, use_cache=True)
    left, right = pads
    padded = torch.randint(0, 61, (3, left + 37 + right))
    mask = torch.zeros_like(padded)
    padded[:, left : left + 37], mask[:, left : left + 37] = ids, 1
    out = model(padded, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(out.logits[:, left : left + 37], plain.logits, rtol=1e-10, atol=1e-10)
    states_close(out.past_key_values, plain.past_key_values)


@torch.no_grad()
def test_4_padding_with_holes_and_across_segments(row, ids):
    """Pads in the middle, differently in every row, in two cached segments; one row of the second is all pads."""
    model = row.build()
    mask = torch.rand(3, 37) > 0.4
    mask[2, 20:] = False
    out = model(ids, attention_mask=mask.long(), use_cache=True)
    cache = MemoryCache(model.config)
    first = model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache).logits
    second = model(ids[:, 20:], attention_mask=mask.long(), past_key_values=cache).logits  # mask over past and input
    pieces = torch.cat([first, second], 1)
    for b in range(3):
        alone = model(ids[b, mask[b]][None], use_cache=True)
        torch.testing.assert_close(out.logits[b, mask[b]], alone.logits[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(pieces[b, mask[b]], alone.logits[0], rtol=1e-10, atol=1e-10)
        states_close(out.past_key_values, alone.past_key_values, slice(b, b + 1))
        states_close(cache, alone.past_key_values, slice(b, b + 1))


def test_5_no_side_effects(row, ids):
    model = row.build(torch.float32)
    frozen = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first, second = model(ids).logits, model(ids).logits
    model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, num_beams=2)
    model(ids, labels=ids).loss.backward()
    assert torch.equal(first, second)
    assert all(torch.equal(frozen[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(frozen[name], buffer) for name, buffer in model.named_buffers() if name in frozen)


def test_6_gradients_reach_every_parameter(row, ids):
    model = row.build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # one step to warm up
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-9, f"gradient of {name} is zero"


def test_6_finite_differences(row, ids):
    """Along a random direction of all parameters together. The loss is ours: transformers' is float32."""
    model = row.build()
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) * (p.std() if p.numel() > 1 else 1) for p in parameters]
    weight = torch.randn(3, 37, 61, dtype=torch.float64)
    # a memory that evaluation does not change leaves what would change it without a gradient
    slope = torch.autograd.grad((model(ids).logits * weight).sum(), parameters, materialize_grads=True)
    slope = sum((g * d).sum() for g, d in zip(slope, directions))
    values = []
    with torch.no_grad():
        for step in (1e-6, -1e-6):
            torch._foreach_add_(parameters, directions, alpha=step)
            values.append((model(ids).logits * weight).sum())
            torch._foreach_add_(parameters, directions, alpha=-step)
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-6, atol=0)


def test_6_gradients_cross_cached_segments(row, ids):
    """A loss on the second segment reaches the first through the memory; detach_ cuts it."""
    model = row.build()
    grads = []
    for segments, cut in (([37], False), ([20, 17], False), ([20, 17], True)):
        cache = MemoryCache(model.config)
        logits = []
        for piece in ids.split(segments, 1):
            logits.append(model(piece, past_key_values=cache).logits)
            if cut:
                cache.detach_()
        model.zero_grad()
        torch.cat(logits, 1)[:, 20:].square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-8, atol=1e-10, msg=name)
    assert any(not torch.allclose(grads[2][name], grad) for name, grad in grads[0].items())
