"""The kernel of csrc/next_scale.cuh as a Python function: from its source, and from nvcc's PTX."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_on_cpu.calls import Shape, View, interpret
from tests.cuda_on_cpu.harness import CSRC, DTYPES, Run, build, emit_ptx
from tests.cuda_on_cpu.problems import LAYOUTS, Problem, laid_out, problem
from tests.models import seeds


class NextScale(ctypes.Structure):
    """csrc/next_scale.cuh has the meaning of the fields."""

    _fields_ = [
        *((name, View) for name in ("queries", "new_keys", "new_values", "cached_keys", "cached_values", "output")),
        ("head_scales", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "past", "count")),
    ]


@dataclass(frozen=True)
class Case:
    """A problem whose queries are the last of its keys and see them all; keys and values before them are in a cache
    that has room for ``spare`` more."""

    problem: Problem
    spare: int = 0
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of cached keys and values

    @property
    def past(self) -> int:
        return self.problem.k_BGNK.shape[2] - self.problem.q_BHLK.shape[2]

    def caches(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they lie before the call: NaN where no token has been."""
        keys, values = self.layouts
        return (
            cache_of(self.problem.k_BGNK, self.past, self.spare, keys),
            cache_of(self.problem.v_BGNK, self.past, self.spare, values),
        )


def cache_of(x_BGNK: Tensor, past: int, spare: int, layout: str) -> Tensor:
    """A cache with room for N + spare tokens, which holds the first ``past`` of these N, and is NaN elsewhere."""
    batch, heads, length, width = x_BGNK.shape
    cache = laid_out(x_BGNK.new_full((batch, heads, length + spare, width), math.nan), layout)
    cache[:, :, :past] = x_BGNK[:, :, :past]
    return cache


def memory_bits(x: Tensor) -> Tensor:
    """All that lies in a tensor's memory, between its numbers too, as bits: NaN is then equal to NaN."""
    storage = x.untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class Result:
    output_BHLK: Tensor
    cached_keys: Tensor
    cached_values: Tensor

    def same_bits(self, other: Result) -> bool:
        pairs = zip(vars(self).values(), vars(other).values(), strict=False)
        return all(torch.equal(memory_bits(a), memory_bits(b)) for a, b in pairs if isinstance(a, Tensor))


@dataclass(frozen=True)
class Watched(Result):
    """A result of the emulator, and what it saw on the way."""

    run: Run


class Launch:
    """A case's tensors, as the kernel wants them. The output lies in memory as [B, L, H, K], and is NaN where nothing
    is written."""

    def __init__(self, case: Case) -> None:
        problem, past = case.problem, case.past
        q = problem.q_BHLK
        self.batch, heads, count, width = q.shape
        self.keys, self.values = case.caches()
        new_keys, new_values = problem.k_BGNK[:, :, past:], problem.v_BGNK[:, :, past:]
        self.output = torch.full((self.batch, count, heads, width), math.nan, dtype=q.dtype).transpose(1, 2)
        self.reads, self.writes = [q, new_keys, new_values], [self.keys, self.values, self.output]
        if problem.cosine is not None:
            self.reads.append(problem.cosine.float())
        self.call = NextScale(
            *(View.of(x) for x in (q, new_keys, new_values, self.keys, self.values, self.output)),
            None if problem.cosine is None else self.reads[-1].data_ptr(),
            problem.scale,
            heads,
            new_keys.shape[1],
            past,
            count,
        )
        cosine = str(problem.cosine is not None).lower()
        self.defines = {"FORMAT": DTYPES[q.dtype], "WIDTH": width, "COSINE": cosine}


def next_scale(case: Case, *, seed: int = 0, csrc: Path = CSRC) -> Watched:
    """The kernel's source, compiled by g++ and watched by the checker."""
    launch = Launch(case)
    run = build("next_scale.cpp", launch.defines, csrc).launch(
        "next_scale_on_cpu",
        ctypes.byref(launch.call),
        launch.batch,
        reads=launch.reads,
        writes=launch.writes,
        seed=seed,
    )
    return Watched(launch.output, launch.keys, launch.values, run)


def next_scale_ptx(case: Case, *, csrc: Path = CSRC, arch: str = "sm_80") -> Result:
    """The PTX that nvcc makes of it, interpreted."""
    launch, shape = Launch(case), Shape()
    library = build("next_scale.cpp", launch.defines)
    library.function("next_scale_shape")(ctypes.byref(launch.call), launch.batch, ctypes.byref(shape))
    source = emit_ptx("next_scale.cu", launch.defines, csrc, arch)
    interpret(source, library, launch.call, shape, reads=launch.reads, writes=launch.writes)
    return Result(launch.output, launch.keys, launch.values)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, width: int, cosine: bool) -> Case:
    count = draw(st.one_of(st.integers(1, 10).map(lambda side: side * side), st.integers(1, 140)))
    past = draw(st.one_of(st.just(0), st.integers(1, 200)))
    drawn = problem(
        dtype,
        width,
        [past + count] * count,
        batch=draw(st.integers(1, 2)),
        key_heads=draw(st.integers(1, 2)),
        share=draw(st.integers(1, 3)),
        cosine=cosine,
        factor=draw(st.sampled_from([0.1, 1.0, 10.0])),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        seed=draw(seeds),
    )
    return Case(drawn, draw(st.integers(0, 70)), draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 2)))


def with_all_sides(dtype: torch.dtype = torch.bfloat16, width: int = 64, cosine: bool = True) -> Case:
    """Two tiles of old and two of new keys, both ending within one; shared key heads, odd layouts, a query and keys of
    zeros, and room left: most mistakes show here."""
    layouts = ("fused", "cache", "fused")
    drawn = problem(dtype, width, [90 + 81] * 81, batch=2, key_heads=2, share=2, cosine=cosine, layouts=layouts)
    drawn.q_BHLK[:, :, 7] = 0
    drawn.k_BGNK[:, :, [30, 100]] = 0
    return Case(drawn, spare=13, layouts=("fused", "cache"))
