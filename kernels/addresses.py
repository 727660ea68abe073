"""Tensors in compiled loops by address: handing an array over from Python takes as long as a small loop's work."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

ANY = 1 << 40  # numbers: nothing is ever read or written but at places that were given


@intrinsic
def flat(_, address, like):
    """In compiled code, the array of the numbers like `like` from an address on; nothing counts references to it."""
    kind = types.Array(like, 1, "C")

    def generate(context, builder, signature, args):
        i64, array = ir.IntType(64), context.make_array(kind)(context, builder)
        size = i64(context.get_abi_sizeof(context.get_data_type(like)))
        data = builder.inttoptr(args[0], context.get_data_type(like).as_pointer())
        shape, strides = (cgutils.pack_array(builder, [x]) for x in (i64(ANY), size))
        populate_array(array, data=data, shape=shape, strides=strides, itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(types.int64, like), generate
