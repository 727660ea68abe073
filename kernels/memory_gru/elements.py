"""What memory_gru's compiled loops and those of other kernels share: functions of one number, vectors, a matrix and a
vector, in float32 and float64.
"""

from functools import partial

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

from memzoo.kernels.compiled import OPTIONS

# Not nnan and ninf: a NaN must come out as NaN.
FASTMATH = {"reassoc", "contract", "arcp", "nsz", "afn"}


def jit(function, fastmath=FASTMATH):
    return numba.njit(fastmath=fastmath, **OPTIONS)(function)


@intrinsic
def like(typingctx, x, value):
    """A constant in x's precision: numba would widen float32 * literal to float64."""

    def codegen(context, builder, signature, args):
        return context.cast(builder, args[1], signature.args[1], signature.return_type)

    return x(x, value), codegen


@intrinsic
def power_of_two(typingctx, x, n):
    """2**n in x's precision for an int32 n, by writing the exponent bits; unlike ldexp it vectorises."""
    bits, mantissa, bias = (32, 23, 127) if x == types.float32 else (64, 52, 1023)

    def codegen(context, builder, signature, args):
        integer = context.get_value_type(types.int32 if bits == 32 else types.int64)
        exponent = args[1] if bits == 32 else builder.sext(args[1], integer)
        shifted = builder.shl(builder.add(exponent, integer(bias)), integer(mantissa))
        return builder.bitcast(shifted, context.get_value_type(x))

    return x(x, types.int32), codegen


@jit
def exp(x):
    """exp, relative error 1e-7 or 1e-15, x clipped to +-87: numba has no vector exp without Intel's SVML."""
    x = like(x, -87.0) if x < like(x, -87.0) else x
    x = like(x, 87.0) if x > like(x, 87.0) else x
    n = np.int32(x * like(x, 1.4426950408889634) + like(x, 256.5)) - np.int32(256)
    r = x - like(x, 0.6931471805599453) * like(x, n)  # in [-0.36, 0.36]
    p = like(x, 1 / 6227020800)
    p = p * r + like(x, 1 / 479001600)
    p = p * r + like(x, 1 / 39916800)
    p = p * r + like(x, 1 / 3628800)
    p = p * r + like(x, 1 / 362880)
    p = p * r + like(x, 1 / 40320)
    p = p * r + like(x, 1 / 5040)
    p = p * r + like(x, 1 / 720)
    p = p * r + like(x, 1 / 120)
    p = p * r + like(x, 1 / 24)
    p = p * r + like(x, 1 / 6)
    p = p * r + like(x, 0.5)
    p = p * r + like(x, 1.0)
    p = p * r + like(x, 1.0)
    return p * power_of_two(x, np.int32(n))


@jit
def sigmoid(x):
    return like(x, 1.0) / (like(x, 1.0) + exp(-x))


@jit
def tanh(x):
    return like(x, 1.0) - like(x, 2.0) / (like(x, 1.0) + exp(like(x, 2.0) * x))


@jit
def one_plus_softplus(x):
    return like(x, 1.0) + (x if x > like(x, 0.0) else like(x, 0.0)) + like(x, np.log1p(exp(-abs(x))))


@partial(jit, fastmath=True)
def maximum(x):
    """Takes nnan to be a vector loop; a NaN in x shows in what is subtracted from, not here."""
    top = x[0]
    for i in range(x.shape[0]):
        top = x[i] if x[i] > top else top
    return top


@jit
def softmax(x):
    """In place."""
    top = maximum(x)
    total = like(top, 0.0)
    for i in range(x.shape[0]):
        x[i] = exp(x[i] - top)
    for i in range(x.shape[0]):
        total += x[i]
    scale = like(top, 1.0) / total
    for i in range(x.shape[0]):
        x[i] *= scale


@jit
def dot(x, y):
    total = like(x[0], 0.0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@jit
def add_matvec(out, A, x):
    """out += A x. Four rows share the loads of x."""
    zero = like(x[0], 0.0)
    n, size = A.shape
    for i in range(0, n - 3, 4):
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(size):
            s0 += A[i, j] * x[j]
            s1 += A[i + 1, j] * x[j]
            s2 += A[i + 2, j] * x[j]
            s3 += A[i + 3, j] * x[j]
        out[i] += s0
        out[i + 1] += s1
        out[i + 2] += s2
        out[i + 3] += s3
    for i in range(n - n % 4, n):
        out[i] += dot(A[i], x)


@jit
def add_vecmat(out, scale, x, A):
    """out += scale x A. Four rows share the loads and stores of out."""
    n, size = A.shape
    for i in range(0, n - 3, 4):
        x0, x1, x2, x3 = scale * x[i], scale * x[i + 1], scale * x[i + 2], scale * x[i + 3]
        for j in range(size):
            out[j] += x0 * A[i, j] + x1 * A[i + 1, j] + x2 * A[i + 2, j] + x3 * A[i + 3, j]
    for i in range(n - n % 4, n):
        xi = scale * x[i]
        for j in range(size):
            out[j] += xi * A[i, j]
