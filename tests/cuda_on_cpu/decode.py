"""The kernels of csrc/decode.cuh as a Python function: from their source, and from nvcc's PTX."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_on_cpu.calls import Shape, View, interpret
from tests.cuda_on_cpu.harness import CSRC, DTYPES, Library, Run, build, emit_ptx
from tests.cuda_on_cpu.next_scale import Result, cache_of
from tests.cuda_on_cpu.problems import LAYOUTS, laid_out
from tests.models import numbers, seeds
from vargpt.kernels import attention
from vargpt.kernels.call import rotate


class Decode(ctypes.Structure):
    """csrc/decode.cuh has the meaning of the fields."""

    _fields_ = [
        *((name, View) for name in ("queries", "new_keys", "new_values", "cached_keys", "cached_values", "output")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "mask", "split_outputs", "split_sums")),
        *((name, ctypes.c_int64) for name in ("angle_stride", "mask_stride")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "past", "splits", "split_keys")),
    ]


class Splits(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int), ("keys", ctypes.c_int)]
    count: int
    keys: int


@dataclass(frozen=True)
class Case:
    """A token whose query, key and value are given as the projections make them, the last of N; keys before it, which
    are turned already, and values are in a cache that has room for ``spare`` more. ``angles_RK`` are those of its
    position, R = 1 where all rows agree."""

    q_BH1K: Tensor
    k_BGNK: Tensor
    v_BGNK: Tensor
    angles_RK: Tensor
    mask_BN: Tensor | None = None
    scale: float = 1.0
    spare: int = 0
    layouts: tuple[str, str] = ("contiguous", "contiguous")  # of cached keys and values
    multiprocessors: int = 108

    @property
    def past(self) -> int:
        return self.k_BGNK.shape[2] - 1

    def caches(self) -> tuple[Tensor, Tensor]:
        """Keys and values as they lie before the call: NaN where no token has been."""
        keys, values = self.layouts
        return (
            cache_of(self.k_BGNK, self.past, self.spare, keys),
            cache_of(self.v_BGNK, self.past, self.spare, values),
        )

    def turned(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The query, and all keys, computed in a precision."""
        cosines, sines = (x[:, None, None].float().to(dtype) for x in (self.angles_RK.cos(), self.angles_RK.sin()))
        q, k = self.q_BH1K.to(dtype), self.k_BGNK.to(dtype)
        new = rotate(k[:, :, self.past :], cosines, sines)
        return rotate(q, cosines, sines), torch.cat((k[:, :, : self.past], new), dim=2)

    def exact(self, rounded: bool = False) -> tuple[Tensor, Tensor]:
        """Output and new key in float64; ``rounded``: of a turned query and key that were rounded to 16 bits
        once, as whoever keeps them so must."""
        q, k = self.turned(torch.float64)
        if rounded:
            q, k = (x.to(self.q_BH1K.dtype).double() for x in (q, k))
        share = q.shape[1] // k.shape[1]
        logits = self.scale * q @ k.repeat_interleave(share, dim=1).transpose(-2, -1)
        if self.mask_BN is not None:
            hidden = ~self.mask_BN.clone()
            hidden[:, -1] = False  # a token sees itself
            logits = logits.masked_fill(hidden[:, None, None], -math.inf)
        values = self.v_BGNK.double().repeat_interleave(share, dim=1)
        return logits.softmax(-1) @ values, k[:, :, self.past :]

    def plain(self) -> Tensor:
        """The usual code: query and key turned in float32, products in the inputs' precision, softmax in float32."""
        q, k = (x.to(self.q_BH1K.dtype) for x in self.turned(torch.float32))
        return attention(q, k, self.v_BGNK, causal=True, key_mask=self.mask_BN, scale=self.scale, backend="matmul")


@dataclass(frozen=True)
class Watched(Result):
    """A result of the emulator, and what it saw on the way, in each of the two kernels."""

    attend: Run | None  # not launched with an empty cache
    combine: Run


class Launch:
    """A case's tensors, as the kernels want them; NaN where nothing is written."""

    def __init__(self, case: Case, csrc: Path) -> None:
        q, past = case.q_BH1K, case.past
        self.batch, heads, _, width = q.shape
        key_heads = case.k_BGNK.shape[1]
        self.defines = {"FORMAT": DTYPES[q.dtype], "WIDTH": width}
        self.library = build("decode.cpp", self.defines, csrc)
        splits = divide(self.library, self.batch, key_heads, past, case.multiprocessors)

        self.keys, self.values = case.caches()
        new_key, new_value = case.k_BGNK[:, :, past:], case.v_BGNK[:, :, past:]
        self.output = torch.full_like(q, math.nan, memory_format=torch.contiguous_format)
        split_outputs = torch.full((self.batch, heads, splits.count, width), math.nan)
        split_sums = torch.full((self.batch, heads, splits.count, 2), math.nan)
        cosines, sines = case.angles_RK.cos().float(), case.angles_RK.sin().float()
        mask = [] if case.mask_BN is None else [case.mask_BN]
        self.workspace = [split_outputs, split_sums] if splits.count else []
        self.attend_reads = [q, self.keys, self.values, cosines, sines, *mask]
        self.combine_reads = [q, new_key, new_value, cosines, sines, *self.workspace]
        self.combine_writes = [self.keys, self.values, self.output]
        self.call = Decode(
            *(View.of(x) for x in (q, new_key, new_value, self.keys, self.values, self.output)),
            cosines.data_ptr(),
            sines.data_ptr(),
            mask[0].data_ptr() if mask else None,
            split_outputs.data_ptr(),
            split_sums.data_ptr(),
            cosines.stride(0) if len(cosines) > 1 else 0,
            mask[0].stride(0) if mask else 0,
            case.scale,
            heads,
            key_heads,
            past,
            splits.count,
            splits.keys,
        )


def divide(library: Library, batch: int, key_heads: int, past: int, multiprocessors: int) -> Splits:
    splits = Splits()
    library.function("decode_splits")(batch, key_heads, past, multiprocessors, ctypes.byref(splits))
    return splits


def decode(case: Case, *, seed: int = 0, csrc: Path = CSRC) -> Watched:
    """The kernels' source, compiled by g++ and watched by the checker."""
    launch = Launch(case, csrc)

    def run(name: str, reads: list[Tensor], writes: list[Tensor]) -> Run:
        return launch.library.launch(
            name, ctypes.byref(launch.call), launch.batch, reads=reads, writes=writes, seed=seed
        )

    attend = run("decode_attend_on_cpu", launch.attend_reads, launch.workspace) if launch.call.splits else None
    combine = run("decode_combine_on_cpu", launch.combine_reads, launch.combine_writes)
    return Watched(launch.output, launch.keys, launch.values, attend, combine)


def decode_ptx(case: Case, *, csrc: Path = CSRC, arch: str = "sm_80") -> Result:
    """The PTX that nvcc makes of them, interpreted."""
    launch = Launch(case, CSRC)

    def run(name: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        shape = Shape()
        launch.library.function(f"{name}_shape")(ctypes.byref(launch.call), launch.batch, ctypes.byref(shape))
        source = emit_ptx("decode.cu", {"KERNEL": name, **launch.defines}, csrc, arch)
        interpret(source, launch.library, launch.call, shape, reads=reads, writes=writes)

    if launch.call.splits:
        run("decode_attend", launch.attend_reads, launch.workspace)
    run("decode_combine", launch.combine_reads, launch.combine_writes)
    return Result(launch.output, launch.keys, launch.values)


def random_case(
    dtype: torch.dtype,
    width: int,
    past: int,
    *,
    batch: int = 1,
    key_heads: int = 1,
    share: int = 1,
    factor: float = 1.0,
    masked: bool = False,
    positions: int = 1,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
    cache_layouts: tuple[str, str] = ("contiguous", "contiguous"),
    spare: int = 0,
    multiprocessors: int = 108,
    seed: int = 0,
) -> Case:
    """Random inputs: ``positions`` is 1 or the batch, ``factor`` multiplies the usual 1 / sqrt(width), and masks hide
    about half of the keys, and in every second row a run of 100 and the token itself."""
    shapes = [(key_heads * share, 1), (key_heads, past + 1), (key_heads, past + 1)]
    q, k, v = (
        laid_out(numbers(batch, *shape, width, seed=seed + i).to(dtype), layout)
        for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    )
    mask = None
    if masked:
        mask = (numbers(batch, past + 8, seed=seed + 3) > 0)[:, : past + 1]
        mask[::2, 50:150] = mask[::2, -1:] = False
    angles = 100 * numbers(positions, width, seed=seed + 4).double()
    return Case(q, k, v, angles, mask, factor / math.sqrt(width), spare, cache_layouts, multiprocessors)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, width: int) -> Case:
    batch = draw(st.integers(1, 3))
    return random_case(
        dtype,
        width,
        draw(st.one_of(st.just(0), st.integers(1, 300))),
        batch=batch,
        key_heads=draw(st.integers(1, 2)),
        share=draw(st.one_of(st.integers(1, 8), st.integers(9, 16))),
        factor=draw(st.sampled_from([0.1, 1.0, 10.0])),
        masked=draw(st.booleans()),
        positions=draw(st.sampled_from([1, batch])),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        cache_layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 2)),
        spare=draw(st.integers(0, 70)),
        multiprocessors=draw(st.sampled_from([1, 2, 108])),  # few: splits of several tiles
        seed=draw(seeds),
    )


def with_all_sides(dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Case:
    """Two splits of two tiles and one that ends within its first; shared key heads, odd layouts, a mask that hides all
    of a tile, of the second or the last split, and the token itself, a position for every row, and room left."""
    case = random_case(
        dtype,
        width,
        290,
        batch=2,
        key_heads=2,
        share=3,
        masked=True,
        positions=2,
        layouts=("fused", "cache", "fused"),
        cache_layouts=("fused", "cache"),
        spare=13,
        multiprocessors=2 if width == 64 else 4,
    )
    assert case.mask_BN is not None
    case.mask_BN[0, 128:256] = case.mask_BN[1, 256:] = False
    return case
