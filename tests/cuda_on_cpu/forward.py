"""The forward kernel of csrc/attention_forward.cuh as a Python function: from its source, and from nvcc's PTX."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.cuda_on_cpu.harness import CSRC, DTYPES, Library, Run, build, emit_ptx, span_of
from tests.cuda_on_cpu.problems import Problem
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


class AttentionForward(ctypes.Structure):
    """csrc/attention_forward.cuh has the meaning of the fields."""

    _fields_ = [
        *((name, View) for name in ("queries", "keys", "values", "output")),
        *((name, ctypes.c_void_p) for name in ("log_sum_exp", "limits", "head_scales")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "query_count", "key_count")),
    ]


class Shape(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("threads", ctypes.c_int), ("shared_bytes", ctypes.c_int)]


@dataclass(frozen=True)
class Result:
    output_BHLK: Tensor
    log_sum_exp_BHL: Tensor


@dataclass(frozen=True)
class Watched(Result):
    """A result of the emulator, and what it saw on the way."""

    run: Run


class Launch:
    """A problem's tensors, as a kernel wants them. The output lies in memory as [B, L, H, K], as the projection after
    it wants it, and is NaN where nothing is written."""

    def __init__(self, problem: Problem) -> None:
        q, k, v = problem.q_BHLK, problem.k_BGNK, problem.v_BGNK
        self.batch, heads, queries, width = q.shape
        self.output = torch.full((self.batch, queries, heads, width), math.nan, dtype=q.dtype).transpose(1, 2)
        self.log_sum_exp = torch.full((self.batch, heads, queries), math.nan)
        limits = torch.tensor(problem.limits, dtype=torch.int32)
        self.reads, self.writes = [q, k, v, limits], [self.output, self.log_sum_exp]
        if problem.cosine is not None:
            self.reads.append(problem.cosine.float())
        self.call = AttentionForward(
            *(View.of(x) for x in (q, k, v, self.output)),
            self.log_sum_exp.data_ptr(),
            limits.data_ptr(),
            None if problem.cosine is None else self.reads[-1].data_ptr(),
            problem.scale,
            heads,
            k.shape[1],
            queries,
            k.shape[2],
        )
        cosine = str(problem.cosine is not None).lower()
        self.defines = {"FORMAT": DTYPES[q.dtype], "WIDTH": width, "COSINE": cosine}


def attention_forward(problem: Problem, *, seed: int = 0, csrc: Path = CSRC) -> Watched:
    """The kernel's source, compiled by g++ and watched by the checker."""
    launch = Launch(problem)
    run = build("attention_forward.cpp", launch.defines, csrc).launch(
        "attention_forward_on_cpu",
        ctypes.byref(launch.call),
        launch.batch,
        reads=launch.reads,
        writes=launch.writes,
        seed=seed,
    )
    return Watched(launch.output, launch.log_sum_exp, run)


def attention_forward_ptx(problem: Problem, *, csrc: Path = CSRC, arch: str = "sm_80") -> Result:
    """The PTX that nvcc makes of it, interpreted."""
    launch = Launch(problem)
    library = build("attention_forward.cpp", launch.defines)
    shape = Shape()
    library.function("attention_forward_shape")(ctypes.byref(launch.call), launch.batch, ctypes.byref(shape))
    source = emit_ptx("attention_forward.cu", launch.defines, csrc, arch)
    interpret(source, shape, launch.call, library, reads=launch.reads, writes=launch.writes)
    return Result(launch.output, launch.log_sum_exp)


def interpret(
    source: str,
    shape: Shape,
    call: ctypes.Structure,
    library: Library,
    *,
    reads: Iterable[Tensor],
    writes: Iterable[Tensor],
) -> None:
    """Run the kernel in a PTX text, with the approximations of the emulator in ``library``."""
    x, y, z = shape.grid
    Machine(
        Program.parse(source),
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
