"""Small matrix products and transposes for compiled CPU loops: numba writes the inner tile as vector instructions.

LLVM turns plain loops into half-width vectors and keeps no block of sums in registers; BLAS needs microseconds a call
for the 16 to 128 wide products here. A tile holds `rows` x `vectors` sums in registers: a value of A, at any strides,
times a vector of B's columns. So B and the result must be contiguous along columns; A may be a transpose.

Shapes are multiples of PAD. All arrays are [rows, columns], float32 or float64.
"""

from collections import namedtuple
from itertools import chain

import numpy as np
from llvmlite import binding, ir
from numba import float32, float64, njit, void
from numba.core import cgutils, types
from numba.extending import intrinsic

from memzoo.kernels.compiled import OPTIONS

PAD = 16

_wide = binding.get_host_cpu_features().get("avx512f", False)
_arm = binding.get_process_triple().startswith(("aarch64", "arm64"))
VECTOR = 64 if _wide else 16 if _arm else 32  # bytes
SUMS = 16 if _wide or _arm else 8  # vectors of sums: half of the registers


def _tile(vectors: int):
    """tile(out, m, n, A, B, x, X, y, Y, ahead, place, step): SUMS / vectors rows and `vectors` vectors of out at
    [m, n] are those of A B + x X + y Y; X and Y may be None. Unless `ahead` is None it asks for the memory at `place`
    and on, `step` bytes for every column of A."""
    rows = SUMS // vectors

    @intrinsic
    def tile(_, out, m, n, A, B, x, X, y, Y, ahead, place, step):
        def generate(context, builder, signature, args):
            real, i64 = context.get_value_type(signature.args[0].dtype), ir.IntType(64)
            size = signature.args[0].dtype.bitwidth // 8
            vector = ir.VectorType(real, VECTOR // size)

            def array(i):
                parts = context.make_array(signature.args[i])(context, builder, args[i])
                return builder.ptrtoint(parts.data, i64), cgutils.unpack_tuple(builder, parts.strides), parts.shape

            def at(base, *steps):
                for count, stride in steps:
                    count, stride = (ir.Constant(i64, v) if isinstance(v, int) else v for v in (count, stride))
                    base = builder.add(base, builder.mul(count, stride))
                return base

            def load(place, kind):
                return builder.load(builder.inttoptr(place, kind.as_pointer()), align=size)

            (m, n), (asked, step) = args[1:3], args[10:]
            (A, (A_row, A_k), A_shape), (B, (B_k, _), _) = array(3), array(4)
            A, B = at(A, (m, A_row)), at(B, (n, size))
            terms = [(args[i - 1], *array(i)[:2]) for i in (6, 8) if signature.args[i] != types.none]
            terms = [(factor, at(place, (m, row), (n, size)), row) for factor, place, (row, _) in terms]
            fetch = signature.args[9] != types.none
            A_rows = [at(ir.Constant(i64, 0), (r, A_row)) for r in range(rows)]
            before, loop = builder.block, builder.append_basic_block("k")
            after = builder.append_basic_block("store")
            builder.branch(loop)
            builder.position_at_end(loop)
            k, a, b, *there = (builder.phi(i64) for _ in range(4 if fetch else 3))
            sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
            if fetch:
                ask(builder, *there)
            columns = [load(at(b, (j, VECTOR)), vector) for j in range(vectors)]
            new = []
            for row, old in zip(A_rows, sums):
                value = splat(builder, load(builder.add(a, row), real), vector)
                new.append([multiply_add(builder, value, column, s) for column, s in zip(columns, old)])
            following = [at(k, (1, 1)), at(a, (1, A_k)), at(b, (1, B_k)), *(at(x, (1, step)) for x in there)]
            for phi, first, then in zip((k, a, b, *there), (ir.Constant(i64, 0), A, B, asked), following):
                phi.add_incoming(first, before)
                phi.add_incoming(then, loop)
            for old, then in zip(chain(*sums), chain(*new)):
                old.add_incoming(ir.Constant(vector, [0.0] * vector.count), before)
                old.add_incoming(then, loop)
            count = builder.extract_value(A_shape, 1)
            builder.cbranch(builder.icmp_signed("<", following[0], count), loop, after)
            builder.position_at_end(after)
            C, (C_row, _), _ = array(0)
            C = at(C, (m, C_row), (n, size))
            for r in range(rows):
                for j in range(vectors):
                    value = new[r][j]
                    for factor, place, row in terms:
                        old = load(at(place, (r, row), (j, VECTOR)), vector)
                        value = multiply_add(builder, splat(builder, factor, vector), old, value)
                    place = at(C, (r, C_row), (j, VECTOR))
                    builder.store(value, builder.inttoptr(place, vector.as_pointer()), align=size)
            return context.get_dummy_value()

        return types.void(out, m, n, A, B, x, X, y, Y, ahead, types.int64, types.int64), generate

    return tile


def multiply_add(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=["contract"]), c, flags=["contract"])


def splat(builder, value, vector):
    """The number in all places of a vector."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.IntType(32)(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None))


def pointer(context, builder, kind, value):
    """An array's first byte as a number, and the strides of its axes."""
    parts = context.make_array(kind)(context, builder, value)
    return builder.ptrtoint(parts.data, ir.IntType(64)), cgutils.unpack_tuple(builder, parts.strides)


def turn(builder, rows):
    """Transpose a square of vectors in place."""
    lanes, k = len(rows), 1
    index = ir.VectorType(ir.IntType(32), lanes)
    while k < lanes:  # swap the off-diagonal k x k blocks of every 2k x 2k one
        low = ir.Constant(index, [j + (lanes - k if j & k else 0) for j in range(lanes)])
        high = ir.Constant(index, [j + (lanes if j & k else k) for j in range(lanes)])
        for i in range(lanes):
            if not i & k:
                a, b = rows[i], rows[i + k]
                rows[i], rows[i + k] = builder.shuffle_vector(a, b, low), builder.shuffle_vector(a, b, high)
        k *= 2


@intrinsic
def _turn(_, x, out, m, n):
    """One square tile of a vector's width: out[n:, m:] = x[m:, n:]'."""

    def generate(context, builder, signature, args):
        i64, size = ir.IntType(64), signature.args[0].dtype.bitwidth // 8
        lanes = VECTOR // size
        vector = ir.VectorType(context.get_value_type(signature.args[0].dtype), lanes)

        def row(base, stride, r, c, i):
            at = builder.add(base, builder.mul(stride, builder.add(r, ir.Constant(i64, i))))
            at = builder.add(at, builder.mul(c, ir.Constant(i64, size)))
            return builder.inttoptr(at, vector.as_pointer())

        (base, (stride, _)), (to, (to_stride, _)) = (
            pointer(context, builder, kind, arg) for kind, arg in zip(signature.args[:2], args[:2])
        )
        m, n = args[2:]
        rows = [builder.load(row(base, stride, m, n, i), align=size) for i in range(lanes)]
        turn(builder, rows)
        for i, x in enumerate(rows):
            builder.store(x, row(to, to_stride, n, m, i), align=size)
        return context.get_dummy_value()

    return types.void(x, out, m, n), generate


def ask(builder, address):
    """Prefetch the cache line there."""
    byte, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, byte), i32(0), i32(3), i32(1)])  # to read, all caches, data


@intrinsic
def _prefetch(_, address):
    def generate(context, builder, signature, args):
        ask(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


# What is asked for during products: memory from one address on, and rows at any addresses, a few with every tile. In
# `state` that address, the bytes for every column of A, the first and last row, rows a tile, bytes of a row.
Ahead = namedtuple("Ahead", "rows state")


@njit(**OPTIONS)
def _come_near(ahead, columns):
    """Ask for the rows that go with a tile; where its products ask, and the bytes for each of so many columns of A."""
    if ahead is None:
        return 0, 0
    state = ahead.state
    first, last = state[2], min(state[2] + state[4], state[3])
    for i in range(first, last):
        for line in range(0, state[5], 64):
            _prefetch(ahead.rows[i] + line)
    state[2] = last
    state[0] += state[1] * columns
    return state[0] - state[1] * columns, state[1]


@njit(**OPTIONS)
def aligned(like, rows, columns):
    """An empty array from a multiple of 64 bytes on: vectors then never straddle two cache lines."""
    raw = np.empty(rows * columns + 64 // like.itemsize, like.dtype)
    first = (-raw.ctypes.data % 64) // like.itemsize
    return raw[first : first + rows * columns].reshape((rows, columns))


_tile1, _tile2, _tile4 = _tile(1), _tile(2), _tile(4)


@njit(**OPTIONS)
def _walk(out, A, B, x, X, y, Y, ahead):
    """out = A B + x X + y Y, tile by tile."""
    lanes = VECTOR // out.itemsize
    M, N = out.shape
    wide = N // (4 * lanes) * 4 * lanes
    half = N // (2 * lanes) * 2 * lanes
    for n in range(0, wide, 4 * lanes):
        for m in range(0, M, SUMS // 4):
            _tile4(out, m, n, A, B, x, X, y, Y, ahead, *_come_near(ahead, A.shape[1]))
    for n in range(wide, half, 2 * lanes):
        for m in range(0, M, SUMS // 2):
            _tile2(out, m, n, A, B, x, X, y, Y, ahead, *_come_near(ahead, A.shape[1]))
    for n in range(half, N, lanes):
        for m in range(0, M, SUMS):
            _tile1(out, m, n, A, B, x, X, y, Y, ahead, *_come_near(ahead, A.shape[1]))


def _signatures(*kinds: str) -> list:
    """Arrays of any layout and numbers, for both types: one compilation each."""
    return [void(*(real[:, :] if kind == "array" else real for kind in kinds)) for real in (float32, float64)]


@njit(_signatures("array", "array", "array"), **OPTIONS)
def product(out, A, B):
    """out = A B."""
    _walk(out, A, B, None, None, None, None, None)


@njit(_signatures("array", "number", "array", "array", "array"), **OPTIONS)
def scale_add(out, x, X, A, B):
    """out = x X + A B."""
    _walk(out, A, B, x, X, None, None, None)


@njit(_signatures("array", "number", "array", "number", "array", "array", "array"), **OPTIONS)
def mix_add(out, x, X, y, Y, A, B):
    """out = x X + y Y + A B."""
    _walk(out, A, B, x, X, y, Y, None)


@njit(_signatures("array", "array", "array"), **OPTIONS)
def add_product(out, A, B):
    """out += A B."""
    _walk(out, A, B, out.dtype.type(1), out, None, None, None)


@njit([void(real[:, :], real[:, :]) for real in (float32, float64)], **OPTIONS)
def transpose(x, out):
    """out[:N, :M] = x' of x [M, N]."""
    lanes = VECTOR // out.itemsize
    for m in range(0, x.shape[0], lanes):
        for n in range(0, x.shape[1], lanes):
            _turn(x, out, m, n)


@njit(**OPTIONS)
def prefetch(x, start, length):
    """Ask for x[start : start + length], x flat, before it is needed."""
    first = x.ctypes.data + start * x.itemsize
    for line in range(0, length * x.itemsize, 64):
        _prefetch(first + line)


@njit(**OPTIONS)
def product_ahead(out, x, X, A, B, ahead):
    """out = x X + A B, while memory that later products read comes near."""
    if x == 0:
        _walk(out, A, B, None, None, None, None, ahead)
    else:
        _walk(out, A, B, x, X, None, None, ahead)
