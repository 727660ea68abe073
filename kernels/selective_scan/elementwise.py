"""exp, softplus and sigmoid for the Numba kernels: polynomials that LLVM vectorises in float32, libm in float64.

Numba's cache on disk does not notice a change here: touch the files of the kernels after one.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

LOG2_E = np.float32(1.4426950408889634)
ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to the nearest integer, left in the low bits
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
EXP_LOW, EXP_HIGH = np.float32(-87.33), np.float32(88.72)  # where the result is a normal float32
# exp(r) = 1 + r + r^2 P(r) on |r| <= ln(2) / 2, Cephes
E0, E1, E2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
E3, E4, E5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
# log(1 + e) = 2 atanh(s), s = e / (2 + e), as 2 s (1 + s^2 / 3 + s^4 / 5 + ...)
L0, L1, L2 = np.float32(2), np.float32(2 / 3), np.float32(2 / 5)
L3, L4, L5 = np.float32(2 / 7), np.float32(2 / 9), np.float32(2 / 11)
L6, L7 = np.float32(2 / 13), np.float32(2 / 15)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)


@njit(fastmath={"contract"})
def exp32(x):
    """exp in float32 to 1e-7 relative, as straight arithmetic; saturates at the smallest and largest normal number."""
    x = EXP_LOW if x < EXP_LOW else x
    x = EXP_HIGH if x > EXP_HIGH else x
    shifted = np.float32(x * LOG2_E + ROUND)
    k = shifted - ROUND
    r = x - k * LN2_HIGH
    r = r - k * LN2_LOW
    p = ((((E0 * r + E1) * r + E2) * r + E3) * r + E4) * r + E5
    p = np.float32(p * r * r + r + ONE)
    bits = (shifted.view(np.int32) << np.int32(23)) + p.view(np.int32)  # adds k to the exponent of p
    return np.int32(bits).view(np.float32)


@njit(fastmath={"contract"})
def softplus32(x):
    e = exp32(-abs(x))
    s = e / (TWO + e)
    q = s * s
    log1p = s * (((((((L7 * q + L6) * q + L5) * q + L4) * q + L3) * q + L2) * q + L1) * q + L0)
    return (ZERO if x < ZERO else x) + log1p


@njit(fastmath={"contract"})
def sigmoid32(x):
    return ONE / (ONE + exp32(-x))


def exp(x): ...
def softplus(x): ...
def sigmoid(x): ...


@overload(exp)
def _exp(x):
    return (lambda x: exp32(x)) if x is types.float32 else (lambda x: math.exp(x))


@overload(softplus)
def _softplus(x):
    if x is types.float32:
        return lambda x: softplus32(x)
    return lambda x: max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@overload(sigmoid)
def _sigmoid(x):
    return (lambda x: sigmoid32(x)) if x is types.float32 else (lambda x: 1.0 / (1.0 + math.exp(-x)))
