"""Instructions for the CPU engine's kernels that Numba does not have.

Numba compiles a kernel anew when the kernel's own file has changed, not when this one has: after a change here, save
numba_kernels.py as well.
"""

from __future__ import annotations

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """float32 with these 32 bits."""
    return types.float32(types.uint32), lambda context, builder, sig, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """Pointer to float32 at an address."""
    signature = types.CPointer(types.float32)(types.int64)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return signature, generate


def _item(context: Any, builder: Any, array_type: Any, value: Any, index: Any) -> Any:
    array = context.make_array(array_type)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, array_type, array, [index])


@intrinsic
def fetch_add(typingctx: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index] before `value` was added to it, as one step for all threads; int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _item(context, builder, sig.args[0], args[0], args[1]), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """array[index] as other threads left it; int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(_item(context, builder, sig.args[0], args[0], args[1]), "seq_cst", 8)

    return types.int64(array, types.intp), generate


@intrinsic
def futex(typingctx: Any, address: Any, operation: Any, value: Any, timeout: Any) -> Any:
    """futex(2) on the 32 bits at an address, between threads of this process; timeout: 0 = none. Where there is no
    futex, a sleep of 50 microseconds: every wait is in a loop."""
    call = {"x86_64": 202, "aarch64": 98}.get(platform.machine()) if sys.platform == "linux" else None

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        long = ir.IntType(64)
        if call is None:
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
            builder.call(
                cgutils.get_or_insert_function(builder.module, kind, "usleep"), [ir.Constant(ir.IntType(32), 50)]
            )
        else:
            kind = ir.FunctionType(long, [long], var_arg=True)
            function = cgutils.get_or_insert_function(builder.module, kind, "syscall")
            none = ir.Constant(long, 0)
            builder.call(function, [ir.Constant(long, call), args[0], args[1], args[2], args[3], none, none])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call(typingctx: Any, function: Any, arguments: Any) -> Any:
    """Call the function at an address with a tuple of int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1], len(arguments))
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * len(arguments))
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(arguments))), generate
