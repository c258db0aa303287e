"""What kernels are called with, and their PTX called with the same."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from tests.cuda_on_cpu.harness import Library, span_of
from tests.cuda_on_cpu.ptx import Array, Machine, Memory, Program


class View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    ]

    @classmethod
    def of(cls, tensor_BHLK: Tensor) -> View:
        *strides, one = tensor_BHLK.stride()
        assert one == 1
        return cls(tensor_BHLK.data_ptr(), *strides)


class Shape(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("threads", ctypes.c_int), ("shared_bytes", ctypes.c_int)]


def interpret(
    ptx: str,
    library: Library,
    call: ctypes.Structure,
    shape: Shape,
    *,
    reads: Iterable[Tensor],
    writes: Iterable[Tensor],
) -> None:
    """Run the one kernel of a .ptx file; the library is the emulator that it is to agree with."""
    x, y, z = shape.grid
    Machine(
        Program.parse(ptx),
        grid=(x, y, z),
        block=shape.threads,
        shared_bytes=shape.shared_bytes,
        parameter=bytes(call),
        memories=[memory_of(x, writable=False) for x in reads] + [memory_of(x) for x in writes],
        approximations={name: partial(approximate, library, f"cuda_on_cpu_{c}") for name, c in APPROXIMATIONS.items()},
    ).run()


APPROXIMATIONS = {"ex2": "exp2", "lg2": "log2"}


def approximate(library: Library, name: str, x: Array) -> Array:
    """A function of the emulator, so that the two ways to run a kernel can agree to the last bit."""
    result = np.array(x, np.float32)
    library.function(name)(ctypes.c_void_p(result.ctypes.data), ctypes.c_size_t(result.size))
    return result


def memory_of(tensor: Tensor, writable: bool = True) -> Memory:
    array_type: Any = ctypes.c_uint8 * span_of(tensor)
    return Memory(tensor.data_ptr(), np.ctypeslib.as_array(array_type.from_address(tensor.data_ptr())), writable)
