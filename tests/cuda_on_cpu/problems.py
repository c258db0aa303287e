"""Inputs of attention: what it should compute on them, and random ones of all shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    def logits(self) -> Tensor:
        """In float64; minus infinity where a key is hidden."""
        q, k = self.q_BHLK.double(), self.k_BGNK.double()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        if self.cosine is not None:
            q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
            q = q * self.cosine.double()[:, None, None]
        else:
            q = q * self.scale
        hidden = torch.arange(k.shape[2]) >= torch.tensor(self.limits)[:, None]
        return (q @ k.transpose(-2, -1)).masked_fill(hidden, -math.inf)

    def attend(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""
        v = self.v_BGNK.double().repeat_interleave(logits.shape[1] // self.v_BGNK.shape[1], dim=1)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp in float64."""
        return self.attend(self.logits())

    def plain(self) -> Tensor:
        """The usual code: products and normalisation in the inputs' precision, softmax in float32."""
        seen = self.limits[-1]
        return attention(
            self.q_BHLK,
            self.k_BGNK[:, :, :seen],
            self.v_BGNK[:, :, :seen],
            limits=Limits.of(self.limits),
            cosine=self.cosine,
            scale=self.scale if self.cosine is None else None,
            backend="matmul",
        )

    @property
    def learned(self) -> dict[str, Tensor]:
        """What has a gradient."""
        every = {"q_BHLK": self.q_BHLK, "k_BGNK": self.k_BGNK, "v_BGNK": self.v_BGNK}
        return every if self.cosine is None else {**every, "cosine": self.cosine}

    def with_leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """The same numbers, of which autograd keeps track."""
        leaves = {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in self.learned.items()}
        return replace(self, **leaves)


Gradients = dict[str, Tensor]
"""By the names of :attr:`Problem.learned`."""

FLOAT32 = 2.0**-22
"""How far a sum of products of 16-bit numbers may be off in float32, for its terms' size."""


@dataclass(frozen=True)
class Learning:
    """Inputs of a backward pass: those of the forward pass, what that kept, and the gradient of its output."""

    problem: Problem
    output_BHLK: Tensor
    log_sum_exp_BHL: Tensor
    d_output_BHLK: Tensor

    @classmethod
    def of(cls, problem: Problem, *, layout: str = "fused", seed: int = 9) -> Learning:
        """With a random gradient, and what an exact forward pass would keep."""
        dtype = problem.q_BHLK.dtype
        output, log_sum_exp = problem.exact()
        d_output = laid_out(numbers(*output.shape, seed=seed).to(dtype), layout)
        return cls(problem, output.to(dtype), log_sum_exp.float(), d_output)

    def exact(self) -> tuple[Gradients, Gradients]:
        """The gradients in float64, and how far from these a kernel may be because of what it is given.

        Of the output it only knows the rounded numbers, and delta = output . d_output is computed from these, in
        float32. Where a row's weight is all one key's, delta and d_weights cancel, and its error is all that is left;
        that is then rounded twice, as one of d_logits and as a sum of these.
        The gradient of head scales is, besides, a sum of d_logits that were rounded one by one: such errors add up as
        the steps of a random walk.
        """
        problem, d_output = self.problem.with_leaves(torch.float64), self.d_output_BHLK.double()
        leaves = problem.learned
        logits = problem.logits()
        output, log_sum_exp = problem.attend(logits)
        *found, d_logits = torch.autograd.grad(output, [*leaves.values(), logits], d_output, retain_graph=True)
        exact = dict(zip(leaves, found, strict=True))

        eps = torch.finfo(self.output_BHLK.dtype).eps
        delta_error = ((self.output_BHLK - output) * d_output).sum(-1).detach()
        size = (output * d_output).abs().sum(-1).detach()
        wrong_delta = (delta_error + torch.where(delta_error < 0, -1, 1) * FLOAT32 * size) * (1 + eps)
        # Logits lose weight times that; and weights are the gradient of the log-sum-exp. Values do not notice.
        changes = torch.autograd.grad(log_sum_exp, list(leaves.values()), wrong_delta, materialize_grads=True)
        slack = {name: change.abs() for name, change in zip(leaves, changes, strict=True)}
        if problem.cosine is not None:
            terms = (d_logits * logits).nan_to_num(0).detach() / problem.cosine.detach()[:, None, None]
            slack["cosine"] += eps / 2 * terms.square().sum((0, 2, 3)).sqrt()
        return exact, slack

    def plain(self) -> Gradients:
        """Those of the usual code."""
        problem = self.problem.with_leaves()
        found = torch.autograd.grad(problem.plain(), list(problem.learned.values()), self.d_output_BHLK)
        return dict(zip(problem.learned, found, strict=True))


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
    unseen: int = 0,
    seed: int = 0,
) -> Problem:
    """Random inputs; ``factor`` multiplies cosine's usual 10, or the usual 1 / sqrt(width); ``unseen`` keys come after
    those that somebody sees."""
    heads, keys = key_heads * share, limits[-1] + unseen
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
        unseen=draw(st.sampled_from([0, 0, 1, 70])),
        seed=draw(seeds),
    )


SMALL = (1, 2, 3, 5, 6, 8)
"""139 tokens: three tiles, the last one in part."""


def with_all_sides(
    dtype: torch.dtype = torch.bfloat16, width: int = 64, cosine: bool = True, unseen: int = 0
) -> Problem:
    """20 keys from before, shared key heads, odd layouts, and a query and a key of zeros: most mistakes show here."""
    limits = [20 + limit for limit in visible_keys(SMALL)]
    layouts = ("fused", "cache", "fused")
    sizes = {"batch": 2, "key_heads": 2, "share": 2, "unseen": unseen}
    all_sides = problem(dtype, width, limits, cosine=cosine, layouts=layouts, **sizes)
    all_sides.q_BHLK[:, :, 7] = 0
    all_sides.k_BGNK[:, :, 30] = 0
    return all_sides
