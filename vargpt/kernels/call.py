"""One call of attention, and what is done to queries and keys before they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from vargpt.kernels.cache import KVCache
from vargpt.scales import Limits


@dataclass(frozen=True, eq=False)
class Call:
    """One call, as it was asked for: see :func:`attention`.

    Backends that fuse read everything here themselves. All others are given the call :meth:`prepared`, in which
    ``k_BGMK`` and ``v_BGMK`` are all N keys and values, and ``cosine``, ``rotary`` and ``cache`` are None.
    """

    q_BHLK: Float[Tensor, "B H L K"]
    k_BGMK: Float[Tensor, "B G M K"]
    v_BGMK: Float[Tensor, "B G M K"]
    causal: bool
    limits: Limits | None
    key_mask: Bool[Tensor, "B _"] | None
    scale: float
    cosine: Float[Tensor, " H"] | None = None
    rotary: tuple[Float[Tensor, "R 1 L K"], Float[Tensor, "R 1 L K"]] | None = None
    cache: KVCache | None = None
    layer: int = 0

    @property
    def queries(self) -> int:
        return self.q_BHLK.shape[2]

    @property
    def keys(self) -> int:
        """All of them, N, cached ones included."""
        return self.k_BGMK.shape[2] + (0 if self.cache is None else self.cache.length)

    @property
    def grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.q_BHLK.shape[1] != self.k_BGMK.shape[1]

    @property
    def learns(self) -> bool:
        """Whether a backward pass will come."""
        inputs = (self.q_BHLK, self.k_BGMK, self.v_BGMK, self.cosine)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def check(self) -> None:
        """Raises ValueError where arguments do not fit each other: backends need not look, and all refuse the same."""
        (batch, heads, _, width), (_, groups, new, _) = self.q_BHLK.shape, self.k_BGMK.shape
        fits("k_BGMK", self.k_BGMK, batch, groups, new, width)
        fits("v_BGMK", self.v_BGMK, batch, groups, new, width)
        if self.cache is not None:
            stored, _ = self.cache.with_room(self.layer, new)
            fits("the cache", stored, batch, groups, self.cache.capacity, width)
        if self.queries > self.keys:
            raise ValueError(f"{self.queries} queries cannot be the last of {self.keys} keys")
        fits("key_mask", self.key_mask, batch, self.keys)
        fits("cosine", self.cosine, heads)
        if self.rotary is not None and new != self.queries:
            raise ValueError(f"the angles of {self.queries} queries cannot be those of {new} new keys")
        for name, angles in zip(("cosines", "sines"), self.rotary or (), strict=False):
            fits(name, angles, 1 if len(angles) == 1 else batch, 1, self.queries, width)
        if self.limits is None:
            return
        if self.limits.queries != self.queries:
            raise ValueError(f"limits of {self.limits.queries} queries do not fit {self.queries} queries")
        own = self.keys - self.queries
        for queries, keys in self.limits.runs:
            own += queries
            if not own <= keys <= self.keys:
                raise ValueError(f"a query that is key {own} of {self.keys} cannot see the first {keys}")

    def prepared(self) -> Call:
        """The same as nothing but products of queries and all keys."""
        return self.rotated().cached().normalised()

    def rotated(self) -> Call:
        """Queries and new keys turned by their angles."""
        if self.rotary is None:
            return self
        q, k = (rotate(x, *self.rotary).to(self.v_BGMK.dtype) for x in (self.q_BHLK, self.k_BGMK))
        return replace(self, q_BHLK=q, k_BGMK=k, rotary=None)

    def cached(self) -> Call:
        """New keys and values appended to the cache, and those before them read from it."""
        if self.cache is None:
            return self
        k, v = self.cache.append(self.layer, self.k_BGMK, self.v_BGMK)
        return replace(self, k_BGMK=k.to(self.k_BGMK.dtype), v_BGMK=v.to(self.v_BGMK.dtype), cache=None)

    def normalised(self) -> Call:
        """Queries and keys of length 1, the queries times their head's number. Comes last: a cache holds keys as they
        are, so that fused and other backends can take turns."""
        if self.cosine is None:
            return self
        q, k = F.normalize(self.q_BHLK, dim=-1) * self.cosine[:, None, None], F.normalize(self.k_BGMK, dim=-1)
        dtype = self.v_BGMK.dtype
        return replace(self, q_BHLK=q.to(dtype), k_BGMK=k.to(dtype), cosine=None)

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


def fits(name: str, x: Tensor | None, *shape: int) -> None:
    """Raises ValueError where there is a tensor of another shape."""
    if x is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {list(x.shape)}, and must have {list(shape)}")


def rotate(
    x_BHTK: Float[Tensor, "B H T K"], cos: Float[Tensor, "R 1 T K"], sin: Float[Tensor, "R 1 T K"]
) -> Float[Tensor, "B H T K"]:
    """Turn channel i and channel i + K/2 by their angle (the half-split layout of the published weights)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat((-second, first), dim=-1) * sin
