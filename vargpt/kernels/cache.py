"""A preallocated key-value cache."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KVCache:
    """Keys and values of every layer, in buffers allocated once for the longest row.

    A forward pass calls :meth:`append` in each of its layers, then :meth:`advance` once. Keys are rotated, but have any
    length, with cosine attention too, so that all backends read the same ones.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity = length
        self.length = 0
        shape = (layers, batch, heads, length, head_dim)
        self._keys = torch.empty(shape, device=device, dtype=dtype)
        self._values = torch.empty(shape, device=device, dtype=dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._keys.dtype

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow back through what it holds."""
        return self._keys.requires_grad or self._values.requires_grad

    def append(
        self, layer: int, k_BHTK: Float[Tensor, "B H T K"], v_BHTK: Float[Tensor, "B H T K"]
    ) -> tuple[Float[Tensor, "B H M K"], Float[Tensor, "B H M K"]]:
        """Store one layer's new keys and values; returns views of all of them so far."""
        end = self.length + k_BHTK.shape[2]
        keys, values = self.with_room(layer, k_BHTK.shape[2])
        keys[:, :, self.length : end] = k_BHTK
        values[:, :, self.length : end] = v_BHTK
        return keys[:, :, :end], values[:, :, :end]

    def with_room(self, layer: int, tokens: int) -> tuple[Float[Tensor, "B H C K"], Float[Tensor, "B H C K"]]:
        """One layer's whole buffers, for kernels that store this many new keys and values by themselves."""
        end = self.length + tokens
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens; token {end} does not fit: make a longer cache")
        return self._keys[layer], self._values[layer]

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has now appended."""
        self.length += tokens

    def select(self, rows: Int[Tensor, " R"]) -> KVCache:
        """A copy whose row i is row ``rows[i]``, with the same capacity."""
        new = object.__new__(KVCache)
        new.capacity, new.length = self.capacity, self.length
        new._keys, new._values = self._keys[:, rows], self._values[:, rows]
        return new
