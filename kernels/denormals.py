"""Numbers too small to be normal cost an Intel or AMD processor a hundred cycles each: compiled loops round them to 0.

`mode = rounding_mode(); set_rounding_mode(mode | FLUSH)` in numba's code, and `set_rounding_mode(mode)` before it
returns, on the thread that computes. Other processors are as fast with them, and left alone.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

FLUSH = 1 << 15 | 1 << 6  # results, operands

_x86 = binding.get_process_triple().startswith(("x86_64", "i386", "i686"))


def _move(builder, name, place):
    """`stmxcsr` writes the processor's mode to a place, `ldmxcsr` reads it from there."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [byte]), name)
    builder.call(function, [builder.bitcast(place, byte)])


@intrinsic
def rounding_mode(_):
    def generate(context, builder, signature, args):
        place = cgutils.alloca_once_value(builder, ir.IntType(32)(0))
        if _x86:
            _move(builder, "llvm.x86.sse.stmxcsr", place)
        return builder.zext(builder.load(place), ir.IntType(64))

    return types.int64(), generate


@intrinsic
def set_rounding_mode(_, mode):
    def generate(context, builder, signature, args):
        if _x86:
            place = cgutils.alloca_once_value(builder, builder.trunc(args[0], ir.IntType(32)))
            _move(builder, "llvm.x86.sse.ldmxcsr", place)
        return context.get_dummy_value()

    return types.void(types.int64), generate
