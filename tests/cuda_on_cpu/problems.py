"""Inputs of attention: what it should compute on them, and random ones of all shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.models import numbers, seeds
from vargpt.kernels import attention
from vargpt.scales import Limits


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


def plain(problem: Problem) -> Tensor:
    """The usual code: products and normalisation in the inputs' precision, softmax in float32."""
    return attention(
        problem.q_BHLK,
        problem.k_BGNK,
        problem.v_BGNK,
        limits=Limits.of(problem.limits),
        cosine=problem.cosine,
        scale=problem.scale if problem.cosine is None else None,
        backend="matmul",
    )


LAYOUTS = ("contiguous", "cache", "fused")


def laid_out(x_BHLK: Tensor, layout: str) -> Tensor:
    """The same numbers as a view of a larger tensor, which is NaN elsewhere: a longer cache, or a fused projection."""
    if layout == "contiguous":
        return x_BHLK
    batch, heads, length, width = x_BHLK.shape
    if layout == "cache":
        view = x_BHLK.new_full((batch, heads, length + 5, width), math.nan)[:, :, :length]
    else:
        view = x_BHLK.new_full((batch, length + 1, 2, heads, width), math.nan)[:, :length, 1].transpose(1, 2)
    return view.copy_(x_BHLK)


def problem(
    dtype: torch.dtype,
    width: int,
    limits: list[int],
    *,
    batch: int = 1,
    key_heads: int = 1,
    share: int = 1,
    cosine: bool = True,
    factor: float = 1.0,
    layouts: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous"),
    seed: int = 0,
) -> Problem:
    """Random inputs; ``factor`` multiplies cosine's usual 10, or the usual 1 / sqrt(width)."""
    heads, keys = key_heads * share, limits[-1]
    shapes = [(heads, len(limits)), (key_heads, keys), (key_heads, keys)]
    q, k, v = (
        laid_out(numbers(batch, *shape, width, seed=seed + i).to(dtype), layout)
        for i, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    )
    scales = (10 * factor * (1 + 0.1 * torch.arange(heads))).to(dtype) if cosine else None
    return Problem(q, k, v, limits, scales, factor / math.sqrt(width))


def visible_keys(patch_nums: Sequence[int]) -> list[int]:
    """Limits of a scale schedule. Not by ScaleSchedule: beartype would draw random numbers, in a strategy."""
    ends = accumulate(side * side for side in patch_nums)
    return [end for side, end in zip(patch_nums, ends, strict=True) for _ in range(side * side)]


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype, width: int, cosine: bool) -> Problem:
    if draw(st.booleans()):
        sides = sorted(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
        visible = visible_keys(sides)
        limits = visible[draw(st.integers(0, len(visible) - 1)) :]  # the queries are the last of the keys
    else:
        queries, before = draw(st.integers(1, 150)), draw(st.integers(0, 100))
        own = before + 1 + torch.arange(queries)
        random = torch.rand(queries, generator=torch.Generator().manual_seed(draw(seeds)))
        limits = (own + random * (before + queries + 1 - own)).long().sort().values.tolist()
    return problem(
        dtype,
        width,
        limits,
        batch=draw(st.integers(1, 2)),
        key_heads=draw(st.integers(1, 2)),
        share=draw(st.integers(1, 3)),
        cosine=cosine,
        factor=draw(st.sampled_from([0.1, 1.0, 10.0])),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        seed=draw(seeds),
    )


SMALL = (1, 2, 3, 5, 6, 8)
"""139 tokens: three tiles, the last one in part."""


def with_all_sides(dtype: torch.dtype = torch.bfloat16, width: int = 64, cosine: bool = True) -> Problem:
    """20 keys from before, shared key heads, odd layouts, and a query and a key of zeros: most mistakes show here."""
    limits = [20 + limit for limit in visible_keys(SMALL)]
    layouts = ("fused", "cache", "fused")
    all_sides = problem(dtype, width, limits, batch=2, key_heads=2, share=2, cosine=cosine, layouts=layouts)
    all_sides.q_BHLK[:, :, 7] = 0
    all_sides.k_BGNK[:, :, 30] = 0
    return all_sides
