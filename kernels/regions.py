"""Parallel regions that compiled code begins itself, on the threads that torch uses.

A region that begins in Python (`threads.run_tasks`) costs 50 us, since each thread has to take the interpreter's lock;
one that begins here costs 1. In numba's code, `run(work, threads, arguments)` calls the compiled work(thread, threads,
*arguments) on each thread and returns when all have. An exception in it is lost.
"""

import ctypes

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from memzoo.kernels.threads import _openmp

_NAMES = ("memzoo_parallel", "memzoo_thread", "memzoo_threads")
_nothing = ctypes.CFUNCTYPE(None)(lambda: None)  # what code is linked to that is never reached without OpenMP
available = _openmp() is not None
for _name, _function in zip(_NAMES, _openmp() or (_nothing,) * 3):
    binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)


@intrinsic
def run(typing, work, threads, arguments):
    signature = work.get_call_type(typing, (types.int64, types.int64, *arguments.types), {})
    if signature.return_type != types.none:
        raise TypeError("what a region runs must return nothing")

    def generate(context, builder, _, values):
        void, i32, byte = ir.VoidType(), ir.IntType(32), ir.IntType(8).as_pointer()
        parallel, thread, team = (
            cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, parameters), name)
            for name, result, parameters in zip(_NAMES, (void, i32, i32), ([byte, byte, i32, i32], [], []))
        )
        compiled = work.dispatcher.get_compile_result(signature)
        context.active_code_library.add_linking_library(compiled.library)
        target = context.declare_function(builder.module, compiled.fndesc)
        name = builder.module.get_unique_name("memzoo_work")
        body = ir.Function(builder.module, ir.FunctionType(void, [byte]), name)
        body.linkage = "internal"
        inner = ir.IRBuilder(body.append_basic_block())
        place = cgutils.alloca_once_value(builder, values[2])
        given = cgutils.unpack_tuple(inner, inner.load(inner.bitcast(body.args[0], place.type)))
        numbers = [inner.sext(inner.call(function, []), ir.IntType(64)) for function in (thread, team)]
        context.call_conv.call_function(inner, target, types.none, signature.args, [*numbers, *given])
        inner.ret_void()
        count = builder.trunc(values[1], i32)
        builder.call(parallel, [builder.bitcast(body, byte), builder.bitcast(place, byte), count, i32(0)])
        return context.get_dummy_value()

    return types.void(work, threads, arguments), generate
