"""Sizes and options of the image tokenizer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VqvaeConfig:
    """A multi-scale VQVAE. The defaults are those of the released tokenizer (VAR's, 256 px)."""

    patch_nums: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    vocab_size: int = 4096
    latent_channels: int = 32
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Width of each resolution over ``channels``; every further entry halves the resolution once."""
    res_blocks: int = 2
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    attention: bool = True
    """Self-attention at the lowest resolution; the middle of both networks always has it."""
    norm_groups: int = 32
    local: bool = False
    """Latents of their own pixels alone: no attention, norms of every position by itself, and an encoder whose kernels
    do not overlap (1x1, and 2x2 of stride 2). Otherwise every token depends on the whole picture, and another object
    changes them all. The decoder still looks around, by its 3x3 convolutions."""
    num_phi: int = 4
    """Convolutions phi shared among the scales; 0 adds the upsampled codes as they are."""
    phi_ratio: float = 0.5
    """phi(h) = (1 - ratio) h + ratio conv(h)."""
    quant_kernel: int = 3
    """Kernel of the convolutions before and after quantization."""
    commitment: float = 0.25
    """Weight beta of the commitment loss."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "latent_channels", "channels", "res_blocks", "norm_groups", "quant_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"channel_multipliers must be one or more, all above 0, not {self.channel_multipliers}")
        for multiplier in self.channel_multipliers:
            if not self.local and self.channels * multiplier % self.norm_groups:
                raise ValueError(
                    f"{self.channels} x {multiplier} channels do not split into norm_groups = {self.norm_groups}"
                )

    @property
    def downsampling(self) -> int:
        """Pixels per latent position, along a side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """Side of the pictures, in pixels."""
        return self.patch_nums[-1] * self.downsampling
