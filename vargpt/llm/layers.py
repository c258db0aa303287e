"""Layers of the language model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vargpt.kernels import KVCache, attention
from vargpt.llm.config import LlamaConfig


def rope_frequencies(config: LlamaConfig, positions: Int[Tensor, "R T"]) -> Float[Tensor, " half"]:
    """Angle per position of every pair of channels, in radians (RoFormer, section 3.4.2).

    Args:
        positions: of the new tokens; only ``dynamic`` scaling depends on them, on the longest row.
    """
    scaling, theta = config.rope_scaling, config.rope_theta
    if scaling is not None and scaling.kind == "dynamic":
        longest = max(int(positions.max()) + 1, scaling.original_positions)
        stretch = scaling.factor * longest / scaling.original_positions - (scaling.factor - 1)
        theta *= stretch ** (config.head_dim / (config.head_dim - 2))
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # llama3: wavelengths that fit the original context often enough stay, those longer than it are stretched.
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, blend.clamp(0, 1))


def rotations(
    frequencies: Float[Tensor, " half"], positions: Int[Tensor, "R T"], dtype: torch.dtype
) -> tuple[Float[Tensor, "R 1 T K"], Float[Tensor, "R 1 T K"]]:
    """Cosines and sines for ``attention``'s ``rotary``, computed in float32; R is B, or 1 where all rows agree."""
    angles = positions[:, None, :, None].float() * frequencies.to(positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        width, head_dim = config.width, config.head_dim
        self.q = nn.Linear(width, config.num_heads * head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(width, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(width, config.num_kv_heads * head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.num_heads * head_dim, width, bias=config.out_bias)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        cos: Float[Tensor, "R 1 T K"],
        sin: Float[Tensor, "R 1 T K"],
        key_mask: Bool[Tensor, "B M"] | None,
        cache: KVCache | None,
        layer: int,
    ) -> Float[Tensor, "B T D"]:
        q = rearrange(self.q(x_BTD), "B T (H K) -> B H T K", H=self.num_heads)
        k = rearrange(self.k(x_BTD), "B T (H K) -> B H T K", H=self.num_kv_heads)
        v = rearrange(self.v(x_BTD), "B T (H K) -> B H T K", H=self.num_kv_heads)
        y = attention(q, k, v, causal=True, key_mask=key_mask, rotary=(cos, sin), cache=cache, layer=layer)
        return self.out(rearrange(y, "B H T K -> B T (H K)"))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up = nn.Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down = nn.Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with its residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        cos: Float[Tensor, "R 1 T K"],
        sin: Float[Tensor, "R 1 T K"],
        key_mask: Bool[Tensor, "B M"] | None,
        cache: KVCache | None,
        layer: int,
    ) -> Float[Tensor, "B T D"]:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), cos, sin, key_mask, cache, layer)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))
