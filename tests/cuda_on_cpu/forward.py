"""The forward kernel of csrc/attention_forward.cuh as a Python function: from its source, and from nvcc's PTX."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda_on_cpu.calls import Shape, View, interpret
from tests.cuda_on_cpu.harness import CSRC, DTYPES, Run, build, emit_ptx
from tests.cuda_on_cpu.problems import Problem


class AttentionForward(ctypes.Structure):
    """csrc/attention_forward.cuh has the meaning of the fields."""

    _fields_ = [
        *((name, View) for name in ("queries", "keys", "values", "output")),
        *((name, ctypes.c_void_p) for name in ("log_sum_exp", "limits", "head_scales")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "query_count", "key_count")),
    ]


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
    ptx = emit_ptx("attention_forward.cu", launch.defines, csrc, arch)
    interpret(ptx, library, launch.call, shape, reads=launch.reads, writes=launch.writes)
    return Result(launch.output, launch.log_sum_exp)
