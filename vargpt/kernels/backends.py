"""Ways to compute attention: what each can do, and when it is the one to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vargpt.kernels import cuda
from vargpt.kernels.call import Call
from vargpt.scales import Limits


def _never(call: Call) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """``refuses`` says why it cannot compute a call, ``yields`` why another one should where none is named.

    One that ``fuses`` rotates, caches and normalises by itself; the others are given calls that are prepared.
    """

    run: Callable[[Call], Tensor]
    refuses: Callable[[Call], str | None] = _never
    yields: Callable[[Call], str | None] = _never
    fuses: bool = False


def _products(call: Call, dtype: torch.dtype) -> Tensor:
    """Two matrix products and a softmax in float32: nothing to read between the lines."""
    share = call.q_BHLK.shape[1] // call.k_BGMK.shape[1]
    k, v = (x.to(dtype).repeat_interleave(share, dim=1) for x in (call.k_BGMK, call.v_BGMK))
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
        call.k_BGMK,
        call.v_BGMK,
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
                call.k_BGMK[:, :, :keys],
                call.v_BGMK[:, :, :keys],
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
    q, k, v = call.q_BHLK, call.k_BGMK, call.v_BGMK
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
    "cuda": Backend(cuda.attend, refuses=cuda.refuses, fuses=True),
}
"""``reference`` is readable and in float32, whatever the inputs; ``matmul`` is the same in the inputs' precision;
``sdpa`` is torch's fused attention; ``scales`` is one call of it for every scale; ``flex`` is torch's FlexAttention;
``cuda`` is this project's own kernels."""
AUTOMATIC = ("cuda", "matmul", "scales", "sdpa")
"""Those that are chosen where none is named, in the order in which they are asked; the last one computes everything."""
