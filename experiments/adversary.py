"""Optional losses of image-tokenizer training: perceptual distance and a patch discriminator (VQGAN, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """A torchvision network whose features are compared."""

    network: str
    """As ``torchvision.models.get_model`` takes it, for example "vgg16"."""
    weights: str
    """A torchvision weights name such as "DEFAULT", which may read the network, or a file of a state dict."""
    layers: tuple[str, ...]
    """Nodes to compare, for example features.3, features.8, features.15."""
    weight: float = 1.0


class PerceptualLoss(nn.Module):
    """Squared distance of unit-length features, as in LPIPS but without its learned weights."""

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        from pathlib import Path

        import torchvision
        from torchvision.models.feature_extraction import create_feature_extractor

        local = Path(config.weights).is_file()
        try:
            network = torchvision.models.get_model(config.network, weights=None if local else config.weights)
            if local:
                network.load_state_dict(torch.load(config.weights, weights_only=True))
            self._features = create_feature_extractor(network.eval(), list(config.layers)).requires_grad_(False)
        except (ValueError, KeyError, RuntimeError, OSError) as error:
            raise ValueError(f"perceptual network {config.network!r}: {str(error).splitlines()[0]}") from None
        self.weight = config.weight
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    mean: Tensor
    std: Tensor

    def forward(self, ours: Float[Tensor, "B 3 h w"], theirs: Float[Tensor, "B 3 h w"]) -> Float[Tensor, ""]:
        a, b = (self._features(((x + 1) / 2 - self.mean) / self.std) for x in (ours, theirs))
        distances = [(F.normalize(a[name], dim=1) - F.normalize(b[name], dim=1)).square().sum(1).mean() for name in a]
        return self.weight * torch.stack(distances).sum()


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """A patch discriminator."""

    start: int
    """Step at which the tokenizer begins to feel it; it learns from the first step on."""
    channels: int = 64
    layers: int = 3
    weight: float = 0.8
    """Its share, on top of the adaptive weight that makes both gradients equally long at the last layer."""


class Adversary(nn.Module):
    """Tells patches of real pictures from reconstructed ones (PatchGAN, hinge loss)."""

    def __init__(self, config: AdversaryConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        inner = config.channels
        for i in range(1, config.layers + 1):
            outer, stride = min(config.channels * 2**i, config.channels * 8), 2 if i < config.layers else 1
            layers += [nn.Conv2d(inner, outer, 4, stride, 1), nn.GroupNorm(8, outer), nn.LeakyReLU(0.2)]
            inner = outer
        self.network = nn.Sequential(*layers, nn.Conv2d(inner, 1, 4, 1, 1))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.5, 0.9))

    def generator_loss(
        self, images: Float[Tensor, "B 3 h w"], reconstruction: Float[Tensor, ""], last: Tensor, step: int
    ) -> Float[Tensor, ""]:
        """How much the pictures look reconstructed, weighted so that its gradient at the ``last`` layer's weight is as
        long as that of the reconstruction loss."""
        if step < self.config.start:
            return images.new_zeros(())
        loss = -self.network(images).mean()
        (ours,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (theirs,) = torch.autograd.grad(loss, last, retain_graph=True)
        adaptive = (ours.norm() / (theirs.norm() + 1e-4)).clamp(max=1e4).detach()
        return self.config.weight * adaptive * loss

    def learn(
        self, real: Float[Tensor, "B 3 h w"], fake: Float[Tensor, "B 3 h w"], step: int, lr: float
    ) -> Float[Tensor, ""]:
        """One step of the discriminator; returns its hinge loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = 0.5 * (F.relu(1 - self.network(real)).mean() + F.relu(1 + self.network(fake)).mean())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
