"""Sizes and options of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those trained on.

    ``linear`` divides every frequency by ``factor`` (position interpolation); ``dynamic`` raises the base once a
    row is longer than ``original_positions`` (NTK-aware); ``llama3`` divides the low frequencies, keeps the high
    ones and blends between (Llama 3.1).

    With ``dynamic`` alone, a token's rotation depends on the longest row it is read with. Beyond the trained positions
    cached and batched results therefore differ from uncached and single ones, here as in the published library.
    """

    kind: Literal["linear", "dynamic", "llama3"]
    factor: float
    original_positions: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "dynamic", "llama3"):
            raise ValueError(f"rope scaling kind must be 'linear', 'dynamic' or 'llama3', not {self.kind!r}")
        if self.factor < 1:
            raise ValueError(f"rope scaling factor must be at least 1, not {self.factor}")
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})"
            )


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """A LLaMA-style decoder. The defaults are those of LLaMA-2-7B / Vicuna-7B with VARGPT's vocabulary."""

    vocab_size: int = 32064
    width: int = 4096
    depth: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_width: int = 11008
    max_positions: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "depth", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
