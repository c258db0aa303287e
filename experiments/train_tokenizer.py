"""Train an image tokenizer: ``python -m experiments.train_tokenizer [NAME] [key=value ...] [--out DIR]``.

NAME is a file of ``experiments/configs/tokenizer``. The folder (by default ``runs/tokenizer-NAME``) gets the state, the
metrics, sample pictures and, at the end, ``model/``, which ``vargpt.load`` reads. The same command resumes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from experiments.adversary import Adversary, AdversaryConfig, PerceptualConfig, PerceptualLoss
from experiments.data.images import PictureData, PictureSource, picture_source
from experiments.run import Ema, Run, Schedule, described, grid, step_generator, training_command
from vargpt.checkpoint import save
from vargpt.config import VargptConfig
from vargpt.model import VARGPT
from vargpt.vqvae import MultiScaleVQVAE, VqvaeConfig


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codebook is kept alive."""

    update: Literal["gradient", "ema"] = "gradient"
    """Codes follow the VQ loss, or the running mean of the residuals that chose them."""
    ema_decay: float = 0.99
    start: float = 0.0
    """Share of the training that comes before quantization; the codes then start as residuals of that time."""
    restart_every: int = 50
    """Every so many steps, codes that are hardly used move to residuals of the current batch; 0: never."""
    restart_until: float = 0.7
    """Share of the training after which codes stay where they are."""
    restart_below: float = 0.05
    """A code is hardly used where no scale chooses it for this share of its mean use."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTraining:
    """One training of an image tokenizer."""

    vqvae: VqvaeConfig
    data: PictureData
    schedule: Schedule
    batch: int = 16
    seed: int = 0
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    codebook: CodebookConfig = CodebookConfig()
    reconstruction: float = 1.0
    """Weight of l1 + l2. The commitment loss pulls latents towards what a few coarse codes can say; where that costs
    fine detail (round corners), this pulls back."""
    coarse: float = 0.0
    """Share of the pictures that are reconstructed from their first few scales only, so that each prefix of scales
    says as much of the picture as it can."""
    perceptual: PerceptualConfig | None = None
    adversary: AdversaryConfig | None = None
    save_every: int = 250
    evaluate_every: int = 500
    validation: int = 256


class TokenizerTrainer:
    """Everything that changes while an image tokenizer trains."""

    def __init__(self, config: TokenizerTraining, source: PictureSource, device: torch.device) -> None:
        self.config, self.source, self.device = config, source, device
        torch.manual_seed(config.seed)
        self.model = MultiScaleVQVAE(config.vqvae).to(device).train()
        self.ema = Ema(self.model, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.schedule.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.codes = CodeUse(self.model, config.codebook).to(device)
        self.perceptual = PerceptualLoss(config.perceptual).to(device) if config.perceptual else None
        self.adversary = Adversary(config.adversary).to(device) if config.adversary else None

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | Ema]:
        parts: dict[str, nn.Module | torch.optim.Optimizer | Ema] = {
            "model": self.model, "ema": self.ema, "optimizer": self.optimizer, "codes": self.codes,
        }  # fmt: skip
        if self.adversary is not None:
            parts |= {"adversary": self.adversary, "adversary_optimizer": self.adversary.optimizer}
        return parts

    def step(self, step: int) -> Mapping[str, float]:
        c = self.config
        torch.manual_seed(c.seed * 1_000_003 + step)
        images = self.source.training(c.seed, step, c.batch).to(self.device)
        lr = c.schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if step < c.codebook.start * c.schedule.steps:
            out = self.model(images, torch.full((len(images),), len(self.model.schedule) + 1, device=self.device))
            loss = out.l1 + out.l2
        else:
            out = self.model(images, self._keep(len(images), step))
            loss = out.loss + (c.reconstruction - 1) * (out.l1 + out.l2)
        scalars = {"l1": out.l1, "l2": out.l2, "vq": out.vq_loss, "commitment": out.commitment_loss}
        if c.codebook.update == "ema":
            loss = loss - out.vq_loss + out.vq_loss.detach()
        if self.perceptual is not None:
            perceptual = self.perceptual(out.images, images)
            scalars["perceptual"] = perceptual
            loss = loss + perceptual
        if self.adversary is not None:
            last = self.model.decoder.conv_out.weight
            adversarial = self.adversary.generator_loss(out.images, out.l1 + out.l2, last, step)
            scalars["adversarial"] = adversarial
            loss = loss + adversarial
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        scalars["gradient"] = nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        self.optimizer.step()
        self.ema.update(self.model, step)
        if self.adversary is not None:
            scalars["discriminator"] = self.adversary.learn(images, out.images.detach(), step, lr)
        restarting = step < c.codebook.restart_until * c.schedule.steps
        if step + 1 == round(c.codebook.start * c.schedule.steps):
            self.codes.hits_SV.zero_()
        self.codes.update(images, out.hits_SV, step, self.optimizer if restarting else None)
        return {"loss": loss.item(), "lr": lr} | {name: value.item() for name, value in scalars.items()}

    def _keep(self, pictures: int, step: int) -> Int[Tensor, " B"] | None:
        """How many scales each picture is reconstructed from."""
        if self.config.coarse == 0:
            return None
        scales, random = len(self.model.schedule), step_generator(self.config.seed, step, stream=1)
        short = torch.rand(pictures, generator=random) < self.config.coarse
        prefix = torch.randint(1, scales + 1, (pictures,), generator=random)
        return torch.where(short, prefix, scales).to(self.device)

    def averaged(self) -> MultiScaleVQVAE:
        """The tokenizer with the running mean of its weights, for use."""
        model = MultiScaleVQVAE(self.config.vqvae).to(self.device)
        model.load_state_dict(self.model.state_dict())
        self.ema.copy_to(model)
        return model.eval()


class CodeUse(nn.Module):
    """How often each scale chooses each code, and what is done about codes that are hardly chosen.

    A code serves all scales, but the 1x1 scale has 1 position where the last has hundreds: by counts alone the coarse
    scales would be left with the few codes that the fine ones have no use for. So each scale's choices count alike,
    and codes that restart become residuals of the scales that use the fewest.
    """

    def __init__(self, model: MultiScaleVQVAE, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self._model = [model]  # in a list: its tensors are saved elsewhere
        codes = model.quantizer.codebook.weight
        self.register_buffer("hits_SV", torch.ones(len(model.schedule), codes.shape[0]))
        self.register_buffer("sum_VZ", codes.detach().clone())

    hits_SV: Tensor
    sum_VZ: Tensor

    @torch.no_grad()
    def update(
        self,
        images: Float[Tensor, "B 3 height width"],
        hits_SV: Float[Tensor, "S V"],
        step: int,
        restart: torch.optim.Optimizer | None,
    ) -> None:
        """Count, follow the residuals (``ema``), and restart codes whose optimizer state is then forgotten."""
        c, codebook = self.config, self._model[0].quantizer.codebook.weight
        due = restart is not None and c.restart_every > 0 and (step + 1) % c.restart_every == 0
        residuals = self._residuals(images) if due or c.update == "ema" else []
        self.hits_SV.lerp_(hits_SV, 1 - c.ema_decay)
        if c.update == "ema":
            vectors, chosen = torch.cat([z for z, _ in residuals]), torch.cat([i for _, i in residuals])
            sums = torch.zeros_like(self.sum_VZ).index_add_(0, chosen, vectors)
            self.sum_VZ.lerp_(sums, 1 - c.ema_decay)
            codebook.copy_(self.sum_VZ / self.hits_SV.sum(0).clamp(min=1e-3)[:, None])
        if not due or restart is None:
            return
        share_SV = self.hits_SV / self.hits_SV.sum(1, keepdim=True).clamp(min=1e-8)
        dead = (share_SV.amax(0) <= c.restart_below / len(codebook)).nonzero()[:, 0]
        if not len(dead):
            return
        unused_S = 1 - (share_SV > c.restart_below / len(codebook)).float().mean(1)
        scales = torch.multinomial(unused_S.clamp(min=1e-3), len(dead), replacement=True).tolist()
        rows = [residuals[s][0] for s in scales]
        fresh = torch.stack([z[int(torch.randint(len(z), ()))] for z in rows])
        codebook[dead] = fresh + 0.01 * fresh.std() * torch.randn_like(fresh)
        self.hits_SV[:, dead] = self.hits_SV.mean(1, keepdim=True)
        self.sum_VZ[dead] = codebook[dead] * self.hits_SV.sum(0)[dead, None]
        for value in restart.state[codebook].values():
            if value.shape == codebook.shape:
                value[dead] = 0

    def _residuals(self, images: Tensor) -> list[tuple[Float[Tensor, "N Z"], Int[Tensor, " N"]]]:
        """What each scale has to quantize, as rows, and the codes it chooses."""
        model = self._model[0]
        quantizer, residual, rows = model.quantizer, model.latent(images), []
        for scale in range(len(model.schedule)):
            z = quantizer.down(scale, residual)
            indices = quantizer.nearest(z)
            rows.append((z.permute(0, 2, 3, 1).flatten(0, 2), indices.flatten()))
            residual = residual - quantizer.contribution(scale, indices)
        return rows


@dataclass(frozen=True, kw_only=True)
class TokenizerScore:
    """How well an image tokenizer does on pictures it has not seen."""

    psnr: list[float]
    """Peak signal-to-noise ratio in dB, of the reconstruction from the first 1, 2, ..., S scales."""
    codes: list[int]
    """Codes in use at each scale."""
    reachable: list[int]
    """Most codes that each scale could use on these pictures: the codebook, or as many as there are positions."""
    reconstructions: list[Float[Tensor, "B 3 height width"]]
    """One batch per prefix of scales."""


@torch.no_grad()
def score(model: MultiScaleVQVAE, images: Float[Tensor, "B 3 height width"], batch: int = 64) -> TokenizerScore:
    """Reconstruct pictures from every prefix of their scales."""
    scales = len(model.schedule)
    maps: list[list[Tensor]] = [[] for _ in range(scales)]
    prefixes: list[list[Tensor]] = [[] for _ in range(scales)]
    for some in images.split(batch):
        f_hat = None
        for scale, indices in enumerate(model.encode(some).indices):
            f_hat = model.add_scale(scale, indices, f_hat)
            maps[scale].append(indices)
            prefixes[scale].append(model.decode_latent(f_hat))
    reconstructions = [torch.cat(p) for p in prefixes]
    errors = [F.mse_loss((r + 1) / 2, (images + 1) / 2, reduction="none").mean((1, 2, 3)) for r in reconstructions]
    return TokenizerScore(
        psnr=[float((-10 * e.clamp(min=1e-10).log10()).mean()) for e in errors],
        codes=[len(torch.cat(m).unique()) for m in maps],
        reachable=[min(model.vocab_size, len(images) * n) for n in model.schedule.lengths],
        reconstructions=reconstructions,
    )


def train(config: TokenizerTraining, folder: Path, device: torch.device) -> MultiScaleVQVAE:
    """Train, or resume, in a folder; returns the averaged tokenizer, also saved as ``model/``.

    Raises:
        ValueError: data that cannot be read, or a folder of another run.
    """
    source = picture_source(config.data, config.vqvae.image_size)
    trainer = TokenizerTrainer(config, source, device)
    run = Run(folder, described(config), trainer.parts())
    validation = source.validation(config.validation).to(device)

    def evaluate() -> None:
        model = trainer.averaged()
        result = score(model, validation)
        used = [a / b for a, b in zip(result.codes, result.reachable, strict=True)]
        run.log({"psnr_after_scale": result.psnr, "codes_used_at_scale": used, **source.judge(result.reconstructions)})
        columns = [validation[:16], *(r[:16] for r in result.reconstructions)]
        run.picture("prefixes", grid([image for row in columns for image in row], columns=16, scale=2))

    run.train(
        config.schedule.steps,
        trainer.step,
        evaluate,
        batch=config.batch,
        save_every=config.save_every,
        evaluate_every=config.evaluate_every,
    )
    model = trainer.averaged()
    save_tokenizer(model, folder / "model")
    return model


def save_tokenizer(model: MultiScaleVQVAE, folder: Path) -> None:
    """Write a model of one part, which ``vargpt.load`` reads."""
    save(VARGPT(vqvae=model, config=VargptConfig(vqvae=model.config)), folder)


def main(arguments: list[str] | None = None) -> int:
    return training_command(arguments, __doc__, "tokenizer", TokenizerTraining, "runs/tokenizer-", train)


if __name__ == "__main__":
    sys.exit(main())
