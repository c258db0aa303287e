"""Layers of the visual decoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vargpt.kernels import KVCache, attention
from vargpt.scales import Limits
from vargpt.var.config import VarConfig

MAX_LOG_SCALE = math.log(100)


def modulate(
    x: Float[Tensor, "B L C"], scale: Float[Tensor, "B 1 C"], shift: Float[Tensor, "B 1 C"], eps: float
) -> Float[Tensor, "B L C"]:
    """LN(x) (1 + scale) + shift: adaptive layer norm (DiT, section 3.2), without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def drop_path(x: Float[Tensor, "B L C"], rate: float, training: bool) -> Float[Tensor, "B L C"]:
    """Stochastic depth: in training, drop a whole row's branch with probability ``rate``."""
    if rate == 0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, 1, device=x.device) >= rate
    return x * keep / (1 - rate)


class Attention(nn.Module):
    """Self-attention; with ``cosine_attention`` q and k have length 1 and each head learns its temperature."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        width, self.num_heads, self.cosine = config.width, config.num_heads, config.cosine_attention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # Keys have no bias: it would shift all logits of a query alike.
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if self.cosine:
            self.log_scale = nn.Parameter(torch.full((config.num_heads,), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x_BLC: Float[Tensor, "B L C"], limits: Limits | None, cache: KVCache | None, layer: int
    ) -> Float[Tensor, "B L C"]:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x_BLC, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "B L (three H K) -> three B H L K", three=3, H=self.num_heads)
        cosine = self.log_scale.clamp(max=MAX_LOG_SCALE).exp() if self.cosine else None
        scale = None if self.cosine else 0.25 / math.sqrt(q.shape[-1])  # a quarter of the usual, as VAR was trained
        y = attention(q, k, v, limits=limits, scale=scale, cosine=cosine, cache=cache, layer=layer)
        return self.proj(rearrange(y, "B H L K -> B L (H K)"))


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, config: VarConfig) -> None:
        super().__init__()
        hidden = round(config.width * config.mlp_ratio)
        self.fc1 = nn.Linear(config.width, hidden)
        self.fc2 = nn.Linear(hidden, config.width)

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (AdaLN).

    The six modulation vectors are gamma1, gamma2 (gates), scale1, scale2, shift1, shift2, from the block's own
    Linear on SiLU(condition), or from the shared one plus this block's offset.
    """

    def __init__(self, config: VarConfig, drop_rate: float) -> None:
        super().__init__()
        self.eps, self.drop_rate = config.norm_eps, drop_rate
        self.attn = Attention(config)
        self.mlp = MLP(config)
        if config.shared_adaln:
            self.ada_offset = nn.Parameter(torch.randn(6, config.width) / config.width**0.5)
        else:
            self.ada = nn.Linear(config.width, 6 * config.width)

    def modulation(
        self, condition: Float[Tensor, "B C"], shared: Float[Tensor, "B six C"] | None
    ) -> Float[Tensor, "six B 1 C"]:
        """The six vectors, from SiLU(condition)."""
        if shared is None:
            return rearrange(self.ada(condition), "B (six C) -> six B 1 C", six=6)
        return rearrange(shared + self.ada_offset, "B six C -> six B 1 C")

    def forward(
        self,
        x: Float[Tensor, "B L C"],
        six: Float[Tensor, "six B 1 C"],
        limits: Limits | None,
        cache: KVCache | None,
        layer: int,
    ) -> Float[Tensor, "B L C"]:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six
        y = self.attn(modulate(x, scale1, shift1, self.eps), limits, cache, layer)
        x = x + drop_path(gamma1 * y, self.drop_rate, self.training)
        y = self.mlp(modulate(x, scale2, shift2, self.eps))
        return x + drop_path(gamma2 * y, self.drop_rate, self.training)
