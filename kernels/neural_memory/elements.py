"""What the compiled loops do element by element: activations with two derivatives, norms and factors.

Features are rows and tokens are columns, [d, n]; `kind` is 0 for silu and 1 for gelu.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from memzoo.kernels.compiled import FAST, UNCOUNTED
from memzoo.kernels.selective_scan.elementwise import exp32, sigmoid

KINDS = {"silu": 0, "gelu": 1}
NORMAL = 1 / math.sqrt(2 * math.pi)
# erf to 1.5e-7: Abramowitz and Stegun 7.1.26
P = np.float32(0.3275911 * math.sqrt(0.5))
A1, A2, A3 = np.float32(0.254829592 / 2), np.float32(-0.284496736 / 2), np.float32(1.421413741 / 2)
A4, A5 = np.float32(-1.453152027 / 2), np.float32(1.061405429 / 2)
NORMAL32, HALF, ONE = np.float32(NORMAL), np.float32(0.5), np.float32(1)
FAR = np.float32(150)  # of squares: beyond it the density would be denormal, and slow


@njit(fastmath={"contract"})
def below32(z):
    """The normal distribution's part below z, and its density at z."""
    square = z * z
    bell = exp32(-HALF * (square if square < FAR else FAR))
    t = ONE / (ONE + P * abs(z))
    tail = ((((A5 * t + A4) * t + A3) * t + A2) * t + A1) * t * bell
    return (tail if z < 0 else ONE - tail), NORMAL32 * bell


@njit
def below64(z):
    return 0.5 + 0.5 * math.erf(z * math.sqrt(0.5)), NORMAL * math.exp(-0.5 * z * z)


def below(z): ...


@overload(below)
def _below(z):
    return (lambda z: below32(z)) if z is types.float32 else (lambda z: below64(z))


@njit(fastmath=FAST, **UNCOUNTED)
def activate(kind, z, h):
    """h = act(z)."""
    for f in range(z.shape[0]):
        if kind == 0:
            for t in range(z.shape[1]):
                h[f, t] = z[f, t] * sigmoid(z[f, t])
        else:
            for t in range(z.shape[1]):
                part, _ = below(z[f, t])
                h[f, t] = z[f, t] * part


@njit(fastmath=FAST, **UNCOUNTED)
def activate_with_slope(kind, z, h, slope):
    """h = act(z) and act's derivative there."""
    one = z.dtype.type(1)
    for f in range(z.shape[0]):
        if kind == 0:
            for t in range(z.shape[1]):
                s = sigmoid(z[f, t])
                value = z[f, t] * s
                h[f, t], slope[f, t] = value, s + value * (one - s)
        else:
            for t in range(z.shape[1]):
                part, density = below(z[f, t])
                h[f, t], slope[f, t] = z[f, t] * part, part + z[f, t] * density


@njit(fastmath=FAST, **UNCOUNTED)
def differentiate(kind, z, h, slope, bend):
    """h = act(z) and act's first and second derivative there."""
    one, two = z.dtype.type(1), z.dtype.type(2)
    for f in range(z.shape[0]):
        if kind == 0:
            for t in range(z.shape[1]):
                s = sigmoid(z[f, t])
                value = z[f, t] * s
                first = s + value * (one - s)
                h[f, t], slope[f, t] = value, first
                bend[f, t] = (s - s * value + first) * (one - s)
        else:
            for t in range(z.shape[1]):
                part, density = below(z[f, t])
                h[f, t], slope[f, t] = z[f, t] * part, part + z[f, t] * density
                bend[f, t] = (two - z[f, t] * z[f, t]) * density


@njit(fastmath=FAST, **UNCOUNTED)
def square_norms(x, out):
    """The squared length of every column."""
    out[:] = 0
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[t] += x[f, t] * x[f, t]


@njit(fastmath=FAST, **UNCOUNTED)
def add_column_dots(x, y, out):
    """out += x' y, column by column. A loop that wrote several such sums would have too many arrays for LLVM to see
    that none overlap, and stay scalar: so one thing at a time, here and below."""
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[t] += x[f, t] * y[f, t]


@njit(fastmath=FAST, **UNCOUNTED)
def mix_columns(x, a, y, b):
    """x = a x + b y, a factor for every column."""
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            x[f, t] = a[t] * x[f, t] + b[t] * y[f, t]


@njit(fastmath=FAST, **UNCOUNTED)
def add_columns(x, a, y, b, out):
    """out += a x + b y, a factor for every column."""
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[f, t] += a[t] * x[f, t] + b[t] * y[f, t]


@njit(fastmath=FAST, **UNCOUNTED)
def scale_columns(x, factors, out):
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[f, t] = factors[t] * x[f, t]


@njit(fastmath=FAST, **UNCOUNTED)
def multiply(x, y, out):
    for f in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[f, t] = x[f, t] * y[f, t]


@njit(fastmath=FAST, **UNCOUNTED)
def copy(x, out):
    """out = x, the part that both have. Assigning an array to an array would allocate."""
    for f in range(min(x.shape[0], out.shape[0])):
        for t in range(min(x.shape[1], out.shape[1])):
            out[f, t] = x[f, t]
