"""What compiled bank attention does between products, in whole vectors: LLVM makes half-width ones of plain loops.

Tiles of logits are [keys, queries], and what happens to a column is the same whatever stands beside it. Numba's cache
on disk does not notice a change here: touch the files of the loops after one.
"""

import math
from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from memzoo.kernels.compiled import OPTIONS
from memzoo.kernels.tiles import VECTOR, multiply_add, pointer, splat, turn

LOG2_E = math.log2(math.e)


class _Lanes:
    """A vector type, and what is needed for 2^x in it."""

    def __init__(self, real: ir.Type, size: int) -> None:
        self.size, self.count = size, VECTOR // size
        self.type = ir.VectorType(real, self.count)
        self.bits = ir.VectorType(ir.IntType(8 * size), self.count)
        self.mantissa = {4: 23, 8: 52}[size]
        # below it 2^x is 0: it changes no sum, and what it multiplies would be denormal, which is slow
        self.low = {4: -80.0, 8: -700.0}[size]
        degree = {4: 5, 8: 11}[size]
        near = np.polynomial.Chebyshev.interpolate(np.exp2, degree, [-0.5, 0.5])
        self.series = near.convert(kind=np.polynomial.Polynomial).coef.astype({4: np.float32, 8: np.float64}[size])

    def fill(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [float(value)] * self.count)

    def exp2(self, builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
        """2^x to 2e-7 or 3e-16, for x <= 0 or a little more: 2^round(x) by its bits, the rest by a polynomial."""
        round_ = self.fill(1.5 * 2**self.mantissa)  # adding it leaves the nearest integer in the low bits
        shifted = builder.fadd(x, round_)
        rest = builder.fsub(x, builder.fsub(shifted, round_))
        power = self.fill(self.series[-1])
        for term in self.series[-2::-1]:
            power = multiply_add(builder, power, rest, self.fill(term))
        exponent = builder.shl(
            builder.bitcast(shifted, self.bits), ir.Constant(self.bits, [self.mantissa] * self.count)
        )
        power = builder.bitcast(builder.add(exponent, builder.bitcast(power, self.bits)), self.type)
        return builder.select(builder.fcmp_unordered(">=", x, self.fill(self.low)), power, self.fill(0))


Step = Callable[..., tuple[ir.Value | None, ir.Value]]


def _strip(step: Step, vectors: int):
    """strip(x, y, keys, n, a, s): from the first to the last of the keys, in columns n on, x, s = step(x, y, a, s)."""

    @intrinsic
    def strip(_, x, y, keys, n, a, s):
        def generate(context, builder, signature, args):
            real, size = context.get_value_type(signature.args[0].dtype), signature.args[0].dtype.bitwidth // 8
            lanes, i64 = _Lanes(real, size), ir.IntType(64)

            def place(base, i):
                return builder.inttoptr(builder.add(base, i64(i * VECTOR)), lanes.type.as_pointer())

            def load(base, i):
                return builder.load(place(base, i), align=size)

            keys, n = args[2:4]
            arrays = [pointer(context, builder, signature.args[i], args[i]) for i in (0, 1, 4, 5)]
            across = builder.mul(n, i64(size))
            (x, y, a, s), (x_row, y_row) = (
                [builder.add(base, across) for base, _ in arrays], [strides[0] for _, strides in arrays[:2]]
            )  # fmt: skip
            first = [load(s, i) for i in range(vectors)]
            offsets = [load(a, i) for i in range(vectors)]
            before, loop = builder.block, builder.append_basic_block("keys")
            after = builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            key, at_x, at_y = (builder.phi(i64) for _ in range(3))
            sums, new = [builder.phi(lanes.type) for _ in range(vectors)], []
            for i in range(vectors):
                value, total = step(builder, lanes, load(at_x, i), load(at_y, i), offsets[i], sums[i])
                new.append(total)
                if value is not None:
                    builder.store(value, place(at_x, i), align=size)
            following = builder.add(key, i64(1)), builder.add(at_x, x_row), builder.add(at_y, y_row)
            for phi, start, then in zip((key, at_x, at_y, *sums), (i64(0), x, y, *first), (*following, *new)):
                phi.add_incoming(start, before)
                phi.add_incoming(then, loop)
            builder.cbranch(builder.icmp_signed("<", following[0], keys), loop, after)
            builder.position_at_end(after)
            for i in range(vectors):
                builder.store(new[i], place(s, i), align=size)
            return context.get_dummy_value()

        return types.void(x, y, keys, n, a, s), generate

    return strip


def _largest(builder, lanes, x, y, a, s):
    return None, builder.select(builder.fcmp_unordered(">", x, s), x, s)


def _exponential(builder, lanes, x, y, a, s):
    e = lanes.exp2(builder, multiply_add(builder, x, lanes.fill(LOG2_E), builder.fneg(a)))
    return e, builder.fadd(s, e)


def _product(builder, lanes, x, y, a, s):
    return None, multiply_add(builder, x, y, s)


def _slope(builder, lanes, x, y, a, s):
    slope = builder.fmul(y, builder.fsub(x, a))
    return slope, builder.fadd(s, slope)


_largest1, _largest4 = _strip(_largest, 1), _strip(_largest, 4)
_exponential1, _exponential2 = _strip(_exponential, 1), _strip(_exponential, 2)
_product1, _product4 = _strip(_product, 1), _strip(_product, 4)
_slope1, _slope4 = _strip(_slope, 1), _strip(_slope, 4)


@njit(**OPTIONS)
def largest(x, keys, top):
    """top [n] = its maximum with x [keys, n] of each column."""
    lanes = VECTOR // x.itemsize
    many = x.shape[1] // (4 * lanes) * 4 * lanes
    for n in range(0, many, 4 * lanes):
        _largest4(x, x, keys, n, top, top)
    for n in range(many, x.shape[1], lanes):
        _largest1(x, x, keys, n, top, top)


@njit(**OPTIONS)
def exponentials(x, keys, offset, sums):
    """x [keys, n] = 2^(x log2 e - offset), added to sums [n]."""
    lanes = VECTOR // x.itemsize
    many = x.shape[1] // (2 * lanes) * 2 * lanes
    for n in range(0, many, 2 * lanes):
        _exponential2(x, x, keys, n, offset, sums)
    for n in range(many, x.shape[1], lanes):
        _exponential1(x, x, keys, n, offset, sums)


@njit(**OPTIONS)
def products(x, y, keys, sums):
    """x y [keys, n] added to sums [n]."""
    lanes = VECTOR // x.itemsize
    many = x.shape[1] // (4 * lanes) * 4 * lanes
    for n in range(0, many, 4 * lanes):
        _product4(x, y, keys, n, sums, sums)
    for n in range(many, x.shape[1], lanes):
        _product1(x, y, keys, n, sums, sums)


@njit(**OPTIONS)
def slopes(x, y, keys, offset, sums):
    """x [keys, n] = y (x - offset), added to sums [n]."""
    lanes = VECTOR // x.itemsize
    many = x.shape[1] // (4 * lanes) * 4 * lanes
    for n in range(0, many, 4 * lanes):
        _slope4(x, y, keys, n, offset, sums)
    for n in range(many, x.shape[1], lanes):
        _slope1(x, y, keys, n, offset, sums)


def _row(mixed: bool):
    """row(to, at, x, start, count, a, b): to[at : at + count] = b x[start : start + count], plus a to if `mixed`."""

    @intrinsic
    def row(_, to, at, x, start, count, a, b):
        def generate(context, builder, signature, args):
            real, size = context.get_value_type(signature.args[0].dtype), signature.args[0].dtype.bitwidth // 8
            lanes, i64 = _Lanes(real, size), ir.IntType(64)
            places = []
            for array, first in ((0, 1), (2, 3)):
                base, _ = pointer(context, builder, signature.args[array], args[array])
                places.append(builder.add(base, builder.mul(args[first], i64(size))))
            keep, take = (splat(builder, value, lanes.type) for value in args[5:7])
            stop = builder.mul(args[4], i64(size))
            before, loop = builder.block, builder.append_basic_block("row")
            after = builder.append_basic_block("after")
            builder.branch(loop)
            builder.position_at_end(loop)
            i = builder.phi(i64)
            target, source = (builder.inttoptr(builder.add(p, i), lanes.type.as_pointer()) for p in places)
            value = builder.fmul(builder.load(source, align=size), take)
            if mixed:
                value = multiply_add(builder, builder.load(target, align=size), keep, value)
            builder.store(value, target, align=size)
            following = builder.add(i, i64(VECTOR))
            i.add_incoming(i64(0), before)
            i.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, stop), loop, after)
            builder.position_at_end(after)
            return context.get_dummy_value()

        return types.void(to, at, x, start, count, a, b), generate

    return row


scale_row, mix_row = _row(False), _row(True)


@intrinsic
def _gather(_, x, at, factors, rows, columns, r, n):
    """A square: rows[r:, n:] = x[at[r:] + n :] times factors[r:], columns[n:, r:] their transpose. x and `at` flat."""

    def generate(context, builder, signature, args):
        real, size = context.get_value_type(signature.args[0].dtype), signature.args[0].dtype.bitwidth // 8
        lanes, i64 = _Lanes(real, size), ir.IntType(64)
        (x, _), (at, _), (factors, _), (rows, (row, _)), (columns, (column, _)) = (
            pointer(context, builder, signature.args[i], args[i]) for i in range(5)
        )
        r, n = args[5:]
        across = builder.mul(n, i64(size))
        values = []

        def place(base, index, stride, offset, kind):
            address = builder.add(builder.add(base, builder.mul(index, stride)), offset)
            return builder.inttoptr(address, kind.as_pointer())

        for i in range(lanes.count):
            this = builder.add(r, i64(i))
            begin = builder.load(place(at, this, i64(8), i64(0), i64))
            factor = builder.load(place(factors, this, i64(size), i64(0), real))
            value = builder.load(place(x, begin, i64(size), across, lanes.type), align=size)
            value = builder.fmul(value, splat(builder, factor, lanes.type))
            builder.store(value, place(rows, this, row, across, lanes.type), align=size)
            values.append(value)
        turn(builder, values)
        down = builder.mul(r, i64(size))
        for i, value in enumerate(values):
            builder.store(value, place(columns, builder.add(n, i64(i)), column, down, lanes.type), align=size)
        return context.get_dummy_value()

    return types.void(x, at, factors, rows, columns, r, n), generate


@njit(**OPTIONS)
def gather_rows(x, at, factors, width, rows, columns):
    """rows[r] = factors[r] x[at[r] :] for r below `width`, and their transpose."""
    lanes = VECTOR // x.itemsize
    for r in range(0, width, lanes):
        for n in range(0, rows.shape[1], lanes):
            _gather(x, at, factors, rows, columns, r, n)
