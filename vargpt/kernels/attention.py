"""One attention for every part, behind one signature.

Visibility has one definition: a query row sees the first ``limit`` keys. Plain causal attention, block-causal
attention over scales and full attention are three choices of the limits; padding takes single keys away.

Which backend computes it is chosen for every call, unless an argument, :func:`using` or the environment variable
``VARGPT_ATTENTION`` names one; :func:`watching` tells which one ran, and why others did not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vargpt.kernels.backends import AUTOMATIC, BACKENDS, Backend
from vargpt.kernels.cache import KVCache
from vargpt.kernels.call import Call
from vargpt.scales import Limits


@dataclass(frozen=True)
class Choice:
    """Which backend computed a call, and why each of those asked before it did not."""

    backend: str
    refused: dict[str, str]


_named: str | None = os.environ.get("VARGPT_ATTENTION") or None
_watched: list[Choice] | None = None


def attention(
    q_BHLK: Float[Tensor, "B H L K"],
    k_BGMK: Float[Tensor, "B G M K"],
    v_BGMK: Float[Tensor, "B G M K"],
    *,
    causal: bool = False,
    limits: Limits | None = None,
    key_mask: Bool[Tensor, "B N"] | None = None,
    scale: float | None = None,
    cosine: Float[Tensor, " H"] | None = None,
    rotary: tuple[Float[Tensor, "R 1 L K"], Float[Tensor, "R 1 L K"]] | None = None,
    cache: KVCache | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> Float[Tensor, "B H L K"]:
    """softmax(scale q k^T) v over the keys that each query sees.

    Args:
        q_BHLK, k_BGMK, v_BGMK: H query heads share G key heads (H a multiple of G); the L queries are the
            last L of the N keys.
        causal: query i sees the first N - L + i + 1 keys.
        limits: how many of the first keys each query sees, its own at least. Neither: every query sees every key.
        key_mask: false at keys that are padding. A query always sees its own key, so that a row of padding
            stays finite; nothing real ever reads it.
        scale: defaults to 1 / sqrt(K).
        cosine: instead of ``scale``: queries and keys are brought to length 1, and each head's logits are multiplied
            by its number (Swin v2, section 3.2).
        rotary: cosines and sines of the angles by which queries and new keys, as many, are turned first.
        cache: the M keys and values given are new ones of its ``layer``: they are appended, and all N so far are
            attended to. Without a cache, N = M.
        backend: one of ``BACKENDS``; by default the one that suits.

    Raises:
        ValueError: shapes or arguments that contradict each other, or a backend that is unknown or cannot do this.
    """
    if causal and limits is not None:
        raise ValueError("causal=True and limits both say what a query sees: give one of them")
    if scale is not None and cosine is not None:
        raise ValueError("scale and cosine both say what logits are multiplied by: give one of them")
    if q_BHLK.shape[1] % k_BGMK.shape[1]:
        raise ValueError(f"{q_BHLK.shape[1]} query heads cannot share {k_BGMK.shape[1]} key heads evenly")
    q, k, v, device = q_BHLK, k_BGMK, v_BGMK, q_BHLK.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    if scale is None:
        scale = 1.0 if cosine is not None else 1 / math.sqrt(q.shape[-1])
    call = Call(q, k, v, causal, limits, key_mask, scale, cosine, rotary, cache, layer)
    call.check()
    choice = choose(call, backend)
    if _watched is not None:
        _watched.append(choice)
    chosen = BACKENDS[choice.backend]
    return chosen.run(call if chosen.fuses else call.prepared())


def choose(call: Call, backend: str | None = None) -> Choice:
    """The backend that is named, or else the first of ``AUTOMATIC`` that suits.

    Raises:
        ValueError: a backend that is unknown, or cannot compute this call.
    """
    named = backend or _named
    if named is not None:
        if (reason := known(named).refuses(call)) is not None:
            raise ValueError(f"attention backend {named!r} cannot compute this: {reason}")
        return Choice(named, {})
    refused = {}
    for name in AUTOMATIC:
        reason = BACKENDS[name].refuses(call) or BACKENDS[name].yields(call)
        if reason is None:
            return Choice(name, refused)
        refused[name] = reason
    raise AssertionError("the last automatic backend computes everything")


def known(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}: use one of {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Every call inside is computed by this backend, unless it names another.

    It holds for the process, not for a thread: on GPUs, the backward pass has threads of its own. What it computes
    again (activation checkpointing) must have the backend of its forward pass, so both belong into the same block.

    Raises:
        ValueError: an unknown backend.
    """
    global _named
    known(backend)
    before, _named = _named, backend
    try:
        yield
    finally:
        _named = before


@contextmanager
def watching() -> Iterator[list[Choice]]:
    """The choices of all calls inside, in this process, in order."""
    global _watched
    before, _watched = _watched, (choices := [])
    try:
        yield choices
    finally:
        _watched = before
