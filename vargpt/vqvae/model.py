"""The image tokenizer: encoder, multi-scale quantizer, decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vargpt.interfaces import TokenMaps
from vargpt.scales import ScaleSchedule
from vargpt.vqvae.config import VqvaeConfig
from vargpt.vqvae.layers import Decoder, Encoder
from vargpt.vqvae.quantizer import MultiScaleQuantizer


@dataclass(frozen=True, kw_only=True)
class VqvaeOutput:
    """The training forward of the image tokenizer."""

    images: Float[Tensor, "B 3 height width"]
    """Reconstructions, not clamped."""
    loss: Float[Tensor, ""]
    """l1 + l2 + vq + beta commitment."""
    l1: Float[Tensor, ""]
    l2: Float[Tensor, ""]
    vq_loss: Float[Tensor, ""]
    commitment_loss: Float[Tensor, ""]
    indices: tuple[Int[Tensor, "B _"], ...]
    hits_SV: Float[Tensor, "S V"]


class MultiScaleVQVAE(nn.Module):
    """Pictures in [-1, 1] to S index maps, and back. Satisfies ``ImageTokenizer``.

    Example::

        tokens = vqvae.encode(images)             # .indices: one [B, N_s] per scale; .f_hat: [B, Z, h, w]
        images = vqvae.decode(tokens.indices)     # [B, 3, height, width] in [-1, 1]
    """

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = ScaleSchedule(config.patch_nums)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        kernel, channels = config.quant_kernel, config.latent_channels
        self.quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.post_quant_conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.quantizer = MultiScaleQuantizer(config)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def image_size(self) -> int:
        return self.config.image_size

    def latent(self, images: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B Z h w"]:
        """The continuous latent, before quantization.

        Raises:
            ValueError: pictures of a size other than ``image_size``.
        """
        side = self.image_size
        if images.shape[-2:] != (side, side):
            raise ValueError(
                f"this image tokenizer reads {side} x {side} pictures, not {images.shape[-2]} x {images.shape[-1]}: "
                "resize them, or change patch_nums"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Float[Tensor, "B 3 height width"]) -> TokenMaps:
        indices, f_hat = self.quantizer.encode(self.latent(images))
        return TokenMaps(indices=indices, f_hat=f_hat)

    def decode(self, indices: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "B 3 height width"]:
        """Pictures in [-1, 1] of the first scales given; all S of them for the finished picture."""
        f_hat = None
        for scale, index_map in enumerate(indices):
            f_hat = self.add_scale(scale, index_map, f_hat)
        if f_hat is None:
            raise ValueError("decode needs the indices of at least one scale")
        return self.decode_latent(f_hat)

    def decode_latent(self, f_hat: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B 3 height width"]:
        return self.decoder(self.post_quant_conv(f_hat)).clamp(-1, 1)

    def add_scale(
        self, scale: int, indices: Int[Tensor, "B N"], f_hat: Float[Tensor, "B Z h w"] | None
    ) -> Float[Tensor, "B Z h w"]:
        added = self.quantizer.contribution(scale, indices)
        return added if f_hat is None else f_hat + added

    def next_input(self, scale: int, f_hat: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B N Z"]:
        return rearrange(self.quantizer.down(scale, f_hat), "B Z h w -> B (h w) Z")

    def forward(self, images: Float[Tensor, "B 3 height width"], keep: Int[Tensor, " B"] | None = None) -> VqvaeOutput:
        """Reconstruct, with the losses that need no second network (VAR, section 3.3).

        Args:
            keep: how many scales of each picture to reconstruct it from; by default all S. S + 1: from the latent
                before quantization.
        """
        quantized = self.quantizer(self.latent(images), keep)
        reconstruction = self.decoder(self.post_quant_conv(quantized.f_hat))
        l1, l2 = F.l1_loss(reconstruction, images), F.mse_loss(reconstruction, images)
        return VqvaeOutput(
            images=reconstruction,
            loss=l1 + l2 + quantized.vq_loss + self.config.commitment * quantized.commitment_loss,
            l1=l1,
            l2=l2,
            vq_loss=quantized.vq_loss,
            commitment_loss=quantized.commitment_loss,
            indices=quantized.indices,
            hits_SV=quantized.hits_SV,
        )

    def usage(self) -> Float[Tensor, " S"]:
        """Share of the codebook that each scale uses: codes chosen at least 0.08 times as often as the mean one."""
        usage = self.quantizer.usage_SV
        return (usage > 0.08 * usage.mean(1, keepdim=True)).float().mean(1)
