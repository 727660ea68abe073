"""What the loops of the neural memory work with and in: options, tokens, and memory that a call takes once.

Index legend in loops.py.
"""

from collections import namedtuple

import numpy as np
from numba import njit

from memzoo.kernels.addresses import flat
from memzoo.kernels.compiled import OPTIONS
from memzoo.kernels.neural_memory.rows import room
from memzoo.kernels.tiles import PAD

Rule = namedtuple(
    "Rule", "widths pads padded chunk block stride kind clip threshold residual own_write detach_every normalize tiny"
)
# q, k, v [B, T, H, d] and alpha, eta, theta [B, T, H] wherever they are, with their strides [6, 3] over B, T and H
Tokens = namedtuple("Tokens", "q k v alpha eta theta strides mask position")
# One block: inputs of the layers, pre-activations, gradients before the slope and after it, the slope and its slope,
# the same inputs with tokens as rows, steps after clip and threshold, and room for four numbers a token.
Block = namedtuple("Block", "h z g delta slope bend rows w sums")
# One block's decays: factors of W and S after i tokens, b being that of S in W; of token j's step after i tokens in W
# and in S; -P w as the reads take them, [j, i]; minus what a step adds to W and to S at the block's end; W and S in
# the reads.
Decays = namedtuple("Decays", "a b e P E steps end_W end_S read_a read_b")


@njit(**OPTIONS)
def tokens_of(places, mask, position, rule):
    """`Tokens` from the first six of places [n, 4]: address and strides over B, T and H."""
    q, k, v = flat(places[0, 0], rule.tiny), flat(places[1, 0], rule.tiny), flat(places[2, 0], rule.tiny)
    alpha, eta, theta = flat(places[3, 0], rule.tiny), flat(places[4, 0], rule.tiny), flat(places[5, 0], rule.tiny)
    return Tokens(q, k, v, alpha, eta, theta, places[:6, 1:], mask, position)


@njit(**OPTIONS)
def blocks_of(like, rule, count, forward):
    """`count` blocks; only a forward needs z and g."""
    L, P, n = len(rule.widths) - 1, rule.pads.max(), rule.block
    parts = room(like, 4 * count * L * P, n, rule).reshape((4, count, L, P, n))
    more = 1 if forward else 0
    inner = room(like, 2 * more * count * L * P, n, rule).reshape((2, more * count, L, P, n))
    rows = room(like, count * L * n, P, rule).reshape((count, L, n, P))
    w = np.zeros((count, n), like.dtype)
    sums = np.zeros((4, n), like.dtype)
    return Block(parts[0], inner[0], inner[1], parts[1], parts[2], parts[3], rows, w, sums)


@njit(**OPTIONS)
def states_of(like, rule, count):
    L, P = len(rule.widths) - 1, rule.pads.max()
    return room(like, count * L * 2 * P, P + PAD, rule).reshape((count, L, 2, P, P + PAD))


@njit(**OPTIONS)
def decays_of(like, rule):
    n = rule.block
    rows, squares = (
        room(like, 7, n + PAD, rule),
        room(like, 3 * (n + 1), n, rule).reshape((3, n + 1, n)),
    )
    return Decays(
        rows[0], rows[1], rows[2], squares[0], squares[1], squares[2], rows[3], rows[4], rows[5, :n], rows[6, :n]
    )
