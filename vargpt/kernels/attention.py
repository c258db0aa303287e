"""One attention for every part, behind one signature.

Visibility has one definition: a query row sees the first ``limit`` keys. Plain causal attention, block-causal
attention over scales and full attention are three choices of the limits; padding takes single keys away.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Backend = Literal["reference", "sdpa"]


def attention(
    q_BHLK: Float[Tensor, "B H L K"],
    k_BGMK: Float[Tensor, "B G M K"],
    v_BGMK: Float[Tensor, "B G M K"],
    *,
    causal: bool = False,
    limits: Int[Tensor, " L"] | None = None,
    key_mask: Bool[Tensor, "B M"] | None = None,
    scale: float | None = None,
    backend: Backend = "sdpa",
) -> Float[Tensor, "B H L K"]:
    """softmax(scale q k^T) v over the keys that each query sees.

    Args:
        q_BHLK, k_BGMK, v_BGMK: H query heads share G key heads (H a multiple of G); the L queries are the
            last L of the M keys.
        causal: query i sees the first M - L + i + 1 keys.
        limits: query i sees the first ``limits[i]`` keys. Neither: every query sees every key.
        key_mask: false at keys that are padding. A query always sees its own key, so that a row of padding
            stays finite; nothing real ever reads it.
        scale: defaults to 1 / sqrt(K).
        backend: ``reference`` is readable and computes in float32; ``sdpa`` is torch's fused attention.
    """
    if causal and limits is not None:
        raise ValueError("causal=True and limits both say what a query sees: give one of them")
    if q_BHLK.shape[1] % k_BGMK.shape[1]:
        raise ValueError(f"{q_BHLK.shape[1]} query heads cannot share {k_BGMK.shape[1]} key heads evenly")
    if q_BHLK.shape[2] > k_BGMK.shape[2]:
        raise ValueError(f"{q_BHLK.shape[2]} queries cannot be the last of {k_BGMK.shape[2]} keys")
    if scale is None:
        scale = 1 / math.sqrt(q_BHLK.shape[-1])
    if backend == "reference":
        mask = visibility(q_BHLK.shape[2], k_BGMK.shape[2], q_BHLK.device, causal, limits, key_mask)
        return _reference(q_BHLK, k_BGMK, v_BGMK, mask, scale)
    if backend == "sdpa":
        return _sdpa(q_BHLK, k_BGMK, v_BGMK, causal, limits, key_mask, scale)
    raise ValueError(f"unknown attention backend {backend!r}: use 'reference' or 'sdpa'")


def visibility(
    queries: int,
    keys: int,
    device: torch.device,
    causal: bool,
    limits: Int[Tensor, " L"] | None,
    key_mask: Bool[Tensor, "B M"] | None,
) -> Bool[Tensor, "R L M"] | None:
    """The mask that the rule above spells out, one for all rows (R = 1) or one each; None if all is visible."""
    index = torch.arange(keys, device=device)
    own = index[keys - queries :, None]
    if causal:
        limits = own[:, 0] + 1
    mask = None if limits is None else (index < limits[:, None])[None]
    if key_mask is not None:
        real = key_mask[:, None, :] | (index == own)
        mask = real if mask is None else mask & real
    return mask


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    logits = (q.float() @ k.float().transpose(-2, -1)) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], float("-inf"))
    return (logits.softmax(-1) @ v.float()).to(q.dtype)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, limits: Tensor | None, key_mask: Tensor | None, scale: float
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    causal = causal and queries > 1  # a lone query is the last of the keys: it sees them all
    # torch's own causal flag (the fast path) aligns the first query with the first key, and takes no mask.
    fast = causal and key_mask is None and queries == keys
    mask = None if fast else visibility(queries, keys, q.device, causal, limits, key_mask)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask[:, None],
        is_causal=fast,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
