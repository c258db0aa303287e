"""The backward kernels of csrc/attention_backward*.cuh as a Python function: from their source, and from nvcc's PTX."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda_on_cpu.calls import Shape, View, interpret
from tests.cuda_on_cpu.harness import CSRC, DTYPES, Run, build, emit_ptx
from tests.cuda_on_cpu.problems import Gradients, Learning, laid_out


class AttentionBackward(ctypes.Structure):
    """csrc/attention_backward.cuh has the meaning of the fields."""

    _fields_ = [
        *((name, View) for name in ("queries", "keys", "values", "output", "d_output")),
        *((name, View) for name in ("d_queries", "d_keys", "d_values")),
        *((name, ctypes.c_void_p) for name in ("log_sum_exp", "limits", "head_scales", "d_head_scales")),
        *((name, ctypes.c_void_p) for name in ("query_numbers", "key_inverse_lengths", "head_scale_parts")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("batch", "heads", "key_heads", "query_count", "key_count")),
    ]


@dataclass(frozen=True)
class Watched:
    """Gradients from the emulator, and what it saw of each kernel on the way."""

    gradients: Gradients
    runs: dict[str, Run]

    @property
    def reports(self) -> list[str]:
        return [report for run in self.runs.values() for report in run.reports]


def padded(rows: int) -> int:
    return -(-rows // 64) * 64


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Launch:
    """A problem's tensors, as the kernels want them. What they write is NaN before; gradients have strides of
    their own."""

    def __init__(self, learning: Learning) -> None:
        problem, d_output = learning.problem, learning.d_output_BHLK
        q, k, v = problem.q_BHLK, problem.k_BGNK, problem.v_BGNK
        (batch, heads, queries, width), (key_heads, keys) = q.shape, k.shape[1:3]
        output, log_sum_exp = learning.output_BHLK, learning.log_sum_exp_BHL
        limits = torch.tensor(problem.limits, dtype=torch.int32)
        d_q, d_k, d_v = (
            laid_out(torch.full_like(x, math.nan), layout)
            for x, layout in ((q, "cache"), (k, "contiguous"), (v, "fused"))
        )
        numbers = torch.full((batch, heads, padded(queries), 4), math.nan)
        scales = d_scales = lengths = parts = None
        if problem.cosine is not None:
            scales, d_scales = problem.cosine.float(), torch.full((heads,), math.nan)
            lengths = torch.full((batch, key_heads, padded(keys)), math.nan)
            parts = torch.full((heads, batch, padded(queries) // 16), math.nan)

        written = {"q_BHLK": d_q, "k_BGNK": d_k, "v_BGNK": d_v, "cosine": d_scales}
        self.gradients: Gradients = {name: x for name, x in written.items() if x is not None}
        self.call = AttentionBackward(
            *(View.of(x) for x in (q, k, v, output, d_output, d_q, d_k, d_v)),
            *(pointer(x) for x in (log_sum_exp, limits, scales, d_scales, numbers, lengths, parts)),
            problem.scale,
            *(batch, heads, key_heads, queries, keys),
        )
        prepared = [q, k, v, d_output, limits, scales, numbers, lengths]
        self.kernels: dict[str, tuple[list[Tensor], list[Tensor]]] = {
            name: ([x for x in reads if x is not None], [x for x in writes if x is not None])
            for name, reads, writes in (
                ("prepare", [q, k, output, d_output, log_sum_exp, limits], [numbers, lengths]),
                ("keys", prepared, [d_k, d_v]),
                ("queries", prepared, [d_q, parts]),
                ("head_scales", [parts], [d_scales]),
            )
            if scales is not None or name != "head_scales"
        }
        """In order, with what each reads and writes, and nothing else."""
        self.defines = {"FORMAT": DTYPES[q.dtype], "WIDTH": width, "COSINE": str(scales is not None).lower()}

    def template(self, kernel: str) -> str:
        """A kernel's name in C++. To nvcc a comma means that another macro follows, unless it is escaped."""
        arguments = "32" if kernel == "head_scales" else r"Format::{FORMAT}\,{WIDTH}\,{COSINE}".format(**self.defines)
        return f"attention_backward_{kernel}<{arguments}>"


def attention_backward(learning: Learning, *, seed: int = 0, csrc: Path = CSRC) -> Watched:
    """The kernels' source, compiled by g++ and watched by the checker."""
    launch = Launch(learning)
    library = build("attention_backward.cpp", launch.defines, csrc)
    runs = {
        name: library.launch(
            "attention_backward_on_cpu", ctypes.byref(launch.call), name.encode(), reads=reads, writes=writes, seed=seed
        )
        for name, (reads, writes) in launch.kernels.items()
    }
    return Watched(launch.gradients, runs)


def attention_backward_ptx(learning: Learning, *, csrc: Path = CSRC, arch: str = "sm_80") -> Gradients:
    """The PTX that nvcc makes of them, interpreted."""
    launch = Launch(learning)
    library = build("attention_backward.cpp", launch.defines)
    for name, (reads, writes) in launch.kernels.items():
        shape = Shape()
        library.function("attention_backward_shape")(ctypes.byref(launch.call), name.encode(), ctypes.byref(shape))
        ptx = emit_ptx("attention_backward.cu", {"KERNEL": launch.template(name)}, csrc, arch)
        interpret(ptx, library, launch.call, shape, reads=reads, writes=writes)
    return launch.gradients
