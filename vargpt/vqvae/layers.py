"""The convolutional encoder and decoder of the image tokenizer (VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vargpt.kernels import attention
from vargpt.vqvae.config import VqvaeConfig

# Submodules keep VQGAN's names (block, norm1, nin_shortcut, ...), which every public checkpoint of the family uses.


class ChannelNorm(nn.LayerNorm):
    """Normalises the channels of every position by themselves, so that no position learns of another."""

    def forward(self, input: Float[Tensor, "B A h w"]) -> Float[Tensor, "B A h w"]:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _norm(channels: int, groups: int) -> nn.Module:
    """Group norm; with 0 groups :class:`ChannelNorm`."""
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else ChannelNorm(channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised convolutions with a residual."""

    def __init__(self, inner: int, outer: int, groups: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm1 = _norm(inner, groups)
        self.conv1 = nn.Conv2d(inner, outer, kernel, padding=kernel // 2)
        self.norm2 = _norm(outer, groups)
        self.conv2 = nn.Conv2d(outer, outer, kernel, padding=kernel // 2)
        self.nin_shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Float[Tensor, "B A h w"]) -> Float[Tensor, "B E h w"]:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class AttnBlock(nn.Module):
    """Single-head self-attention over positions, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "B A h w"]) -> Float[Tensor, "B A h w"]:
        q, k, v = rearrange(self.qkv(self.norm(x)), "B (three A) h w -> three B 1 (h w) A", three=3)
        y = rearrange(attention(q, k, v), "B 1 (h w) A -> B A h w", h=x.shape[2])
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Half the resolution; the padding of a kernel of 3 is on the right and below only, one of 2 needs none."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, stride=2)
        self.padding = kernel - 2

    def forward(self, x: Float[Tensor, "B A h w"]) -> Float[Tensor, "B A h2 w2"]:
        return self.conv(F.pad(x, (0, self.padding, 0, self.padding)))


class Upsample(nn.Module):
    """Twice the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "B A h w"]) -> Float[Tensor, "B A h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, with an optional change of resolution at their end."""

    def __init__(
        self,
        widths: list[int],
        groups: int,
        *,
        attend: bool,
        kernel: int = 3,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, groups, kernel) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(b, groups) if attend else nn.Identity() for b in widths[1:])
        self.downsample = downsample or nn.Identity()
        self.upsample = upsample or nn.Identity()

    def forward(self, x: Float[Tensor, "B A h w"]) -> Float[Tensor, "B E h2 w2"]:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, attend: bool, kernel: int = 3) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups, kernel)
        self.attn_1 = AttnBlock(channels, groups) if attend else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups, kernel)

    def forward(self, x: Float[Tensor, "B A h w"]) -> Float[Tensor, "B A h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pictures to latents, one resolution after the other."""

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        groups, last = 0 if config.local else config.norm_groups, len(widths) - 1
        kernel = 1 if config.local else 3
        self.conv_in = nn.Conv2d(3, config.channels, kernel, padding=kernel // 2)
        levels, inner = [], config.channels
        for i, width in enumerate(widths):
            attend = config.attention and not config.local and i == last
            down = Downsample(width, 2 if config.local else 3) if i < last else None
            levels.append(
                Level([inner] + [width] * config.res_blocks, groups, attend=attend, kernel=kernel, downsample=down)
            )
            inner = width
        self.down = nn.ModuleList(levels)
        self.mid = Middle(inner, groups, attend=not config.local, kernel=kernel)
        self.norm_out = _norm(inner, groups)
        self.conv_out = nn.Conv2d(inner, config.latent_channels, kernel, padding=kernel // 2)

    def forward(self, x: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B Z h w"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents to pictures; its levels are numbered from the highest resolution, as the encoder's."""

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        groups, last = 0 if config.local else config.norm_groups, len(widths) - 1
        inner = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, inner, 3, padding=1)
        self.mid = Middle(inner, groups, attend=not config.local)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            attend = config.attention and not config.local and i == last
            up = Upsample(width) if i > 0 else None
            levels.append(Level([inner] + [width] * (config.res_blocks + 1), groups, attend=attend, upsample=up))
            inner = width
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(inner, groups)
        self.conv_out = nn.Conv2d(inner, 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 height width"]:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
