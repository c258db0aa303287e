"""The forward kernel of csrc/attention_forward.cuh on the CPU, and what it should compute."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.cuda_on_cpu.harness import CSRC, DTYPES, Run, build


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


@dataclass(frozen=True)
class Problem:
    """Inputs of one call; ``cosine`` holds a scale for each head, or is None: then ``scale`` holds for all."""

    q_BHLK: Tensor
    k_BGNK: Tensor
    v_BGNK: Tensor
    limits: list[int]
    cosine: Tensor | None = None
    scale: float = 1.0

    def exact(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp in float64."""
        q, k, v = (x.double() for x in (self.q_BHLK, self.k_BGNK, self.v_BGNK))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        if self.cosine is not None:
            q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
            q = q * self.cosine.double()[:, None, None]
        else:
            q = q * self.scale
        hidden = torch.arange(k.shape[2]) >= torch.tensor(self.limits)[:, None]
        logits = (q @ k.transpose(-2, -1)).masked_fill(hidden, -math.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)


@dataclass(frozen=True)
class Result:
    output_BHLK: Tensor
    log_sum_exp_BHL: Tensor
    run: Run


def attention_forward(problem: Problem, *, seed: int = 0, csrc: Path = CSRC) -> Result:
    """Run the kernel; the output lies in memory as [B, L, H, K], as the projection after it wants it."""
    q, k, v = problem.q_BHLK, problem.k_BGNK, problem.v_BGNK
    batch, heads, queries, width = q.shape
    output = torch.full((batch, queries, heads, width), math.nan, dtype=q.dtype).transpose(1, 2)
    log_sum_exp = torch.full((batch, heads, queries), math.nan)
    limits = torch.tensor(problem.limits, dtype=torch.int32)
    inputs = [q, k, v, limits]
    if problem.cosine is not None:
        inputs.append(problem.cosine.float())
    call = AttentionForward(
        *(View.of(x) for x in (q, k, v, output)),
        log_sum_exp.data_ptr(),
        limits.data_ptr(),
        None if problem.cosine is None else inputs[-1].data_ptr(),
        problem.scale,
        heads,
        k.shape[1],
        queries,
        k.shape[2],
    )
    defines = {"FORMAT": DTYPES[q.dtype], "WIDTH": width, "COSINE": str(problem.cosine is not None).lower()}
    run = build("attention_forward.cpp", defines, csrc).launch(
        "attention_forward_on_cpu", ctypes.byref(call), batch, reads=inputs, writes=[output, log_sum_exp], seed=seed
    )
    return Result(output, log_sum_exp, run)
