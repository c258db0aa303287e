"""Multi-scale residual quantization (VAR, algorithms 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from vargpt.scales import ScaleSchedule
from vargpt.vqvae.config import VqvaeConfig


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized latent, for training."""

    f_hat: Float[Tensor, "B Z h w"]
    """The sum of the scales that are kept; its gradient goes straight through to the latent that was quantized."""
    indices: tuple[Int[Tensor, "B _"], ...]
    vq_loss: Float[Tensor, ""]
    """Moves the codes (and phi) towards the latent; mean over the scales."""
    commitment_loss: Float[Tensor, ""]
    """Moves the latent towards the codes; mean over the scales, not yet weighted by beta."""
    hits_SV: Float[Tensor, "S V"]
    """How often each code was chosen at each scale, in this batch."""


class MultiScaleQuantizer(nn.Module):
    """Represents a latent as a sum of upsampled code maps, from 1x1 to full size.

    Each scale quantizes what the earlier ones left over: the residual is area-averaged to the scale's size, its
    nearest codes are looked up, upsampled (bicubic) and smoothed by a convolution phi, and subtracted.
    """

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        self.schedule = schedule = ScaleSchedule(config.patch_nums)
        self.phi_ratio = config.phi_ratio
        self.codebook = nn.Embedding(config.vocab_size, config.latent_channels)
        channels = config.latent_channels
        self.phi = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(config.num_phi))
        self._phi_of_scale = [phi_index(config.num_phi, schedule.position(s)) for s in range(len(schedule))]
        # Running share of each code, as published checkpoints carry it; refreshed by the training forward.
        self.register_buffer("usage_SV", torch.zeros(len(schedule), config.vocab_size))
        nn.init.uniform_(self.codebook.weight, -1 / config.vocab_size, 1 / config.vocab_size)

    usage_SV: Tensor

    def nearest(self, z_BZhw: Float[Tensor, "B Z h w"]) -> Int[Tensor, "B N"]:
        """The code with the smallest squared distance to each position."""
        z = rearrange(z_BZhw, "B Z h w -> (B h w) Z")
        codes = self.codebook.weight
        distance = z.square().sum(1, keepdim=True) + codes.square().sum(1)
        distance = torch.addmm(distance, z, codes.T, alpha=-2)
        return rearrange(distance.argmin(1), "(B N) -> B N", B=z_BZhw.shape[0])

    def contribution(self, scale: int, indices: Int[Tensor, "B N"]) -> Float[Tensor, "B Z h w"]:
        """What the codes of one scale add to the latent."""
        side, full = self.schedule.patch_nums[scale], self.schedule.latent_side
        h = rearrange(self.codebook(indices), "B (h w) Z -> B Z h w", h=side)
        if scale < len(self.schedule) - 1:
            h = F.interpolate(h, size=(full, full), mode="bicubic")
        if not self.phi:
            return h
        phi = self.phi[self._phi_of_scale[scale]]
        return (1 - self.phi_ratio) * h + self.phi_ratio * phi(h)

    def down(self, scale: int, f: Float[Tensor, "B Z h w"]) -> Float[Tensor, "B Z p p"]:
        """A latent area-averaged to a scale's size."""
        side = self.schedule.patch_nums[scale]
        return f if scale == len(self.schedule) - 1 else F.interpolate(f, size=(side, side), mode="area")

    def forward(self, f: Float[Tensor, "B Z h w"], keep: Int[Tensor, " B"] | None = None) -> Quantized:
        """Quantize with the losses of training.

        Gradients of ``vq_loss`` reach the codes, those of ``commitment_loss`` the latent.

        Args:
            keep: how many scales of each picture ``f_hat`` sums up, from the first; by default all S. Pictures decoded
                from a prefix teach the coarse scales to carry the picture; S + 1 stands for the latent itself, not
                quantized. The losses always run over all scales.
        """
        target, f_hat = f.detach(), torch.zeros_like(f)
        residual, kept = target, f_hat
        vq_loss, commitment_loss = f.new_zeros(()), f.new_zeros(())
        index_maps, hits = [], []
        for scale in range(len(self.schedule)):
            indices = self.nearest(self.down(scale, residual))
            added = self.contribution(scale, indices)
            residual, f_hat = residual - added.detach(), f_hat + added
            kept = f_hat if keep is None else torch.where((scale < keep)[:, None, None, None], f_hat, kept)
            vq_loss = vq_loss + F.mse_loss(f_hat, target)
            commitment_loss = commitment_loss + F.mse_loss(f_hat.detach(), f)
            index_maps.append(indices)
            hits.append(torch.bincount(indices.flatten(), minlength=self.codebook.num_embeddings).float())
        if keep is not None:
            kept = torch.where((keep > len(self.schedule))[:, None, None, None], target, kept)
        hits_SV = torch.stack(hits)
        if self.training:
            self.usage_SV.lerp_(hits_SV.to(self.usage_SV.dtype), 0.01 if self.usage_SV.any() else 1.0)
        scales = len(self.schedule)
        return Quantized(
            f_hat=f + (kept - f).detach(),
            indices=tuple(index_maps),
            vq_loss=vq_loss / scales,
            commitment_loss=commitment_loss / scales,
            hits_SV=hits_SV,
        )

    def encode(self, f: Float[Tensor, "B Z h w"]) -> tuple[tuple[Int[Tensor, "B _"], ...], Float[Tensor, "B Z h w"]]:
        """Index maps of every scale, and the latent they add up to."""
        residual, f_hat, index_maps = f, torch.zeros_like(f), []
        for scale in range(len(self.schedule)):
            indices = self.nearest(self.down(scale, residual))
            added = self.contribution(scale, indices)
            residual, f_hat = residual - added, f_hat + added
            index_maps.append(indices)
        return tuple(index_maps), f_hat


def phi_index(num_phi: int, position: float) -> int:
    """Which phi a scale at ``position`` (s / (S - 1)) uses: the nearest of evenly spread ticks."""
    if num_phi == 0:
        return 0
    # numpy's linspace to the last bit: ties between two ticks are broken by its rounding in the published code.
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    return int(np.argmin(np.abs(np.linspace(edge, 1 - edge, num_phi) - position)))
