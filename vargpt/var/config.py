"""Sizes and options of the visual decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VarConfig:
    """A next-scale transformer. The defaults are those of the released VARGPT (VAR, depth 30)."""

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096
    latent_channels: int = 32
    width: int = 1920
    depth: int = 30
    num_heads: int = 30
    mlp_ratio: float = 4.0
    num_classes: int = 1
    """Rows of the class embedding but one: the last row, ``num_classes``, stands for "no condition"."""
    shared_adaln: bool = False
    """One modulation for all blocks plus a learned offset each, instead of a Linear in every block."""
    adaptive: bool = True
    """Whether norms and gates follow the condition (AdaLN). Otherwise each has a scale, a shift and a gate of its own,
    and the condition is only where the first scale starts from."""
    cosine_attention: bool = True
    """Queries and keys normalised to length 1, with a learned temperature per head."""
    drop_path: float = 0.125
    """Drop rate of the last block's residual branches; it grows linearly from 0 at the first."""
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "latent_channels", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio must be above 0, not {self.mlp_ratio}")
        if self.width % self.num_heads:
            raise ValueError(f"width ({self.width}) must be a multiple of num_heads ({self.num_heads})")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), not {self.drop_path}")
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}")
