"""Causal self-attention as a memory: every path against the definition, in float64."""

import itertools

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from memzoo.modeling.attention import CausalSelfAttention

T = 75
OPTIONS = list(itertools.product([None, 1, 3, 20, 64], [0, 3], [4, 2]))  # window, persistent tokens, key-value heads


def build(window: int | None, persistent: int, kv_heads: int) -> tuple[CausalSelfAttention, Tensor]:
    torch.manual_seed(0)
    attention = CausalSelfAttention(16, 4, kv_heads, window=window, num_persistent_tokens=persistent).double()
    attention.init_weights(0.5)
    for parameter in attention.parameters():
        parameter.data.mul_(3)
    return attention, torch.randn(2, T, 16, dtype=torch.float64)


def definition(attention: CausalSelfAttention, x: Tensor) -> Tensor:
    """One query at a time over exactly the keys that it may see."""
    B = len(x)
    q, k, v = (
        proj(x).view(B, T, -1, attention.head_dim).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    half = 10000.0 ** -(torch.arange(0, attention.head_dim, 2, dtype=torch.float64) / attention.head_dim)
    angles = torch.outer(torch.arange(T), half).repeat(1, 2)[None]
    q, k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    out = []
    for i in range(T):
        first = 0 if attention.window is None else max(0, i - attention.window + 1)
        keys, values = k[:, :, first : i + 1], v[:, :, first : i + 1]
        if attention.persistent is not None:
            more = (p.expand(B, -1, -1, -1) for p in attention.persistent)
            keys, values = (torch.cat(pair, 2) for pair in zip(more, (keys, values)))
        keys, values = (a.repeat_interleave(attention.groups, 1) for a in (keys, values))
        out.append((q[:, :, i : i + 1] @ keys.mT * attention.head_dim**-0.5).softmax(-1) @ values)
    return attention.o_proj(torch.cat(out, 2).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", OPTIONS)
def test_whole_split_and_ragged_sequences_agree_with_the_definition(options):
    attention, x = build(*options)
    expected = definition(attention, x)
    torch.testing.assert_close(attention(x, {})[0], expected, rtol=1e-12, atol=1e-12)
    state: dict[str, Tensor] = {}
    for start, end in [(0, 1), (1, 30), (30, 31), (31, T)]:
        y, state = attention(x[:, start:end], state)
        torch.testing.assert_close(y, expected[:, start:end], rtol=1e-12, atol=1e-12)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 33:] = False  # the second row has read seven tokens less
    _, state = attention(x[:, :40], {}, mask)
    y, _ = attention(torch.stack([x[0, 40:70], x[1, 33:63]]), state)
    torch.testing.assert_close(y, torch.stack([expected[0, 40:70], expected[1, 33:63]]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [(20, 3, 2), (None, 3, 2)])
def test_gradients_agree_with_the_definition(options):
    attention, x = build(*options)
    weight = torch.randn_like(x)
    grads = [
        torch.autograd.grad((y * weight).sum(), list(attention.parameters()))
        for y in (attention(x, {})[0], definition(attention, x))
    ]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_window_remembers_a_constant_number_of_keys_and_no_window_all():
    for window, expected in [(20, [19, 19, 19]), (None, [5, 45, 46])]:
        attention, x = build(window, 0, 4)
        state: dict[str, Tensor] = {}
        lengths = []
        for part in (x[:, :5], x[:, :40], x[:, :1]):
            _, state = attention(part, state)
            lengths.append(state["keys"].shape[2])
        assert lengths == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 15, "num_heads": 4}, "hidden_size 15 is not a multiple of num_attention_heads 4"),
        (
            {"hidden_size": 16, "num_heads": 4, "num_key_value_heads": 3},
            "4 is not a multiple of num_key_value_heads 3",
        ),
        ({"hidden_size": 16, "num_heads": 4, "window": 0}, "at least 1 token, not 0"),
        ({"hidden_size": 12, "num_heads": 4}, "even head width, not 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalSelfAttention(**arguments)
