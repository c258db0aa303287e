"""Ways to compute attention: what each can do, and when it is the one to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vargpt.scales import Limits


@dataclass(frozen=True, eq=False)
class Call:
    """One call: all keys, cached ones included, and queries that are the last of them. See :func:`attention`."""

    q_BHLK: Float[Tensor, "B H L K"]
    k_BGNK: Float[Tensor, "B G N K"]
    v_BGNK: Float[Tensor, "B G N K"]
    causal: bool
    limits: Limits | None
    key_mask: Bool[Tensor, "B _"] | None
    scale: float

    @property
    def queries(self) -> int:
        return self.q_BHLK.shape[2]

    @property
    def keys(self) -> int:
        return self.k_BGNK.shape[2]

    @property
    def grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.q_BHLK.shape[1] != self.k_BGNK.shape[1]

    @property
    def learns(self) -> bool:
        """Whether a backward pass will come."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q_BHLK, self.k_BGNK, self.v_BGNK))

    def check(self) -> None:
        """Raises ValueError where queries, keys and limits do not fit each other."""
        if self.queries > self.keys:
            raise ValueError(f"{self.queries} queries cannot be the last of {self.keys} keys")
        if self.key_mask is not None and self.key_mask.shape[1] != self.keys:
            raise ValueError(f"a mask of {self.key_mask.shape[1]} keys does not fit {self.keys} keys")
        if self.limits is None:
            return
        if self.limits.queries != self.queries:
            raise ValueError(f"limits of {self.limits.queries} queries do not fit {self.queries} queries")
        own = self.keys - self.queries
        for queries, keys in self.limits.runs:
            own += queries
            if not own <= keys <= self.keys:
                raise ValueError(f"a query that is key {own} of {self.keys} cannot see the first {keys}")

    def visibility(self) -> Bool[Tensor, "R L N"] | None:
        """The mask that causal, limits and key_mask spell out, one for all rows (R = 1) or one each; None if all is
        visible."""
        device = self.q_BHLK.device
        index = torch.arange(self.keys, device=device)
        own = index[self.keys - self.queries :, None]
        mask = None
        if self.causal and self.queries > 1:  # a lone query is the last of the keys: it sees them all
            mask = (index <= own)[None]
        elif self.limits is not None:
            mask = (index < self.limits.tensor(device)[:, None])[None]
        if self.key_mask is not None:
            real = self.key_mask[:, None, :] | (index == own)
            mask = real if mask is None else mask & real
        return mask


def _never(call: Call) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """``refuses`` says why it cannot compute a call, ``yields`` why another one should where none is named."""

    run: Callable[[Call], Tensor]
    refuses: Callable[[Call], str | None] = _never
    yields: Callable[[Call], str | None] = _never


def _products(call: Call, dtype: torch.dtype) -> Tensor:
    """Two matrix products and a softmax in float32: nothing to read between the lines."""
    share = call.q_BHLK.shape[1] // call.k_BGNK.shape[1]
    k, v = (x.to(dtype).repeat_interleave(share, dim=1) for x in (call.k_BGNK, call.v_BGNK))
    logits = (call.q_BHLK.to(dtype) * call.scale) @ k.transpose(-2, -1)
    mask = call.visibility()
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    return (logits.softmax(-1, dtype=torch.float32).to(dtype) @ v).to(call.q_BHLK.dtype)


def _reference(call: Call) -> Tensor:
    with torch.autocast(call.q_BHLK.device.type, enabled=False):
        return _products(call, torch.float32)


def _matmul(call: Call) -> Tensor:
    return _products(call, call.q_BHLK.dtype)


def _matmul_yields(call: Call) -> str | None:
    # The backward pass of torch's fused attention takes two to four times as long there (AVX-512 BF16, measured).
    if call.q_BHLK.device.type == "cpu" and call.q_BHLK.dtype != torch.float32 and call.learns:
        return None
    return "torch's fused attention is faster, but for training in low precision on CPUs"


def _sdpa(call: Call) -> Tensor:
    # torch's own causal flag (the fast path) aligns the first query with the first key, and takes no mask.
    fast = call.causal and call.key_mask is None and call.queries == call.keys
    mask = None if fast else call.visibility()
    return F.scaled_dot_product_attention(
        call.q_BHLK,
        call.k_BGNK,
        call.v_BGNK,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=fast,
        scale=call.scale,
        enable_gqa=call.grouped,
    )


MOST_RUNS = 32
"""More calls than that for one attention cost more than the mask that they save."""


def _scales(call: Call) -> Tensor:
    """One fused call without a mask for every run of queries that see as many keys: exact, in fewer operations."""
    assert call.limits is not None
    start, parts = 0, []
    for queries, keys in call.limits.runs:
        parts.append(
            F.scaled_dot_product_attention(
                call.q_BHLK[:, :, start : start + queries],
                call.k_BGNK[:, :, :keys],
                call.v_BGNK[:, :, :keys],
                scale=call.scale,
                enable_gqa=call.grouped,
            )
        )
        start += queries
    return torch.cat(parts, dim=2)


def _scales_refuses(call: Call) -> str | None:
    if call.limits is None:
        return "it computes block-causal attention, and needs limits"
    return None if call.key_mask is None else "it takes no key_mask"


def _scales_yields(call: Call) -> str | None:
    assert call.limits is not None
    many = len(call.limits.runs) > MOST_RUNS
    return f"limits in {len(call.limits.runs)} runs (at most {MOST_RUNS})" if many else None


def _flex(call: Call) -> Tensor:
    """torch's FlexAttention, compiled; visibility is a predicate, and blocks that nothing sees are never read."""
    from torch.nn.attention.flex_attention import create_block_mask

    device, offset = call.q_BHLK.device, call.keys - call.queries
    limits = (call.limits or Limits(((call.queries, call.keys),))).tensor(device)
    key_mask = call.key_mask
    # Lambdas: FlexAttention counts a predicate's arguments, which decorators hide.
    if call.causal:
        seen: Any = lambda row, head, query, key: key <= query + offset  # noqa: E731
    else:
        seen = lambda row, head, query, key: key < limits[query]  # noqa: E731
    real = (
        seen
        if key_mask is None
        else lambda row, head, query, key: seen(row, head, query, key) & (key_mask[row, key] | (key == query + offset))
    )
    rows = None if key_mask is None else len(key_mask)
    mask = create_block_mask(real, rows, None, call.queries, call.keys, device=device.type)
    q, k, v = call.q_BHLK, call.k_BGNK, call.v_BGNK
    return _compiled_flex()(q, k, v, block_mask=mask, scale=call.scale, enable_gqa=call.grouped)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_refuses(call: Call) -> str | None:
    width = call.q_BHLK.shape[-1]
    if call.q_BHLK.device.type == "cpu" and call.learns:
        return "FlexAttention has no backward pass on CPUs"
    if width < 16 or width & (width - 1):
        return f"FlexAttention takes head widths that are powers of two from 16 on, not {width}"
    return None


BACKENDS: dict[str, Backend] = {
    "reference": Backend(_reference),
    "matmul": Backend(_matmul, yields=_matmul_yields),
    "sdpa": Backend(_sdpa),
    "scales": Backend(_scales, refuses=_scales_refuses, yields=_scales_yields),
    "flex": Backend(_flex, refuses=_flex_refuses),
}
"""``reference`` is readable and in float32, whatever the inputs; ``matmul`` is the same in the inputs' precision;
``sdpa`` is torch's fused attention; ``scales`` is one call of it for every scale; ``flex`` is torch's FlexAttention."""
AUTOMATIC = ("matmul", "scales", "sdpa")
"""Those that are chosen where none is named, in the order in which they are asked; the last one computes everything."""
